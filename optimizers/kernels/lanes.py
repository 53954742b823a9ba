"""How the compiled steps read tensors with leading dimensions of lanes, and share their work between threads.

A lane is one particle or task; what all lanes of a dimension share is expanded there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

SHARE = 16384
"""Coordinates below which another thread costs more than it brings."""


def expanded(tensors: Sequence[Tensor], num_dims: int) -> tuple[torch.Size, list[Tensor]]:
    """Return the lanes' sizes, and the tensors with all of them in their first ``num_dims`` dimensions."""
    if num_dims == 0:
        return torch.Size(()), list(tensors)
    lanes = torch.broadcast_shapes(*(t.shape[:num_dims] for t in tensors))
    return lanes, [t if t.shape[:num_dims] == lanes else t.expand(*lanes, *t.shape[num_dims:]) for t in tensors]


def contiguous(tensor: Tensor, num_dims: int) -> Tensor:
    """Return the tensor with every lane contiguous in itself; how the lanes lie to each other does not matter."""
    return tensor if tensor[(0,) * num_dims].is_contiguous() else tensor.contiguous()


def array(kind: Any, values: Sequence[Any]) -> Any:
    """Return a C array of numbers or addresses."""
    return (kind * len(values))(*values)


def shared(call: Callable[[int, int], int], num_units: int, num_coordinates: int) -> bool:
    """Call ``call(first, last)`` on the units, in as many shares as there are threads and work for them.

    Returns:
        Whether one of the calls said that it failed.
    """
    count = max(1, min(torch.get_num_threads(), num_units, num_coordinates // SHARE))
    size = -(-num_units // count) or 1
    bounds = [(first, min(first + size, num_units)) for first in range(0, num_units, size)]
    if len(bounds) <= 1:
        return any(bool(call(*pair)) for pair in bounds)
    with ThreadPoolExecutor(len(bounds)) as pool:
        return any(list(pool.map(lambda pair: call(*pair), bounds)))
