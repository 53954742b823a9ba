"""The step of a trained LSTM optimizer, as a ``torch.optim.Optimizer`` takes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import peers_jax
from benchmarks.suite import Call, Competitor, Size, Workload
from benchmarks.workloads_lstm import cells_of, step_of, trained, weights_of, zeros
from learnedopt import LearnedOptimizer
from learnedopt import optimizers as rules

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
    return LearnedOptimizer([parameter], (rules.make("lstm"), trained(size)))


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
}  # fmt: skip
