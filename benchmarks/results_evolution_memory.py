"""Peak memory of an estimate by evolution strategies against the number of pairs.

One task: an MLP 784-20-10 on random images, batch 128, trained by the rule ``small-mlp`` (202 weights). Run ``python
benchmarks/results_evolution_memory.py`` (a CPU minute). Every point is a process of its own; memory is counted as in
``results_memory.py``, beside theta and the carry, which for persistent ones holds the particles.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
from results_memory import MB, Point, allocator_peak, exponent, resident_growth
from torch import Tensor, nn

from learnedopt import (
    EvolutionStrategies,
    GradientEstimator,
    InnerLoop,
    ModuleFamily,
    PersistentES,
    SumOfLosses,
    optimizers,
)

PAIRS = (4, 8, 16, 32)
STEPS, WINDOW = 8, 2
WHOLE, PERSISTENT = "whole episodes", "persistent"


def estimator(label: str, num_pairs: int) -> GradientEstimator:
    """Return what is measured."""
    if label == WHOLE:
        return EvolutionStrategies(STEPS, num_pairs, sigma=0.05)
    return PersistentES(WINDOW, STEPS, num_pairs, sigma=0.05)


def data(seed: int, step: int, split: str) -> tuple[Tensor, Tensor]:
    """Return random images and classes."""
    generator = torch.Generator().manual_seed(seed % 1000 + 1000 * step)
    return torch.randn(128, 784, generator=generator), torch.randint(10, (128,), generator=generator)


def build() -> nn.Module:
    """Return the MLP."""
    return nn.Sequential(nn.Linear(784, 20), nn.Sigmoid(), nn.Linear(20, 10))


def measure_point(label: str, num_pairs: int) -> Point:
    """Return the peaks of one estimate; call it in a process of its own."""
    torch.set_num_threads(1)
    family, generator = ModuleFamily(build, nn.functional.cross_entropy, data), torch.Generator().manual_seed(0)
    tasks = family.sample(1, generator)
    loop = InnerLoop(family, optimizers.make("small-mlp", template={}))
    theta, measured = loop.init_theta(generator), estimator(label, num_pairs)
    carry = measured.start(loop, theta, tasks, generator)

    def estimate() -> None:
        measured.estimate(loop, theta, SumOfLosses(), carry)

    estimate()  # what is set up once is there then
    resident = resident_growth(estimate)
    return Point(allocator_peak(estimate), resident)


def in_own_process(label: str, num_pairs: int) -> Point:
    """Return ``measure_point`` as a fresh process finds it."""
    command = [sys.executable, __file__, label, str(num_pairs)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{label}, {num_pairs} pairs: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return Point(*json.loads(done.stdout.splitlines()[-1]))  # the profiler may print above it


def main() -> None:
    """Print the table and check that memory grows no faster than pairs."""
    print("peak MB, allocator (resident)".ljust(32) + "".join(f"{n:>18}" for n in PAIRS) + "  exponent")
    for label in (WHOLE, PERSISTENT):
        points = [in_own_process(label, n) for n in PAIRS]
        peaks = [point.allocated for point in points]
        cells = [f"{point.allocated / MB:.1f} ({point.resident / MB:.1f})" for point in points]
        print(
            label.ljust(32) + "".join(f"{x:>18}" for x in cells) + f"{exponent(PAIRS, peaks):10.2f}",
            flush=True,
        )
        if any(peak > peaks[0] * n / PAIRS[0] for peak, n in zip(peaks, PAIRS, strict=True)):
            raise SystemExit("memory grows faster than the number of pairs")


if __name__ == "__main__":
    if len(sys.argv) == 3:  # a point's own process
        print(json.dumps(measure_point(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
