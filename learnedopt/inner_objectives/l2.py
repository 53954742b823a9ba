"""A learned L2 regularization, or weight decay, of the inner loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch

from learnedopt.core.inner_objective import InnerObjective
from learnedopt.core.tree import Params, Theta
from learnedopt.inner_objectives.bases.quadratic_penalty import Per, QuadraticPenalty


@final
@dataclass(frozen=True, eq=False)
class L2(InnerObjective):
    """``family.loss(x) + ½ Σ strength · x²``: ridge regression where the family's loss is a square.

    The classic of hyperparameter optimization by gradients (Bengio 2000; one strength per coordinate: Maclaurin et al.
    2015, Lorraine et al. 2020). Outside, the family's loss counts alone.

    Args:
        template: one task's parameters, of which names, shapes and dtypes count.
        strength: where the strengths start, positive.
        per: "scalar": one strength for all, "tensor": one for each tensor, "coordinate": each has the shape of its
            parameter; they differ once they are learned.
        learn: whether the strengths are in theta.

    Theta: their logarithms, so that they stay positive: ``log_l2`` (scalar) or ``log_l2/<param>``.

    Raises:
        TypeError: ``strength`` is not a number.
        ValueError: ``strength`` is not positive; ``per`` is no such choice, or several strengths are fixed; the
            template holds no floating-point tensors; at use, the task's parameters are not like the template.

    Example:
        >>> objective = L2({"w": torch.zeros(2)}, 1.0, per="coordinate")
        >>> objective.init_theta(torch.Generator())
        {'log_l2/w': tensor([0., 0.])}
    """

    template: Params = field(repr=False)
    strength: float
    per: Per = field(default="scalar", kw_only=True)
    learn: bool = field(default=True, kw_only=True)
    # The base has any penalty, and in a frozen class none takes its place.
    penalty: QuadraticPenalty = field(init=False, repr=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        penalty = QuadraticPenalty(
            "L2", _from_origin, "log_l2", self.template, self.strength, self.per, self.learn, log=True
        )
        object.__setattr__(self, "penalty", penalty)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the logarithms of the strengths where they are learned."""
        return self.penalty.init_theta(generator)


def _from_origin(theta: Theta, params: Params) -> Params:
    return params
