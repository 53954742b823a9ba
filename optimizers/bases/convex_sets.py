"""Convex sets that parameters are kept in, as their Euclidean projections."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch

from learnedopt.core import tree
from learnedopt.core.tree import Params
from learnedopt.optimizers.bases.hand_designed import check_number
from learnedopt.optimizers.bases.precision import like, wide


class ConvexSet(ABC):
    """A closed convex set of ONE task's parameters; calling it projects onto it, and works under vmap."""

    @abstractmethod
    def __call__(self, params: Params) -> Params:
        """Return the closest point of the set by the Euclidean distance of all parameters together."""


@final
@dataclass(frozen=True)
class Ball(ConvexSet):
    """``‖x‖ <= radius`` around the origin, the norm over all of a task's parameters together."""

    radius: float

    def __post_init__(self) -> None:
        check_number("Ball", "radius", self.radius, 0.0, math.inf)
        if self.radius == 0:
            raise ValueError("Ball: radius=0 leaves one point and nothing to learn; pass a positive radius")

    def __call__(self, params: Params) -> Params:
        """Scale what lies outside down to the radius."""
        squared = torch.stack([wide(p).square().sum() for p in params.values()]).sum()
        outside = squared > self.radius**2
        # The root's derivative is infinite at 0, so it only ever sees squares that it is used for.
        scale = torch.where(outside, self.radius * torch.where(outside, squared, 1.0).rsqrt(), 1.0)
        return {k: like(scale.to(wide(p).dtype) * wide(p), p) for k, p in params.items()}


@final
@dataclass(frozen=True)
class Box(ConvexSet):
    """``low <= x_i <= high`` for every entry."""

    low: float
    high: float

    def __post_init__(self) -> None:
        check_number("Box", "low", self.low, -math.inf, math.inf)
        check_number("Box", "high", self.high, -math.inf, math.inf)
        if not self.low < self.high:
            raise ValueError(f"Box: low={self.low!r} is not below high={self.high!r}; the box is empty, or a point")

    def __call__(self, params: Params) -> Params:
        """Clamp every entry."""
        return {k: p.clamp(self.low, self.high) for k, p in params.items()}


@final
@dataclass(frozen=True)
class Simplex(ConvexSet):
    """Distributions over all entries of a task's parameters together: not negative, with the sum 1.

    Args:
        mixing: part of the uniform distribution that is in all of them, in [0, 1): the set is then ``(1 - mixing) p +
            mixing / dim``, on which KL is finite between any two points.
    """

    mixing: float = 0.0

    def __post_init__(self) -> None:
        check_number("Simplex", "mixing", self.mixing, 0.0, 1.0)

    def __call__(self, params: Params) -> Params:
        """Shift all entries by one number and cut off at the least (Duchi et al. 2008, figure 1)."""
        flat = torch.cat([wide(p).reshape(-1) for p in params.values()])
        count = flat.shape[0]
        least, total = self.mixing / count, 1.0 - self.mixing
        falling = (flat - least).sort(descending=True).values
        ranks = torch.arange(1, count + 1, device=flat.device, dtype=flat.dtype)
        shifts = (falling.cumsum(0) - total) / ranks
        last = (falling > shifts).sum().clamp(min=1) - 1  # the first always is, but for what is not finite
        shift = shifts.gather(0, last.reshape(1))
        projected = (flat - least - shift).clamp(min=0) + least
        return dict(zip(params, _unravel(projected, params), strict=True))


def _unravel(flat: torch.Tensor, params: Params) -> list[torch.Tensor]:
    pieces = torch.split(flat, [p.numel() for p in params.values()])
    return [like(piece.reshape(p.shape), p) for piece, p in zip(pieces, params.values(), strict=True)]


def outside(convex_set: ConvexSet, params: Params) -> float:
    """Return how far the farthest of batched parameters lies from the set, relative to one more than its length."""
    inside = torch.func.vmap(convex_set)(tree.detach(params))
    gap, length = (
        tree.row_lengths(wide(tree.ravel(list(each.values()))))
        for each in ({k: params[k].detach() - inside[k] for k in params}, inside)
    )
    return float((gap / (1 + length)).max())
