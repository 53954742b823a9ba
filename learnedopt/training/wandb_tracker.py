"""W&B as a view of a meta-training: offline unless asked otherwise, and never in the training's way.

Look at an offline run with ``wandb leet FOLDER`` in the terminal; ``wandb sync FOLDER`` uploads it.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from learnedopt.core.files import plain_json
from learnedopt.training.tracker import Metrics

logger = logging.getLogger(__name__)

Mode: TypeAlias = Literal["online", "offline", "disabled"]
_MODES: dict[str, Mode] = {
    "online": "online", "offline": "offline", "disabled": "disabled", "run": "online", "dryrun": "offline",
}  # fmt: skip
_STEP = "meta_step"
_CHART_POINTS = (
    250  # of each curve, evenly spaced: W&B cuts a chart's table off at 10,000 rows, and these are 40 curves
)


def resolve_mode(mode: str | None, environ: Mapping[str, str] = os.environ) -> Mode:
    """Return what the user said, else what ``WANDB_MODE`` says, else ``"offline"``.

    W&B itself would let a mode given in the call override its variable, and without any of them ask for an account.

    Raises:
        ValueError: neither online, offline nor disabled (nor W&B's old words for them, run and dryrun).
    """
    source, said = ("mode", mode) if mode is not None else ("WANDB_MODE", environ.get("WANDB_MODE") or "offline")
    if said not in _MODES:
        raise ValueError(f"{source}={said!r} is not a W&B mode that works here; use 'online', 'offline' or 'disabled'")
    return _MODES[said]


class WandbTracker:
    """Shows a run in W&B: configuration, metrics against the meta-step, curves, figures, theta as a versioned artifact.

    A failure of W&B (no network, a wrong key, a full disk, a folder that cannot be written, a service that was killed
    or does not answer) is reported once by ``logging``; from then on every call does nothing. Each call to W&B runs in
    a thread of its own and is waited for, so a W&B that hangs holds the training up once: for ``timeout`` seconds, and
    for at most ten more in which it is shut down.

    A curve (a list) is kept as it is under its name at each step; and at steps that double, a chart ``<name>_curves``
    of the curves at those steps is logged. Once more at the end, with the last.

    Only rank 0 logs (the variable ``RANK``), and only the process that called ``start``: a forked child would write
    into its parent's run.

    Args:
        mode: ``"online"``, ``"offline"``, ``"disabled"``, or None for what ``resolve_mode`` finds.
        project: where W&B files the run.
        group: which runs it stands beside; None leaves it to W&B.
        job_type: what kind of run it is, such as "train"; None leaves it to W&B.
        name: what W&B calls it; None leaves it to W&B.
        dir: the run's folder; everything, artifacts in waiting included, goes to ``dir/wandb``.
        run_id: identity of a run to go on with, from an earlier tracker's ``run_id``; None makes a new one. Keep it in
            the checkpoint. Offline each start writes a fragment of its own, which ``wandb sync`` joins by this id.
        timeout: seconds that one call may take; an upload that ``finish`` waits for included.

    Raises:
        ValueError: the mode is unknown, or the timeout not positive.

    Example: ``WandbTracker("offline", project="learnedopt", group="lstm-mnist", job_type="train", dir=run_folder)``.
    A trainer that is told to stop by SIGTERM calls ``finish(exit_code=143)``: W&B alone would lose the run's end.
    """

    def __init__(
        self,
        mode: Mode | None = None,
        *,
        project: str = "learnedopt",
        group: str | None = None,
        job_type: str | None = None,
        name: str | None = None,
        dir: Path = Path("."),
        run_id: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
        self.mode: Mode = resolve_mode(mode)
        self.dir = Path(dir).absolute()
        self.run_id = run_id if run_id is not None else uuid.uuid4().hex[:8]
        self._about = {"project": project, "group": group, "job_type": job_type, "name": name, "id": self.run_id}
        self._timeout = timeout
        self._run: Any = None
        self._pid: int | None = None  # the process that may log; None before start, -1 after the end
        self._owns_service = False
        self._environment: list[str] = []  # variables set for the length of the run
        self._step = 0
        self._curves: dict[str, dict[int, list[float]]] = {}  # by name, by meta-step: what the charts show
        self._last_curve: dict[str, tuple[int, list[float]]] = {}

    @property
    def active(self) -> bool:
        """Whether calls from this process reach W&B: between ``start`` and ``finish``, while nothing has failed."""
        return self._pid == os.getpid()

    def start(self, config: dict[str, Any]) -> None:
        """Open the run with the configuration; with the id of an earlier run, go on with that one."""
        if self.mode == "disabled" or self._pid is not None or os.environ.get("RANK", "0") != "0":
            return
        self._pid = os.getpid()
        self._owns_service = "WANDB_SERVICE" not in os.environ
        # Before wandb is imported: offline it would still look its telemetry host up, and wait for a dead network;
        # and it would keep artifacts that wait for their upload under the home folder.
        self._set_environment("WANDB_DATA_DIR", str(self.dir / "wandb"))
        if self.mode == "offline":
            self._set_environment("WANDB_ERROR_REPORTING", "false")
        self._call("starting", lambda: self._open(plain_json(config)))

    def log(self, metrics: Metrics, step: int) -> None:
        """Log the metrics with the meta-step as their x-axis."""
        if not self.active:
            return
        self._step = step
        curves = {name: list(value) for name, value in metrics.items() if isinstance(value, list)}
        self._call(f"logging meta-step {step}", lambda: self._log(metrics, curves, step))

    def figure(self, name: str, path: Path) -> None:
        """Log a copy of the PNG file."""
        if self.active:
            self._call(f"logging the figure {path}", lambda: self._figure(name, Path(path)))

    def artifact(self, name: str, paths: list[Path], metadata: dict[str, Any]) -> None:
        """Log a copy of the files as a new version of the artifact ``name`` of type "model".

        Characters that W&B does not allow in ``name`` become ``-``. W&B counts files that have not changed as the same
        version.
        """
        if self.active:
            self._call(f"logging the artifact {name}", lambda: self._artifact(name, paths, plain_json(metadata)))

    def finish(self, exit_code: int = 0) -> None:
        """Write everything out (online: wait for the upload) and end W&B's service process, if it is this run's own."""
        if self.active:
            self._call("finishing", lambda: self._finish(exit_code))
        if self.active:  # nothing failed
            self._end()

    # What runs in the thread of a call.

    def _open(self, config: dict[str, Any]) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        import wandb

        # Printed lines are not captured, since the capture would break with W&B; and W&B's own timeout tells more.
        settings: dict[str, Any] = {"console": "off", "quiet": True, "init_timeout": self._timeout / 2}
        if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:
            settings["x_transaction_log_flush_interval"] = 1.0  # by default a kill loses the last 15 seconds
        run = wandb.init(
            **cast("dict[str, Any]", self._about), mode=self.mode, dir=str(self.dir), config=config, resume="allow",
            reinit="create_new", settings=wandb.Settings(**settings),
        )  # fmt: skip
        if not self.active:  # given up while W&B was still starting
            run.finish(exit_code=1)
            return
        self._run = run
        if not Path(run.dir).resolve().is_relative_to(self.dir.resolve()):
            raise OSError(f"{self.dir} cannot be written, W&B went to {run.dir} instead; give a folder that can")
        # W&B's own step must grow by each call and starts again in an offline resume: the meta-step is a metric.
        run.define_metric(_STEP)
        run.define_metric("*", step_metric=_STEP)

    def _log(self, metrics: Metrics, curves: dict[str, list[float]], step: int) -> None:
        for name in curves.keys() - self._curves.keys():
            self._run.define_metric(name, step_metric=_STEP, summary="none")  # not a second copy of each curve
        plain = {
            name: value if isinstance(value, str) else float(cast(float, value))
            for name, value in metrics.items()
            if name not in curves
        }
        values: dict[str, Any] = {**plain, **curves}
        self._run.log({**values, _STEP: step})
        for name, curve in curves.items():
            if not curve:  # nothing to draw
                continue
            shown = self._curves.setdefault(name, {})
            self._last_curve[name] = step, curve
            if not shown or step >= 2 * max(shown):
                self._chart(name)

    def _chart(self, name: str) -> None:
        import wandb

        step, curve = self._last_curve[name]
        shown = self._curves[name]
        shown[step] = curve
        inner_steps = [range(0, len(values), -(-len(values) // _CHART_POINTS) or 1) for values in shown.values()]
        chart = wandb.plot.line_series(
            xs=[list(at) for at in inner_steps],
            ys=[[values[k] for k in at] for values, at in zip(shown.values(), inner_steps, strict=True)],
            keys=[f"meta-step {at}" for at in shown],
            title=name,
            xname="inner step",
        )
        self._run.log({f"{name}_curves": chart, _STEP: step})

    def _figure(self, name: str, path: Path) -> None:
        import wandb

        self._run.log({name: wandb.Image(str(path)), _STEP: self._step})

    def _artifact(self, name: str, paths: list[Path], metadata: dict[str, Any]) -> None:
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name, flags=re.ASCII), "model", metadata=metadata)
        for path in paths:
            artifact.add_file(str(path), name=Path(path).name)
        self._run.log_artifact(artifact)  # its wait() needs a server, and so would fail offline

    def _finish(self, exit_code: int) -> None:
        import wandb

        for name, (step, _) in self._last_curve.items():
            if step not in self._curves[name]:
                self._chart(name)
        self._run.finish(exit_code=exit_code)
        if self._owns_service and wandb.setup().most_recent_active_run is None:
            wandb.teardown()  # the service would live on until the interpreter ends

    def _abandon(self) -> None:
        import wandb

        in_use = "WANDB_SERVICE" in os.environ and wandb.setup().most_recent_active_run not in (None, self._run)
        if self._owns_service and not in_use:
            # Takes back wandb's exit hook too, which would wait for a service that does not answer, and the settings
            # that failed, which would be those of the next run.
            wandb.teardown(exit_code=1)

    # Keeping W&B's troubles away from the training.

    def _call(self, doing: str, action: Callable[[], None]) -> None:
        """Run ``action`` in a thread and wait; on an exception or after the timeout, report and give W&B up."""
        error = _in_thread(action, self._timeout)
        if error is None:
            return
        self._end()
        logger.warning(
            "W&B failed while %s: %s: %s. The training goes on without it; other trackers are not affected. What W&B "
            "had written is in %s. Mode 'offline' needs no network, and 'disabled' leaves W&B out.",
            doing, type(error).__name__, error, self.dir / "wandb",
        )  # fmt: skip
        # A service that is gone or stuck makes these fail or hang too, which adds nothing to what has been reported.
        steps = [self._abandon]
        if self._run is not None and not isinstance(error, ConnectionError | TimeoutError):
            steps.insert(0, lambda: self._run.finish(exit_code=1))
        for step in steps:
            if (again := _in_thread(step, min(self._timeout, 5.0))) is not None:
                logger.debug("W&B could not be shut down either: %s: %s", type(again).__name__, again)

    def _set_environment(self, variable: str, value: str) -> None:
        if variable not in os.environ:  # the user's own choice stands
            os.environ[variable] = value
            self._environment.append(variable)

    def _end(self) -> None:
        """Make every later call do nothing, and take the environment variables back."""
        self._pid = -1
        while self._environment:
            os.environ.pop(self._environment.pop(), None)


def _in_thread(action: Callable[[], None], timeout: float) -> BaseException | None:
    """Run ``action`` in a daemon thread, which never keeps the interpreter from ending; return what went wrong."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - returned; wandb raises SystemExit when its service ends badly
            errors.append(error)

    thread = threading.Thread(target=body, name="wandb-call", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        return TimeoutError(f"no answer within {timeout:g} seconds")
    return errors[0] if errors else None
