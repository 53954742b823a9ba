"""The step of the normalised rules as two compiled C functions, for all tensors of all lanes, on a CPU.

What is particular to a rule is what its kernel makes of the sums of the first function for the second; see
``normalised_kernel.c`` for the formulas.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from learnedopt.core.modes import taking_tangents
from learnedopt.optimizers.kernels import native
from learnedopt.optimizers.kernels.lanes import array, contiguous, shared

_SOURCE = Path(__file__).with_name("normalised_kernel.c")
_NAMES = {torch.float32: ("REAL=float", "INTEGER=int"), torch.float64: ("REAL=double", "INTEGER=long long")}
_PIECE = 65536  # coordinates of a tensor's piece, about
_ROWS = 4096  # of a matrix's piece: sums of columns are taken in the tensors' own precision
READ = ("grad", "param", "first", "second", "square", "average")
WRITTEN = ("param", "first", "second", "square", "average")
LANE_NUMBERS, TENSOR_NUMBERS = 14, 8
NO_NET, MLP, LSTM = range(3)

Shapes: TypeAlias = tuple[tuple[int, ...], ...]


def serves(tensors: Sequence[Tensor]) -> bool:
    """Return whether there are compiled functions for such tensors here: plain, without a graph, one dtype, a CPU."""
    if torch.is_grad_enabled() or taking_tangents() or torch.compiler.is_compiling():
        return False
    # Under vmap; torch has no public name for it.
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    dtype = tensors[0].dtype
    if dtype not in _NAMES or any(t.dtype != dtype or t.device.type != "cpu" for t in tensors):
        return False
    return native.plain(tensors) and native.library(_SOURCE, *_NAMES[dtype]) is not None


@final
@dataclass(frozen=True, eq=False)
class Cut:
    """Tensors of these shapes in pieces."""

    shapes: Shapes
    pieces: tuple[tuple[int, int, int, int], ...]
    """Tensor, first and last coordinate, where its columns' sums begin."""
    layout: tuple[tuple[int, int, int, int, int], ...]
    """Of each tensor: whether it is a matrix, its columns, where its rows, columns and coordinates begin."""
    num_rows: int
    num_columns: int
    num_sums: int
    c: Any
    """What C reads of it."""

    @property
    def numels(self) -> list[int]:
        """The tensors' numbers of coordinates."""
        return [torch.Size(shape).numel() for shape in self.shapes]

    def once(self) -> bool:
        """Return whether every tensor is one piece."""
        return [piece[0] for piece in self.pieces] == list(range(len(self.shapes)))


class _CutC(ctypes.Structure):
    _fields_ = (
        ("num_pieces", ctypes.c_long), ("num_coordinates", ctypes.c_long), ("num_tensors", ctypes.c_int),
        ("pieces", ctypes.c_void_p), ("shapes", ctypes.c_void_p),
    )  # fmt: skip


class _LanesC(ctypes.Structure):
    _fields_ = (
        ("num_dims", ctypes.c_int), ("sizes", ctypes.c_void_p), ("data", ctypes.c_void_p), ("strides", ctypes.c_void_p),
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def cut(shapes: Shapes) -> Cut:
    """Cut tensors, by the shapes of one lane's."""
    pieces, layout, rows, columns, sums, start = [], [], 0, 0, 0, 0
    for tensor, shape in enumerate(shapes):
        n = torch.Size(shape).numel()
        matrix = len(shape) >= 2
        width = n // shape[0] if matrix and n else n
        layout.append((int(matrix), width, rows, columns, start))
        length = max(min(_PIECE // width, _ROWS), 1) * width if matrix and n else _PIECE
        for first in range(0, n, length):
            pieces.append((tensor, first, min(first + length, n), sums))
            sums += width if matrix else 0
        rows, columns, start = rows + shape[0] * matrix if matrix else rows, columns + width * matrix, start + n
    flat = [array(ctypes.c_long, [x for row in table for x in row]) for table in (pieces, layout)]
    c = _CutC(len(pieces), start, len(shapes), *map(ctypes.addressof, flat))
    return Cut(shapes, tuple(pieces), tuple(layout), rows, columns, sums, (c, flat))


class Data:
    """What C reads of tensors with leading lanes; it keeps them alive."""

    def __init__(self, lanes: Sequence[int], tensors: Sequence[Tensor | None]) -> None:
        num_dims = len(lanes)
        self.lanes = torch.Size(lanes)
        self.tensors = [None if t is None else contiguous(t, num_dims) for t in tensors]
        none = (0,) * num_dims
        strides = [s for t in self.tensors for s in (none if t is None else t.stride()[:num_dims])]
        self._arrays = (
            array(ctypes.c_long, lanes),
            array(ctypes.c_void_p, [None if t is None else t.data_ptr() for t in self.tensors]),
            array(ctypes.c_long, strides),
        )
        self.c = _LanesC(num_dims, *map(ctypes.addressof, self._arrays))


class Sums(NamedTuple):
    """Sums of the new v and of z² over tensors, (\\*lanes, tensors); of v over all rows and all columns of matrices."""

    square: Tensor
    iterate: Tensor
    rows: Tensor | None
    columns: Tensor | None


def sums(cut: Cut, data: Data, lane_numbers: Tensor, with_factors: bool, with_iterates: bool) -> Sums:
    """Return the sums; write the directions that ``data`` has.

    Rows and columns have sums only ``with_factors``; those of z² are 0 without ``with_iterates``.
    """
    lanes, like = data.lanes, lane_numbers
    found = like.new_empty((*lanes, len(cut.pieces), 2))
    rows = like.new_zeros((*lanes, cut.num_rows)) if with_factors else None
    columns = like.new_zeros((*lanes, cut.num_sums)) if with_factors else None

    def call(first: int, last: int) -> int:
        _function("sums", like.dtype)(
            ctypes.c_long(first), ctypes.c_long(last), ctypes.byref(cut.c[0]), ctypes.byref(data.c),
            *map(_address, (lane_numbers, found, rows, columns)), ctypes.c_long(cut.num_rows),
            ctypes.c_long(cut.num_sums), with_iterates,
        )  # fmt: skip
        return 0

    _shared(call, cut, lanes)
    if not cut.once():
        owners = torch.tensor([piece[0] for piece in cut.pieces], dtype=torch.int64)
        found = like.new_zeros((*lanes, len(cut.shapes), 2)).index_add_(-2, owners, found)
        columns = None if columns is None else _joined(cut, columns)
    return Sums(found[..., 0], found[..., 1], rows, columns)


def _joined(cut: Cut, columns: Tensor) -> Tensor:
    """Add up what the pieces of a matrix have of its columns."""
    parts, start = [], 0
    for tensor, (matrix, width, *_) in enumerate(cut.layout):
        count = sum(piece[0] == tensor for piece in cut.pieces) if matrix else 0
        own = columns[..., start : start + count * width]
        parts.append(own.unflatten(-1, (count, width)).sum(-2) if count > 1 else own)
        start += count * width
    return torch.cat(parts, -1)


class Net(NamedTuple):
    """Which network adds to the brackets."""

    kind: int
    units: int
    inputs: int
    """Columns of the first layer's weight; the first eight are the features of a coordinate."""


def move(
    cut: Cut,
    data: Data,
    lane_numbers: Tensor,
    tensor_numbers: Tensor,
    factors: tuple[Tensor, Tensor] | None,
    net: Net,
) -> None:
    """Take the step: write what ``data`` has to be written.

    Args:
        cut: of the tensors.
        data: the tensors; four of the LSTM's states; the network's weights.
        lane_numbers: (\\*lanes, 14), in the order of the C enumeration.
        tensor_numbers: (\\*lanes, tensors, 8), likewise.
        factors: of all matrices' rows and columns; None for none.
        net: what kind of a network there is.

    Raises:
        MemoryError: there is no memory for the scratch space.
    """
    rows, columns = (None, None) if factors is None else (factors[0].contiguous(), factors[1].contiguous())
    numbers = [lane_numbers.contiguous(), tensor_numbers.contiguous()]

    def call(first: int, last: int) -> int:
        return _function("move", lane_numbers.dtype)(
            ctypes.c_long(first), ctypes.c_long(last), ctypes.byref(cut.c[0]), ctypes.byref(data.c),
            *map(_address, (*numbers, rows, columns)), ctypes.c_long(cut.num_rows), ctypes.c_long(cut.num_columns),
            *net,
        )  # fmt: skip

    if _shared(call, cut, data.lanes):
        raise MemoryError("the compiled step of the normalised rules found no memory for its scratch space")


def _shared(call: Any, cut: Cut, lanes: torch.Size) -> bool:
    count = lanes.numel()
    return shared(call, count * len(cut.pieces), count * cut.c[0].num_coordinates)


def _function(name: str, dtype: torch.dtype) -> Any:
    return getattr(native.library(_SOURCE, *_NAMES[dtype]), name)


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
