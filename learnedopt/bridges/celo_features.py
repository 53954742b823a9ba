"""What Celo's network reads of each coordinate: its gradient, momenta, and second moments whole and factored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOMENTA = (0.9, 0.99, 0.999)
"""What the momenta keep in a step, and the factored second moments."""
SQUARE = 0.999
"""What the second moment of each coordinate keeps."""
WIDTHS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
"""Of the features, in the order of ``features``: 29 in all."""


class Tracks(NamedTuple):
    """Running means of one tensor's gradients, none corrected for its start at 0; three time scales lead."""

    momenta: Tensor
    """(3, *shape)."""
    square: Tensor
    """(*shape)."""
    rows: Tensor
    """Squares over the longest axis alone, (3, *shape without it); of tensors of one axis or none, (3, *shape)."""
    columns: Tensor
    """Squares over the second longest axis, (3, *shape without it); empty, (0,), where ``rows`` has all axes."""


def longest_axes(shape: torch.Size) -> tuple[int, int] | None:
    """Return the second longest axis and the longest, the later of equals; None below two axes."""
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return (order[-2], order[-1]) if len(shape) >= 2 else None


def start(param: Tensor, dtype: torch.dtype) -> Tracks:
    """Return the means of a tensor before the first gradient."""
    axes, shape = longest_axes(param.shape), list(param.shape)

    def zeros(*of: int) -> Tensor:
        return torch.zeros(of, dtype=dtype, device=param.device)

    momenta, square = zeros(3, *shape), zeros(*shape)
    if axes is None:
        return Tracks(momenta, square, zeros(3, *shape), zeros(0))
    second, first = axes
    without = [[n for axis, n in enumerate(shape) if axis != left] for left in (first, second)]
    return Tracks(momenta, square, zeros(3, *without[0]), zeros(3, *without[1]))


def tracked(tracks: Tracks, grad: Tensor) -> Tracks:
    """Return the means with one more gradient, clipped already."""
    keep = _scales(grad)
    squares, axes = grad * grad + 1e-30, longest_axes(grad.shape)
    momenta = keep * tracks.momenta + (1 - keep) * grad
    square = SQUARE * tracks.square + (1 - SQUARE) * grad * grad
    if axes is None:
        return Tracks(momenta, square, keep * tracks.rows + (1 - keep) * squares, tracks.columns)
    second, first = axes
    keep = keep.squeeze(-1)
    rows = keep * tracks.rows + (1 - keep) * squares.mean(first)
    return Tracks(momenta, square, rows, keep * tracks.columns + (1 - keep) * squares.mean(second))


def features(param: Tensor, grad: Tensor, tracks: Tracks) -> list[Tensor]:
    """Return the features of every coordinate, each (width, *shape), before they are normalised.

    With r the root of the second moment's inverse and F that of the factored one: g; g clipped to 0.1; x; momenta m;
    v; m r; r; g F; g r; rows; columns; the roots of their inverses; m F. A tensor of one axis or none has its second
    moments at three time scales in the place of rows and columns, both.
    """
    g, root = grad[None], (tracks.square + 1e-6).rsqrt()[None]
    axes = longest_axes(grad.shape)
    if axes is None:
        rows = columns = tracks.rows
        of_gradient, of_momenta = _inverse_root(rows + 1e-9), rows**-0.5
    else:
        second, first = axes
        rows, columns = tracks.rows.unsqueeze(first + 1), tracks.columns.unsqueeze(second + 1)
        mean = rows.mean(second + 1, keepdim=True)
        of_gradient = of_momenta = _inverse_root(rows / (mean + 1e-9)) * _inverse_root(columns)
        rows, columns = (x.expand(3, *grad.shape) for x in (rows, columns))
    return [
        g, g.clamp(-0.1, 0.1), param[None], tracks.momenta, tracks.square[None], tracks.momenta * root, root,
        g * of_gradient, g * root, rows, columns, (rows + 1e-8).rsqrt(), (columns + 1e-8).rsqrt(),
        tracks.momenta * of_momenta,
    ]  # fmt: skip


def normalised(found: list[Tensor]) -> Tensor:
    """Return the features, each over its root mean square in the tensor, as one matrix (coordinates, 29)."""
    rows = torch.cat([x.reshape(x.shape[0], -1) for x in found])
    return (rows * (rows.square().mean(1, keepdim=True) + 1e-5).rsqrt()).T


def _scales(like: Tensor) -> Tensor:
    return torch.tensor(MOMENTA, dtype=like.dtype, device=like.device).reshape(3, *[1] * like.ndim)


def _inverse_root(x: Tensor) -> Tensor:
    return x.clamp(min=1e-9).rsqrt()
