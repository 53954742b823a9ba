"""What the studies of FMRL have in common: tasks, the learner within them, and who hands it a start and a radius."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from learnedopt.core.carry import Carry
from learnedopt.core.execution import Execution
from learnedopt.core.inner import InnerLoop
from learnedopt.core.task import TaskFamily, Tasks
from learnedopt.core.tree import Params, Theta
from learnedopt.estimators.unrolled import Unrolled
from learnedopt.evaluation.regret import RecordedTasks, Regret, regret
from learnedopt.meta_optimizers.follow_the_leader import FollowTheLeader
from learnedopt.meta_optimizers.guess_and_grow import GuessAndGrow
from learnedopt.meta_optimizers.per_name import PerName
from learnedopt.objectives.convex import ProjectedGradient
from learnedopt.objectives.leader_and_radius import LeaderAndRadius
from learnedopt.objectives.regularized_leader import FollowTheRegularizedLeader
from learnedopt.objectives.targets import BestInHindsight, LastIterate, Target
from learnedopt.recipes.recipe import ALL_TASKS
from learnedopt.training.trainer import MetaTrainer

if TYPE_CHECKING:
    from learnedopt.optimizers import ConvexSet, Geometry, LearnedInit, MirrorDescent

Follows = Literal["fal", "fli-online", "fli-batch"]
"""What the leader is the mean of: tasks' best points in hindsight, last iterates, or regularised solutions."""
BATCHED = Execution(chunk_size=ALL_TASKS)
TOLERANCE = 1e-9  # of the mean loss's gradient: regret is then exact to the square of it


@dataclass(frozen=True)
class OnlineConvex:
    """Tasks of ``num_losses`` convex losses with gradients within ``lipschitz``, and mirror descent within them.

    The Euclidean learner is projected onto the set; the entropic one is on the simplex by itself, and the set, a mixed
    simplex, is what it is compared with.
    """

    family: TaskFamily
    num_losses: int
    geometry: Geometry
    onto: ConvexSet
    lipschitz: float

    def learner(self, radius: float) -> MirrorDescent:
        """Return the rule whose radius is theta's, and starts there."""
        from learnedopt.optimizers import MirrorDescent

        return MirrorDescent(self.geometry, radius, self.lipschitz, self.num_losses, learn=("radius",))

    def rule(self, radius: float) -> LearnedInit:
        """Return it on a learned start: the family's own."""
        from learnedopt.optimizers import LearnedInit, Projected

        tasks = self.family.sample(1, torch.Generator().manual_seed(0))
        start = {k: p[0] for k, p in self.family.init_params(tasks).items()}
        learner = self.learner(radius)
        return LearnedInit(Projected(learner, self.onto) if self.geometry.flat else learner, start)

    def leader(self, radius: float) -> FollowTheRegularizedLeader:
        """Return the learner that follows the regularised leader of the true losses."""
        onto = self.onto if self.geometry.flat else None
        return FollowTheRegularizedLeader(self.learner(radius), onto, tolerance=TOLERANCE)

    def divergence(self, loop: InnerLoop, target: Carry, end: Carry, split: str) -> Tensor:
        """Return ``B(target, end)`` of each task (num_tasks,)."""
        return loop.over_tasks(self.geometry.divergence, (), target.params, end.params)

    def meta_train(
        self, follows: Follows, num_tasks: int, seed: int, *, radius: float = 0.1, factor: float = 1.1
    ) -> RecordedTasks:
        """Run FMRL over that many tasks, and return what it met and knew.

        Args:
            follows: what the leader is the mean of.
            num_tasks: tasks, one a meta-step.
            seed: of the tasks.
            radius: D at the start.
            factor: by which D grows where a task's target is further away.
        """
        targets: dict[Follows, Target] = {
            "fal": BestInHindsight(ProjectedGradient(self.onto, tolerance=TOLERANCE), self.num_losses),
            "fli-online": LastIterate(self.num_losses),
            "fli-batch": BestInHindsight(self.leader(radius), self.num_losses),
        }
        recorded = RecordedTasks(LeaderAndRadius(targets[follows], divergence=self.divergence))
        weight = math.sqrt(self.num_losses)
        meta_optimizer = PerName(
            {
                "init/*": lambda params: FollowTheLeader(params, weight),
                "*radius": lambda params: GuessAndGrow(params, factor),
            }
        )
        loop = InnerLoop(self.family, self.rule(radius))
        MetaTrainer(loop, Unrolled(0), recorded, meta_optimizer, tracker=None, seed=seed).run(num_tasks)
        return recorded

    def regret(self, thetas: Theta, tasks: Tasks, *, leads: bool = False) -> Regret:
        """Return the regret of each task from its own start at its own radius, and the bound on it.

        ``leads`` measures the regularised leader of the true losses in place of mirror descent.
        """
        loop = InnerLoop(self.family, self.rule(1.0), BATCHED)
        best, leader = ProjectedGradient(self.onto, tolerance=TOLERANCE), self.leader(1.0) if leads else None
        return regret(loop, self.learner(1.0), thetas, tasks, self.num_losses, best, leader)

    def single_task(self, radius: float, tasks: Tasks) -> Theta:
        """Return what a learner knows that learns each task alone: the family's start, and a radius."""
        start = {k: p.clone() for k, p in self.family.init_params(tasks).items()}
        return self._thetas(start, torch.full((len(next(iter(start.values()))),), radius))

    def omniscient(self, tasks: Tasks) -> Theta:
        """Return what is best to know of all tasks: the mean of their best points, and the radius around it.

        The radius is the root of the mean of ``2 B``, for which the bound is least.
        """
        loop = InnerLoop(self.family, self.rule(1.0), BATCHED)
        carry = loop.begin(loop.init_theta(torch.Generator()), loop.start(tasks))
        best = ProjectedGradient(self.onto, tolerance=TOLERANCE)(loop, {}, carry, self.num_losses).params
        mean = {k: p.mean(0).expand_as(p) for k, p in best.items()}
        divergence = loop.over_tasks(self.geometry.divergence, (), best, mean)
        return self._thetas(mean, (2 * divergence.mean()).sqrt().expand_as(divergence))

    def _thetas(self, start: Params, radius: Tensor) -> Theta:
        names = self.rule(1.0).init_theta(torch.Generator())
        dtype = next(iter(start.values())).dtype
        return {k: start[k.removeprefix("init/")] if k.startswith("init/") else radius.to(dtype) for k in names}
