"""Learned rates, Meta-SGD and MAML."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from learnedopt.optimizers.hand_designed import check_number
from learnedopt.optimizers.learned_init import LearnedInit, check_template
from learnedopt.optimizers.sgd import SGD
from learnedopt.optimizers.wrapper import prefixed
from learnedopt.rule import UpdateRule
from learnedopt.tree import Params, Theta


@final
@dataclass(frozen=True, eq=False)
class LearnedRates(UpdateRule):
    """``delta = -lr * g`` with a learned rate for each coordinate or tensor (Li et al. 2017, equation 1).

    Args:
        template: one task's parameters, for names, shapes and dtypes.
        rates: "coordinate": each rate has the shape of its parameter; "tensor": one rate for each tensor.
        lr: where all rates start. None draws one value from U[0.005, 0.1], as the paper does.

    Theta: ``lr/<param>``, raw: meta-training may turn rates negative.

    Raises:
        TypeError: ``lr`` is not a number.
        ValueError: ``lr`` is negative, ``rates`` is no such choice, or the template holds no floating-point tensors.
    """

    template: Params = field(repr=False)
    rates: Literal["coordinate", "tensor"] = "coordinate"
    lr: float | None = None

    def __post_init__(self) -> None:
        check_template(type(self).__name__, self.template)
        if self.rates not in ("coordinate", "tensor"):
            raise ValueError(f'LearnedRates: rates={self.rates!r} is not a choice; pass "coordinate" or "tensor"')
        if self.lr is not None:
            check_number(type(self).__name__, "lr", self.lr, 0.0, math.inf)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return all rates at one value."""
        lr = self.lr
        if lr is None:
            lr = float(torch.empty((), device=generator.device).uniform_(0.005, 0.1, generator=generator))
        rates = {k: p.new_full(() if self.rates == "tensor" else p.shape, lr) for k, p in self.template.items()}
        return prefixed("lr", rates)

    def init(self, theta: Theta, params: Params) -> tuple[Params, tuple[()]]:
        """Start where the parameters are; there is no memory."""
        return params, ()

    def update(
        self, theta: Theta, grads: Params, state: tuple[()], params: Params, loss: Tensor
    ) -> tuple[Params, tuple[()]]:
        """Step against the gradient at each one's rate."""
        return {name: -theta[f"lr/{name}"].to(grad.dtype) * grad for name, grad in grads.items()}, state


def meta_sgd(
    template: Params, rates: Literal["coordinate", "tensor"] = "coordinate", lr: float | None = None
) -> LearnedInit:
    """Make Meta-SGD (Li et al. 2017): a learned start and learned rates.

    Args:
        template: one task's parameters; the start is initialised to their values.
        rates: "coordinate", as in the paper, or "tensor".
        lr: where all rates start. None draws one value from U[0.005, 0.1].

    Theta: ``init/<param>`` and ``rule/lr/<param>``.
    """
    return LearnedInit(LearnedRates(template, rates, lr), template)


def maml(template: Params, lr: float = 0.01) -> LearnedInit:
    """Make MAML (Finn et al. 2017): a learned start, and gradient descent with a fixed rate that is not in theta.

    Args:
        template: one task's parameters; the start is initialised to their values.
        lr: the inner learning rate.

    Theta: ``init/<param>``.
    """
    return LearnedInit(SGD(lr, learn=()), template)
