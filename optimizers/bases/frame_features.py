"""What small networks in the frame see of a coordinate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from learnedopt.core.tree import Params
from learnedopt.optimizers.bases import frame
from learnedopt.optimizers.bases.frame import TINY, Moments

NUM_ROWS = 8
NUM_CLOCKS = 2
_LIMIT = 5.0
FLOOR = 1e-3
"""Of the root mean square of a tensor's entries: biases may all be 0."""


def rows(tensors: Mapping[str, Moments], at: Params) -> Tensor:
    """Return each coordinate's features, (8, coordinates of all tensors), clamped to 5 in size.

    g, m1, m2 over sqrt(v); the same over the root of v's mean; log(v / mean v) / 4; the entry over its tensor's RMS.
    """
    return torch.cat([_of_tensor(tensors[name], z) for name, z in at.items()], dim=1).clamp(-_LIMIT, _LIMIT)


def clocks(progress: Tensor, step: Tensor) -> Tensor:
    """Return what is the same for all coordinates, (2,): 2 p - 1 and tanh(t / 10 - 1), t the updates before this."""
    return torch.stack([2 * progress - 1, torch.tanh(step / 10 - 1)])


def split(flat: Tensor, at: Params) -> Params:
    """Return (coordinates of all tensors,) as tensors."""
    pieces = flat.split([z.numel() for z in at.values()])
    return {name: piece.reshape(z.shape) for (name, z), piece in zip(at.items(), pieces, strict=True)}


def alive(tensors: Mapping[str, Moments], at: Params) -> Tensor:
    """Return 1 for coordinates that have ever had a gradient and 0 for others, (coordinates of all tensors,)."""
    return torch.cat([(tensors[name].square > 0).reshape(-1) for name in at]).to(next(iter(at.values())).dtype)


def _of_tensor(tensor: Moments, z: Tensor) -> Tensor:
    floor = 1e-8 * tensor.mean_square + TINY
    square, mean = tensor.square + floor, tensor.mean_square + floor
    seen = torch.stack([tensor.grad.reshape(-1), tensor.first.reshape(-1), tensor.second.reshape(-1)])
    ratio = (square / mean).log().reshape(1, -1) / 4
    entry = (z / frame.rms(z, FLOOR)).reshape(1, -1)
    return torch.cat([seen * square.rsqrt().reshape(1, -1), seen * mean.rsqrt(), ratio, entry])
