"""The gradient of a loss whose own derivative is taken by forward mode over reverse mode.

A gradient that is recorded keeps the graph of the loss and of its backward pass. Here it keeps the parameters alone:
where a cotangent ``c`` arrives, one forward-mode pass of the gradient along ``c`` gives ``Hc``, which by symmetry is
the cotangent of the parameters (MixFlow-MG, Kemaev et al. 2025). The other order, reverse over forward, is not used:
torch gets it wrong, silently, for normalisation layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from learnedopt.core.tree import Params


def value_and_gradient(losses: Callable[[Params], Tensor], params: Params) -> tuple[Tensor, list[Tensor]]:
    """Return ``losses(params)``, one number a task, and the gradient of their sum; differentiable once.

    Args:
        losses: of tasks that do not interact; reads nothing else that is to be differentiated.
        params: batched, or one task's.
    """
    names = list(params)

    def pair(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            values = losses(dict(zip(names, tensors, strict=True)))
            return values, *torch.autograd.grad(values.sum(), tensors, materialize_grads=True)

    values, *grads = _Gradient.apply(pair, *params.values())
    return values, grads


class _Gradient(torch.autograd.Function):
    """Take the gradient without a graph; go through it again, with tangents, when its cotangents arrive."""

    @staticmethod
    def forward(ctx: Any, pair: Callable[..., tuple[Tensor, ...]], *params: Tensor) -> tuple[Tensor, ...]:
        ctx.pair = pair
        ctx.save_for_backward(*params)
        ctx.set_materialize_grads(False)
        values, *grads = pair(tuple(p.detach().requires_grad_() for p in params))
        return values.detach(), *grads

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_values: Tensor | None, *of_grads: Tensor | None) -> tuple[Any, ...]:
        params = [_own(p).requires_grad_() for p in ctx.saved_tensors]
        tangents = [torch.zeros_like(p) if c is None else c.contiguous() for p, c in zip(params, of_grads, strict=True)]
        with torch.enable_grad(), forward_ad.dual_level():
            duals = tuple(forward_ad.make_dual(p, c) for p, c in zip(params, tangents, strict=True))
            _, *grads = [forward_ad.unpack_dual(x) for x in ctx.pair(duals)]
        found = [torch.zeros_like(p) if g.tangent is None else g.tangent for p, g in zip(params, grads, strict=True)]
        if of_values is not None:
            # Each task's cotangent scales that task's own gradient.
            scale = [of_values.reshape(of_values.shape + (1,) * (p.ndim - of_values.ndim)) for p in params]
            found = [x + s * g.primal.detach() for x, s, g in zip(found, scale, grads, strict=True)]
        return None, *found


def _own(p: Tensor) -> Tensor:
    """Return the tensor without its graph; a copy where it repeats entries, as tangents cannot."""
    repeats = any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True))
    return p.detach().clone(memory_format=torch.contiguous_format) if repeats else p.detach()
