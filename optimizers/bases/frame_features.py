"""What small networks in the frame see of a coordinate."""

from __future__ import annotations

import torch
from torch import Tensor

from learnedopt.optimizers.bases.frame import RELATIVE, TINY, Moments
from learnedopt.optimizers.bases.joined import Layout

NUM_ROWS = 8
NUM_CLOCKS = 2
LIMIT = 5.0
FLOOR = 1e-3
"""Of the root mean square of a tensor's entries: biases may all be 0."""


def rows(moments: Moments, mean: Tensor, at: Tensor, layout: Layout) -> Tensor:
    """Return each coordinate's features, (8, coordinates), clamped to 5 in size.

    g, m1, m2 over sqrt(v); the same over the root of v's mean; log(v / mean v) / 4; the entry over its tensor's RMS.

    Args:
        moments: of all tensors side by side.
        mean: of v over each coordinate's tensor.
        at: the iterates.
        layout: of the tensors.
    """
    floor = RELATIVE * mean + TINY
    square, mean = moments.square + floor, mean + floor
    seen = torch.stack([moments.grad, moments.first, moments.second])
    inverse = (layout.means(at * at) + FLOOR * FLOOR).rsqrt()
    more = torch.stack([(square / mean).log() / 4, at * layout.spread(inverse[None])[0]])
    return torch.cat([seen * square.rsqrt(), seen * mean.rsqrt(), more]).clamp(-LIMIT, LIMIT)


def clocks(progress: Tensor, step: Tensor) -> Tensor:
    """Return what is the same for all coordinates, (2,): 2 p - 1 and tanh(t / 10 - 1), t the updates before this."""
    return torch.stack([2 * progress - 1, torch.tanh(step / 10 - 1)])


def alive(moments: Moments) -> Tensor:
    """Return 1 for coordinates that have ever had a gradient and 0 for others."""
    return (moments.square > 0).to(moments.square.dtype)
