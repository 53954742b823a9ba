"""The step that the rules ``normalised``, ``normalised-mlp`` and ``normalised-lstm`` share, and its 24 numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases import frame
from learnedopt.optimizers.bases.frame import RELATIVE, TINY, Decays, Memory, Moments
from learnedopt.optimizers.bases.joined import ALL, Layout
from learnedopt.optimizers.bases.kinds import Kind, kinds_of

Added: TypeAlias = Callable[[Moments, Tensor, Tensor, Layout], Tensor]
"""Returns what joins the brackets, given the moments of all tensors side by side, v's means, iterates and layout."""

_RATE_OF = {
    Kind.FIRST: 0, Kind.EMBEDDING: 0, Kind.HIDDEN_BIAS: 1, Kind.GAIN: 1, Kind.MIDDLE: 2, Kind.LAST: 2,
    Kind.LAST_BIAS: 3,
}  # fmt: skip


def init_theta(lr: float, device: torch.device) -> Theta:
    """Return the start: an Adam of rate ``lr`` with a warm-up, a decay and averaged iterates."""

    def numbers(*values: float) -> Tensor:
        return torch.tensor(values, device=device)

    return {
        "log_rate": torch.tensor(math.log(lr), device=device),
        "schedule": numbers(-0.6, 0.4, 0.3, 0.3, 0.0, -1.0, -1.6),
        "kind_rate": numbers(0.0, 0.0, 0.0, 0.0),
        "decay": numbers(1.6, 2.75, 2.5),
        "mix": numbers(0.25, 0.75, 0.0),
        "norm": numbers(1.0, 0.0, 0.0),
        "weight_decay": torch.tensor(-8.0, device=device),
        "averaging": numbers(0.0, -0.55),
    }


def theta_scale() -> dict[str, float | Tensor]:
    """Return how far each of them moves in a step of size one."""
    return {
        "log_rate": 0.2, "schedule": 0.25, "kind_rate": 0.25, "decay": 0.4, "mix": 0.15, "norm": 0.15,
        "weight_decay": 0.7, "averaging": torch.tensor([0.4, 0.5]),
    }  # fmt: skip


def step(
    theta: Theta, grads: Params, memory: Memory, params: Params, progress: Tensor, added: Added | None = None
) -> tuple[Params, Memory]:
    """Take the step that ``Normalised`` states, with what is ``added`` to the brackets."""
    layout = Layout(params)
    tensors, after = frame.moments(layout.join(grads), layout.join_memory(memory), Decays(*theta["decay"].unbind()))
    blend, power = theta["averaging"][1].sigmoid(), theta["averaging"][0].exp() - 1
    joined = layout.join(params)
    at, moments = frame.iterates(joined, after, blend)[ALL], tensors[ALL]
    rate = theta["log_rate"] + frame.schedule(theta["schedule"], progress)
    kinds = theta["kind_rate"][torch.tensor([rate_of(k.kind) for k in kinds_of(params).values()], device=at.device)]
    mean, rates = layout.spread(torch.stack([layout.means(moments.square), (rate + kinds).exp()])).unbind()
    bracket = frame.mixture(theta["mix"], moments) / denominator(theta["norm"], moments.square, mean, layout)
    bracket = bracket + theta["weight_decay"].exp() * at
    if added is not None:
        bracket = bracket + added(moments, mean, at, layout)
    deltas, after = frame.looked_at(joined, {ALL: at - rates * bracket}, after, blend, power)
    return layout.split(deltas, params), layout.split_memory(after, memory)


def rate_of(kind: Kind) -> int:
    """Return which of the numbers ``kind_rate`` is a tensor's."""
    return _RATE_OF[kind]


def denominator(exponents: Tensor, square: Tensor, mean: Tensor, layout: Layout) -> Tensor:
    """Return D of the bracket, (coordinates,), of v and of its mean over each coordinate's tensor."""
    floor = RELATIVE * mean + TINY
    square, mean = square + floor, mean + floor
    outer = torch.cat([factored(piece).reshape(-1) for piece in layout.pieces(square).values()])
    powers = exponents[0] * square.log() + exponents[2] * mean.log() + exponents[1] * outer.log()
    return (0.5 * powers).exp()


def factored(square: Tensor) -> Tensor:
    """Return the outer product of the means of rows and columns, over the mean; of a vector itself.

    What has more than two dimensions is a matrix (first, all others).
    """
    if square.ndim < 2:
        return square
    matrix = square.flatten(1)
    rows, columns = matrix.mean(1, keepdim=True), matrix.mean(0, keepdim=True)
    return (rows / rows.mean() * columns).reshape(square.shape)
