"""What FMRL with an unknown task similarity minimises: the distance to the task's target, and a radius too small."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Rollout
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import TaskMean
from learnedopt.core.tree import Theta
from learnedopt.objectives.matching import Matching, SquaredDistance, require_distances, require_matching
from learnedopt.objectives.regularized_leader import find_radius
from learnedopt.objectives.target_matching import TargetMatching
from learnedopt.objectives.targets import Target


@final
@dataclass(frozen=True)
class LeaderAndRadius(TaskMean):
    """``½‖phi − c‖² + max(0, log d − log D)``: c the target, D theta's radius, ``d = sqrt(2 B(c, phi))`` how far it is.

    d enters without a gradient. After no inner steps, phi a learned start, the gradient is ``phi − c`` for phi, and
    negative for D exactly where D is less than d: ``FollowTheLeader`` and ``GuessAndGrow`` make FMRL of the two
    (Balcan, Khodak and Talwalkar 2019, algorithm 2). With ``LastIterate`` D may never grow: that target
    lies no further than ``D sqrt(m)`` times the ratio of the mean gradient to the bound that the step size knows. Let
    it grow against ``BestInHindsight``, or start from the domain's radius.

    Args:
        target: ``BestInHindsight``, ``LastIterate``, ``RegularizedSolution``, or one of your own.
        radius: a pattern, as of ``fnmatch``, that matches the one meta-parameter D.
        divergence: B, a number a task; by default half the squared distance.

    Raises:
        ValueError: as ``TargetMatching``; D is not in theta, or not positive.

    Example:
        >>> rule = LearnedInit(MirrorDescent(radius=0.1, num_steps=16, learn=("radius",)), template)
        >>> objective = LeaderAndRadius(BestInHindsight(ProjectedGradient(), 16))
    """

    target: Target
    radius: str = "*radius"
    divergence: Matching = field(default_factory=SquaredDistance)

    end_only = True
    holds_fixed = True

    def __post_init__(self) -> None:
        TargetMatching(self.target)  # which asks whether it is one
        require_matching(self.divergence)

    @property
    def reads_theta(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """The radius."""
        return (self.radius,)

    def check(self, loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> None:
        """Ask the target whether it can serve, and theta for the radius."""
        find_radius(theta, self.radius)
        TargetMatching(self.target).check(loop, theta, carry, num_steps)

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> tuple[Tensor, Carry]:
        """Return the mean over tasks, and the carry that training goes on from."""
        radius, (target, ahead) = find_radius(theta, self.radius), self.target.find(loop, theta, rollout.end)
        squares = SquaredDistance()(loop, target, rollout.end, self.target.split)
        with torch.no_grad():
            found = self.divergence(loop, target, rollout.end, self.target.split)
            distances = (2 * require_distances(self.divergence, found, tree.size(rollout.end.params))).sqrt()
        too_small = (distances.log() - radius.log()).relu()  # by logarithms, so that no unit counts
        return squares.mean() + too_small.mean(), ahead
