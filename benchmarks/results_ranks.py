"""What several processes cost and bring: ``python benchmarks/results_ranks.py [exact] [resume] [speed] [project]``.

``exact``: how far meta-gradients on 2, 3 and 4 processes are from one's, for five estimators. ``resume``: where a run
ends that goes on with 2, 1 and 4 processes. ``speed``: meta-steps a second on two processes against one, one thread
each. ``project``: what 64 processes would bring, from measured times. Tables go to standard output as Markdown.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from learnedopt import EvolutionStrategies, FinalLoss, MetaTrainer, recipes
from learnedopt.config import INTERCHANGEABLE, override
from learnedopt.recipes import Recipe
from learnedopt.run import build
from learnedopt.training.tracker import Metrics, NullTracker

KINDS = {
    "unrolled": ("maml-sine", ["num_tasks=5"]),
    "truncated": ("lstm-quadratic", ["num_tasks=5"]),
    "implicit": ("imaml-regression", ["num_tasks=5"]),
    "ES": ("lstm-quadratic", ["num_tasks=5"]),
    "PES": ("pes-quadratic", ["num_tasks=5"]),
}
"""Recipes by which each estimator is measured; that of ES is put in place of the recipe's own."""
SPEED: dict[str, tuple[str, list[str], int]] = {
    "conv few-shot": ("maml-omniglot", ["execution.compile=false"], 32),
    "PES": ("pes-quadratic", [], 1024),
    "LSTM": ("lstm-mnist", [], 4),
}
"""Recipes that are timed, and their numbers of tasks: enough that the calls of torch are not what takes the time."""
STEPS = 5


def recipe_of(name: str, sets: list[str], **_: Any) -> Recipe:
    """Return a recipe in one thread, uncompiled."""
    return override(recipes.meta_training(name), [*sets, "execution.compile=false"], INTERCHANGEABLE)


class Remembering(torch.optim.SGD):
    """Keeps the gradients that it is handed."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.grads: list[Tensor] = []

    def step(self, closure: Any = None) -> Any:
        """Keep them, and take a step."""
        self.grads.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))
        return super().step(closure)


class Times(NullTracker):
    """Keeps how long meta-steps took."""

    def __init__(self) -> None:
        self.ms: list[float] = []

    def log(self, metrics: Metrics, step: int) -> None:
        """Keep a time."""
        if "step_ms" in metrics:
            self.ms.append(float(metrics["step_ms"]))  # pyright: ignore[reportArgumentType]


def trainer_of(name: str, sets: list[str], dtype: torch.dtype, *, by_es: bool = False, **options: Any) -> MetaTrainer:
    """Return the meta-training of a recipe, without a folder and a validation."""
    recipe = recipe_of(name, sets)
    torch.set_default_dtype(dtype)
    loop = build(recipe)[0]
    loop = type(loop)(
        loop.family, loop.rule, type(loop.execution)(recipe.execution.chunk_size, dtype=dtype), loop.inner_objective,
        loop.horizon,
    )  # fmt: skip
    estimator, objective = recipe.estimator, recipe.objective
    if by_es:
        estimator, objective = EvolutionStrategies(10, num_pairs=4, sigma=0.5), FinalLoss()
    return MetaTrainer(
        loop, estimator, objective, lambda params: Remembering(params, 1e-3), num_tasks=recipe.num_tasks, **options
    )


def gradients(kind: str, dtype: torch.dtype) -> Tensor:
    """Return the first meta-gradients of a training."""
    trainer = trainer_of(*KINDS[kind], dtype, by_es=kind == "ES", tracker=None)
    trainer.run(STEPS)
    assert isinstance(trainer.meta_optimizer, Remembering)
    return torch.stack(trainer.meta_optimizer.grads)


def goes_on(kind: str, path: Path, steps: int) -> Tensor:
    """Return the theta of a training that goes on from a checkpoint, or begins one."""
    result = trainer_of(*KINDS[kind], torch.float32, tracker=None, checkpoint=path).run(steps)
    return torch.cat([x.flatten() for x in result.theta.values()])


def seconds(name: str, sets: list[str], steps: int) -> tuple[float, int]:
    """Return how long a meta-step takes, the median after the first two, and how many numbers theta has."""
    times = Times()
    trainer = trainer_of(name, sets, torch.float32, tracker=times)
    trainer.run(steps)
    return statistics.median(times.ms[2:] or [0.0]) / 1e3, sum(x.numel() for x in trainer.theta.values())


def sums(num: int, repeats: int = 50) -> float:
    """Return the seconds of an all-reduce of so many float64 numbers, the least of several medians."""
    if dist.get_world_size() == 1:
        return 0.0
    found = []
    for _ in range(5):
        took = []
        for _ in range(repeats):
            vector = torch.zeros(num, dtype=torch.float64)
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(vector)
            took.append(time.perf_counter() - began)
        found.append(statistics.median(took))
    return min(found)


def side_by_side(size: int, run: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the first of as many processes returns."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.pt"
        started = [
            context.Process(target=_work, args=(rank, size, store.port, answer, run, arguments)) for rank in range(size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        return torch.load(answer)


def _work(rank: int, size: int, port: int, answer: Path, run: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[rank % len(processors)]})
    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", rank=rank, world_size=size, store=store, timeout=timedelta(seconds=600))
    found = run(*arguments)
    if rank == 0:
        torch.save(found, answer)
    dist.destroy_process_group()


def exact() -> None:
    """Print how far meta-gradients are from those of one process, relative to their length: the first, at the same
    theta, and the largest of some, behind meta-steps that differ by rounding, which long inner loops let grow."""
    print("| estimator | dtype | 2 processes | 3 | 4 |\n|---|---|---|---|---|")
    for kind in KINDS:
        for dtype in (torch.float64, torch.float32):
            expected = side_by_side(1, gradients, kind, dtype)
            row = []
            for size in (2, 3, 4):
                found = side_by_side(size, gradients, kind, dtype)
                away = (found - expected).norm(dim=1) / expected.norm(dim=1)
                row.append(f"{float(away[0]):.1e}, {float(away.max()):.1e}")
            print(f"| {kind} | {str(dtype)[6:]} | " + " | ".join(row) + " |", flush=True)


def resume() -> None:
    """Print how far a run that goes on with 2, 1 and 4 processes ends from one process's."""
    print("| estimator | largest difference of theta |\n|---|---|")
    for kind in ("truncated", "PES"):
        with tempfile.TemporaryDirectory() as folder:
            for size, steps in ((2, 4), (1, 7), (4, 12)):
                found = side_by_side(size, goes_on, kind, Path(folder) / "parts.pt", steps)
            expected = side_by_side(1, goes_on, kind, Path(folder) / "once.pt", 12)
        print(f"| {kind} | {float((found - expected).abs().max()):.1e} |", flush=True)


def speed(steps: int, repeats: int) -> None:
    """Print the seconds of a meta-step on one process and on two, in turns, the least of each."""
    print("| training | 1 process (ms) | 2 (ms) | times as fast |\n|---|---|---|---|")
    for label, (name, sets, num_tasks) in SPEED.items():
        found: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(repeats):
            for size, times in found.items():
                times.append(side_by_side(size, seconds, name, [*sets, f"num_tasks={num_tasks}"], steps)[0])
        one, two = min(found[1]), min(found[2])
        print(f"| {label} | {1e3 * one:.1f} | {1e3 * two:.1f} | {one / two:.2f} |", flush=True)


def project(steps: int) -> None:
    """Print what N processes would bring with k tasks each, from times that are measured on one and two.

    ``T(N) = f + k t + 2 (N - 1) (a + b d / N) + ceil(log2 N) (a + b d)``: the part of a meta-step that all repeat, f;
    that of a task, t; an all-reduce of d numbers in a ring, and the broadcast of theta in a tree, with a message's
    latency a and the seconds of a number b. f and t are a line through the times of the tasks of ``SPEED`` and of half
    as many on one process; a and b one through all-reduces of 64 and 2^20 numbers on two. k is one, and that half.
    """
    small, large = (side_by_side(2, sums, num) for num in (64, 2**20))
    latency, each = small / 2, (large - small) / 2**20
    print(f"All-reduce on two processes: {1e6 * small:.0f} us, and {1e9 * each:.2f} ns a number.\n")
    print("| training | fixed (ms) | a task (ms) | tasks each | 8 | 64 processes, times as fast as one |")
    print("|---|---|---|---|---|---|")
    for label, (name, sets, num_tasks) in SPEED.items():
        (half, size), (whole, _) = (
            side_by_side(1, seconds, name, [*sets, f"num_tasks={num}"], steps) for num in (num_tasks // 2, num_tasks)
        )
        task = (whole - half) / (num_tasks - num_tasks // 2)
        fixed = max(whole - num_tasks * task, 0.0)
        for own in (1, num_tasks // 2):
            row = []
            for num in (8, 64):
                ring = 2 * (num - 1) * (latency + each * size / num)
                together = fixed + own * task + ring + math.ceil(math.log2(num)) * (latency + each * size)
                row.append((fixed + num * own * task) / together)
            numbers = " | ".join(f"{x:.1f}" for x in row)
            print(f"| {label} | {1e3 * fixed:.1f} | {1e3 * task:.2f} | {own} | {numbers} |", flush=True)


def main() -> int:
    """Print the tables that are asked for; all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="exact, resume, speed, project; default: all")
    parser.add_argument("--steps", type=int, default=12, help="meta-steps that are timed (default 12)")
    parser.add_argument("--repeats", type=int, default=3, help="of each time, of which the least counts (default 3)")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], None]] = {
        "exact": exact,
        "resume": resume,
        "speed": lambda: speed(arguments.steps, arguments.repeats),
        "project": lambda: project(arguments.steps),
    }
    for name in arguments.parts or parts:
        parts[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
