"""The library's own rows of the benchmarks in two checkouts, in turn: what a change did to them.

Run ``python benchmarks/alternate.py OTHER_CHECKOUT [ROUNDS]`` (15 minutes). Each measurement is a fresh process of one
thread; the two checkouts take turns, and the ratio is the median of those of neighbours, so that what else the machine
does meets both. Both checkouts need the same ``benchmarks/measure.py``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.bench import WORKLOADS
from benchmarks.measure import ONE_THREAD, SECONDS
from benchmarks.suite import Size

HERE = Path(__file__).resolve().parents[1]


def milliseconds(checkout: Path, workload: str, competitor: str, size: Size) -> float:
    """Return the median CPU time of a call in a fresh process of a checkout."""
    given = ["--worker", workload, competitor, "times", json.dumps(dataclasses.asdict(size)), str(SECONDS)]
    done = subprocess.run(
        [sys.executable, str(checkout / "benchmarks" / "bench.py"), *given],
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(checkout)}, cwd=checkout, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{checkout}: {workload}, {competitor}: {done.stderr}")
    return statistics.median(json.loads(done.stdout.splitlines()[-1])["cpu_ms"])


def main() -> None:
    """Print a row for each workload and way of this library's."""
    other, rounds = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 3
    print("| workload | before, CPU ms | after | ratio | range |\n|---|---|---|---|---|")
    for name, workload in WORKLOADS.items():
        for competitor in (c for c in workload.competitors if c.startswith("learnedopt")):
            pairs = [
                [milliseconds(place, name, competitor, workload.size) for place in (other, HERE)] for _ in range(rounds)
            ]
            before, after = (statistics.median(each) for each in zip(*pairs, strict=True))
            ratios = sorted(b / a for a, b in pairs)
            print(
                f"| {name}, {competitor} | {before:.0f} | {after:.0f} | {statistics.median(ratios):.2f} | "
                f"{ratios[0]:.2f} to {ratios[-1]:.2f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
