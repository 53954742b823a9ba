"""The step of the normalised rules as compiled C functions, for all tensors of all lanes, on a CPU.

What is particular to a rule are constants that its kernel makes of theta; see ``normalised_kernel.c`` and
``frame_numbers.h`` for the formulas.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_long
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor
from torch.nn import Parameter

from learnedopt.core.modes import taking_tangents
from learnedopt.optimizers.bases.frame import KNOTS
from learnedopt.optimizers.kernels import native
from learnedopt.optimizers.kernels.lanes import array, contiguous, shared

_SOURCE = Path(__file__).with_name("normalised_kernel.c")
_PIECE = 65536  # coordinates of a tensor's piece, about
_ROWS = 4096  # of a matrix's piece: sums of columns are taken in the tensors' own precision
READ = ("grad", "param", "first", "second", "square", "average")
WRITTEN = ("param", "first", "second", "square", "average")
LANE_NUMBERS, TENSOR_NUMBERS = 14, 8
LANE_CONSTANTS, TENSOR_CONSTANTS = 14 + len(KNOTS), 11
NO_NET, MLP, LSTM = range(3)

Shapes: TypeAlias = tuple[tuple[int, ...], ...]


def serves(tensors: Sequence[Tensor]) -> bool:
    """Return whether there are compiled functions for such tensors here: plain, without a graph, one dtype, a CPU."""
    dtype = tensors[0].dtype
    if not unrecorded() or dtype not in native.NAMES:
        return False
    return all(plain(t, dtype) for t in tensors) and native.library(_SOURCE, *native.NAMES[dtype]) is not None


def unrecorded() -> bool:
    """Return whether nothing records or transforms what is done here, of which C would not know."""
    if torch.is_grad_enabled() or taking_tangents() or torch.compiler.is_compiling():
        return False
    # Under vmap; torch has no public name for it.
    return torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]


def plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a tensor's numbers lie in the memory of this machine, in this dtype."""
    known = type(tensor) in (Tensor, Parameter) and tensor.layout is torch.strided
    return known and tensor.dtype is dtype and tensor.is_cpu


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
        self.lanes: torch.Size = torch.Size(lanes)
        self.tensors: list[Tensor | None] = [None if t is None else contiguous(t, num_dims) for t in tensors]
        none = (0,) * num_dims
        strides = [s for t in self.tensors for s in (none if t is None else t.stride()[:num_dims])]
        self._addresses = array(ctypes.c_void_p, [None if t is None else t.data_ptr() for t in self.tensors])
        self._others = (array(ctypes.c_long, lanes), array(ctypes.c_long, strides))
        places = (ctypes.addressof(each) for each in (self._others[0], self._addresses, self._others[1]))
        self.c: _LanesC = _LanesC(num_dims, *places)

    def point(self, first: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Let the places from ``first`` on be other tensors, without lanes, and return what is to be kept alive."""
        kept = [t if t.is_contiguous() else t.contiguous() for t in tensors]
        for i, tensor in enumerate(kept, first):
            self._addresses[i] = tensor.data_ptr()
        return kept


class Constants(NamedTuple):
    """What does not change from step to step, in the order of the C enumerations."""

    lanes: Tensor
    """(\\*lanes, 21)."""
    tensors: Tensor
    """(\\*lanes, tensors, 11)."""


class Clocks(NamedTuple):
    """What does: the steps taken, and the progress, (\\*lanes) both, contiguous."""

    steps: Tensor
    progress: Tensor


class Net(NamedTuple):
    """Which network adds to the brackets."""

    kind: int
    units: int
    inputs: int
    """Columns of the first layer's weight; the first eight are the features of a coordinate."""


@final
class Ready:
    """A step made ready to be taken any number of times.

    Args:
        cut: of the tensors.
        data: the tensors; four of the LSTM's states; the network's weights.
        constants: of the rule.
        clocks: read at every step.
        with_factors: whether rows and columns of matrices have factors of their own.
        with_iterates: whether the sums over z² are read.
    """

    def __init__(
        self, cut: Cut, data: Data, constants: Constants, clocks: Clocks, *, with_factors: bool, with_iterates: bool
    ) -> None:
        lanes, like = data.lanes, constants.lanes
        self.data = data
        self._count = lanes.numel()
        self._size = (self._count * len(cut.pieces), self._count * cut.c[0].num_coordinates)
        numbers = like.new_empty((*lanes, LANE_NUMBERS)), like.new_empty((*lanes, len(cut.shapes), TENSOR_NUMBERS))
        found = like.new_empty((*lanes, len(cut.pieces), 2))
        sizes = (cut.num_rows, cut.num_sums, cut.num_columns)
        rows, sums, columns = (like.new_zeros((*lanes, n)) if with_factors else None for n in sizes)
        self._zeroed = [x for x in (rows, sums) if x is not None]
        self._kept = (cut, constants, clocks, numbers, found, columns, _KNOTS)
        library: Any = native.library(_SOURCE, *native.NAMES[like.dtype])
        self._begin, self._sums, self._numbers, self._move = (
            library.begin, library.sums, library.numbers, library.move
        )  # fmt: skip
        own, both = ctypes.byref(cut.c[0]), (ctypes.byref(cut.c[0]), ctypes.byref(data.c))
        lane_numbers, tensor_numbers = map(_address, numbers)
        of_lanes, of_tensors = map(_address, constants)
        steps, progress = map(_address, clocks)
        at_rows, at_sums, at_columns, at_found = map(_address, (rows, sums, columns, found))
        num_rows, num_sums, num_columns = map(ctypes.c_long, sizes)
        num_lanes = ctypes.c_long(self._count)
        self._of_begin = (num_lanes, of_lanes, steps, lane_numbers)
        self._of_sums = (*both, lane_numbers, at_found, at_rows, at_sums, num_rows, num_sums, int(with_iterates))
        self._of_numbers = (
            num_lanes, own, of_lanes, ctypes.byref(_KNOTS), progress, of_tensors, lane_numbers, at_found,
            tensor_numbers, at_rows, at_sums, at_columns, num_rows, num_sums, num_columns,
        )  # fmt: skip
        self._of_move = (*both, lane_numbers, tensor_numbers, at_rows, at_columns, num_rows, num_columns)

    def sums(self) -> None:
        """Find the sums, and write the directions that ``data`` has."""
        for tensor in self._zeroed:
            tensor.zero_()
        self._begin(*self._of_begin)

        def call(first: int, last: int) -> int:
            self._sums(c_long(first), c_long(last), *self._of_sums)
            return 0

        shared(call, *self._size)

    def move(self, net: Net) -> None:
        """Take the step: write what ``data`` has to be written.

        Raises:
            MemoryError: there is no memory for the scratch space.
        """
        self._numbers(*self._of_numbers)

        def call(first: int, last: int) -> int:
            return self._move(c_long(first), c_long(last), *self._of_move, *net)

        if shared(call, *self._size):
            raise MemoryError("the compiled step of the normalised rules found no memory for its scratch space")


_KNOTS = array(ctypes.c_double, KNOTS)


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
