"""Gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import NOT_NEGATIVE, HandDesigned


@final
@dataclass(frozen=True)
class SGD(HandDesigned):
    """``delta = -lr * (g + weight_decay * x)``, as ``torch.optim.SGD`` without momentum.

    Args:
        lr: learning rate.
        weight_decay: factor of the L2 penalty; 0 switches it off.
        learn: the hyperparameters in theta; None for all that are switched on.

    Example:
        >>> rule = SGD(lr=0.1)
        >>> theta = rule.init_theta(torch.Generator())  # {"lr": tensor(0.1000)}
    """

    lr: float = 1e-3
    weight_decay: float = 0.0

    ranges: ClassVar[dict[str, tuple[float, float]]] = {"lr": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE}
    optional: ClassVar[tuple[str, ...]] = ("weight_decay",)

    def init(self, theta: Theta, params: Params) -> tuple[Params, tuple[()]]:
        """Start where the parameters are; there is no memory."""
        return params, ()

    def update(
        self, theta: Theta, grads: Params, state: tuple[()], params: Params, loss: Tensor
    ) -> tuple[Params, tuple[()]]:
        """Step against the gradient."""
        values = self.values(theta, grads.values())
        deltas = {}
        for name, grad in grads.items():
            hyper = values[grad.dtype]
            deltas[name] = -hyper["lr"] * self.decayed(hyper, grad, params[name])
        return deltas, state

    def step(
        self, theta: Theta, grads: Params, state: tuple[()], params: Params, loss: Tensor
    ) -> tuple[Params, tuple[()]] | None:
        """Step in one pass; not with a weight decay."""
        if self.uses("weight_decay"):
            return None
        values = self.values(theta, params.values())
        return {k: descend(p, values[p.dtype]["lr"], grads[k].to(p.dtype)) for k, p in params.items()}, state


def descend(param: Tensor, rate: float | Tensor, grad: Tensor) -> Tensor:
    """Return ``param - rate * grad``."""
    if isinstance(rate, Tensor):
        return torch.addcmul(param, rate, grad, value=-1)
    return torch.add(param, grad, alpha=-rate)
