"""Stands for a meta-training in tests of sweeps: holds its folder, tells a loss, is stopped, and goes on.

``sweep_trial.py RECIPE key=value ... --runs DIR --name NAME``. With waits=1 it waits after the third value to be
stopped, where it was not before. It ends badly for rate=13.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

from filelock import FileLock

STEPS = 9


def main(words: list[str]) -> int:
    """Write the record of a run, from where it stands."""
    said = dict(word.split("=") for word in words if "=" in word)
    folder = Path(words[words.index("--runs") + 1], words[words.index("--name") + 1])
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / "lock", timeout=0)
    lock.acquire()  # as a run does, for as long as its process lives
    record = folder / "metrics.jsonl"
    begun = [line for line in record.read_text().splitlines() if "best" in line] if record.exists() else []
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    with record.open("a") as out:
        for step in range(len(begun), STEPS):
            if said["rate"] == "13":
                print("a rate of 13 is too high\nwandb: how to sync the run", file=sys.stderr)
                return 1
            loss = abs(float(said["rate"]) - 3) + float(said.get("seed", 0)) / 10 + 1 / (1 + step)
            print(json.dumps({"step": step, "best_validation": loss, "at": time.time()}), file=out, flush=True)
            give_up = time.monotonic() + 20
            while step == 2 and "waits" in said and not stopped and time.monotonic() < give_up:
                time.sleep(0.01)
            if stopped:
                print(json.dumps({"event": "finish", "step": step, "exit_code": 143}), file=out)
                return 143
        print(json.dumps({"event": "finish", "step": STEPS - 1, "exit_code": 0}), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
