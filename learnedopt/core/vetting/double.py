"""Everything in float64, whatever a loss makes its tensors of: differences of losses need the digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

WIDER = {
    torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip
_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


class InDouble(TorchFunctionMode):
    """Promote every floating-point tensor that an operation of torch is given or returns to float64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        args, kwargs = _promoted(args), _promoted(kwargs or {})
        return _promoted((torch.Tensor.double if func in _CASTS else func)(*args, **kwargs))


def _promoted(x: Tensor | torch.dtype | tuple[Any, ...] | list[Any] | dict[str, Any] | float | None) -> Any:
    # Asked at every operation: plain containers are walked here, the rest, such as results with names, by torch.
    if isinstance(x, Tensor):
        return x.to(WIDER[x.dtype]) if x.dtype in WIDER else x
    if type(x) is tuple or type(x) is list:
        return type(x)(map(_promoted, x))
    if type(x) is dict:
        return {k: _promoted(v) for k, v in x.items()}
    if isinstance(x, torch.dtype):
        return WIDER.get(x, x)
    return pytree.tree_map(_promoted_leaf, x) if isinstance(x, tuple) else x


def _promoted_leaf(x: Any) -> Any:
    return _promoted(x) if isinstance(x, Tensor | torch.dtype) else x


def promoted(loss: Callable[..., Tensor], *args: Any) -> Tensor:
    """Return ``loss(*args)`` with everything that it reads in float64."""
    with InDouble():
        return loss(*pytree.tree_map(_promoted_leaf, args))
