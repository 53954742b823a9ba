"""Peak memory and time of a meta-gradient on 20-way 5-shot Omniglot against inner steps: MAML, first order, iMAML.

Run ``python benchmarks/results_few_shot_memory.py``: figure 2b of Rajeswaran et al. (2019) on this library, for one
task and the strided net of 64 filters. Every point is a fresh process of one thread. Memory is the most that torch's
CPU allocator holds at a time; time is wall clock, the least of three estimates after a short one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import learnedopt
from benchmarks.results_memory import MB, allocator_peak
from learnedopt import (
    ConjugateGradient,
    FinalLoss,
    FirstOrder,
    GradientEstimator,
    Implicit,
    InnerLoop,
    Proximal,
    TaskLoss,
    Unrolled,
)

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "figures" / "few_shot_memory.png"
STEPS = (1, 2, 4, 8, 16, 32, 64)
MAML, FIRST_ORDER, IMPLICIT = "MAML", "first-order MAML", "iMAML, 5 CG steps"


class Point(NamedTuple):
    """Peak bytes held by torch's allocator, and seconds, of one estimate."""

    peak: float
    seconds: float


def estimator(label: str, num_steps: int) -> GradientEstimator:
    """Return what is compared; with no tolerance for a warning, as nothing is to converge here."""
    if label == IMPLICIT:
        return Implicit(num_steps, ConjugateGradient(5), tolerance=math.inf)
    return Unrolled(num_steps) if label == MAML else FirstOrder(num_steps)


def measure_point(label: str, num_steps: int, ways: int = 20, width: int = 64) -> Point:
    """Return the peak and the time of one estimate; call it in a process of its own."""
    torch.set_num_threads(1)
    family = learnedopt.tasks.make("omniglot", ways=ways, shots=5, queries=15, model="conv", width=width)
    generator = torch.Generator().manual_seed(0)
    tasks = family.sample(1, generator)
    template = {k: p[0] for k, p in family.init_params(tasks).items()}
    rule = learnedopt.optimizers.make("maml", template=template, lr=0.1)
    loop = InnerLoop(family, rule, inner_objective=Proximal(template, 2.0) if label == IMPLICIT else TaskLoss())
    theta, carry = loop.init_theta(generator), loop.start(tasks)

    def estimate(steps: int = num_steps) -> None:
        estimator(label, steps).estimate(loop, theta, FinalLoss(), carry)

    estimate(1)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        estimate()
        times.append(time.perf_counter() - began)
    return Point(allocator_peak(estimate), min(times))


def in_own_process(label: str, num_steps: int) -> Point:
    """Return ``measure_point`` as a fresh process finds it."""
    command = [sys.executable, "-m", "benchmarks.results_few_shot_memory", "--point", label, str(num_steps)]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{label}, {num_steps} steps: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return Point(*json.loads(done.stdout.splitlines()[-1]))  # the profiler may print above it


def main() -> None:
    """Print the tables, check that implicit memory is flat, and draw the figure."""
    from learnedopt.evaluation.plots import plot_lines

    points = {label: [in_own_process(label, n) for n in STEPS] for label in (MAML, FIRST_ORDER, IMPLICIT)}
    tables = {
        "peak MB": {label: [point.peak / MB for point in row] for label, row in points.items()},
        "seconds": {label: [point.seconds for point in row] for label, row in points.items()},
    }
    for what, rows in tables.items():
        print(what.ljust(20) + "".join(f"{n:>9}" for n in STEPS))
        for label, values in rows.items():
            print(label.ljust(20) + "".join(f"{v:9.3g}" for v in values))
    peaks = tables["peak MB"]
    flat = max(peaks[IMPLICIT]) / min(peaks[IMPLICIT])
    print(f"iMAML: largest / smallest {flat:.3f} (goal: below 1.1)")
    print(f"MAML: {(peaks[MAML][-1] - peaks[MAML][0]) / (STEPS[-1] - STEPS[0]):.1f} MB a step")
    if flat >= 1.1:
        raise SystemExit("the memory of the implicit meta-gradient is not flat")
    plot_lines(
        FIGURE,
        {label: (STEPS, row) for label, row in peaks.items()},
        xlabel="inner steps",
        ylabel="peak memory of the meta-gradient (MB)",
        logx=True,
        logy=True,
        title="Omniglot, 20-way 5-shot, strided net of 64 filters, one task",
    )
    print(f"drew {FIGURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--point", nargs=2, metavar=("METHOD", "STEPS"), help="measure one point, in this process")
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure_point(arguments.point[0], int(arguments.point[1]))))
    else:
        main()
