"""RMSprop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import DECAY_RATE, NOT_NEGATIVE, HandDesigned, sqrt
from learnedopt.optimizers.bases.precision import wide_dtype, zeros


@final
@dataclass(frozen=True)
class RMSprop(HandDesigned):
    """``v <- alpha * v + (1 - alpha) * g^2,  delta = -lr * g / (sqrt(v) + eps)``, as ``torch.optim.RMSprop``.

    Tieleman and Hinton (2012); centered as Graves (2013).

    Args:
        lr: learning rate.
        alpha: decay of the averages.
        eps: added to the root for stability.
        weight_decay: factor of the L2 penalty, which joins the gradient; 0 switches it off.
        momentum: decay of a heavy-ball buffer of the scaled gradients; 0 switches it off.
        centered: subtract the squared average of the gradients from ``v`` under the root.
        learn: the hyperparameters in theta; None for all that are switched on.

    The derivative of the root at ``v = 0``, where the gradients were exactly zero so far, is taken as 0.

    State: ``square``, and ``mean`` where centered, ``buffer`` where there is momentum; each as the parameters.
    """

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "lr": NOT_NEGATIVE,
        "alpha": DECAY_RATE,
        "eps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "momentum": NOT_NEGATIVE,
    }
    optional: ClassVar[tuple[str, ...]] = ("weight_decay", "momentum")

    def init(self, theta: Theta, params: Params) -> tuple[Params, dict[str, Params]]:
        """Start where the parameters are, with zero averages."""
        kept = ["square", *["mean"] * self.centered, *["buffer"] * self.uses("momentum")]
        return params, {kind: zeros(params) for kind in kept}

    def update(
        self, theta: Theta, grads: Params, state: dict[str, Params], params: Params, loss: Tensor
    ) -> tuple[Params, dict[str, Params]]:
        """Step against the gradient over the root of its average square."""
        values = self.values(theta, grads.values())
        deltas: Params = {}
        new_state: dict[str, Params] = {kind: {} for kind in state}
        for name, grad in grads.items():
            hyper = values[wide_dtype(grad)]
            alpha = hyper["alpha"]
            dtype, grad = grad.dtype, self.decayed(hyper, grad, params[name])
            spread = new_state["square"][name] = alpha * state["square"][name] + (1 - alpha) * grad * grad
            if self.centered:
                mean = new_state["mean"][name] = alpha * state["mean"][name] + (1 - alpha) * grad
                spread = spread - mean * mean
            step = grad / (sqrt(spread) + hyper["eps"])
            if self.uses("momentum"):
                step = new_state["buffer"][name] = hyper["momentum"] * state["buffer"][name] + step
            deltas[name] = (-hyper["lr"] * step).to(dtype)
        return deltas, new_state
