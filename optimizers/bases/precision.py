"""In what dtype rules compute: never less than float32.

In bfloat16 ``1 - 0.999`` is 0 and an average stands still; in float16 a gradient's square is infinite from 256 on. So
averages and all arithmetic are float32 at least, and the deltas alone are rounded to the parameters' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learnedopt.core.tree import Params


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of ``x``, or float32 if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in that dtype: ``x`` itself where it has it."""
    return x.to(wide_dtype(x))


def zeros(params: Params) -> Params:
    """Return zeros shaped as the parameters, in the dtype to compute in."""
    return {name: torch.zeros_like(p, dtype=wide_dtype(p)) for name, p in params.items()}
