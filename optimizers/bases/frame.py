"""The frame of the normalised rules: a schedule of the horizon, momenta, second moments, an averaged iterate.

In it long meta-gradients stay small: the exact one through all of a hundred steps is as long as one of a few. All
functions see ONE task and work under ``torch.func.vmap``; all are finite and have finite derivatives at zero gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.precision import dtype_of, wide, zeros

KNOTS = (0.0, 0.04, 0.12, 0.3, 0.6, 0.85, 1.0)
"""Fractions of the horizon at which a schedule has a value of its own."""
TINY = 1e-20
"""Added to mean squares of gradients under a logarithm or in a denominator; squares of about 1e-10 are far smaller
than any that matters, and its inverse square root is finite in float32."""
RELATIVE = 1e-8
"""Of the mean of v, joins v: a coordinate that hardly ever has a gradient is not blown up."""


class Memory(NamedTuple):
    """What the rules of the frame keep of a task."""

    step: Tensor
    """Updates taken, a scalar."""
    first: Params
    """Running averages of the gradient at the shorter time scale, without a correction of their start at 0."""
    second: Params
    """The same at the longer one."""
    square: Params
    """Running averages of the gradient's square."""
    average: Params
    """The averaged iterate."""


class Moments(NamedTuple):
    """What a step reads of one tensor, all shaped as it: averages are corrected for their start at 0."""

    grad: Tensor
    first: Tensor
    second: Tensor
    square: Tensor

    @property
    def mean_square(self) -> Tensor:
        """The mean of ``square``, a scalar."""
        return self.square.mean()


class Decays(NamedTuple):
    """Logits of how much of each running average is kept in a step; scalars."""

    first: Tensor
    second: Tensor
    square: Tensor


def in_dtype(theta: Theta, params: Params) -> Theta:
    """Return theta in the dtype that the rules compute in."""
    dtype = dtype_of(params)
    return {name: value.to(dtype) for name, value in theta.items()}


def start(params: Params) -> Memory:
    """Return the memory of a run that begins at ``params``."""
    step = torch.zeros((), dtype=dtype_of(params), device=next(iter(params.values())).device)
    average = {name: wide(p).clone() for name, p in params.items()}
    return Memory(step, zeros(params), zeros(params), zeros(params), average)


def schedule(values: Tensor, progress: Tensor) -> Tensor:
    """Interpolate ``values`` at ``KNOTS``, (..., 7), linearly at ``progress``, (...) in [0, 1]."""
    knots = torch.tensor(KNOTS, dtype=values.dtype, device=values.device)
    gaps = knots.diff()
    ahead = ((progress.unsqueeze(-1) - knots[:-1]) / gaps).clamp(0.0, 1.0)  # how much of each gap is behind
    return values[..., 0] + (ahead * values.diff()).sum(-1)


def moments(grads: Params, memory: Memory, decays: Decays) -> tuple[dict[str, Moments], Memory]:
    """Update the running averages by the gradients; the iterate's average stays as it is."""
    keep = [d.sigmoid() for d in decays]
    # 1 - keep^n, in a form that loses no digits where keep is close to 1.
    # -softplus(-d) is logsigmoid(d), which torch cannot map over particles of several tasks on a GPU.
    share = [-torch.expm1(-(memory.step + 1) * functional.softplus(-d, threshold=50.0)) for d in decays]
    found: dict[str, Moments] = {}
    first: Params = {}
    second: Params = {}
    square: Params = {}
    for name, grad in grads.items():
        g = wide(grad)
        first[name] = keep[0] * memory.first[name] + (1 - keep[0]) * g
        second[name] = keep[1] * memory.second[name] + (1 - keep[1]) * g
        square[name] = keep[2] * memory.square[name] + (1 - keep[2]) * g * g
        found[name] = Moments(g, first[name] / share[0], second[name] / share[1], square[name] / share[2])
    return found, Memory(memory.step + 1, first, second, square, memory.average)


def mixture(weights: Tensor, tensor: Moments) -> Tensor:
    """Return the gradient and its two averages, weighted by ``weights`` (3,)."""
    return weights[0] * tensor.grad + weights[1] * tensor.first + weights[2] * tensor.second


def rms(x: Tensor, floor: float) -> Tensor:
    """Return the root of the mean square of a tensor's entries plus ``floor`` squared, a scalar."""
    return (x.square().mean() + floor * floor).sqrt()


def iterates(params: Params, memory: Memory, blend: Tensor) -> Params:
    """Return z where the parameters are y = z + blend (average - z): what the rule moves, where y is where it looks.

    It is not kept: whoever moves the parameters otherwise moves z along.
    """
    return {name: (wide(p) - blend * memory.average[name]) / (1 - blend) for name, p in params.items()}


def looked_at(params: Params, moved: Params, memory: Memory, blend: Tensor, power: Tensor) -> tuple[Params, Memory]:
    """Take the iterate into its average, and return how far the parameters are from where the next gradient is taken.

    After the n-th step::

        average <- average + (1 + power) / (n + power) (z - average),    y = z + blend (average - z)

    A power of 0 weights all iterates alike, 1 the later ones linearly more. ``memory`` counts the n steps already.
    """
    share = (1 + power) / (memory.step + power)
    deltas: Params = {}
    average: Params = {}
    for name, z in moved.items():
        average[name] = memory.average[name] + share * (z - memory.average[name])
        y = z + blend * (average[name] - z)
        deltas[name] = (y - wide(params[name])).to(params[name].dtype)
    return deltas, memory._replace(average=average)
