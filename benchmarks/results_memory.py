"""Peak memory of a meta-gradient against inner steps: recorded whole, recomputed in segments, and implicit.

One task: an MLP 784-256-128-64-5 (242,437 parameters) under implicit MAML's proximal objective, on random inputs, since
memory does not depend on values. Run ``python benchmarks/results_memory.py``.

Every point is a process of its own. It takes one estimate of a single inner step, so that what is set up once is
there, and then two of the number asked for. Under torch's profiler one gives the most bytes that torch's CPU allocator
held at a time, of those that the estimate asked for: exact, and drawn. The other gives the growth of the process's peak
resident memory as the kernel counts it (Linux), as a check. For the check, glibc is told to give every tensor of 64 KiB
or more pages of its own: left to itself it keeps freed ones in its heap, which then counts more than is held.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from learnedopt import (
    ConjugateGradient,
    FinalLoss,
    GradientEstimator,
    Implicit,
    InnerLoop,
    ModuleFamily,
    Proximal,
    Unrolled,
)
from learnedopt import optimizers as rules

STEPS = (5, 10, 20, 40, 80)
WIDTHS, NUM_EXAMPLES = (784, 256, 128, 64, 5), 25
WHOLE, SEGMENTS, IMPLICIT = "unrolled", "unrolled, segments of √steps", "implicit, 5 CG steps"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "meta_gradient_memory.png"
MB = 1e6


class Point(NamedTuple):
    """Peak bytes of one estimate: held by torch's allocator, and resident (NaN where the kernel does not tell)."""

    allocated: float
    resident: float


def estimators(num_steps: int) -> dict[str, GradientEstimator]:
    """Return what is compared, by label; with no tolerance for a warning, as nothing is to converge here."""
    return {
        WHOLE: Unrolled(num_steps),
        SEGMENTS: Unrolled(num_steps, segment=round(math.sqrt(num_steps))),
        IMPLICIT: Implicit(num_steps, ConjugateGradient(5), tolerance=math.inf),
    }


def data(seed: int, step: int, split: str) -> tuple[Tensor, Tensor]:
    """Return random images and classes, the same at every step."""
    generator = torch.Generator().manual_seed(2 * seed + (split == "valid"))
    classes = torch.randint(WIDTHS[-1], (NUM_EXAMPLES,), generator=generator)
    return torch.randn(NUM_EXAMPLES, WIDTHS[0], generator=generator), classes


def build() -> nn.Module:
    """Return the MLP."""
    layers = [layer for pair in pairwise(WIDTHS) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def measure_point(label: str, num_steps: int) -> Point:
    """Return the peaks of one estimate; call it in a process of its own."""
    torch.set_num_threads(1)
    family = ModuleFamily(build, nn.functional.cross_entropy, data)
    generator = torch.Generator().manual_seed(0)
    tasks = family.sample(1, generator)
    template = {k: p[0] for k, p in family.init_params(tasks).items()}
    rule = rules.make("maml", template=template, lr=0.01)
    loop = InnerLoop(family, rule, inner_objective=Proximal(template, 1.0))
    theta, carry = loop.init_theta(generator), loop.start(tasks)

    def estimate(steps: int) -> None:
        estimators(steps)[label].estimate(loop, theta, FinalLoss(), carry)

    estimate(1)
    resident = resident_growth(lambda: estimate(num_steps))
    return Point(allocator_peak(lambda: estimate(num_steps)), resident)


def allocator_peak(call: Callable[[], None]) -> float:
    """Return the most bytes that torch's CPU allocator held at a time, of those that were asked for during ``call``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    return max(float(event["args"]["Total Allocated"]) for event in events if event["name"] == "[memory]")


def resident_growth(call: Callable[[], None]) -> float:
    """Return by how many bytes the process's peak resident memory during ``call`` exceeds that before it."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        call()
        return math.nan
    reset.write_text("5")  # sets the peak back to the present: see proc(5)
    before = _kilobytes(status, "VmHWM")
    call()
    return 1024 * (_kilobytes(status, "VmHWM") - before)


def _kilobytes(status: Path, field: str) -> float:
    line = next(line for line in status.read_text("utf-8").splitlines() if line.startswith(field))
    return float(line.split()[1])


def measure(steps: Iterable[int] = STEPS) -> dict[str, list[Point]]:
    """Return each estimator's peaks for each number of inner steps."""
    return {label: [in_own_process(label, n) for n in steps] for label in estimators(1)}


def in_own_process(label: str, num_steps: int) -> Point:
    """Return ``measure_point`` as a fresh process finds it."""
    command = [sys.executable, __file__, label, str(num_steps)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{label}, {num_steps} steps: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return Point(*json.loads(done.stdout.splitlines()[-1]))  # the profiler may print above it


def exponent(steps: Iterable[int], peaks: Iterable[float]) -> float:
    """Return the slope of the straight line through the logarithms: 1 for linear growth, 0 for none."""
    x, y = (torch.tensor([*values], dtype=torch.float64).log() for values in (steps, peaks))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def main() -> None:
    """Print the tables, check the shapes and draw the figure."""
    from learnedopt.evaluation.plots import plot_lines

    points = measure()
    for field, what in (("allocated", "held by torch's allocator"), ("resident", "growth of resident memory")):
        print(f"peak MB, {what}".ljust(40) + "".join(f"{n:>8}" for n in STEPS) + "  exponent")
        for label, row in points.items():
            values = [getattr(point, field) for point in row]
            print(label.ljust(40) + "".join(f"{v / MB:8.1f}" for v in values) + f"{exponent(STEPS, values):10.2f}")
    peaks = {label: [point.allocated for point in row] for label, row in points.items()}
    grows, flat = exponent(STEPS, peaks[SEGMENTS]), max(peaks[IMPLICIT]) / min(peaks[IMPLICIT])
    print(f"unrolled: {(peaks[WHOLE][-1] - peaks[WHOLE][0]) / (STEPS[-1] - STEPS[0]) / MB:.2f} MB a step")
    print(f"segments: exponent {grows:.2f} (goal: below 0.8); implicit: largest / smallest {flat:.4f} (below 1.1)")
    if grows >= 0.8 or flat >= 1.1:
        raise SystemExit("the shapes are not what theory says")
    plot_lines(
        FIGURE,
        {label: (STEPS, [v / MB for v in row]) for label, row in peaks.items()},
        xlabel="inner steps",
        ylabel="peak memory of the meta-gradient (MB)",
        logx=True,
        logy=True,
        title=f"MLP {'-'.join(map(str, WIDTHS))}, {NUM_EXAMPLES} examples, one task",
    )
    print(f"drew {FIGURE}")


if __name__ == "__main__":
    if len(sys.argv) == 3:  # a point's own process
        print(json.dumps(measure_point(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
