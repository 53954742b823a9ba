"""Gradient descent with Nesterov's momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import NOT_NEGATIVE, HandDesigned
from learnedopt.optimizers.bases.precision import wide_dtype, zeros


@final
@dataclass(frozen=True)
class Nesterov(HandDesigned):
    """``b <- momentum * b + g,  delta = -lr * (g + momentum * b)``, as ``torch.optim.SGD(nesterov=True)``.

    The form of Sutskever et al. (2013) with the gradient at the point looked ahead to.

    Args:
        lr: learning rate.
        momentum: decay of the buffer; positive.
        weight_decay: factor of the L2 penalty, which joins the gradient; 0 switches it off.
        learn: the hyperparameters in theta; None for all that are switched on.

    State: ``buffer``, as the parameters.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "lr": NOT_NEGATIVE,
        "momentum": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
    }
    optional: ClassVar[tuple[str, ...]] = ("weight_decay",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum == 0:
            raise ValueError("Nesterov: momentum=0 is plain gradient descent; pass a positive momentum, or use SGD")

    def init(self, theta: Theta, params: Params) -> tuple[Params, dict[str, Params]]:
        """Start where the parameters are, with zero buffers."""
        return params, {"buffer": zeros(params)}

    def update(
        self, theta: Theta, grads: Params, state: dict[str, Params], params: Params, loss: Tensor
    ) -> tuple[Params, dict[str, Params]]:
        """Step against the gradient plus the decayed new buffer."""
        values = self.values(theta, grads.values())
        deltas: Params = {}
        buffers: Params = {}
        for name, grad in grads.items():
            hyper = values[wide_dtype(grad)]
            dtype, grad = grad.dtype, self.decayed(hyper, grad, params[name])
            buffers[name] = hyper["momentum"] * state["buffer"][name] + grad
            deltas[name] = (-hyper["lr"] * (grad + hyper["momentum"] * buffers[name])).to(dtype)
        return deltas, {"buffer": buffers}
