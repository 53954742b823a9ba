"""The proximal inner objective of implicit MAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch

from learnedopt.core.inner_objective import InnerObjective
from learnedopt.core.tree import Params, Theta
from learnedopt.inner_objectives.bases.quadratic_penalty import Per, QuadraticPenalty


@final
@dataclass(frozen=True, eq=False)
class Proximal(InnerObjective):
    """``family.loss(x) + strength / 2 · |x − start|²``, with the learned start of the rule as the centre.

    Rajeswaran et al. (2019), equation 3: the start is also what solutions are pulled to, so that it moves them however
    they are found, and ``Implicit`` applies. It is read from theta's entries ``init/<param>``, also where wrappers put
    a prefix before them. Outside, the family's loss counts alone.

    Args:
        template: one task's parameters, of which names and shapes count.
        strength: the weight of the term, positive; lambda in the paper.
        per: "scalar": one strength for all, "tensor": one for each tensor, "coordinate": each has the shape of its
            parameter; they differ once they are learned.
        learn: whether the strength is in theta.

    Theta: where it is learned, raw, ``strength`` (scalar) or ``strength/<param>``. Nothing keeps meta-training from
    moving it below 0.

    Raises:
        TypeError: ``strength`` is not a number.
        ValueError: ``strength`` is not positive; ``per`` is no such choice, or several strengths are fixed; the
            template holds no floating-point tensors; at use, the task's parameters are not like the template, or theta
            has no learned start, or several.

    Example:
        >>> objective = Proximal({"w": torch.zeros(2)}, 2.0)
        >>> theta = {"init/w": torch.tensor([0.0, 1.0])}
        >>> objective.penalty.value(theta, {"w": torch.tensor([3.0, 1.0])})
        tensor(9.)
    """

    template: Params = field(repr=False)
    strength: float = 1.0
    per: Per = field(default="scalar", kw_only=True)
    learn: bool = field(default=False, kw_only=True)
    # The base has any penalty, and in a frozen class none takes its place.
    penalty: QuadraticPenalty = field(init=False, repr=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        penalty = QuadraticPenalty(
            "Proximal", _from_start, "strength", self.template, self.strength, self.per, self.learn, log=False
        )
        object.__setattr__(self, "penalty", penalty)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the strength or strengths where they are learned."""
        return self.penalty.init_theta(generator)


def _from_start(theta: Theta, params: Params) -> Params:
    starts: dict[str, list[str]] = {}
    for key in theta:  # one pass: this is asked at every inner step
        before, mark, name = key.rpartition("init/")
        if mark and (not before or before.endswith("/")):
            starts.setdefault(name, []).append(key)
    return {name: p - theta[_only(starts.get(name, []), name, theta)] for name, p in params.items()}


def _only(found: list[str], name: str, theta: Theta) -> str:
    """Return the one entry of theta that is the start of a parameter, whatever wrappers have put before its name."""
    if len(found) != 1:
        what = f"has {len(found)} of them: {found}" if found else f"has none: its entries are {list(theta)}"
        raise ValueError(
            f"Proximal pulls to the rule's learned start, theta's one entry {f'init/{name}'!r} (behind any prefix), "
            f"but theta {what}; use a rule with one learned start for every parameter: 'maml', or LearnedInit(rule, "
            "template)"
        )
    return found[0]
