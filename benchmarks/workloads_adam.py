"""A long unroll: all hyperparameters of Adam, learned through 1,000 inner steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers_jax
from benchmarks.networks import Problem, Stored, at
from benchmarks.suite import Call, Competitor, Size, Workload
from benchmarks.workloads_lstm import mlp_problem
from learnedopt import InnerLoop, SumOfLosses, Unrolled
from learnedopt import optimizers as rules

STEPS, SEGMENT = 1000, 32
BATCHES = 20  # that the steps go through again and again: a thousand of them would be most of the memory
START: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-4}


class Cycled(Stored):
    """Batches in a cycle."""

    def batch(self, tasks, step, split):
        """Return the step's batch."""
        return super().batch(tasks, step % BATCHES, split)


def _problem(size: Size) -> Problem:
    return mlp_problem(Size(BATCHES - 1, size.tasks, size.units, size.dtype))


def ours(segment: int | None) -> Callable[[Size], Call]:
    """Return how this library computes it."""

    def build(size: Size) -> Call:
        family = Cycled(_problem(size), fresh=True)
        loop, tasks = InnerLoop(family, rules.make("adam", **START)), family.sample(size.tasks, torch.Generator())
        theta = {k: torch.tensor(v, dtype=size.torch_dtype) for k, v in START.items()}

        def call() -> list[Tensor]:
            estimate = Unrolled(size.steps, segment=segment).estimate(loop, theta, SumOfLosses(), loop.start(tasks))
            return [estimate.grads[k] for k in START]

        return call

    return build


def plain(size: Size) -> Call:
    """Return the loop that one writes by hand; coordinates whose gradients were all zero do not move."""
    problem = _problem(size)

    def call() -> list[Tensor]:
        hyper = [torch.tensor(v, dtype=size.torch_dtype, requires_grad=True) for v in START.values()]
        params: Sequence[Tensor] = [p.clone().requires_grad_() for p in problem.start.values()]
        means, squares = ([torch.zeros_like(p) for p in params] for _ in range(2))
        losses = []
        for step in range(size.steps):
            losses.append(problem.loss(params, at(problem.train, 0, step % BATCHES)))
            grads = torch.autograd.grad(losses[-1], params, create_graph=True)
            params, means, squares = _moved(hyper, params, means, squares, grads, step + 1)
        losses.append(problem.loss(params, at(problem.train, 0, size.steps % BATCHES)))
        return list(torch.autograd.grad(torch.stack(losses[1:]).sum(), hyper))

    return call


def _moved(
    hyper: Sequence[Tensor], params: Sequence[Tensor], means: list[Tensor], squares: list[Tensor],
    grads: Sequence[Tensor], count: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    lr, beta1, beta2, eps = hyper
    means = [beta1 * m + (1 - beta1) * g for m, g in zip(means, grads, strict=True)]
    squares = [beta2 * v + (1 - beta2) * g * g for v, g in zip(squares, grads, strict=True)]
    roots = []
    for v in squares:
        positive = v > 0  # the root's derivative at zero is infinite
        roots.append(torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0))
    correction1, correction2 = 1 - beta1**count, (1 - beta2**count).sqrt()
    pairs = zip(params, means, roots, strict=True)
    return [p - lr * (m / correction1) / (r / correction2 + eps) for p, m, r in pairs], means, squares


def jax(size: Size, remat: bool) -> Call:
    """Return the same in JAX."""
    problem = _problem(size)
    start, data = list(problem.start.values()), at(problem.train, 0)
    return peers_jax.adam(start, data, list(START.values()), size, remat=remat)


WORKLOADS = {
    "adam-1000": Workload(
        f"Learned Adam, MLP 784-20-10, {STEPS:,} steps",
        "Learning rate, both decays and epsilon are learned, from the sum of the losses; batches of 128 random images. "
        "A tape is what one inner step adds: the difference of the peaks of 2 steps and of 1.",
        Size(steps=STEPS),
        Size(steps=40),
        {
            f"learnedopt, segments of {SEGMENT}": Competitor(ours(SEGMENT)),
            "learnedopt": Competitor(ours(None)),
            "plain autograd": Competitor(plain),
            **peers_jax.rows(jax),
        },
        "plain autograd",
        tape="learnedopt",
    )
}
