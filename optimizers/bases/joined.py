"""All tensors of a task side by side: a step then takes a few operations on them together, not a few on each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from learnedopt.core.tree import Params
from learnedopt.optimizers.bases.frame import Memory
from learnedopt.optimizers.bases.precision import wide

ALL = "all"
"""What the tensors are called together."""


@final
class Layout:
    """Where each of the tensors ``params`` lies among all coordinates."""

    def __init__(self, params: Params) -> None:
        self._names = list(params)
        self._shapes = {name: p.shape for name, p in params.items()}
        self._sizes = [p.numel() for p in params.values()]

    def join(self, tensors: Mapping[str, Tensor]) -> Params:
        """Return all tensors as one, (coordinates,), in the dtype to compute in."""
        return {ALL: torch.cat([wide(tensors[name]).reshape(-1) for name in self._names])}

    def split(self, joined: Params, like: Mapping[str, Tensor]) -> Params:
        """Return the tensors again, each in the dtype of its ``like``: the inverse of ``join``."""
        return {name: piece.to(like[name].dtype) for name, piece in self.pieces(joined[ALL]).items()}

    def pieces(self, flat: Tensor) -> Params:
        """Return what is (coordinates,) as tensors."""
        pieces = torch.split(flat, self._sizes)
        return {name: x.reshape(self._shapes[name]) for name, x in zip(self._names, pieces, strict=True)}

    def join_memory(self, memory: Memory) -> Memory:
        """Return a memory of all tensors as one."""
        return memory._replace(**{kind: self.join(getattr(memory, kind)) for kind in _KINDS})

    def split_memory(self, joined: Memory, like: Memory) -> Memory:
        """Return the memory of each tensor again."""
        return joined._replace(**{kind: self.split(getattr(joined, kind), getattr(like, kind)) for kind in _KINDS})

    def means(self, flat: Tensor) -> Tensor:
        """Return the mean over each tensor of what is (coordinates,): (tensors,)."""
        return torch.stack([piece.mean() for piece in torch.split(flat, self._sizes)])

    def spread(self, values: Tensor) -> Tensor:
        """Give every coordinate its tensor's values: (k, tensors) to (k, coordinates)."""
        rows = values.shape[0]
        columns = torch.split(values, 1, dim=1)
        return torch.cat([column.expand(rows, n) for column, n in zip(columns, self._sizes, strict=True)], dim=1)


_KINDS = ("first", "second", "square", "average")
