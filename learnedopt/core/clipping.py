"""The length of a meta-gradient, and its scaling to a limit, for every finite gradient of every precision."""

from __future__ import annotations

import math
from typing import NamedTuple

from learnedopt.core.containers import is_dict
from learnedopt.core.tree import Theta


class Norm(NamedTuple):
    """The Euclidean length of all tensors together, ``mantissa * 2**exponent``.

    Kept in two numbers, it is finite wherever the tensors are: their squares would overflow from 1e19 on in float32,
    and from 1e154 on in float64. Where a tensor is not finite, the mantissa is not.
    """

    mantissa: float
    exponent: int

    @property
    def value(self) -> float:
        """The length as one number; infinite where it exceeds every float."""
        try:
            return math.ldexp(self.mantissa, self.exponent)
        except OverflowError:
            return math.inf


def norm_of(grads: Theta) -> Norm:
    """Return the length of all gradients together, from sums in float64."""
    peaks = [float(g.abs().max()) for g in grads.values() if g.numel()]
    if not all(map(math.isfinite, peaks)):
        return Norm(math.nan if any(map(math.isnan, peaks)) else math.inf, 0)
    # A power of two changes no digit of what it scales. Below 2**-1000 its inverse would be infinite.
    exponent = max(math.frexp(max(peaks, default=0.0))[1], -1000)
    total = sum(float((g.double() * 2.0**-exponent).square().sum()) for g in grads.values())
    return Norm(math.sqrt(total), exponent)


def clip(grads: Theta, norm: Norm, limit: float | None) -> Theta:
    """Return copies of the gradients, scaled down to the length ``limit`` where ``norm``, theirs, is longer."""
    if limit is None or norm.value <= limit:
        return {k: g.clone() for k, g in grads.items()}
    # In this order no factor overflows or vanishes, whatever the length.
    scale, unit = limit / norm.mantissa, 2.0**-norm.exponent
    return {k: (g.double() * unit * scale).to(g.dtype) for k, g in grads.items()}


def require_grads(estimator: object, grads: object, theta: Theta) -> None:
    """Raise ValueError unless there is one gradient, shaped as it, for every meta-parameter."""
    wanted = {k: tuple(v.shape) for k, v in theta.items()}
    found = {k: tuple(g.shape) for k, g in grads.items()} if is_dict(grads) else type(grads).__name__
    if found != wanted:
        raise ValueError(
            f"{type(estimator).__name__}.estimate must return one gradient for every meta-parameter, {wanted}, got "
            f"{found}"
        )
