"""Real ``train_meta.py`` processes for ``soak.py``: small trainings, started, watched, and compared at their ends."""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil
import safetensors.torch
import torch

from learnedopt import cli
from learnedopt.training.json_tracker import read_metrics

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300.0
"""Seconds after which a process that should have ended, or come somewhere, is taken to hang."""
TIMES = ("step_ms", "compile_seconds")
"""Metrics that no second run repeats."""
_IMPORTED = (
    "torch._dynamo", "jsonargparse", "matplotlib.figure", "matplotlib.backends.backend_agg", "learnedopt.run",
    "learnedopt.tasks.registry", "learnedopt.optimizers.registry", "learnedopt.inner_objectives.registry",
    "learnedopt.evaluation.plots", "learnedopt.execution.memory", "learnedopt.recipes.recipe",
)  # fmt: skip
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--max-restarts", "3", "--nproc-per-node")
# What the process is given before it becomes the training: how SIGHUP is handled (whoever starts the soak may ignore
# it), the largest file that it may write, and its terminal.
_LAUNCH = """
import os, resource, signal, sys
limit, terminal = map(int, sys.argv[1:3])
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if terminal:
    import fcntl, termios
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)
if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


class Training(NamedTuple):
    """A recipe with the settings that make it small; ``data``: it reads LEARNEDOPT_DATA."""

    recipe: str
    settings: tuple[str, ...]
    data: bool = False
    compiled: bool = False


_TINY = ("num_meta_steps=60", "num_tasks=2", "checkpoint_every=2", "meta.lr=0.01")
_HELD_OUT = ("validation.num_tasks=3", "validation.num_steps=4", "validation.every=7")
_QUADRATIC = (*_TINY, *_HELD_OUT, "family.dim=3", "estimator.num_steps=2", "rule.hidden_size=3")
_IMAGES = ("family.batch_size=4", "family.hidden=[3]")
TRAININGS = {
    "LSTM, truncated": Training("lstm-quadratic", (*_QUADRATIC, "estimator.horizon=6")),
    "learned start, truncated": Training(
        "lstm-quadratic",
        (
            *_TINY, *_HELD_OUT, "family.dim=3", "estimator.num_steps=2", "estimator.horizon=6", "rule=learned-init",
            'rule.rule={"name": "lstm", "options": {"hidden_size": 3}}',
        ),
    ),
    "bootstrapped target": Training(
        "lstm-quadratic",
        (
            *_QUADRATIC, "estimator.horizon=12", "objective=BootstrappedTarget", "objective.num_target_steps=3",
            "objective.step_size=0.01",
        ),
    ),
    "evolution strategies": Training(
        "lstm-quadratic",
        (
            *_QUADRATIC, "estimator=EvolutionStrategies", "estimator.horizon=6", "estimator.num_pairs=3",
            "estimator.sigma=0.01",
        ),
    ),
    "persistent evolution strategies": Training(
        "pes-quadratic", (*_QUADRATIC, "estimator.horizon=6", "estimator.num_pairs=4", "estimator.sigma=0.01")
    ),
    "MAML, unrolled": Training("maml-sine", (*_TINY, *_HELD_OUT, "estimator.num_steps=2", "execution.compile=false")),
    "implicit": Training("imaml-regression", (*_TINY, *_HELD_OUT, "checkpoint_every=1")),
    "LSTM on images": Training(
        "lstm-mnist",
        (*_TINY, *_HELD_OUT, *_IMAGES, "estimator.num_steps=2", "estimator.horizon=6", "rule.hidden_size=3"),
        data=True,
    ),
    "MAML, compiled": Training(
        "maml-sine", (*_TINY, *_HELD_OUT, "estimator.num_steps=2", "execution.compile=true"), compiled=True
    ),
}  # fmt: skip


class Process(Protocol):
    """What is asked of a training: of ``subprocess.Popen`` and of a ``Forked`` alike."""

    pid: int
    returncode: int | Any

    def poll(self) -> int | None:
        """Return its exit code, minus a signal's number where that ended it; None while it runs."""
        ...

    def send_signal(self, sig: int) -> None:
        """Send it a signal."""
        ...


class Forked:
    """The command line ``train_meta.py *arguments`` in a fork of this process, whose imports it need not repeat."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], output: int) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.environ.clear()
            os.environ.update(environment)
            for handle in (1, 2):
                os.dup2(output, handle)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            code = cli.main(["train", *arguments])
        except BaseException:  # noqa: BLE001 - the end of a process, which says so as any other would
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)  # what is open here is the parent's to close

    def poll(self) -> int | None:
        """See ``Process``."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """See ``Process``."""
        if self.poll() is None:
            os.kill(self.pid, sig)


def import_all() -> None:
    """Import what a training imports, for those that are forked: it takes most of the time of a short one."""
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # objects that a child need not look through


@contextmanager
def started(
    training: Training,
    runs: Path,
    *,
    wandb: str = "disabled",
    environment: Mapping[str, str] | None = None,
    file_limit: int = 0,
    terminal: int | None = None,
    ranks: int = 1,
    fork: bool = False,
) -> Iterator[Process]:
    """Start the training in a process of its own; what is left of it and its children at the end is killed.

    Args:
        training: which one; its run's folder is ``runs/run``, and what it says goes to ``runs/said.txt``.
        runs: the folder of runs, and by default its home.
        wandb: the mode.
        environment: variables beside those of this process.
        file_limit: bytes that a file may have, 0 for no limit.
        terminal: the handle of a terminal to be started in, and to write to.
        ranks: more than one are launched by ``torchrun``, which starts all again where one ends.
        fork: fork this process, without any of the three before, instead of starting Python anew.
    """
    runs.mkdir(parents=True, exist_ok=True)
    sets = [word for setting in training.settings for word in ("--set", setting)]
    arguments = [training.recipe, "--runs", str(runs), "--name", "run", "--wandb", wandb, *sets]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    own = {"HOME": str(runs), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
    given = map(str, (file_limit, int(terminal is not None)))
    launcher = [*_TORCHRUN, str(ranks)] if ranks > 1 else []
    call = [sys.executable, "-c", _LAUNCH, *given, *launcher, str(ROOT / "train_meta.py"), *arguments]
    # A file, not a pipe: a stopped service of W&B would keep a pipe open.
    with open(runs / "said.txt", "a", encoding="utf-8") as file:
        output = terminal or file.fileno()
        if fork:
            process = Forked(arguments, {**kept, **own}, output)
        else:
            process = subprocess.Popen(
                call, cwd=ROOT, env={**kept, **own}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=terminal is not None,
            )  # fmt: skip
    try:
        yield process
    finally:
        for child in family(process.pid):
            child.kill()
        process.send_signal(signal.SIGKILL)
        wait_for_end(process)


def family(pid: int) -> list[psutil.Process]:
    """Return the children of a process, theirs included; none where it has ended."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def said(runs: Path) -> str:
    """Return what the processes of these runs have written."""
    return (runs / "said.txt").read_text("utf-8", errors="replace")


def last_step(folder: Path) -> int:
    """Return the last meta-step in the run's record, -1 before the first."""
    record = folder / "metrics.jsonl"
    steps = re.findall(rb'^\{"step": (\d+)', record.read_bytes(), re.MULTILINE) if record.exists() else []
    return int(steps[-1]) if steps else -1


def wait_until(process: Process, come: Callable[[], bool], every: float = 0.002) -> bool:
    """Wait until ``come()`` is true; return False where the process ended before.

    Raises:
        TimeoutError: neither came within ``PATIENCE`` seconds.
    """
    give_up = time.monotonic() + PATIENCE
    while not come():
        if process.poll() is not None:
            return False
        if time.monotonic() > give_up:
            raise TimeoutError(f"process {process.pid} neither came on nor ended within {PATIENCE:g} seconds")
        time.sleep(every)
    return True


def wait_for_end(process: Process) -> None:
    """Wait until the process has ended; raise TimeoutError where it does not."""
    wait_until(process, lambda: False, every=0.01)


def torn(folder: Path) -> list[str]:
    """Return the names of files that cannot be read whole; a record may lack the end of its last line."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "wandb" not in p.parts):
        try:
            if path.name.endswith(".partial"):  # a write that was not finished: no reader looks at it
                continue
            if path.suffix == ".pt":
                torch.load(path, weights_only=True)
            elif path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            elif path.suffix == ".jsonl":
                read_metrics(path)
            elif path.suffix == ".safetensors":
                safetensors.torch.load_file(path)
        except Exception as error:  # noqa: BLE001 - whatever it is, the file is torn
            found.append(f"{path.name} ({type(error).__name__}: {error})")
    return found


def differences(folder: Path, whole: Path) -> list[str]:
    """Return in what a run differs from the undisturbed one: nothing at all, to the bit, where it went on exactly."""
    missing = [
        f"no {name}" for name in ("theta.safetensors", "checkpoint.pt", "training.png") if not (folder / name).exists()
    ]
    if missing:
        return missing
    found = torn(folder)
    if found:
        return found
    if (folder / "theta.safetensors").read_bytes() != (whole / "theta.safetensors").read_bytes():
        found.append("theta differs")
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, whole)]
    if not same(*states):
        found.append("the checkpoint differs")
    rows, expected = ([_timeless(row) for row in read_metrics(f / "metrics.jsonl")] for f in (folder, whole))
    if not same(rows, expected):
        found.append(f"the record differs: {len(rows)} rows instead of {len(expected)}, or other numbers")
    found += [f"{path.name} is left" for path in folder.glob(".*")]
    return found


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in TIMES}


def same(a: Any, b: Any) -> bool:
    """Return whether two nested values are equal, tensors bitwise; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))
