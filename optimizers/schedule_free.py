"""Descent without a schedule: the gradient is taken between the iterate and the average of iterates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from learnedopt.core.counts import require_count
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import DECAY_RATE, NOT_NEGATIVE, HandDesigned, sqrt
from learnedopt.optimizers.bases.precision import like, wide, wide_dtype, zeros

_POWER = 2
"""Of the rate in a step's weight in the average: with a warm-up the first steps weigh less."""


@final
@dataclass(frozen=True)
class ScheduleFree(HandDesigned):
    """Schedule-Free AdamW, or SGD (Defazio et al. 2024, algorithm 1), as the package ``schedulefree`` has them.

    With z the iterate, x the average of iterates and y between them, where the gradient g is taken::

        y_t = (1 - beta1) z_t + beta1 x_t,    z_(t+1) = z_t - lr_t (u_t + weight_decay y_t)
        x_(t+1) = (1 - c) x_t + c z_(t+1),    c = lr_t^2 / sum_(s <= t) lr_s^2
        u = g / (sqrt(v / (1 - beta2^t)) + eps)  with v an average of g^2,  or  u = g

    The parameters that the inner loop moves are y: losses along the way are those at y. What one keeps and judges at
    the end is x, which ``result`` returns.

    Args:
        lr: learning rate; lr_t after the warm-up.
        beta1: the share of x in y, positive: 1 - beta1 of it is z.
        beta2: decay of the average of squared gradients.
        eps: added to the root for stability.
        weight_decay: decoupled from the averages; 0 switches it off.
        adaptive: AdamW's u; False is SGD's, without ``beta2`` and ``eps``.
        warmup_steps: lr_t grows linearly to lr over so many.
        learn: the hyperparameters in theta; None for all that are switched on.

    State: ``ahead``, z - y as the parameters; ``square``, v, as these too where adaptive; ``step``, the number of
    updates taken, and ``total``, the sum of (lr_s / lr)^2 (scalars). So the rule reads the parameters for the decay
    alone.
    """

    lr: float = 2.5e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    adaptive: bool = True
    warmup_steps: int = 0

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "lr": NOT_NEGATIVE,
        "beta1": DECAY_RATE,
        "beta2": DECAY_RATE,
        "eps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
    }
    optional: ClassVar[tuple[str, ...]] = ("weight_decay",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("warmup_steps", self.warmup_steps)
        if self.beta1 == 0:
            raise ValueError("ScheduleFree: beta1=0 takes the gradient at z alone; pass a positive one, such as 0.9")
        useless = [name for name in self.learn or () if not self.uses(name)]
        if useless:
            raise ValueError(f"ScheduleFree: {useless} do nothing without adaptive=True; leave them out of learn")

    def uses(self, name: str) -> bool:
        """Return whether a hyperparameter is switched on."""
        return super().uses(name) and (self.adaptive or name not in ("beta2", "eps"))

    def init(self, theta: Theta, params: Params) -> tuple[Params, dict[str, Any]]:
        """Start where the parameters are, with z, y and x in one place."""
        first = next(iter(params.values()))
        step = torch.zeros((), dtype=wide_dtype(first), device=first.device)
        squares = {"square": zeros(params)} if self.adaptive else {}
        return params, {"ahead": zeros(params), **squares, "step": step, "total": torch.zeros_like(step)}

    def update(
        self, theta: Theta, grads: Params, state: dict[str, Any], params: Params, loss: Tensor
    ) -> tuple[Params, dict[str, Any]]:
        """Move z against the gradient and y with it, towards z by its share in the average."""
        step = state["step"] + 1
        values = self.values(theta, grads.values())
        exact = self.values(theta, [step])[step.dtype]
        correction = (1 - exact["beta2"] ** step).sqrt()
        warmth = (step / self.warmup_steps).clamp(max=1) if self.warmup_steps else torch.ones_like(step)
        total = state["total"] + warmth**_POWER
        share = warmth**_POWER / total
        deltas: Params = {}
        aheads: Params = {}
        squares: Params = {}
        for name, grad in grads.items():
            hyper, direction = values[wide_dtype(grad)], wide(grad)
            if self.adaptive:
                beta2 = hyper["beta2"]
                squares[name] = beta2 * state["square"][name] + (1 - beta2) * direction * direction
                direction = direction / (sqrt(squares[name]) / correction.to(direction.dtype) + hyper["eps"])
            moved = hyper["lr"] * warmth.to(direction.dtype) * self.decayed(hyper, direction, params[name])
            kept, beta1, ahead = 1 - share.to(direction.dtype), hyper["beta1"], state["ahead"][name]
            deltas[name] = ((1 - kept) * ahead + (beta1 * kept - 1) * moved).to(grad.dtype)
            aheads[name] = kept * (ahead - beta1 * moved)
        memory = {"ahead": aheads, "square": squares} if self.adaptive else {"ahead": aheads}
        return deltas, {**memory, "step": step, "total": total}

    def result(self, theta: Theta, params: Params, state: dict[str, Any]) -> Params:
        """Return x, the average of iterates: ``y - (1 - beta1) / beta1 * (z - y)``."""
        values = self.values(theta, params.values())
        found: Params = {}
        for name, param in params.items():
            beta1 = values[wide_dtype(param)]["beta1"]
            found[name] = like(wide(param) - (1 - beta1) / beta1 * state["ahead"][name], param)
        return found
