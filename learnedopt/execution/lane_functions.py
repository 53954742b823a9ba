"""Functions of torch that its rules for ``torch.func.vmap`` do slowly, or wrong, done well for particles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_LOSSES = (functional.mse_loss, functional.smooth_l1_loss, functional.huber_loss)
"""What torch's rules for a ``vmap`` within another get the shapes of wrong where the targets have no lane."""


@final
class LaneFunctions(TorchFunctionMode):
    """Within it, some functions under ``torch.func.vmap`` go ways of their own; values differ by rounding at most.

    Linear layers whose weights have a lane and whose inputs have none: torch's own rule copies the inputs for each lane
    once there is another ``vmap`` around; here ``x W_1ᵀ, ..., x W_mᵀ`` are one product. Cross-entropy of classes, with
    the default options: torch's rule takes it apart into many operations, the slowest a softmax over a short last
    dimension. Three losses that read outputs with a lane and targets without: torch's rules fail there, and are helped.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take over these, call all else."""
        kwargs = kwargs or {}
        if func is functional.linear and not kwargs and _serves(args[0], args[1]):
            return _linear(*args)
        if func in _PRODUCTS and not kwargs and _serves(args[0], args[1]):
            return _linear(args[0], args[1].mT)
        if func is functional.cross_entropy and len(args) == 2 and _is_plain(kwargs) and _are_classes(*args):
            return _cross_entropy(*args)
        if func in _LOSSES and len(args) > 1:
            return func(args[0], args[1] + torch.zeros_like(args[0]), *args[2:], **kwargs)
        return func(*args, **kwargs)


_PLAIN = {
    "weight": None, "size_average": None, "ignore_index": -100, "reduce": None, "reduction": "mean",
    "label_smoothing": 0.0,
}  # fmt: skip
"""The default options of ``cross_entropy``."""


def _is_plain(options: dict[str, Any]) -> bool:
    return all(name in _PLAIN and _PLAIN[name] == value for name, value in options.items() if value is not None)


def _are_classes(logits: Tensor, targets: Tensor) -> bool:
    return logits.ndim == 2 and targets.ndim == 1 and targets.dtype is torch.int64


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over rows, without those whose target is -100, as ``functional.cross_entropy`` by default."""
    kept = targets != -100
    # Along the rows, of which there are many, one softmax is vectorised; along the classes each is a loop of its own.
    found = logits.mT.contiguous().log_softmax(0).gather(0, torch.where(kept, targets, 0).unsqueeze(0)).squeeze(0)
    return -torch.where(kept, found, 0.0).sum() / kept.sum()


def _serves(inputs: Any, weight: Any) -> bool:
    tensors = isinstance(inputs, Tensor) and isinstance(weight, Tensor)
    return tensors and inputs.ndim >= 2 and weight.ndim == 2


def _linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Return ``x wᵀ + b``; x (..., inputs), w (outputs, inputs), b (outputs,) or None.

    With the weights on the left torch folds their lanes into rows of one matrix, and so does the way back.
    """
    out = torch.matmul(w, x.flatten(0, -2).mT).mT
    out = out if b is None else out + b
    return out if x.ndim == 2 else torch.unflatten(out, 0, x.shape[:-1])
