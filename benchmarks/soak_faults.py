"""The faults of ``soak.py``: each strikes a real training, and says how that ended.

A fault is a function of a ``Round``. It returns what it did beside ``outcome``: ``survived``, where the training went
on by itself, or ``stopped``, where it ended with a message and the same command went on later. Either way the end must
be that of the undisturbed training, to the bit. Everything else is ``Wrong``.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks.soak_runs import (
    Process,
    Training,
    differences,
    family,
    last_step,
    said,
    started,
    torn,
    wait_until,
)

LAST = 60
"""The meta-steps of every training here."""
NOBODY = 65534
KILLS = 4
"""Kills in one round, before the training may end."""
BAD_INPUT = 2
STOPPED = r"Stopped\. The same command goes on from "
FULL = "full"
"""The folder on a small disk of its own, inside a round's."""


class Wrong(Exception):
    """The library did what it must not do."""


class Round(NamedTuple):
    """One training to be struck.

    Args:
        training: which one.
        runs: an empty folder.
        whole: the folder of the undisturbed run.
        home: a folder for what is kept from round to round, such as compiled code.
        moments: where chance comes from.
    """

    training: Training
    runs: Path
    whole: Path
    home: Path
    moments: random.Random

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.runs / "run"

    @contextmanager
    def start(self, environment: dict[str, str] | None = None, **options: Any) -> Iterator[Process]:
        """Start the training; see ``started``."""
        own = {"HOME": str(self.home), "TORCHINDUCTOR_CACHE_DIR": str(self.home / "inductor"), **(environment or {})}
        with started(self.training, self.runs, environment=own, **options) as process:
            yield process

    def come_to(self, process: Process, step: int) -> None:
        """Wait until the record has meta-step ``step``, and a moment longer."""
        if not wait_until(process, lambda: last_step(self.folder) >= step):
            raise Wrong(f"it ended with code {process.returncode} before meta-step {step}: {self.tail()}")
        time.sleep(self.moments.uniform(0, 0.01))

    def tail(self) -> str:
        """Return the last line that was said."""
        return (said(self.runs).splitlines() or [""])[-1]

    def ends(self, process: Process, code: int, message: str = "") -> str:
        """Wait for the end; return the line of ``message``, a regular expression. Raise ``Wrong`` for another end."""
        wait_until(process, lambda: False, every=0.01)
        text = said(self.runs)
        if "Traceback" in text:
            raise Wrong(f"a traceback, and code {process.returncode}: {self.tail()}")
        if process.returncode != code:
            raise Wrong(f"code {process.returncode} instead of {code}: {self.tail()}")
        lines = [line for line in text.splitlines() if re.search(message, line)]
        if not lines:
            raise Wrong(f"it did not say {message!r}, but: {self.tail()}")
        return lines[-1].replace(str(self.folder), "FOLDER").replace(str(self.runs), "RUNS")

    def finish(self) -> None:
        """Run to the end, undisturbed, and compare. Raise ``Wrong`` where it is not where it would have been."""
        with self.start(fork=True) as process:
            self.ends(process, 0)
        self.compare()

    def compare(self) -> None:
        """Raise ``Wrong`` unless the run is the undisturbed one, to the bit."""
        if found := differences(self.folder, self.whole):
            raise Wrong("; ".join(found))


def kill(round: Round) -> dict[str, Any]:
    """SIGKILL, several times in one training: wherever, in a meta-step, while a file is half-written."""
    struck: Counter[str] = Counter()
    wandb = "offline" if round.moments.random() < 0.25 else "disabled"
    for i in range(KILLS):
        with round.start(wandb=wandb, fork=round.moments.random() < 0.9) as process:
            starts = _starts(round.folder)
            if not _strike(round, process, LAST * i // KILLS):
                break  # it was done before
            children = family(process.pid)
            process.send_signal(signal.SIGKILL)
            wait_until(process, lambda: False)
            if left := psutil.wait_procs(children, timeout=60)[1]:
                raise Wrong(f"{[child.name() for child in left]} outlived the training by a minute")
        if found := torn(round.folder):
            raise Wrong(f"torn after a kill: {'; '.join(found)}")
        struck[_where(round.folder, starts)] += 1
    round.finish()
    return {"outcome": "survived", "kills": dict(struck)}


def _strike(round: Round, process: Process, first: int) -> bool:
    """Wait for the moment; return whether the process still runs."""
    how = round.moments.choice(("wherever", "meta-step", "save", "save"))
    if how == "wherever":
        time.sleep(round.moments.uniform(0, 4))
        return process.poll() is None
    step = first + round.moments.randrange(LAST // KILLS)
    if not wait_until(process, lambda: last_step(round.folder) >= step):
        return False
    if how == "save":
        return wait_until(process, lambda: any(round.folder.glob(".*.partial")), every=0.0)
    time.sleep(round.moments.uniform(0, 0.01))
    return process.poll() is None


def _where(folder: Path, starts: int) -> str:
    """Return, from what is there, where a kill has struck."""
    if any(folder.glob(".*.partial")):
        return "in a save"
    if _starts(folder) == starts:
        return "in the start"
    if last_step(folder) == LAST:
        return "at the end"
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists() and torch.load(checkpoint, weights_only=True)["carry"] is not None:
        return "in an episode"
    return "between episodes"


def _starts(folder: Path) -> int:
    record = folder / "metrics.jsonl"
    return record.read_bytes().count(b'"event": "start"') if record.exists() else 0


def stop(round: Round, number: signal.Signals, code: int, times: int = 1) -> dict[str, Any]:
    """A signal that a training answers with a checkpoint."""
    with round.start() as process:
        round.come_to(process, 2 + round.moments.randrange(LAST // 2))
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.002)
        message = round.ends(process, code, STOPPED)
    if times == 1 and number != signal.SIGINT:
        _require_saved(round)
    round.finish()
    return {"outcome": "stopped", "message": message, "code": code}


def _require_saved(round: Round) -> None:
    saved = torch.load(round.folder / "checkpoint.pt", weights_only=True)["meta_step"]
    if saved != last_step(round.folder):
        raise Wrong(f"meta-step {saved} is saved, {last_step(round.folder)} was done")


def close_terminal(round: Round) -> dict[str, Any]:
    """A terminal that closes: SIGHUP, and nowhere to write to."""
    ours, theirs = os.openpty()
    try:
        with round.start(terminal=theirs) as process:
            os.close(theirs)
            round.come_to(process, 2 + round.moments.randrange(LAST // 2))
            os.close(ours)
            wait_until(process, lambda: False, every=0.01)
    finally:
        for handle in (ours, theirs):
            try:
                os.close(handle)
            except OSError:  # it is closed
                continue
    if process.returncode != 128 + signal.SIGHUP:
        raise Wrong(f"code {process.returncode} instead of {128 + signal.SIGHUP}")
    _require_saved(round)
    round.finish()
    return {"outcome": "stopped", "code": process.returncode}


def fill_disk(round: Round) -> dict[str, Any]:
    """A disk on which the run does not fit, until there is room; without the right to mount one, a limit of files."""
    size = sum(path.stat().st_size for path in round.whole.rglob("*") if path.is_file())
    round.runs.mkdir(parents=True, exist_ok=True)
    share = round.moments.uniform(0.2, 0.6)
    mounted = _mount(round.folder, f"size={int(share * size)}")
    try:
        limit = 0 if mounted else int(share * (round.whole / "checkpoint.pt").stat().st_size)
        with round.start(file_limit=limit) as process:
            wait_until(process, lambda: False, every=0.01)
            message = round.ends(process, process.returncode or -1, "(?i)no space|too large|disk is full|room")
        if process.returncode in (1, BAD_INPUT + 126):
            raise Wrong(f"code {process.returncode}, that of divergence: {message}")
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=100m", str(round.folder)], check=True)
        round.finish()
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(round.folder)], check=True)
    how = "a small disk" if mounted else "a limit of file sizes"
    return {"outcome": "stopped", "message": message, "code": process.returncode, "how": how}


def _mount(folder: Path, options: str) -> bool:
    folder.mkdir(parents=True)
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    call = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(call, capture_output=True).returncode == 0


def read_only(round: Round) -> dict[str, Any]:
    """A run's folder that cannot be written any more; root, whom no mode keeps out, becomes another user."""
    with round.start() as process:
        round.come_to(process, 2 + round.moments.randrange(LAST // 2))
        process.send_signal(signal.SIGTERM)
        round.ends(process, 128 + signal.SIGTERM, STOPPED)
    paths = [round.folder, *round.folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.read_bytes() for path in paths if path.is_file()}
    try:
        with round.start(user=NOBODY if os.geteuid() == 0 else 0) as process:
            message = round.ends(process, BAD_INPUT, "(?i)permission denied|cannot be written")
        if {path: path.read_bytes() for path in round.folder.rglob("*") if path.is_file()} != before:
            raise Wrong("files of the folder have changed")
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    round.finish()
    return {"outcome": "stopped", "message": message, "code": BAD_INPUT}


def lose_wandb(round: Round, number: signal.Signals) -> dict[str, Any]:
    """W&B's service killed, or stopped: it does not answer any more."""
    services: list[psutil.Process] = []
    began = time.monotonic()
    try:
        with round.start(wandb="offline") as process:
            round.come_to(process, 2)
            services = [child for child in family(process.pid) if "wandb" in child.name() or "gpu" in child.name()]
            if not services:
                raise Wrong("there is no service of W&B")
            began = time.monotonic()
            for service in services:
                service.send_signal(number)
            message = round.ends(process, 0, "W&B failed while")
    finally:
        for service in services:
            try:
                service.kill()
            except psutil.NoSuchProcess:
                continue
    round.compare()
    return {"outcome": "survived", "message": message, "held_up_s": round_seconds(began)}


def round_seconds(began: float) -> float:
    """Return the seconds since then."""
    return float(f"{time.monotonic() - began:.1f}")


def lose_data(round: Round, when: str) -> dict[str, Any]:
    """The folder of data sets vanishes: in the training, or before it goes on."""
    data, link = Path(os.environ["LEARNEDOPT_DATA"]).resolve(), round.runs / "data"
    round.runs.mkdir(parents=True, exist_ok=True)
    link.symlink_to(data)
    environment = {"LEARNEDOPT_DATA": str(link)}
    with round.start(environment) as process:
        round.come_to(process, 2 + round.moments.randrange(LAST // 2))
        if when == "in the training":
            link.unlink()
            round.ends(process, 0)
            round.compare()
            return {"outcome": "survived"}
        process.send_signal(signal.SIGTERM)
        round.ends(process, 128 + signal.SIGTERM, STOPPED)
    link.unlink()
    with round.start(environment) as process:
        message = round.ends(process, BAD_INPUT, "LEARNEDOPT_DATA")
    round.finish()
    return {"outcome": "stopped", "message": message, "code": BAD_INPUT}


_JUMPS = """
import random, time
real, moments, offset = time.time, random.Random(0), [0.0]
def jumping():
    if moments.random() < 0.5:
        offset[0] = moments.uniform(-4e8, 4e8)
    return real() + offset[0]
time.time = jumping
"""


def jump_clock(round: Round) -> dict[str, Any]:
    """The clock jumps by years, forth and back, whenever it is read; what counts seconds does not."""
    module = round.runs / "clock" / "sitecustomize.py"
    module.parent.mkdir(parents=True)
    module.write_text(_JUMPS, encoding="utf-8")
    path = f"{module.parent}{os.pathsep}{Path(__file__).resolve().parents[1]}"
    with round.start({"PYTHONPATH": path}) as process:
        round.come_to(process, 2 + round.moments.randrange(LAST // 2))
        process.send_signal(signal.SIGTERM)
        round.ends(process, 128 + signal.SIGTERM, STOPPED)
    with round.start({"PYTHONPATH": path}) as process:
        round.ends(process, 0)
    round.compare()
    return {"outcome": "survived"}


def start_twice(round: Round) -> dict[str, Any]:
    """A second start in the folder of a training that runs, which is held still meanwhile."""
    with round.start() as first:
        round.come_to(first, 2 + round.moments.randrange(LAST // 2))
        first.send_signal(signal.SIGSTOP)
        with round.start() as second:
            message = round.ends(second, BAD_INPUT, "another process")
        first.send_signal(signal.SIGCONT)
        round.ends(first, 0)
    round.compare()
    return {"outcome": "survived", "message": message}


Fault = Callable[[Round], dict[str, Any]]
KILL = "SIGKILL"
OTHERS: dict[str, Fault] = {
    "SIGTERM": partial(stop, number=signal.SIGTERM, code=143),
    "Ctrl-C": partial(stop, number=signal.SIGINT, code=130),
    "Ctrl-C twice": partial(stop, number=signal.SIGINT, code=130, times=2),
    "SIGHUP": partial(stop, number=signal.SIGHUP, code=129),
    "SIGHUP twice": partial(stop, number=signal.SIGHUP, code=129, times=2),
    "terminal closed": close_terminal,
    "disk full": fill_disk,
    "folder read-only": read_only,
    "W&B's service killed": partial(lose_wandb, number=signal.SIGKILL),
    "W&B's service stopped": partial(lose_wandb, number=signal.SIGSTOP),
    "data vanished in the training": partial(lose_data, when="in the training"),
    "data vanished before it goes on": partial(lose_data, when="before"),
    "clock jumps": jump_clock,
    "second start in one folder": start_twice,
}
"""Every fault but SIGKILL, by name."""
NEED_DATA = {"data vanished in the training", "data vanished before it goes on"}
