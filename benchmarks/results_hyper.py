"""What learning rates while training costs a step, beside the optimizer whose rates are fixed, and beside torch's Adam.

Run ``python benchmarks/results_hyper.py`` (a minute on a free core). Methods take turns in short rounds, and medians of
rounds are told, so that what else the machine does falls on all alike. The studies of what is learned are recipes:
``python train_meta.py hyper-fashion`` and ``python train_meta.py optimistic-conv``.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from learnedopt import (
    AcceptIfBetter,
    DualAveraging,
    FinalLoss,
    HyperOptimizer,
    LearnedOptimizer,
    PresentGradient,
    SumOfLosses,
    UpdateRule,
)
from learnedopt.optimizers import Adam, Reparametrized, per_tensor

NETS = {"196-32-10": (196, 32, 10), "196-512-512-10": (196, 512, 512, 10)}
BATCH, ROUNDS, STEPS = 32, 30, 20


def net(widths: tuple[int, ...]) -> nn.Sequential:
    """Return an MLP, always the same."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rule(model: nn.Module) -> UpdateRule:
    """Return Adam's direction at a rate of its own for each tensor, kept as its logarithm."""
    template = {k: p.detach() for k, p in model.named_parameters()}
    return Reparametrized(per_tensor(Adam(1e-3, learn=("lr",)), template), {"*/lr": "log"})


def meta_adam(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Return what moves theta."""
    return torch.optim.Adam(params, 0.01)


def optimistic(model: nn.Module) -> HyperOptimizer:
    """Return one whose meta-optimizer reads the present gradient's hint."""
    hint = PresentGradient()
    return HyperOptimizer(
        model.named_parameters(),
        rule(model),
        hint=hint,
        meta_optimizer=lambda p: DualAveraging(p, 0.01, hint=hint, form="adagrad", averaged=False),
    )


METHODS: dict[str, Callable[[nn.Module], torch.optim.Optimizer | None]] = {
    "the gradient alone": lambda model: None,
    "torch's Adam": lambda model: torch.optim.Adam(model.parameters(), 1e-3),
    "fixed rates": lambda model: LearnedOptimizer(
        model.named_parameters(), (rule(model), rule(model).init_theta(torch.Generator())), guard=False
    ),
    "plain": lambda model: HyperOptimizer(
        model.named_parameters(), rule(model), 1, FinalLoss(), meta_optimizer=meta_adam
    ),
    "optimistic": optimistic,
    "null steps": lambda model: HyperOptimizer(
        model.named_parameters(), rule(model), meta_optimizer=meta_adam, guard=AcceptIfBetter()
    ),
    "windows of 5, sum of losses": lambda model: HyperOptimizer(
        model.named_parameters(), rule(model), 5, SumOfLosses(), meta_optimizer=meta_adam
    ),
}


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Callable[[], object]:
    """Return a function that takes one step of training on a fixed batch."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(BATCH, next(model.parameters()).shape[1], generator=generator)
    targets = torch.randint(10, (BATCH,), generator=generator)

    def closure() -> Any:
        model.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss.detach()

    return closure if optimizer is None else lambda: optimizer.step(closure)


def medians(widths: tuple[int, ...]) -> dict[str, float]:
    """Return the microseconds of a step by method."""
    steps = {}
    for name, make in METHODS.items():
        model = net(widths)
        steps[name] = step_of(model, make(model))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            if turn:  # the first warms up
                times[name].append((time.perf_counter() - began) / STEPS * 1e6)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    """Print a table for each net."""
    torch.set_num_threads(1)
    for name, widths in NETS.items():
        found = medians(widths)
        gradient = found["the gradient alone"]
        print(f"\n| {name}, batch {BATCH} | µs a step | of 2 × fixed rates + a gradient | of 2 × Adam + a gradient |")
        print("|---|---|---|---|")
        for method, cost in found.items():
            shares = (cost / (2 * found[base] + gradient) for base in ("fixed rates", "torch's Adam"))
            print(f"| {method} | {cost:.0f} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
