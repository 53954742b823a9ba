"""On a GPU: ``python benchmarks/results_gpu.py [exact] [steps] [meta] [--device cuda]``, by default all (5 minutes).

``exact``: how far every recipe's meta-gradient there is from the CPU's, in float64 and float32. ``steps``: the step of
every packaged optimizer beside Adam's, by size. ``meta``: one meta-gradient beside what others take for it on the same
GPU, and beside one thread of the CPU. Times are wall clock, the GPU waited for, the least of several rounds; memory is
the most that torch's allocator held on the GPU beside what was there before. Tables go to standard output as Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import workloads_lstm, workloads_maml
from benchmarks.networks import Problem, Stored
from benchmarks.results_plug_in import ADAM, CELL, SIZES, competitors, matrix
from benchmarks.suite import Call, Size
from learnedopt import Execution, FirstOrder, InnerLoop, SumOfLosses, Unrolled, recipes
from learnedopt import optimizers as rules
from learnedopt.core import tree
from learnedopt.recipes import Recipe, smoke
from learnedopt.run import build

MB = 1e6
ROUNDS, SECONDS, LONG = 3, 0.5, 2.0
"""Of timing: rounds, seconds a round, and how long a call is that is not warmed up again."""
LARGE = 100_000_000
FEW_SHOT = {"5-way 1-shot, 32 tasks, one step": Size(steps=1, tasks=32), "the same, 5 steps": Size(steps=5, tasks=32)}
LSTM = Size(steps=20, tasks=1)


def synchronized(device: torch.device) -> None:
    """Wait for what the device was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the least wall time of a call over the rounds, each long enough to be told from none."""
    for _ in range(3):
        first = time.perf_counter()
        call()
        synchronized(device)
        if time.perf_counter() - first > LONG:
            break
    times = []
    for _ in range(ROUNDS):
        synchronized(device)
        begun, count = time.perf_counter(), 0
        while count < 1 or (time.perf_counter() - begun < SECONDS and count < 200):
            call()
            count += 1
        synchronized(device)
        times.append((time.perf_counter() - begun) / count)
    return 1e3 * min(times)


def peak(call: Callable[[], Any], device: torch.device) -> float:
    """Return the most megabytes that a call takes on the device; NaN off a GPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MB


def meta_trainings() -> list[str]:
    """Return the recipes that are meta-trainings."""
    return [name for name in recipes.names() if isinstance(recipes.make(name), Recipe)]


def gradient(name: str, device: str, dtype: str) -> dict[str, Tensor]:
    """Return the first meta-gradient of a recipe in its small form."""
    recipe = smoke(recipes.make(name))
    assert isinstance(recipe, Recipe)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    torch.set_default_dtype(kind)
    try:
        loop = build(replace(recipe, execution=replace(recipe.execution, device=device, dtype=kind)))[0]
        generator = torch.Generator().manual_seed(0)
        theta = {k: v.to(device, kind).requires_grad_() for k, v in loop.init_theta(generator).items()}
        tasks = loop.family.sample(recipe.num_tasks, generator)
        carry = recipe.estimator.start(loop, theta, tasks, generator)
        estimate = recipe.estimator.estimate(loop, theta, recipe.objective, carry)
    finally:
        torch.set_default_dtype(torch.float32)
    return {k: v.detach().cpu().double() for k, v in estimate.grads.items()}


def distance(there: dict[str, Tensor], here: dict[str, Tensor]) -> float:
    """Return the largest ``|a - b| / |b|`` over meta-parameters."""
    found = [float((there[k] - b).norm() / b.norm()) for k, b in here.items() if float(b.norm()) > 0]
    return max(found, default=0.0)


def exact(device: torch.device) -> None:
    """Print how far meta-gradients on the device are from the CPU's."""
    print("| recipe, small | float64 | float32 |\n|---|---|---|", flush=True)
    for name in meta_trainings():
        cells = []
        for dtype in ("float64", "float32"):
            try:
                cells.append(f"{distance(gradient(name, str(device), dtype), gradient(name, 'cpu', dtype)):.1e}")
            except Exception as error:  # noqa: BLE001 - a row says what happened, and the others are measured
                cells.append(f"{type(error).__name__}: {error}".partition("\n")[0])
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def on_device(param: Tensor, device: torch.device) -> Tensor:
    """Return a parameter of the same values, with its gradient, on the device."""
    there = torch.nn.Parameter(param.detach().to(device))
    assert param.grad is not None
    there.grad = param.grad.to(device)
    return there


def steps(device: torch.device, sizes: tuple[int, ...]) -> None:
    """Print the time and memory of steps by size."""
    compared = {k: v for k, v in competitors().items() if k != CELL}
    for size in sizes:
        print(f"\n{size:,} parameters, {size * 4 / MB:.3g} MB in float32:\n")
        print("| | ms a step | of Adam's (foreach) | peak MB |\n|---|---|---|---|", flush=True)
        adam = None
        for label, made in compared.items():
            try:
                optimizer = made(on_device(matrix(size), device))
                ms = milliseconds(optimizer.step, device)
                adam = ms if label == ADAM else adam
                taken = peak(optimizer.step, device)
                print(f"| {label} | {ms:.3g} | {ms / (adam or ms):.3g} | {taken:.4g} |", flush=True)
            except torch.OutOfMemoryError:
                print(f"| {label} | out of memory | | |", flush=True)
            optimizer = None


def there(pose: Callable[[Size], Problem], device: torch.device) -> Callable[[Size], Problem]:
    """Return the problem with network and data on the device."""

    def posed(size: Size) -> Problem:
        module, forward, train, valid = pose(size)
        return Problem(module.to(device), forward, *(tree.tree_map(lambda x: x.to(device), x) for x in (train, valid)))

    return posed


def lstm(size: Size, device: torch.device) -> Call:
    """Return the meta-training step of the LSTM on the MLP, on the device."""
    problem = there(workloads_lstm.mlp_problem, device)(size)
    family, rule = Stored(problem, fresh=True), rules.make("lstm")
    loop = InnerLoop(family, rule, Execution(device=device))
    theta = {k: v.to(device) for k, v in workloads_lstm.trained(size).items()}
    tasks = family.sample(size.tasks, torch.Generator())

    def call() -> list[Tensor]:
        return list(FirstOrder(size.steps).estimate(loop, theta, SumOfLosses(), loop.start(tasks)).grads.values())

    return call


def meta(device: torch.device) -> None:
    """Print one meta-gradient's time and memory, ours and others'."""
    cpu, pose = torch.device("cpu"), workloads_maml.conv_problem
    on_gpu = there(pose, device)
    ours = workloads_maml.ours(on_gpu, Unrolled, Execution(device=device))
    compiled = workloads_maml.ours(on_gpu, Unrolled, Execution(compile=True, device=device))
    others = {
        "higher": workloads_maml.higher,
        "torchopt": workloads_maml.torchopt,
        "plain autograd": workloads_maml.plain,
    }
    for label, size in FEW_SHOT.items():
        rows = {"learnedopt": ours, **{name: peer(on_gpu) for name, peer in others.items()}}
        rows |= {"learnedopt, compiled": compiled} if size.steps == 1 else {}
        table(f"MAML on four blocks of 64 filters, {label}", _of_size(rows, size), device)
    size = FEW_SHOT[next(iter(FEW_SHOT))]
    on_cpu = _of_size({"learnedopt, one thread": workloads_maml.ours(pose)}, size)
    table(f"MAML on four blocks of 64 filters, {next(iter(FEW_SHOT))}, on the CPU", on_cpu, cpu)
    table("LSTM, one meta-step of 20 steps on the MLP 784-20-10", {"learnedopt": lambda: lstm(LSTM, device)}, device)
    table("the same on the CPU", {"learnedopt, one thread": lambda: lstm(LSTM, cpu)}, cpu)


def _of_size(rows: dict[str, Callable[[Size], Call]], size: Size) -> dict[str, Callable[[], Call]]:
    return {label: lambda build=build: build(size) for label, build in rows.items()}


def table(title: str, rows: dict[str, Callable[[], Call]], device: torch.device) -> None:
    """Print one workload's table."""
    print(f"\n{title}:\n\n| | ms | peak MB |\n|---|---|---|", flush=True)
    for label, make in rows.items():
        try:
            call = make()
            print(f"| {label} | {milliseconds(call, device):.3g} | {peak(call, device):.4g} |", flush=True)
        except ImportError as error:
            print(f"| {label} | not installed ({error.name}) | |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="exact, steps, meta; by default all")
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--sizes", default=(*SIZES, LARGE), type=lambda x: tuple(map(int, x.split(","))))
    asked = parser.parse_args()
    if unknown := [part for part in asked.parts if part not in ("exact", "steps", "meta")]:
        parser.error(f"there is no part {unknown[0]!r}; the parts are exact, steps and meta")
    if asked.device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu tries the program out")
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name(asked.device) if asked.device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    for part in asked.parts or ("exact", "steps", "meta"):
        {"exact": exact, "steps": lambda d: steps(d, asked.sizes), "meta": meta}[part](asked.device)


if __name__ == "__main__":
    main()
