"""Adam with decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases import adam_averages
from learnedopt.optimizers.bases.hand_designed import HandDesigned, sqrt
from learnedopt.optimizers.bases.precision import wide, wide_dtype


@final
@dataclass(frozen=True)
class AdamW(HandDesigned):
    """Adam whose weight decay does not pass its averages (Loshchilov and Hutter 2019, algorithm 2).

        m <- beta1 * m + (1 - beta1) * g,    v <- beta2 * v + (1 - beta2) * g^2
        delta = -lr * ((m / (1 - beta1^t)) / (sqrt(v) / sqrt(1 - beta2^t) + eps) + weight_decay * x)

    as ``torch.optim.AdamW``. The decay is part of the delta: what scales that, such as ``Scheduled``, scales it too.

    Args:
        lr: learning rate.
        beta1: decay of the average of gradients.
        beta2: decay of the average of squared gradients.
        eps: added to the root for stability.
        weight_decay: share of each parameter that a step of rate 1 would take away; 0 switches it off.
        learn: the hyperparameters in theta; None for all that are switched on.

    The derivative of the root at ``v = 0``, where the gradients were exactly zero so far, is taken as 0.

    State: ``mean`` and ``square``, as the parameters; ``step`` (scalar), the number of updates taken.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2

    ranges: ClassVar[dict[str, tuple[float, float]]] = adam_averages.RANGES
    optional: ClassVar[tuple[str, ...]] = ("weight_decay",)

    def init(self, theta: Theta, params: Params) -> tuple[Params, dict[str, Any]]:
        """Start where the parameters are, with zero averages."""
        return params, adam_averages.start(params)

    def update(
        self, theta: Theta, grads: Params, state: dict[str, Any], params: Params, loss: Tensor
    ) -> tuple[Params, dict[str, Any]]:
        """Step against the corrected average gradient over the corrected root, and towards zero."""
        step = state["step"] + 1
        values = self.values(theta, grads.values())
        exact = self.values(theta, [step])[step.dtype]
        correction1 = 1 - exact["beta1"] ** step
        correction2 = (1 - exact["beta2"] ** step).sqrt()
        deltas: Params = {}
        means: Params = {}
        squares: Params = {}
        for name, grad in grads.items():
            hyper, wide_grad = values[wide_dtype(grad)], wide(grad)
            beta1, beta2 = hyper["beta1"], hyper["beta2"]
            means[name] = beta1 * state["mean"][name] + (1 - beta1) * wide_grad
            squares[name] = beta2 * state["square"][name] + (1 - beta2) * wide_grad * wide_grad
            root = sqrt(squares[name]) / correction2.to(wide_grad.dtype) + hyper["eps"]
            direction = self.decayed(hyper, means[name] / correction1.to(wide_grad.dtype) / root, params[name])
            deltas[name] = (-hyper["lr"] * direction).to(grad.dtype)
        return deltas, {"mean": means, "square": squares, "step": step}
