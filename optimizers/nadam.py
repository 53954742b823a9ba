"""Adam with Nesterov's momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases import adam_averages
from learnedopt.optimizers.bases.hand_designed import NOT_NEGATIVE, HandDesigned, sqrt
from learnedopt.optimizers.bases.precision import wide_dtype


@final
@dataclass(frozen=True)
class NAdam(HandDesigned):
    """Adam that looks ahead, its momentum warmed up (Dozat 2016, algorithm 2), as ``torch.optim.NAdam``.

        mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2),    P_t = mu_1 * ... * mu_t
        m <- beta1 * m + (1 - beta1) * g,    v <- beta2 * v + (1 - beta2) * g^2
        delta = -lr * ((1 - mu_t) / (1 - P_t) * g + mu_(t+1) / (1 - P_(t+1)) * m) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        lr: learning rate.
        beta1: decay of the average of gradients, and what the momentum mu grows to from its half.
        beta2: decay of the average of squared gradients.
        eps: added to the root for stability.
        weight_decay: factor of the L2 penalty, which joins the gradient; 0 switches it off.
        momentum_decay: how fast the momentum grows.
        learn: the hyperparameters in theta; None for all that are switched on.

    The derivative of the root at ``v = 0``, where the gradients were exactly zero so far, is taken as 0.

    State: ``mean`` and ``square``, as the parameters; ``step``, the number of updates taken, and ``product``, P_t
    (scalars).
    """

    lr: float = 2e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum_decay: float = 4e-3

    ranges: ClassVar[dict[str, tuple[float, float]]] = {**adam_averages.RANGES, "momentum_decay": NOT_NEGATIVE}
    optional: ClassVar[tuple[str, ...]] = ("weight_decay",)

    def init(self, theta: Theta, params: Params) -> tuple[Params, dict[str, Any]]:
        """Start where the parameters are, with zero averages."""
        state = adam_averages.start(params)
        return params, {**state, "product": torch.ones_like(state["step"])}

    def update(
        self, theta: Theta, grads: Params, state: dict[str, Any], params: Params, loss: Tensor
    ) -> tuple[Params, dict[str, Any]]:
        """Step against a mixture of the gradient and its average, over the corrected root."""
        step = state["step"] + 1
        values = self.values(theta, grads.values())
        exact = self.values(theta, [step])[step.dtype]
        now, ahead = (exact["beta1"] * (1 - 0.5 * 0.96 ** (t * exact["momentum_decay"])) for t in (step, step + 1))
        product = state["product"] * now
        of_grad, of_mean = (1 - now) / (1 - product), ahead / (1 - product * ahead)
        correction = (1 - exact["beta2"] ** step).sqrt()
        deltas: Params = {}
        means: Params = {}
        squares: Params = {}
        for name, grad in grads.items():
            hyper = values[wide_dtype(grad)]
            beta1, beta2 = hyper["beta1"], hyper["beta2"]
            dtype, grad = grad.dtype, self.decayed(hyper, grad, params[name])
            means[name] = beta1 * state["mean"][name] + (1 - beta1) * grad
            squares[name] = beta2 * state["square"][name] + (1 - beta2) * grad * grad
            root = sqrt(squares[name]) / correction.to(grad.dtype) + hyper["eps"]
            mixed = of_grad.to(grad.dtype) * grad + of_mean.to(grad.dtype) * means[name]
            deltas[name] = (-hyper["lr"] * mixed / root).to(dtype)
        return deltas, {"mean": means, "square": squares, "step": step, "product": product}
