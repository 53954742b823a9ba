"""Gradient descent with a learned rate for each inner step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnedopt.core.counts import require_count
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import check_number
from learnedopt.optimizers.bases.precision import wide, wide_dtype
from learnedopt.optimizers.sgd import Descent


@final
@dataclass(frozen=True)
class StepRates(UpdateRule):
    """``delta = -lr[t] * g`` at inner step t, one learned rate a step for all parameters.

    Antoniou et al. (2019, MAML++), section 4, with one rate for all layers; Wang et al. (2018) learn it beside the
    distilled images. ``LearnedRates(rates="step")`` has one for each tensor. A run that goes on past ``num_steps``
    steps keeps the last rate.

    Args:
        num_steps: inner steps that have a rate of their own.
        lr: where all rates start.

    Theta: ``lr`` (num_steps,), raw: meta-training may turn rates negative; ``Reparametrized(StepRates(n), {"lr":
    "log"})`` keeps them positive. State: ``step`` (scalar), the number of updates taken.

    Raises:
        TypeError: ``lr`` is not a number, or ``num_steps`` no integer.
        ValueError: ``lr`` is negative, or ``num_steps`` is below 1.

    Example:
        >>> StepRates(3).init_theta(torch.Generator())
        {'lr': tensor([0.1000, 0.1000, 0.1000])}
    """

    num_steps: int
    lr: float = 0.1

    coordinatewise = True

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps, least=1)
        check_number(type(self).__name__, "lr", self.lr, 0.0, math.inf)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return all rates at one value."""
        return {"lr": torch.full((self.num_steps,), float(self.lr), device=generator.device)}

    def theta_scale(self) -> dict[str, float | Tensor]:
        """A step of size one is large for a rate: 0.3."""
        return {"lr": 0.3}

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start where the parameters are, at step 0."""
        return params, {"step": torch.zeros((), dtype=torch.int64, device=next(iter(params.values())).device)}

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Step against the gradient at the rate of this step."""
        rates, state = self._rates(theta, grads, state)
        return {name: (-rates[name] * wide(grad)).to(grad.dtype) for name, grad in grads.items()}, state

    @property
    def kernel(self) -> Descent:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """One pass."""
        return Descent(self._rates)

    def _rates(self, theta: Theta, like: Params, state: State) -> tuple[Params, State]:
        now = state["step"].clamp(max=self.num_steps - 1).reshape(1)
        rate = theta["lr"].index_select(0, now).squeeze(0)
        return {name: rate.to(wide_dtype(x)) for name, x in like.items()}, {"step": state["step"] + 1}
