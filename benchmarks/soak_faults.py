"""The faults of ``soak.py``: each strikes a real training, and says how that ended.

A fault is a function of a ``Round``. It returns what it did beside ``outcome``: ``survived``, where the training went
on by itself, or ``stopped``, where it ended with a message and the same command went on later. Either way the end must
be that of the undisturbed training, to the bit. Everything else is ``Wrong``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.soak_round import LAST, Round, Wrong
from benchmarks.soak_runs import ROOT, family
from benchmarks.soak_signals import STOPPED, close_terminal, kill_rank, stop
from learnedopt.cli import BAD_INPUT, DISK_FULL


def fill_disk(round: Round) -> dict[str, Any]:
    """A disk on which the run does not fit, until there is room; without the right to mount one, a limit of files."""
    size = sum(path.stat().st_size for path in round.whole.rglob("*") if path.is_file())
    round.runs.mkdir(parents=True, exist_ok=True)
    share = round.moments.uniform(0.2, 0.6)
    mounted = _mount(round.folder, f"size={int(share * size)}")
    try:
        limit = 0 if mounted else int(share * (round.whole / "checkpoint.pt").stat().st_size)
        with round.start(file_limit=limit) as process:
            message = round.ends(process, DISK_FULL, "^learnedopt train: the disk is full")
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=100m", str(round.folder)], check=True)
        round.finish()
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(round.folder)], check=True)
    how = "a small disk" if mounted else "a limit of file sizes"
    return {"outcome": "stopped", "message": message, "code": DISK_FULL, "how": how}


def _mount(folder: Path, options: str) -> bool:
    folder.mkdir(parents=True)
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    call = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(call, capture_output=True).returncode == 0


def read_only(round: Round) -> dict[str, Any]:
    """A run's folder that cannot be written any more: its modes, and for root, whom they let pass, a mount."""
    with round.start() as process:
        round.come_to(process, 2 + round.moments.randrange(LAST // 2))
        process.send_signal(signal.SIGTERM)
        round.ends(process, 128 + signal.SIGTERM, STOPPED)
    before = {path: path.read_bytes() for path in round.folder.rglob("*") if path.is_file()}
    with _unwritable(round.folder), round.start() as process:
        message = round.ends(process, BAD_INPUT, "(?i)permission denied|cannot be written|read-only")
    if {path: path.read_bytes() for path in round.folder.rglob("*") if path.is_file()} != before:
        raise Wrong("files of the folder have changed")
    round.finish()
    return {"outcome": "stopped", "message": message, "code": BAD_INPUT}


@contextmanager
def _unwritable(folder: Path) -> Iterator[None]:
    if os.geteuid() == 0:
        subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def lose_wandb(round: Round, number: signal.Signals) -> dict[str, Any]:
    """W&B's service killed, or stopped: it does not answer any more."""
    services: list[psutil.Process] = []
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
            ended = time.monotonic()
    finally:
        for service in services:
            with suppress(psutil.NoSuchProcess):  # it has ended
                service.kill()
    round.compare()
    return {"outcome": "survived", "message": message, "ended_after_s": ended - began}


def lose_data(round: Round, when: str) -> dict[str, Any]:
    """The folder of data sets vanishes: in the training, or before it goes on."""
    data, link = Path(os.environ["LEARNEDOPT_DATA"]).resolve(), round.runs / "data"
    round.runs.mkdir(parents=True, exist_ok=True)
    link.symlink_to(data)
    # Without a network: the library would get them anew, and go on.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {"LEARNEDOPT_DATA": str(link), **nowhere}
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
    path = f"{module.parent}{os.pathsep}{ROOT}"
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
    "SIGKILL of one of two ranks": kill_rank,
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
