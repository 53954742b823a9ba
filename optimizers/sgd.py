"""Gradient descent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from learnedopt.core.rule import Kernel, State
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import NOT_NEGATIVE, HandDesigned, Hyper
from learnedopt.optimizers.bases.precision import like, wide, wide_dtype


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
        deltas: Params = {}
        for name, grad in grads.items():
            hyper = values[wide_dtype(grad)]
            deltas[name] = (-hyper["lr"] * self.decayed(hyper, grad, params[name])).to(grad.dtype)
        return deltas, state

    @property
    def kernel(self) -> Descent | None:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """One pass; None with a weight decay."""
        return None if self.uses("weight_decay") else Descent(self._rates)

    def _rates(self, theta: Theta, params: Params, state: tuple[()]) -> tuple[dict[str, Hyper], tuple[()]]:
        values = self.values(theta, params.values())
        return {name: values[wide_dtype(p)]["lr"] for name, p in params.items()}, state


@final
@dataclass(frozen=True)
class Descent(Kernel):
    """``params - rate * grads`` in one pass over memory.

    Args:
        rates: takes theta, parameters and state, and returns each parameter's rate and the new state.
    """

    rates: Callable[[Theta, Params, Any], tuple[Mapping[str, Hyper], Any]]

    def step(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Descend each parameter at its rate."""
        rates, state = self.rates(theta, params, state)
        return {k: like(_descend(wide(p), rates[k], grads[k]), p) for k, p in params.items()}, state


def _descend(param: Tensor, rate: Hyper, grad: Tensor) -> Tensor:
    grad = like(grad, param)
    if isinstance(rate, Tensor):
        return torch.addcmul(param, rate, grad, value=-1)
    return torch.add(param, grad, alpha=-rate)
