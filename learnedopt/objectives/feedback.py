"""Progress relative to what the gradient promised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnedopt.core.carry import Rollout
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import TaskMean
from learnedopt.core.tree import Params, Theta


@final
@dataclass(frozen=True)
class HypergradientFeedback(TaskMean):
    """``(f(x_K) - f(x_0)) / |∇f(x_0)|²``, the loss by which OSGM learns online (Gao et al. 2024, definition of h_x).

    f is the train loss of the window's first step at the start, the loss on the valid split at the end; |∇f| runs over
    all parameters of a task. For ``x_1 = x_0 - w∘∇f(x_0)`` the meta-gradient is ``-∇f(x_1)∘∇f(x_0) / |∇f(x_0)|²``.
    Where the gradient is zero there is nothing to learn: the value is 0. The start and its gradient enter without a
    graph.
    """

    holds_fixed = True

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        """Return the mean over tasks."""
        start = rollout.start
        with torch.enable_grad():
            params = {k: p.detach().requires_grad_() for k, p in start.params.items()}
            before = loop.losses(theta, start._replace(params=params), "train")
        found = torch.autograd.grad(before.sum(), tuple(params.values()), materialize_grads=True)
        squares = torch.stack([g.reshape(len(before), -1).square().sum(1) for g in found]).sum(0)
        gain = loop.losses(theta, rollout.end, "valid") - before.detach()
        return (gain * inverse(squares)).mean()


def inverse(squares: Tensor) -> Tensor:
    """Return 1 / squares, and 0 for 0."""
    return torch.where(squares > 0, 1 / torch.where(squares > 0, squares, 1.0), 0.0)


def scale_of(grads: Params) -> Tensor:
    """Return ``1 / |∇f|²`` of one task's gradient, 0 for a zero one."""
    return inverse(torch.stack([g.square().sum() for g in grads.values()]).sum())
