"""Faults met by real trainings: each is struck at random moments, and must end as if nothing had happened.

``make soak``, or ``python benchmarks/soak.py [--minutes M] [--folder FOLDER] [--only FAULT ...]``, goes through rounds
until the time is over: SIGKILL on every kind of training, and every other fault. A row of each is added to
``FOLDER/rounds.jsonl``, and the next call goes on behind the last; a folder belongs to one version of the library. What
a failed round left stays in ``FOLDER/rounds``. ``--memory`` watches one long training instead. ``--table`` writes
what all of them have found into ``docs/reliability.md``. Linux, and W&B offline; LEARNEDOPT_DATA holds the images.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import soak_memory, soak_table
from benchmarks.soak_faults import KILL, NEED_DATA, OTHERS
from benchmarks.soak_round import Round
from benchmarks.soak_runs import TRAININGS, import_all
from benchmarks.soak_signals import kill


def plan(only: list[str]) -> list[tuple[str, str]]:
    """Return one cycle of rounds, fault and training: SIGKILL on each training, among them the other faults."""
    data = bool(os.environ.get("LEARNEDOPT_DATA"))
    names = [name for name, training in TRAININGS.items() if data or not training.data]
    quick = [name for name in names if not TRAININGS[name].compiled]
    others = [fault for fault in OTHERS if data or fault not in NEED_DATA]
    rounds = []
    for i in range(max(len(names), len(others))):
        if i < len(names):
            rounds.append((KILL, names[i]))
        if i < len(others):
            images = [name for name in quick if TRAININGS[name].data]
            rounds.append((others[i], images[0] if others[i] in NEED_DATA else quick[i % len(quick)]))
    return [each for each in rounds if not only or each[0] in only]


def carry_out(fault: str, name: str, number: int, folder: Path) -> dict[str, Any]:
    """Return the row of one round."""
    (folder / "rounds").mkdir(exist_ok=True)
    runs = Path(tempfile.mkdtemp(prefix=f"{number:04d}-", dir=folder / "rounds"))  # one that was cut off begins anew
    training, home, began = TRAININGS[name], folder / "home", time.monotonic()
    row: dict[str, Any] = {"round": number, "fault": fault, "training": name}
    try:
        round = Round(training, runs, undisturbed(name, folder), home, random.Random(number))
        row |= kill(round) if fault == KILL else OTHERS[fault](round)
        shutil.rmtree(runs)
    except Exception as error:  # noqa: BLE001 - a round that fails is a row of the table
        row |= {"outcome": "failed", "message": f"{type(error).__name__}: {error}"}
    return row | {"seconds": float(f"{time.monotonic() - began:.1f}")}


def undisturbed(name: str, folder: Path) -> Path:
    """Return the folder of the run that nothing disturbs, made where it is not there yet."""
    runs = folder / "whole" / name.replace(" ", "-").replace(",", "")
    round = Round(TRAININGS[name], runs, runs / "run", folder / "home", random.Random(0))
    if not (runs / "run" / "training.png").exists():
        shutil.rmtree(runs, ignore_errors=True)
        with round.start(fork=True) as process:
            round.ends(process, 0)
    return runs / "run"


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows so far."""
    path = folder / "rounds.jsonl"
    if path.exists():
        yield from map(json.loads, path.read_text("utf-8").splitlines())


def soak(folder: Path, minutes: float, only: list[str]) -> int:
    """Go through rounds for so long; return how many of all in the folder have failed."""
    folder.mkdir(parents=True, exist_ok=True)
    import_all()
    rounds, give_up = plan(only), time.monotonic() + 60 * minutes
    while time.monotonic() < give_up:
        number = len([*rows_of(folder)])
        fault, name = rounds[number % len(rounds)]
        row = carry_out(fault, name, number, folder)
        with open(folder / "rounds.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{number}: {fault} on {name}: {row['outcome']} ({row['seconds']} s) {row.get('message', '')}", flush=True
        )
    return sum(row["outcome"] == "failed" for row in rows_of(folder))


def main() -> int:
    """Do what the command line says; return 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="default: runs/soak")
    parser.add_argument("--minutes", type=float, default=20.0, help="after which no other round begins (default: 20)")
    parser.add_argument("--only", action="append", default=[], choices=(KILL, *OTHERS), metavar="FAULT")
    parser.add_argument("--memory", action="store_true", help="watch the memory of one long training")
    parser.add_argument("--table", action="store_true", help="write docs/reliability.md from what the folder holds")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if arguments.table:
        soak_table.write(folder, [*rows_of(folder)])
        return 0
    if arguments.memory:
        found = soak_memory.soak(folder, arguments.minutes)
        print(json.dumps(found, indent=2))
        return 0 if found["passed"] else 1
    return 1 if soak(folder, arguments.minutes, arguments.only) else 0


if __name__ == "__main__":
    sys.exit(main())
