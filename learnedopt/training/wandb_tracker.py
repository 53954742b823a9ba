"""W&B as a view of a meta-training: offline unless asked otherwise, and never in the training's way.

Look at an offline run with ``wandb leet FOLDER`` in the terminal; ``wandb sync FOLDER`` uploads it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from learnedopt.core.files import plain_json
from learnedopt.training import wandb_files
from learnedopt.training.tracker import Metrics
from learnedopt.training.wandb_variables import Mode, identity, in_sweep, resolve_mode, said

logger: logging.Logger = logging.getLogger(__name__)

_STEP = "meta_step"
_CHART_ROWS, _CHART_POINTS = 10_000, 250
"""Where W&B cuts a chart's table off, and how many of them a curve has at most, evenly spaced: these are 40 curves."""


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
        project: where W&B files the run; None for what WANDB_PROJECT says, else "learnedopt".
        entity: the user or team; here and below None (no tags) leaves it to W&B and its variable.
        group: which runs it stands beside.
        job_type: what kind of run it is, such as "train".
        name: what W&B calls it.
        tags: words to find it by.
        notes: a longer description.
        dir: the run's folder; everything, artifacts in waiting included, goes to ``dir/wandb``.
        run_id: identity of a run to go on with, from an earlier tracker's ``run_id``; None makes a new one. Keep it in
            the checkpoint. Offline each start writes a fragment of its own, whose rows count on, and which ``wandb
            sync`` joins by this id. A trial of a sweep has the id that ``wandb agent`` gave it: see ``identity``.
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
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        dir: Path = Path("."),
        run_id: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
        self.mode: Mode = resolve_mode(mode)
        self.dir: Path = Path(dir).absolute()
        self.run_id: str = identity(run_id)
        self._about = {"group": group, "job_type": job_type, "name": name, "tags": [*tags] or None, "notes": notes}
        if not in_sweep():  # which has a place of its own, and an id for each trial
            place = {"project": said(project, "WANDB_PROJECT", "learnedopt"), "entity": entity, "id": self.run_id}
            self._about |= place
        self._timeout = timeout
        self._run: Any = None
        self._pid: int | None = None  # the process that may log; None before start, -1 after the end
        self._owns_service = False
        self._failed = ""  # what W&B did not do
        self._environment: list[str] = []  # variables set for the length of the run
        self._step = 0
        self._first_row: int | None = None  # W&B's own count at the next row; None where it goes on by itself
        self._curves: dict[str, dict[int, list[float]]] = {}  # by name, by meta-step: what the charts show
        self._last_curve: dict[str, tuple[int, list[float]]] = {}

    @property
    def _data(self) -> Path:  # of this run alone, so that what it does not need can be told
        return self.dir / "wandb" / f"data-{self.run_id}"

    @property
    def active(self) -> bool:
        """Whether calls from this process reach W&B: between ``start`` and ``finish``, while nothing has failed."""
        return self._pid == os.getpid()

    def start(self, config: dict[str, Any]) -> None:
        """Open the run with the configuration; with the id of an earlier run, go on with that one."""
        if self.mode == "disabled" or self._pid is not None or os.environ.get("RANK", "0") != "0":
            return
        if os.environ.get("WANDB_RUN_ID", self.run_id) != self.run_id:
            logger.warning("WANDB_RUN_ID is not taken: the run keeps its own id %s, by which it goes on.", self.run_id)
        self._pid = os.getpid()
        self._owns_service = "WANDB_SERVICE" not in os.environ
        # Before wandb is imported: offline it would still look its telemetry host up, and wait for a dead network;
        # and it would keep artifacts that wait for their upload under the home folder.
        self._set_environment("WANDB_DATA_DIR", str(self._data))
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

    def lines(self, name: str, lines: Mapping[str, Sequence[float]], xname: str) -> None:
        """Log a chart of several lines, such as the losses of a learned optimizer and of others, by their labels."""
        if self.active and lines:
            self._call(f"logging the chart {name}", lambda: self._lines(name, lines, xname, self._step))

    def use(self, label: str, name: str, paths: list[Path], about: dict[str, Any]) -> None:
        """Record that this run reads the files which another run has logged as the artifact ``name``.

        Online W&B links the two: files that are the same are the same version, whoever logs them. Offline it refuses
        to; so the configuration tells it in both modes, as ``used/<label>``: ``about``, the name, and W&B's own digest
        of the version, by which it is found again.
        """
        if self.active:
            self._call(f"recording the use of {name}", lambda: self._use(label, name, paths, plain_json(about)))

    def finish(self, exit_code: int = 0) -> None:
        """Write everything out (online: wait for the upload) and end W&B's service process, if it is this run's own."""
        if self._failed and self.mode == "online":  # the first report may have scrolled away
            logger.warning("W&B has not heard all of this run, and will not: it failed while %s.", self._failed)
        if self.active:
            self._call("finishing", lambda: self._finish(exit_code))
        if self.active:  # nothing failed
            self._end()
        self._failed = ""

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
        # W&B's own step must grow by each call, also where a resumed training repeats some: the meta-step is a metric.
        run.define_metric(_STEP)
        run.define_metric("*", step_metric=_STEP)
        if self.mode == "offline":  # online W&B counts on by itself
            found = wandb_files.fragments(self.dir / "wandb", self.run_id)
            earlier = [path for path in found if path.parent != Path(run.dir).parent]
            self._first_row = 1 + max(map(wandb_files.last_step, earlier), default=-1)

    def _log(self, metrics: Metrics, curves: dict[str, list[float]], step: int) -> None:
        for name in curves.keys() - self._curves.keys():
            self._run.define_metric(name, step_metric=_STEP, summary="none")  # not a second copy of each curve
        plain = {
            name: value if isinstance(value, str) else float(cast(float, value))
            for name, value in metrics.items()
            if name not in curves
        }
        values: dict[str, Any] = {**plain, **curves}
        self._row(values, step)
        for name, curve in curves.items():
            if not curve:  # nothing to draw
                continue
            shown = self._curves.setdefault(name, {})
            self._last_curve[name] = step, curve
            if not shown or step >= 2 * max(shown):
                self._chart(name)

    def _chart(self, name: str) -> None:
        step, curve = self._last_curve[name]
        shown = self._curves[name]
        shown[step] = curve
        self._lines(f"{name}_curves", {f"meta-step {at}": values for at, values in shown.items()}, "inner step", step)

    def _lines(self, name: str, lines: Mapping[str, Sequence[float]], xname: str, step: int) -> None:
        import wandb

        most = min(_CHART_POINTS, _CHART_ROWS // len(lines))
        xs = [range(0, len(values), -(-len(values) // most) or 1) for values in lines.values()]
        ys = [[values[k] for k in at] for values, at in zip(lines.values(), xs, strict=True)]
        title = name.replace("_", " ")
        chart = wandb.plot.line_series(xs=[[*at] for at in xs], ys=ys, keys=[*lines], title=title, xname=xname)
        self._row({name: chart}, step)

    def _row(self, values: dict[str, Any], step: int) -> None:
        self._run.log({**values, _STEP: step}, step=self._first_row, commit=True)
        self._first_row = None

    def _figure(self, name: str, path: Path) -> None:
        import wandb

        self._row({name: wandb.Image(str(path))}, self._step)

    def _artifact(self, name: str, paths: list[Path], metadata: dict[str, Any]) -> None:
        # Its wait() needs a server, and so would fail offline.
        self._run.log_artifact(wandb_files.version(name, paths, metadata))

    def _use(self, label: str, name: str, paths: list[Path], about: dict[str, Any]) -> None:
        version = wandb_files.version(name, paths, {}, policy="immutable")
        told = {**about, "artifact": version.name, "digest": version.digest}
        self._run.config.update({f"used/{label}": told}, allow_val_change=True)
        if self.mode == "online":
            self._run.use_artifact(version)

    def _finish(self, exit_code: int) -> None:
        import wandb

        for name, (step, _) in self._last_curve.items():
            if step not in self._curves[name]:
                self._chart(name)
        self._run.finish(exit_code=exit_code)
        if self._owns_service and wandb.setup().most_recent_active_run is None:
            wandb.teardown()  # the service would live on until the interpreter ends
        if "WANDB_DATA_DIR" in self._environment:  # else others may keep theirs there
            staging, own = self._data / "artifacts" / "staging", Path(self._run.dir).parent / f"run-{self.run_id}.wandb"
            wandb_files.remove_unneeded(staging, wandb_files.fragments(self.dir / "wandb", self.run_id), own)

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
        self._failed = doing
        logger.warning(
            "W&B failed while %s: %s: %s. The training goes on without it; other trackers are not affected. What W&B "
            "had written is in %s. Mode 'offline' needs no network, and 'disabled' leaves W&B out.",
            doing, type(error).__name__, str(error).rstrip("."), self.dir / "wandb",
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
