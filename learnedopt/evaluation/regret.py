"""Task-averaged regret, and the bounds on it, of learners whose start and radius are meta-learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Rollout, Tape
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import MetaObjective, TaskMean
from learnedopt.core.task import Tasks
from learnedopt.core.tree import Params, Theta

if TYPE_CHECKING:
    from learnedopt.optimizers import MirrorDescent


class Regret(NamedTuple):
    """Of each task (num_tasks,): the regret, its bound, the radius D that the learner had, and its losses' sum."""

    regret: Tensor
    bound: Tensor
    radius: Tensor
    losses: Tensor

    def averaged(self) -> tuple[Tensor, Tensor]:
        """Return regret and bound, averaged over the first 1, 2, ... tasks: the task-averaged regret (TAR)."""
        counts = torch.arange(1, len(self.regret) + 1, dtype=self.regret.dtype)
        return self.regret.cumsum(0) / counts, self.bound.cumsum(0) / counts

    def violations(self) -> int:
        """Return after how many of 1, 2, ... tasks the averaged regret is not within its bound; NaN is not."""
        averages, bounds = self.averaged()
        return int((~(averages <= bounds)).sum())


class RecordedTasks(TaskMean):
    """An objective that remembers which tasks theta met, and the theta that it was then: what regret is computed of.

    It keeps all of it in memory, and none of it in a checkpoint.

    Example:
        >>> objective = RecordedTasks(LeaderAndRadius(target))
        >>> MetaTrainer(loop, Unrolled(0), objective, meta_optimizer).run(200)
        >>> found = regret(loop, learner, objective.thetas, objective.tasks, num_steps=16, best=ProjectedGradient())
    """

    def __init__(self, objective: TaskMean) -> None:
        self.objective = objective
        self._met = list[tuple[Theta, Tasks]]()
        self.end_only: bool = objective.end_only
        self.reads_theta: tuple[str, ...] = objective.reads_theta
        self.holds_fixed: bool = objective.holds_fixed

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor | tuple[Tensor, Carry]:
        """Return what the objective does."""
        self._met.append((tree.tree_map(lambda x: x.detach().clone(), theta), rollout.start.tasks))
        objective: MetaObjective = self.objective  # pyright: ignore[reportAssignmentType]
        return objective(loop, theta, rollout)

    def check(self, loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> None:
        """Ask what the objective asks."""
        self.objective.check(loop, theta, carry, num_steps)

    @property
    def thetas(self) -> Theta:
        """One theta for each task, each entry with that leading dimension, in the order in which they were met."""
        counts = [tree.size(tasks) for _, tasks in self._met]
        pairs = zip(self._met, counts, strict=True)
        return tree.concatenate([{k: x.expand(n, *x.shape) for k, x in theta.items()} for (theta, _), n in pairs])

    @property
    def tasks(self) -> Tasks:
        """The tasks in the same order."""
        return tree.concatenate([tasks for _, tasks in self._met])


def regret(
    loop: InnerLoop, learner: MirrorDescent, thetas: Theta, tasks: Tasks, num_steps: int, best: Callable[..., Carry],
    leader: Callable[..., Carry] | None = None,
) -> Regret:  # fmt: skip
    """Measure ``Σ_i l_i(x_i) − min_x Σ_i l_i(x)`` over ``num_steps`` losses of each task, and its bound.

    The bound is ``B(x*, phi)/eta + (eta/2) G² m = (B(x*, phi)/D + D/2) G sqrt(m)``, with D theta's radius at the time,
    G the learner's ``lipschitz`` and m its ``num_steps``: it holds for mirror descent and for the regularised leader on
    convex losses whose gradients are within G (in the largest entry, for the entropic geometry).

    Args:
        loop: whose rule takes the steps x_1 = phi, x_2, ...; all tasks are run together where its execution is such.
        learner: the ``MirrorDescent`` in that rule, for geometry, G and D.
        thetas: one for each task: every entry has a leading dimension of tasks.
        tasks: the tasks.
        num_steps: m.
        best: a solver of the best point in hindsight, such as ``ProjectedGradient``.
        leader: where given, x_{i+1} is what it makes of the first i losses: ``FollowTheRegularizedLeader``.

    Raises:
        ValueError: ``num_steps`` is not the learner's; a task's radius is not positive.
    """
    if num_steps != learner.num_steps:
        raise ValueError(
            f"num_steps={num_steps}, but the learner's step size is one for num_steps={learner.num_steps}, for which "
            "the bound is; pass MirrorDescent(num_steps=...) the losses of a task"
        )
    begun = loop.begin(thetas, loop.start(tasks), theta_per_task=True)
    best_end = best(loop, thetas, begun, num_steps)
    if leader is None:
        met = loop.run(thetas, begun, num_steps, Tape.NONE, theta_per_task=True).losses.sum(0)
    else:
        met = losses_at(loop, thetas, [leader(loop, thetas, begun, i).params for i in range(num_steps)], begun)
    least = losses_at(loop, thetas, [best_end.params] * num_steps, begun)
    divergence = loop.over_tasks(learner.geometry.divergence, (), best_end.params, begun.params)
    radius = _radius(learner, thetas, divergence)
    bound = (divergence / radius + radius / 2) * learner.lipschitz * math.sqrt(num_steps)
    return Regret(met - least, bound, radius, met)


def losses_at(loop: InnerLoop, thetas: Theta, points: list[Params], begun: Carry) -> Tensor:
    """Return each task's sum of losses (num_tasks,), that of step i at the i-th of ``points``."""
    total = torch.zeros(())
    for i, params in enumerate(points):
        here = begun._replace(params=params, step=begun.step + i)
        total = total + loop.losses(thetas, here, "train", theta_per_task=True).detach()
    return total


def _radius(learner: MirrorDescent, thetas: Theta, like: Tensor) -> Tensor:
    if not learner.learns_radius:
        return torch.full_like(like, learner.radius)
    (name,) = (k for k in thetas if k.rpartition("/")[2] == "radius")
    if not bool((thetas[name] > 0).all()):
        raise ValueError(f"the radius {name!r} must be positive, its least entry is {float(thetas[name].min()):g}")
    return thetas[name]
