"""A rule's memory in bfloat16 between steps, at half the bytes; what is computed stays wide.

Stored numbers are rounded at random, up or down with the odds that leave their mean where it was: rounded to the
nearest, an average that moves by less than half a unit in the last place, as Adam's ``square`` with ``beta2 = 0.999``
does at every step, would stand still for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from learnedopt.plug_in import shards

_DROPPED = 16
"""Bits of a float32 that a bfloat16 does not have."""


def require_state_dtype(dtype: torch.dtype | None) -> None:
    """Raise ValueError for a ``state_dtype`` that memory cannot be kept in; None is what the rule keeps it in."""
    if dtype not in (None, torch.bfloat16):
        raise ValueError(
            f"state_dtype={dtype!r}: memory can be kept in torch.bfloat16, which has the range of float32; float16 has "
            "not (a gradient of 300 has no square in it). Leave it out to keep what the rule keeps"
        )


def packed(memory: Mapping[str, Any], param: Tensor, dtype: torch.dtype | None, seed: int) -> dict[str, Any]:
    """Return the memory of one parameter as it is kept between steps.

    Leaves with one number or more for every coordinate, ``(*leading, *param.shape)`` or ``(*leading, param.numel())``,
    are rounded to ``dtype``; everything else, such as counts and statistics of the tensor, stays what it is. A
    parameter without dimensions has nothing to save.

    Args:
        memory: by the path to each leaf; not overwritten.
        param: the parameter it belongs to, or what of it lies here.
        dtype: ``torch.bfloat16``, or None to keep everything.
        seed: of the rounding. Replicas of a parameter that are to stay equal take the same, such as the step's number.
    """
    if dtype is None:
        return dict(memory)
    generator = torch.Generator(param.device).manual_seed(seed)
    return {k: _rounded_here(x, param, generator) if _per_coordinate(x, param) else x for k, x in memory.items()}


def unpacked(leaf: Any, dtype: torch.dtype | None) -> Any:
    """Return a leaf of the memory as a rule computes with it: what was rounded in the ``dtype`` that it had."""
    narrow = isinstance(leaf, Tensor) and leaf.dtype is torch.bfloat16 and dtype is not None
    return leaf.to(dtype) if narrow else leaf


def _per_coordinate(leaf: Any, param: Tensor) -> bool:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not param.ndim or not leaf.ndim:
        return False
    return leaf.shape[-param.ndim :] == param.shape or leaf.shape[-1] == param.numel()


def _rounded_here(x: Tensor, param: Tensor, generator: torch.Generator) -> Tensor:
    """Return what ``_rounded`` does, of the piece of a ``DTensor`` that lies here."""
    here = shards.local(x)
    return _rounded(x, generator) if here is x else shards.joined_like(_rounded(here, generator), param)


def _rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``x`` in bfloat16: the next number above or below, by chance; what is one already, inf and nan stay."""
    if x.dtype == torch.bfloat16:
        return x
    x = x.float()
    noise = torch.randint(1 << _DROPPED, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    # The bits of a float32 count up with its size, so a carry out of the dropped ones is a step to the next bfloat16.
    raised = ((x.view(torch.int32) + noise) >> _DROPPED << _DROPPED).view(torch.float32)
    return torch.where(x.isfinite(), raised, x).bfloat16()
