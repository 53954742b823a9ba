"""Rates that balance how far tasks move against how steep they are: the rule that ARUBA learns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, final, get_args

import torch
from torch import Tensor

from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import check_number
from learnedopt.optimizers.bases.precision import wide, wide_dtype
from learnedopt.optimizers.bases.wrapper import prefixed
from learnedopt.optimizers.learned_init import LearnedInit, check_template, template_faults
from learnedopt.optimizers.meta_sgd import LearnedRates
from learnedopt.optimizers.sgd import Descent

Shared: TypeAlias = Literal["coordinate", "tensor", "all"]


@final
@dataclass(frozen=True, eq=False)
class BalancedRates(UpdateRule):
    """``delta = -sqrt(distance / squares) * grad``, both learned (Khodak, Balcan & Talwalkar 2019, algorithm 2).

    With a task's squared distance from the start and the sum of its squared gradients, of all rates this one has the
    least bound on the regret, ``(distance / lr + lr * squares) / 2``. ``MomentMatching`` is the objective that learns
    them.

    Args:
        template: one task's parameters, for names, shapes and dtypes.
        rates: "coordinate": a rate for each coordinate; "tensor": one for each tensor; "all": one for all (isotropic).
        eps: distances start at its square.
        zeta: squares start at its square, so that all rates start at eps / zeta.

    Theta: ``distance/<param>`` (b in the paper) and ``squares/<param>`` (g), with "all" ``distance`` and ``squares``;
    they must stay positive. There is no state.

    Raises:
        TypeError: ``eps`` or ``zeta`` is not a number.
        ValueError: one of them is not positive, ``rates`` is no such choice, or the template holds no floating-point
            tensors.
    """

    template: Params = field(repr=False)
    rates: Shared = "coordinate"
    eps: float = 1.0
    zeta: float = 1.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_template(name, self.template)
        if self.rates not in get_args(Shared):
            raise ValueError(f"{name}: rates={self.rates!r} is none of {', '.join(get_args(Shared))}")
        for option in ("eps", "zeta"):
            value = getattr(self, option)
            check_number(name, option, value, 0.0, math.inf)
            if not value > 0:
                raise ValueError(f"{name}: {option}={value!r} must be positive: rates are eps / zeta at the start")

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return all distances at ``eps**2`` and all squares at ``zeta**2``."""
        if self.rates == "all":
            like = next(iter(self.template.values()))
            return {"distance": like.new_full((), self.eps**2), "squares": like.new_full((), self.zeta**2)}

        def full(value: float) -> Params:
            each = self.rates == "coordinate"
            return {k: p.new_full(p.shape if each else (), value) for k, p in self.template.items()}

        return prefixed("distance", full(self.eps**2)) | prefixed("squares", full(self.zeta**2))

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start where the parameters are; there is no memory."""
        return params, ()

    def start_faults(self, params: Params) -> list[str]:
        """Say which parameters the template does not have."""
        return [] if self.rates == "all" else template_faults(self.template, params, shapes=self.rates == "coordinate")

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Step against the gradient at each one's rate."""
        rates, state = self._rates_now(theta, grads, state)
        return {name: (-rates[name] * wide(grad)).to(grad.dtype) for name, grad in grads.items()}, state

    @property
    def kernel(self) -> Descent:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """One pass."""
        return Descent(self._rates_now)

    def _rates_now(self, theta: Theta, grads: Params, state: State) -> tuple[Params, State]:
        return {name: _rate(theta, name, wide_dtype(grad)) for name, grad in grads.items()}, state


def _rate(theta: Theta, name: str, dtype: torch.dtype) -> Tensor:
    found = (theta[kind if kind in theta else f"{kind}/{name}"].to(dtype) for kind in ("distance", "squares"))
    distance, squares = found
    return (distance / squares).sqrt()


def aruba(template: Params, rates: Shared = "coordinate", eps: float = 1.0, zeta: float = 1.0) -> LearnedInit:
    """Make what ARUBA learns (Khodak et al. 2019): a start, and rates that balance distances against gradients.

    Args:
        template: one task's parameters; the start is initialised to their values.
        rates: see ``BalancedRates``.
        eps: see ``BalancedRates``.
        zeta: see ``BalancedRates``.

    Theta: ``init/<param>``, ``rule/distance/<param>`` and ``rule/squares/<param>``.
    """
    return LearnedInit(BalancedRates(template, rates, eps, zeta), template)


def as_meta_sgd(rule: UpdateRule, theta: Theta) -> tuple[LearnedInit, Theta]:
    """Return ``meta-sgd`` with the same start and rates as an ``aruba`` rule with its theta.

    It moves as the rule does, to the bit; an isotropic rate comes back as one for each tensor, all alike.

    Raises:
        TypeError: the rule is none of ``aruba``'s.

    Example:
        >>> learnedopt.save("start-and-rates", *as_meta_sgd(loop.rule, result.theta))
    """
    if not isinstance(rule, LearnedInit) or not isinstance(rule.rule, BalancedRates):
        raise TypeError(
            f"as_meta_sgd takes a learned start with balanced rates, as aruba(template) makes, got {rule!r}"
        )
    balanced, like = rule.rule, rule.rule.template
    own = {name.removeprefix("rule/"): value for name, value in theta.items() if name.startswith("rule/")}
    rates = {f"rule/lr/{name}": _rate(own, name, wide_dtype(param)) for name, param in like.items()}
    starts = {name: value for name, value in theta.items() if name.startswith("init/")}
    each = "coordinate" if balanced.rates == "coordinate" else "tensor"
    return LearnedInit(LearnedRates(like, each), rule.template), {**starts, **rates}
