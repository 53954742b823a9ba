"""The proximal rule of implicit MAML."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, final, get_args

import torch
from torch import Tensor

from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import check_number
from learnedopt.optimizers.bases.wrapper import prefixed
from learnedopt.optimizers.learned_init import check_template, initial_start, learned_start
from learnedopt.optimizers.sgd import Descent

Strengths: TypeAlias = Literal["scalar", "tensor", "coordinate"]


@final
@dataclass(frozen=True, eq=False)
class IMAML(UpdateRule):
    """Gradient descent on ``loss(x) + strength / 2 * |x - start|^2`` from a learned start.

    Rajeswaran et al. (2019), equation 3: the start is also the centre that solutions are pulled to, so that it moves
    them however they are found, and ``Implicit`` applies.

    Args:
        template: one task's parameters; the start is initialised to their values.
        lr: the inner learning rate, not in theta.
        strength: the weight of the proximal term, positive; lambda in the paper.
        learn_strength: whether ``strength`` is in theta.
        strengths: "scalar": one for all, "tensor": one for each tensor, "coordinate": each has the shape of its
            parameter; they differ once they are learned.

    Theta: ``init/<param>``; where it is learned, raw, ``strength`` (scalar), or ``strength/<param>``.

    Raises:
        TypeError: ``lr`` or ``strength`` is not a number.
        ValueError: ``lr`` is negative or ``strength`` not positive; ``strengths`` is no such choice, or several are
            fixed; the template holds no floating-point tensors; at ``init``, the task's parameters are not like it.
    """

    template: Params = field(repr=False)
    lr: float = 0.1
    strength: float = 1.0
    learn_strength: bool = False
    strengths: Strengths = "scalar"

    coordinatewise = True

    def __post_init__(self) -> None:
        check_template(type(self).__name__, self.template)
        check_number(type(self).__name__, "lr", self.lr, 0.0, math.inf)
        check_number(type(self).__name__, "strength", self.strength, 0.0, math.inf)
        if self.strength == 0:
            raise ValueError(
                "IMAML: strength=0 leaves nothing that ties solutions to the start; pass a positive one, or use maml"
            )
        if self.strengths not in get_args(Strengths):
            raise ValueError(f"IMAML: strengths={self.strengths!r} is none of {', '.join(get_args(Strengths))}")
        if self.strengths != "scalar" and not self.learn_strength:
            raise ValueError(
                f"IMAML: strengths={self.strengths!r} are all the same unless they are learned; pass "
                'learn_strength=True, or leave them at "scalar"'
            )

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return copies of the template, and the strength or strengths where they are learned."""
        theta = initial_start(self.template)
        if self.learn_strength and self.strengths == "scalar":
            theta["strength"] = torch.tensor(float(self.strength), device=generator.device)
        elif self.learn_strength:
            shapes = {k: p.shape if self.strengths == "coordinate" else () for k, p in self.template.items()}
            theta |= prefixed("strength", {k: p.new_full(shapes[k], self.strength) for k, p in self.template.items()})
        return theta

    def init(self, theta: Theta, params: Params) -> tuple[Params, tuple[()]]:
        """Start at theta's start; there is no memory."""
        return learned_start(theta, params), ()

    def update(
        self, theta: Theta, grads: Params, state: tuple[()], params: Params, loss: Tensor
    ) -> tuple[Params, tuple[()]]:
        """Step against the gradient, which includes the proximal term's."""
        return {name: -self.lr * grad for name, grad in grads.items()}, state

    @property
    def kernel(self) -> Descent:
        """One pass."""
        return Descent(lambda theta, params, state: (dict.fromkeys(params, self.lr), state))

    def regularizer(self, theta: Theta, params: Params) -> Tensor:
        """Return the proximal term ``strength / 2 * |params - start|^2``, each one's where there are more."""
        start = learned_start(theta, params)
        squares = {name: (p - start[name]).square() for name, p in params.items()}
        if self.strengths != "scalar":
            squares = {name: theta[f"strength/{name}"].to(square.dtype) * square for name, square in squares.items()}
            return 0.5 * torch.stack([square.sum() for square in squares.values()]).sum()
        distance = torch.stack([square.sum() for square in squares.values()]).sum()
        strength = theta["strength"].to(distance.dtype) if self.learn_strength else self.strength
        return 0.5 * strength * distance

    def regularizer_gradient(self, theta: Theta, params: Params) -> Params:
        """Return ``strength * (params - start)``."""
        start = learned_start(theta, params)
        if not self.learn_strength:
            return {name: self.strength * (p - start[name]) for name, p in params.items()}
        own = self.strengths != "scalar"
        strength = {name: theta[f"strength/{name}" if own else "strength"].to(p.dtype) for name, p in params.items()}
        return {name: strength[name] * (p - start[name]) for name, p in params.items()}
