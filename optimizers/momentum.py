"""Gradient descent with heavy-ball momentum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import NOT_NEGATIVE, HandDesigned
from learnedopt.optimizers.bases.precision import wide_dtype, zeros


@final
@dataclass(frozen=True)
class Momentum(HandDesigned):
    """``b <- momentum * b + (1 - dampening) * g,  delta = -lr * b``, as ``torch.optim.SGD``.

    The first step sets ``b = g`` without dampening, as torch does. Without dampening that needs no memory of the step,
    so that the rule's step map has a fixed point; with it, the state holds a flag that is 0 before the first step.

    Args:
        lr: learning rate.
        momentum: decay of the buffer.
        dampening: what the gradient's weight lacks to 1; 0 switches it off.
        weight_decay: factor of the L2 penalty, which joins the gradient; 0 switches it off.
        learn: the hyperparameters in theta; None for all that are switched on.

    State: ``buffer``, as the parameters; ``started`` (scalar) where there is dampening.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    dampening: float = 0.0
    weight_decay: float = 0.0

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "lr": NOT_NEGATIVE,
        "momentum": NOT_NEGATIVE,
        "dampening": (-math.inf, math.inf),
        "weight_decay": NOT_NEGATIVE,
    }
    optional: ClassVar[tuple[str, ...]] = ("dampening", "weight_decay")

    def init(self, theta: Theta, params: Params) -> tuple[Params, dict[str, Any]]:
        """Start where the parameters are, with zero buffers."""
        state: dict[str, Any] = {"buffer": zeros(params)}
        if self.uses("dampening"):
            first = next(iter(params.values()))
            state["started"] = first.new_zeros((), dtype=wide_dtype(first))
        return params, state

    def update(
        self, theta: Theta, grads: Params, state: dict[str, Any], params: Params, loss: Tensor
    ) -> tuple[Params, dict[str, Any]]:
        """Step against the buffer."""
        values = self.values(theta, grads.values())
        deltas: Params = {}
        buffers: Params = {}
        for name, grad in grads.items():
            hyper = values[wide_dtype(grad)]
            dtype, grad = grad.dtype, self.decayed(hyper, grad, params[name])
            if self.uses("dampening"):
                damped = (1 - hyper["dampening"]) * grad
                grad = torch.where(state["started"] > 0, damped, grad)
            buffers[name] = hyper["momentum"] * state["buffer"][name] + grad
            deltas[name] = (-hyper["lr"] * buffers[name]).to(dtype)
        new_state: dict[str, Any] = {"buffer": buffers}
        if self.uses("dampening"):
            new_state["started"] = torch.ones_like(state["started"])
        return deltas, new_state
