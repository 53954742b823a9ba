"""Learned rates, Meta-SGD and MAML."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, final, get_args

import torch
from torch import Tensor

from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import check_number
from learnedopt.optimizers.bases.precision import wide, wide_dtype
from learnedopt.optimizers.bases.wrapper import prefixed
from learnedopt.optimizers.learned_init import LearnedInit, check_template, template_faults
from learnedopt.optimizers.sgd import SGD, Descent

Rates: TypeAlias = Literal["coordinate", "tensor", "step"]


@final
@dataclass(frozen=True, eq=False)
class LearnedRates(UpdateRule):
    """``delta = -lr * g`` with a learned rate for each coordinate or tensor (Li et al. 2017, equation 1).

    Args:
        template: one task's parameters, for names, shapes and dtypes.
        rates: "coordinate": each rate has the shape of its parameter; "tensor": one rate for each tensor; "step": one
            for each tensor and inner step, shape (num_steps,), the last of them for all later steps (MAML++, Antoniou
            et al. 2019, section 4).
        lr: where all rates start. None draws one value from U[0.005, 0.1], as the paper does.
        num_steps: of "step", and needed there.

    Theta: ``lr/<param>``, raw: meta-training may turn rates negative. State: with "step" the count of steps.

    Raises:
        TypeError: ``lr`` is not a number.
        ValueError: ``lr`` is negative, ``rates`` is no such choice, ``num_steps`` is no count or comes without "step",
            or the template holds no floating-point tensors.
    """

    template: Params = field(repr=False)
    rates: Rates = "coordinate"
    lr: float | None = None
    num_steps: int | None = None

    def __post_init__(self) -> None:
        check_template(type(self).__name__, self.template)
        if self.rates not in get_args(Rates):
            raise ValueError(f"LearnedRates: rates={self.rates!r} is none of {', '.join(get_args(Rates))}")
        counted = isinstance(self.num_steps, int) and not isinstance(self.num_steps, bool) and self.num_steps >= 1
        if counted != (self.rates == "step") or (self.num_steps is not None and not counted):
            raise ValueError(
                f'LearnedRates: num_steps={self.num_steps!r} with rates={self.rates!r}; rates="step" needs the number '
                "of inner steps that have a rate of their own, at least 1, the others take none"
            )
        if self.lr is not None:
            check_number(type(self).__name__, "lr", self.lr, 0.0, math.inf)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return all rates at one value."""
        lr = self.lr
        if lr is None:
            lr = float(torch.empty((), device=generator.device).uniform_(0.005, 0.1, generator=generator))
        shapes: dict[str, Any] = {
            k: {"coordinate": p.shape, "tensor": (), "step": (self.num_steps,)}[self.rates]
            for k, p in self.template.items()
        }
        return prefixed("lr", {k: p.new_full(shapes[k], lr) for k, p in self.template.items()})

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start where the parameters are; there is no memory, but with "step" a count of 0."""
        if self.rates != "step":
            return params, ()
        return params, {"step": torch.zeros((), dtype=torch.int64, device=next(iter(params.values())).device)}

    def start_faults(self, params: Params) -> list[str]:
        """Say which parameters the template does not have."""
        return template_faults(self.template, params, shapes=self.rates == "coordinate")

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Step against the gradient at each one's rate."""
        rates, state = self._rates_now(theta, grads, state)
        return {name: (-rates[name] * wide(grad)).to(grad.dtype) for name, grad in grads.items()}, state

    @property
    def kernel(self) -> Descent:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """One pass."""
        return Descent(self._rates_now)

    def _rates_now(self, theta: Theta, grads: Params, state: State) -> tuple[Params, State]:
        rates = {name: theta[f"lr/{name}"].to(wide_dtype(grad)) for name, grad in grads.items()}
        if self.num_steps is not None:
            now = state["step"].clamp(max=self.num_steps - 1).reshape(1)
            rates = {name: rate.index_select(0, now).squeeze(0) for name, rate in rates.items()}
            state = {"step": state["step"] + 1}
        return rates, state


def meta_sgd(
    template: Params, rates: Rates = "coordinate", lr: float | None = None, num_steps: int | None = None
) -> LearnedInit:
    """Make Meta-SGD (Li et al. 2017): a learned start and learned rates.

    Args:
        template: one task's parameters; the start is initialised to their values.
        rates: "coordinate", as in the paper, "tensor" or "step"; see ``LearnedRates``.
        lr: where all rates start. None draws one value from U[0.005, 0.1].
        num_steps: of "step".

    Theta: ``init/<param>`` and ``rule/lr/<param>``.
    """
    return LearnedInit(LearnedRates(template, rates, lr, num_steps), template)


def maml(template: Params, lr: float = 0.01) -> LearnedInit:
    """Make MAML (Finn et al. 2017): a learned start, and gradient descent with a fixed rate that is not in theta.

    Args:
        template: one task's parameters; the start is initialised to their values.
        lr: the inner learning rate.

    Theta: ``init/<param>``.
    """
    return LearnedInit(SGD(lr, learn=()), template)
