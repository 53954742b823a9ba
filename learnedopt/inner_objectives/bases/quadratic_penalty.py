"""Half the weighted squared distance from a centre, with its gradient in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, final, get_args

import torch
from torch import Tensor

from learnedopt.core.inner_objective import Penalty
from learnedopt.core.tree import Params, Theta
from learnedopt.inner_objectives.bases import arguments

Per: TypeAlias = Literal["scalar", "tensor", "coordinate"]
"""One strength for all, one for each tensor, or one for each coordinate."""


@final
@dataclass(frozen=True, eq=False)
class QuadraticPenalty(Penalty):
    """``½ Σ strength · offset²``, summed over all coordinates.

    Args:
        owner: the inner objective's class, for messages.
        offsets: (theta, params) -> the parameters' distances from the centre, one tensor each.
        key: theta's name of the strength; with ``per`` other than "scalar", ``<key>/<param>``.
        template: one task's parameters: names, shapes and, for theta per tensor or coordinate, dtypes.
        strength: positive; learned ones start there.
        per: how many strengths there are.
        learn: whether they are in theta.
        log: whether theta holds their logarithms, so that they stay positive, and not the raw values.

    Raises:
        TypeError: ``strength`` is not a number.
        ValueError: it is not positive and finite; ``per`` is no such choice, or several strengths are fixed; the
            template holds no floating-point tensors; at use, the task's parameters are not like it.
    """

    owner: str
    offsets: Callable[[Theta, Params], Params]
    key: str
    template: Params = field(repr=False)
    strength: float
    per: Per
    learn: bool
    log: bool

    def __post_init__(self) -> None:
        arguments.require_template(self.owner, self.template)
        arguments.require_number(self.owner, "strength", self.strength)
        if self.strength <= 0:
            raise ValueError(
                f"{self.owner}: strength={self.strength!r} is not positive, so nothing would pull; pass a positive "
                "one, or leave the inner objective out"
            )
        arguments.require_choice(self.owner, "per", self.per, Per)
        if self.per != "scalar" and not self.learn:
            raise ValueError(
                f"{self.owner}: per={self.per!r} strengths are all the same unless they are learned; pass learn=True, "
                f"or leave per at {get_args(Per)[0]!r}"
            )

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the strengths that are learned; a scalar one is of the default dtype, others are of the template's."""
        if not self.learn:
            return {}
        start = math.log(self.strength) if self.log else float(self.strength)
        if self.per == "scalar":
            return {self.key: torch.tensor(start, device=generator.device)}
        shapes = {k: p.shape if self.per == "coordinate" else () for k, p in self.template.items()}
        return {
            f"{self.key}/{k}": torch.full(shapes[k], start, dtype=p.dtype, device=generator.device)
            for k, p in self.template.items()
        }

    def value(self, theta: Theta, params: Params) -> Tensor:
        """Return half the weighted squared distance."""
        offsets = self._offsets(theta, params)
        if self.per == "scalar":
            distance = torch.stack([x.square().sum() for x in offsets.values()]).sum()
            return 0.5 * self._strength(theta, "", distance.dtype) * distance
        squares = [(self._strength(theta, k, x.dtype) * x.square()).sum() for k, x in offsets.items()]
        return 0.5 * torch.stack(squares).sum()

    def gradient(self, theta: Theta, params: Params) -> Params:
        """Return ``strength · offset``."""
        offsets = self._offsets(theta, params)
        return {k: self._strength(theta, k, x.dtype) * x for k, x in offsets.items()}

    def _offsets(self, theta: Theta, params: Params) -> Params:
        arguments.require_like(self.owner, self.template, params)
        return self.offsets(theta, params)

    def _strength(self, theta: Theta, name: str, dtype: torch.dtype) -> Tensor | float:
        """Return the strength of one parameter, in its dtype: it is theta's that is converted, and none promotes."""
        if not self.learn:
            return self.strength
        value = theta[self.key if self.per == "scalar" else f"{self.key}/{name}"].to(dtype)
        return value.exp() if self.log else value
