"""The steps of frozen learned optimizers, as a ``torch.optim.Optimizer`` takes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import peers_jax
from benchmarks.suite import Call, Competitor, Size, Workload
from benchmarks.workloads_lstm import cells_of, step_of, trained, weights_of, zeros
from learnedopt import LearnedOptimizer, UpdateRule
from learnedopt import optimizers as rules
from learnedopt.optimizers.bases.wrapper import Wrapper

CHUNK = 16384  # coordinates that a chunked step takes at a time


def _frozen(size: Size) -> tuple[nn.Parameter, Tensor]:
    """Return a parameter of ``units`` coordinates, all zero so that what moves it can be compared, and a gradient."""
    grads = torch.randn(size.units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameter = nn.Parameter(torch.zeros(size.units, dtype=size.torch_dtype))
    parameter.grad = grads.to(size.torch_dtype)
    return parameter, parameter.grad


def _by(make: Callable[[nn.Parameter, Size], torch.optim.Optimizer]) -> Callable[[Size], Call]:
    """Return the step of a ``torch.optim.Optimizer``; the memory that it keeps is there before."""

    def build(size: Size) -> Call:
        parameter, _ = _frozen(size)
        optimizer = make(parameter, size)
        optimizer.step()

        def call() -> list[Tensor]:
            optimizer.step()
            return [parameter]

        return call

    return build


def cell_step(chunk: int | None) -> Callable[[Size], Call]:
    """Return the step written with ``nn.LSTMCell``, on all coordinates or on a chunk of them at a time."""

    def build(size: Size) -> Call:
        (parameter, grads), cells = _frozen(size), cells_of(trained(size))
        states = [tuple(h.clone() for h in pair) for pair in zeros(size.units, parameter.detach())]
        length = chunk or size.units

        @torch.no_grad()
        def call() -> list[Tensor]:
            for low in range(0, size.units, length):
                piece = slice(low, low + length)
                deltas, new = step_of(cells, grads[piece], [(h[piece], c[piece]) for h, c in states])
                for old_pair, new_pair in zip(states, new, strict=True):
                    for old, value in zip(old_pair, new_pair, strict=True):
                        old[piece] = value
                parameter[piece] += deltas
            return [parameter]

        def whole() -> list[Tensor]:
            nonlocal states
            with torch.no_grad():
                deltas, new = step_of(cells, grads, states)  # type: ignore[arg-type]
                states = new  # type: ignore[assignment]
                parameter.add_(deltas)
            return [parameter]

        taken = whole if chunk is None else call
        taken()
        return taken

    return build


def jax_step(size: Size) -> Call:
    """Return the step in JAX."""
    _, grads = _frozen(size)
    return peers_jax.frozen_lstm(grads, weights_of(cells_of(trained(size))), size)


def _learned(parameter: nn.Parameter, size: Size) -> torch.optim.Optimizer:
    return LearnedOptimizer([parameter], (rules.make("lstm"), trained(size)), guard=False)


def frame_step(rule: UpdateRule) -> Callable[[Size], Call]:
    """Return the step of a rule that tells matrices and vectors apart, on one square matrix, at its start."""

    def build(size: Size) -> Call:
        theta = rule.init_theta(torch.Generator().manual_seed(0))
        theta = {name: value.to(size.torch_dtype) for name, value in theta.items()}
        return _on_matrix(lambda named: LearnedOptimizer(named, (rule, theta), num_steps=10_000, guard=False), size)

    return build


def adam_step(size: Size) -> Call:
    """Return Adam's step on that matrix."""
    return _on_matrix(lambda named: torch.optim.Adam([p for _, p in named], lr=1e-3, foreach=True), size)


def _on_matrix(make: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer], size: Size) -> Call:
    side = math.isqrt(size.units)
    values = torch.randn(2, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, grad = values.to(size.torch_dtype)
    parameter = nn.Parameter(start.clone())
    parameter.grad = grad.clone()
    optimizer = make([("weight", parameter)])
    for _ in range(2):  # the second step is in place
        optimizer.step()

    def call() -> list[Tensor]:
        optimizer.step()
        return [parameter.detach() - start]

    return call


WORKLOADS = {
    "lstm-step": Workload(
        "Step of a trained LSTM optimizer, 1,000,000 parameters",
        "One step; memory is what it takes beside the parameters and what the optimizer remembers. Adam for scale.",
        Size(units=1_000_000), Size(units=5_000),
        {
            "learnedopt": Competitor(_by(_learned)),
            "nn.LSTMCell": Competitor(cell_step(None)),
            f"nn.LSTMCell, chunks of {CHUNK:,}": Competitor(cell_step(CHUNK)),
            "JAX, jitted": Competitor(jax_step, "jax", warm_at_size=True),
            "torch.optim.Adam": Competitor(
                _by(lambda parameter, size: torch.optim.Adam([parameter], lr=1e-3)), compared=False
            ),
        },
        "nn.LSTMCell",
    ),
    "normalised-step": Workload(
        "Step of the normalised rules and of the general one, a matrix of 1,000 × 1,000",
        "One step; memory is what it takes beside the parameters and what the optimizer remembers. All but the first "
        "two do other jobs, and are here for scale.",
        Size(units=1_000_000), Size(units=5_000),
        {
            "learnedopt, normalised": Competitor(frame_step(rules.Normalised())),
            "normalised in pure torch": Competitor(frame_step(Wrapper(rules.Normalised()))),
            **{
                f"learnedopt, {name}": Competitor(frame_step(rule), compared=False)
                for name, rule in {
                    "normalised-mlp": rules.NormalisedMLP(),
                    "normalised-lstm": rules.NormalisedLSTM(),
                    "general": rules.General(),
                    "general, in bfloat16": rules.General(bfloat16=True),
                    "general, not orthogonalised": rules.General(orthogonalise=False),
                }.items()
            },
            "torch.optim.Adam, foreach": Competitor(adam_step, compared=False),
        },
        "normalised in pure torch",
    ),
}  # fmt: skip
