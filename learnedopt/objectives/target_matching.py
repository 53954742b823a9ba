"""The meta-objective that draws an inner loop's end to a target."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Rollout, detach, narrow
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import TaskMean
from learnedopt.core.task import Split
from learnedopt.core.tree import Theta
from learnedopt.objectives.direction import is_normalised
from learnedopt.objectives.matching import Matching, SquaredDistance, require_distances, require_matching
from learnedopt.objectives.targets import Bootstrap, Target

Onward: TypeAlias = Literal["bootstrap", "rollout"]


@final
@dataclass(frozen=True)
class TargetMatching(TaskMean):
    """Distance from the rollout's end to a target; no gradient flows into the target.

    Args:
        target: where the end is to come to: ``Bootstrap``, ``LastIterate``, ``BestInHindsight``,
            ``RegularizedSolution``, or a ``Target`` of your own.
        matching: ``SquaredDistance()``, ``KLDivergence()``, or a function ``(loop, target, end, split)`` of your own
            that returns one distance a task.
        continue_from: where training goes on: "bootstrap", from the further steps of the rule that the target was made
            of, as published; "rollout", from the rollout's end, so that these steps are taken again.

    Raises:
        ValueError: before the first step: the target or the matching cannot serve this loop; or the squared distance
            to where a rule comes whose updates keep their length, however small the gradients are
            (Adam's, sign descent): it moves away by as much as a learned rate grows, and rates grow without end.

    Example:
        >>> objective = TargetMatching(LastIterate(5))
        >>> objective = TargetMatching(Bootstrap(16, 0.1), KLDivergence("reverse"), continue_from="rollout")
    """

    target: Target
    matching: Matching = field(default_factory=SquaredDistance)
    continue_from: Onward = "bootstrap"

    end_only = True
    holds_fixed = True

    def __post_init__(self) -> None:
        if not isinstance(cast("object", self.target), Target):
            raise TypeError(
                f"target={self.target!r} is no Target; pass an instance, such as LastIterate(5), or one of a class of "
                "your own that derives from Target"
            )
        require_matching(self.matching)
        if self.continue_from not in ("bootstrap", "rollout"):
            raise ValueError(f"continue_from={self.continue_from!r} is neither 'bootstrap' nor 'rollout'")

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> tuple[Tensor, Carry]:
        """Return the mean distance over tasks, and the carry that training goes on from."""
        found = self.target.find(loop, theta, rollout.end)
        distances = self.matching(loop, found.target, rollout.end, self.target.split)
        distances = require_distances(self.matching, distances, tree.size(rollout.end.params))
        return distances.mean(), found.ahead if self.continue_from == "bootstrap" else detach(rollout.end)

    def check(self, loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> None:
        """Ask the target and the matching whether they can serve, on the first two tasks where they start."""
        target, theta = self.target, tree.detach(theta)
        begun = detach(loop.begin(theta, narrow(carry, 0, min(2, tree.size(carry.params)))))
        chases = num_steps > 0 and target.rule_steps > 0 and isinstance(self.matching, SquaredDistance)
        if chases and is_normalised(loop, theta, begun):
            raise ValueError(
                f"{type(loop.rule).__name__}'s updates keep their length, however small the gradients are, so that a "
                f"target {target.rule_steps} of them ahead moves away by as much as a learned rate grows: under the "
                "squared distance rates grow without end. Match outputs (KLDivergence()), or use a Bootstrap with "
                "num_target_steps=1"
            )
        end = begun._replace(step=begun.step + num_steps)
        target.check(loop, theta, end)
        with torch.no_grad():
            found = self.matching(loop, end, end, target.split)
        require_distances(self.matching, found, tree.size(end.params))


def BootstrappedTarget(
    num_target_steps: int,
    step_size: float,
    split: Split = "valid",
    matching: Matching = SquaredDistance(),  # noqa: B008 - without a state
    continue_from: Onward = "bootstrap",
) -> TargetMatching:
    """Bootstrapped meta-gradients: ``TargetMatching(Bootstrap(...), matching)`` (Flennerhag et al. 2022)."""
    return TargetMatching(Bootstrap(num_target_steps, step_size, split), matching, continue_from)
