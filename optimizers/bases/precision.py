"""In what dtype rules compute: never less than float32.

In bfloat16 ``1 - 0.999`` is 0 and an average stands still; in float16 a gradient's square is infinite from 256 on. So
averages and all arithmetic are float32 at least, and the deltas alone are rounded to the parameters' dtype.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from learnedopt.core.tree import Params

WIDE = (torch.float32, torch.float64)
"""What is computed in as it is: asked at every tensor of every step, so that it is worth being asked quickly."""


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of ``x``, or float32 if that is wider."""
    return x.dtype if x.dtype in WIDE else torch.promote_types(x.dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in that dtype: ``x`` itself where it has it."""
    return x if x.dtype in WIDE else x.to(wide_dtype(x))


def like(x: Tensor, other: Tensor) -> Tensor:
    """Return ``x`` in the dtype of another: ``x`` itself where it has it."""
    return x if x.dtype is other.dtype else x.to(other.dtype)


def dtype_of(params: Params) -> torch.dtype:
    """Return the dtype that all of the parameters together are computed in: the widest of theirs."""
    return functools.reduce(torch.promote_types, {wide_dtype(p) for p in params.values()})


def zeros(params: Params) -> Params:
    """Return zeros shaped as the parameters, in the dtype to compute in."""
    return {name: torch.zeros_like(p, dtype=wide_dtype(p)) for name, p in params.items()}
