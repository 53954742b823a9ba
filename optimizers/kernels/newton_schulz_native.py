"""Newton-Schulz orthogonalisation of small matrices as a compiled C function; see ``newton_schulz.c``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import final

from torch import Tensor

from learnedopt.optimizers.bases.newton_schulz import COEFFICIENTS
from learnedopt.optimizers.kernels import native
from learnedopt.optimizers.kernels.lanes import array, shared

_SOURCE = Path(__file__).with_name("newton_schulz.c")
SMALL = 128
"""The largest of the smaller sides; torch takes as long for squares of 128, and twice as long for longer matrices."""
_LONG = 262144
"""Above so many entries products are worth sharing between threads, which torch does."""


def serves(matrices: Tensor) -> bool:
    """Return whether they, (..., m, n) contiguous on a CPU, are small enough and there is a compiled function."""
    rows, columns = matrices.shape[-2:]
    small = min(rows, columns) <= SMALL and rows * columns <= _LONG
    return small and native.library(_SOURCE, *native.NAMES[matrices.dtype]) is not None


class _GroupC(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("count", ctypes.c_long),
        ("rows", ctypes.c_long),
        ("columns", ctypes.c_long),
    )


@final
class Orthogonaliser:
    """Orthogonalises matrices where they are, as ``bases.newton_schulz.orthogonalised`` does.

    Args:
        buffers: of one dtype, (..., m, n) each, which ``serves``; they are kept.
        num_steps: of the iteration.
        coefficients: its a, b, c.
    """

    def __init__(
        self,
        buffers: Sequence[Tensor],
        num_steps: int = 4,
        coefficients: tuple[float, float, float] = COEFFICIENTS,
    ) -> None:
        self._buffers = [b for b in buffers if b.numel()]
        counts = [b.shape[:-2].numel() for b in self._buffers]
        groups = [(b.data_ptr(), n, *b.shape[-2:]) for b, n in zip(self._buffers, counts, strict=True)]
        self._units, self._coordinates = sum(counts), sum(b.numel() for b in self._buffers)
        self._kept = (array(_GroupC, [_GroupC(*each) for each in groups]), array(ctypes.c_double, coefficients))
        addresses = [ctypes.c_void_p(ctypes.addressof(each)) for each in self._kept]
        self._arguments = (addresses[0], ctypes.c_int(len(groups)), ctypes.c_int(num_steps), addresses[1])
        if self._buffers:
            library = native.library(_SOURCE, *native.NAMES[self._buffers[0].dtype])
            assert library is not None
            self._function = library.orthogonalise

    def __call__(self) -> None:
        """Overwrite the buffers.

        Raises:
            MemoryError: there is no memory for the scratch space.
        """

        def call(first: int, last: int) -> int:
            return self._function(ctypes.c_long(first), ctypes.c_long(last), *self._arguments)

        if self._units and shared(call, self._units, self._coordinates):
            raise MemoryError("the compiled orthogonalisation found no memory for its scratch space")
