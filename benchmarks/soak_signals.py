"""Signals that end a training of ``soak.py``: SIGKILL anywhere, and those that it answers with a checkpoint."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.soak_round import LAST, Round, Wrong
from benchmarks.soak_runs import Process, family, last_step, torn, wait_for_end, wait_until

KILLS = 4
"""Kills in one round, before the training may end."""
STOPPED = r"Stopped\. The same command goes on from "


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
            wait_for_end(process)
            if left := psutil.wait_procs(children, timeout=60)[1]:
                raise Wrong(f"{[child.name() for child in left]} outlived the training by a minute")
        if found := torn(round.folder):
            raise Wrong(f"torn after a kill: {'; '.join(found)}")
        struck[_where(round.folder, starts)] += 1
    round.finish()
    return {"outcome": "survived", "kills": dict(struck)}


def kill_rank(round: Round) -> dict[str, Any]:
    """SIGKILL of one of two ranks: what launched them starts both again; another pair, undisturbed, says where to."""
    pair = round._replace(runs=round.runs / "pair")
    with pair.start(ranks=2) as process:
        pair.ends(process, 0)
    with round.start(ranks=2) as process:
        round.come_to(process, 2 + round.moments.randrange(LAST // 2))
        both = [child for child in family(process.pid) if any("train_meta.py" in word for word in child.cmdline())]
        if len(both) != 2:
            raise Wrong(f"there are {len(both)} ranks")
        round.moments.choice(both).kill()
        message = round.ends(process, 0, "rank [01]")
    round._replace(whole=pair.folder).compare()
    return {"outcome": "survived", "message": message}


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
            wait_for_end(process)
    finally:
        for handle in (ours, theirs):
            with suppress(OSError):  # it is closed
                os.close(handle)
    if process.returncode != 128 + signal.SIGHUP:
        raise Wrong(f"code {process.returncode} instead of {128 + signal.SIGHUP}")
    _require_saved(round)
    round.finish()
    return {"outcome": "stopped", "code": process.returncode}
