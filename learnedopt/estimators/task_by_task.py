"""A meta-batch task by task: each with a horizon, a family and an estimator of its own, and no say beyond a limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry
from learnedopt.core.clipping import Norm, clip, norm_of
from learnedopt.core.counts import require_count
from learnedopt.core.estimator import Estimate, GradientEstimator, Recording
from learnedopt.core.inner import InnerLoop
from learnedopt.core.modes import outside_inference_mode
from learnedopt.core.objective import MetaObjective
from learnedopt.core.parts import loop_of, parts_of
from learnedopt.core.shares import Places, all_places, join_places, narrow_places, require_same
from learnedopt.core.task import Tasks
from learnedopt.core.tree import Theta
from learnedopt.estimators import perturbations
from learnedopt.estimators.whole_episodes import over, pairs_of, require_whole, steps_of


class TaskByTaskCarry(NamedTuple):
    """The tasks of one meta-batch or a share of it, the seed of their horizons and perturbations, and their places."""

    tasks: Tasks
    seed: int
    places: Places | None = None  # None in files of before: all


class _Task(NamedTuple):
    """One task: its loop, its positions in the meta-batch and in the carry, its member of a mixture, its horizon."""

    loop: InnerLoop
    task: Tasks
    position: int
    place: int
    member: int
    horizon: int


class _Found(NamedTuple):
    """One task's estimate, and the length of its gradient with respect to theta / theta_scale."""

    estimate: Estimate
    norm: Norm

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm.mantissa) and bool(self.estimate.loss.isfinite())


@final
@dataclass(frozen=True)
class TaskByTask(GradientEstimator):
    """The mean of estimates of single tasks, each judged, and clipped or left out, by itself.

    One task whose inner loop is chaotic has a meta-gradient that outweighs all others together: a limit on the whole
    meta-gradient then keeps nothing but that task's direction, a limit on each task's keeps the others' too. Tasks may
    have different horizons, and the families of a mixture (``TaskFamily.families``) different shapes.

    Norms are of the gradient with respect to ``theta / theta_scale``, as ``MetaTrainer`` has them, of one task's
    objective times its weight.

    Args:
        estimator: what estimates one task: an estimator of whole episodes, such as ``Unrolled``.
        horizons: pairs of inner steps and a weight; each task's is drawn, by weight, from a seed in the carry, and the
            loop's ``horizon`` and the estimator's ``num_steps`` are both that. None: these are as they are.
        instead: what estimates a task in the estimator's place, as the three options below say: evolution strategies
            do not fail where back-propagated gradients explode. It takes the same number of steps.
        exact_up_to: on tasks of more inner steps, ``instead`` is taken. None for no limit.
        instead_for: members of the mixture, by number, for which ``instead`` is taken.
        instead_above: a norm; a task whose gradient is longer, or not finite, is estimated again, by ``instead``.
        max_task_grad_norm: each task's gradient is scaled down to this norm where it is longer.
        drop_above: a norm; a task whose gradient is longer is left out. None leaves out those that are not finite only.
        task_weights: factors of the objective, one for each member of the mixture; None for 1.

    The estimate is the mean over the tasks that are not left out, not finite where none is: ``MetaTrainer`` skips that.
    Those that are not finite are named, see ``Estimate``: here they need no second estimate.
    The carry is None after it: these are whole episodes, and an objective that names a carry to go on from is not
    followed. ``info`` has ``dropped``, ``clipped`` and ``instead``, how many tasks were; ``inner_steps``, of all, those
    of estimates that were thrown away included; ``losses``, their mean curve, where all have one horizon.

    Raises:
        TypeError: a part is no estimator of whole episodes.
        ValueError: an option out of its range; ``instead`` without a condition, or a condition without ``instead``; a
            member that the family does not have; what an estimator refuses.

    Example:
        >>> estimator = TaskByTask(
        ...     Unrolled(100, segment=10), ((50, 0.3), (100, 0.5), (200, 0.2)),
        ...     EvolutionStrategies(100, num_pairs=4, sigma=0.4), exact_up_to=100, max_task_grad_norm=0.3,
        ... )
        >>> result = MetaTrainer(loop, estimator, LogMeans(2.0), num_tasks=8).run(100)
    """

    estimator: GradientEstimator
    horizons: tuple[tuple[int, float], ...] | None = None
    instead: GradientEstimator | None = None
    exact_up_to: int | None = None
    instead_for: tuple[int, ...] = ()
    instead_above: float | None = None
    max_task_grad_norm: float | None = None
    drop_above: float | None = None
    task_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        require_whole("estimator", self.estimator)
        if self.instead is not None:
            require_whole("instead", self.instead)
        for steps, weight in pairs_of(self.horizons):
            require_count("a horizon", steps, least=1)
            _require_positive(f"the weight of horizon {steps}", weight)
            for part in (self.estimator, self.instead):
                if part is not None:
                    over(part, steps)
        steps = [steps_of(part) for part in (self.estimator, self.instead) if part is not None]
        if self.horizons is None and len({*steps}) > 1:
            raise ValueError(
                f"TaskByTask: estimator and instead take {steps} steps of one task; give both the same, or horizons"
            )
        for name in ("instead_above", "max_task_grad_norm", "drop_above"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if self.exact_up_to is not None:
            require_count("exact_up_to", self.exact_up_to)
        for i in self.instead_for:
            require_count("a member in instead_for", i)
        for i, weight in enumerate(self.task_weights or ()):
            _require_positive(f"task_weights[{i}]", weight)
        conditions = [self.exact_up_to is not None, bool(self.instead_for), self.instead_above is not None]
        if any(conditions) != (self.instead is not None):
            raise ValueError(
                "exact_up_to, instead_for and instead_above say where `instead` is taken: pass instead= together with "
                f"one of them at least, got instead={self.instead!r} and "
                f"{(self.exact_up_to, self.instead_for, self.instead_above)}"
            )

    @property
    def takes_second_derivatives(self) -> bool:
        """Whether a part does."""
        return any(part.takes_second_derivatives for part in (self.estimator, self.instead) if part is not None)

    @property
    def recording(self) -> Recording | None:
        """That of the estimator on the longest episodes that it is asked for; of one task at a time."""
        longest = [n for n, _ in pairs_of(self.horizons) if self.exact_up_to is None or n <= self.exact_up_to]
        return over(self.estimator, max(longest)).recording if longest else self.estimator.recording

    @outside_inference_mode
    def start(self, loop: InnerLoop, theta: Theta, tasks: Tasks, generator: torch.Generator) -> TaskByTaskCarry:
        """Return these tasks, and a seed."""
        self._require_members(loop)
        return TaskByTaskCarry(tree.detach(tasks), perturbations.draw_seed(generator), all_places(tree.size(tasks)))

    def forms(self, loop: InnerLoop, theta: Theta, carry: TaskByTaskCarry) -> list[Any]:
        """Return the carry as it starts: it is never anything else."""
        return [carry]

    def require_carry(self, theta: Theta, carry: Any) -> None:
        """Raise TypeError where a carry is of another class."""
        if not isinstance(carry, TaskByTaskCarry):
            raise TypeError(
                f"TaskByTask keeps tasks and a seed in a carry of its own, got a {type(carry).__name__}; begin with "
                "estimator.start(loop, theta, tasks, generator)"
            )

    def count_tasks(self, carry: TaskByTaskCarry) -> int:
        """Return how many tasks there are."""
        return tree.size(carry.tasks)

    def narrow(self, carry: TaskByTaskCarry, start: int, stop: int) -> TaskByTaskCarry:
        """Return a share of the tasks: horizons and perturbations are drawn for a task's place in the meta-batch."""
        places = narrow_places(_places(carry), start, stop)
        return TaskByTaskCarry(tree.narrow(carry.tasks, start, stop), carry.seed, places)

    def join(self, carries: Sequence[TaskByTaskCarry]) -> TaskByTaskCarry:
        """Return the carry of all tasks of these shares."""
        require_same("seed", [x.seed for x in carries], "TaskByTask")
        places = join_places([_places(x) for x in carries], "TaskByTask")
        return TaskByTaskCarry(tree.concatenate([x.tasks for x in carries]), carries[0].seed, places)

    @outside_inference_mode
    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: TaskByTaskCarry) -> Estimate:
        """Take each task's estimate, and the mean of those that serve."""
        self.require_carry(theta, carry)
        self._require_members(loop)
        scale = loop.theta_scale(theta)
        kept: list[_Found] = []
        failed: list[int] = []
        counts = {"dropped": 0, "clipped": 0, "instead": 0, "inner_steps": 0}
        for task in self._tasks(loop, carry):
            found = self._one(task, theta, objective, scale, carry.seed, counts)
            if not found.finite:
                failed.append(task.place)
            if not found.finite or (self.drop_above is not None and found.norm.value > self.drop_above):
                counts["dropped"] += 1
                continue
            long = self.max_task_grad_norm is not None and found.norm.value > self.max_task_grad_norm
            counts["clipped"] += long
            grads = clip(found.estimate.grads, found.norm, self.max_task_grad_norm)
            kept.append(found._replace(estimate=found.estimate._replace(grads=grads)))
        found = _mean(kept, theta, counts)
        told: dict[str, Any] = {"num_tasks": len(kept)} if counts["dropped"] else {}
        told |= {"failed_tasks": len(failed), "failed": failed} if failed else {}
        return found._replace(info=found.info | told)

    def standing(self, loop: InnerLoop, carry: TaskByTaskCarry) -> list[tuple[InnerLoop, Carry, int | None]]:
        """Return each task at its start."""
        return [(task.loop, task.loop.start(task.task), task.horizon) for task in self._tasks(loop, carry)]

    def _tasks(self, loop: InnerLoop, carry: TaskByTaskCarry) -> list[_Task]:
        """Return the tasks one by one, in the order of the batch."""
        found: list[_Task] = []
        places = _places(carry)
        drawn = self._drawn(carry.seed, places.num_tasks)
        for part in parts_of(loop, carry.tasks):
            for i, place in enumerate(part.positions):
                position, task = places.positions[place], tree.narrow(part.tasks, i, i + 1)
                if drawn is None:
                    steps = steps_of(self.estimator)
                    found.append(_Task(part.loop, task, position, place, part.member, steps))
                else:
                    own = loop_of(loop, part.member, drawn[position])
                    found.append(_Task(own, task, position, place, part.member, drawn[position]))
        return sorted(found, key=lambda task: task.place)

    def _drawn(self, seed: int, num_tasks: int) -> list[int] | None:
        """Return a horizon for each task of the batch."""
        if self.horizons is None:
            return None
        weights = torch.tensor([weight for _, weight in self.horizons], dtype=torch.float64)
        picks = torch.multinomial(weights, num_tasks, replacement=True, generator=perturbations.generator(seed))
        return [self.horizons[i][0] for i in tree.numbers(picks)]

    def _one(
        self, task: _Task, theta: Theta, objective: MetaObjective, scale: Theta, seed: int, counts: dict[str, int]
    ) -> _Found:
        """Return the estimate of one task, times its weight, by whichever part is to be taken."""
        weight = 1.0 if self.task_weights is None else self.task_weights[task.member]

        def by(part: GradientEstimator) -> _Found:
            part = part if self.horizons is None else over(part, task.horizon)
            # Of the task's own: neither its neighbours nor a first try by another part change its perturbations.
            own = perturbations.generator(seed, task.position)
            found = part.estimate(task.loop, theta, objective, part.start(task.loop, theta, task.task, own))
            counts["inner_steps"] += found.info.get("inner_steps", 0)
            found = found._replace(loss=weight * found.loss, grads={k: weight * g for k, g in found.grads.items()})
            return _Found(found, norm_of({k: g * scale[k] for k, g in found.grads.items()}))

        if self.instead is None:
            return by(self.estimator)
        too_long = self.exact_up_to is not None and task.horizon > self.exact_up_to
        if not too_long and task.member not in self.instead_for:
            found = by(self.estimator)
            if self.instead_above is None or (found.finite and found.norm.value <= self.instead_above):
                return found
        counts["instead"] += 1
        return by(self.instead)

    def _require_members(self, loop: InnerLoop) -> None:
        here = len(loop.family.families)
        if self.task_weights is not None and len(self.task_weights) != here:
            raise ValueError(
                f"task_weights={self.task_weights} are {len(self.task_weights)}, the family "
                f"{type(loop.family).__name__} has {here} members; pass one weight for each"
            )
        if any(i >= here for i in self.instead_for):
            raise ValueError(
                f"instead_for={self.instead_for} names members by number, of which {type(loop.family).__name__} has "
                f"{here}, counted from 0"
            )


def _mean(kept: list[_Found], theta: Theta, counts: dict[str, int]) -> Estimate:
    """Return the mean of the estimates; NaN of none."""
    if not kept:
        nothing = {k: torch.full_like(x, math.nan, requires_grad=False) for k, x in theta.items()}
        return Estimate(torch.tensor(math.nan), nothing, None, dict(counts))
    estimates, share = [found.estimate for found in kept], 1 / len(kept)
    info: dict[str, Any] = dict(counts)
    curves = [each.info["losses"] for each in estimates if "losses" in each.info]
    if len(curves) == len(kept) and len({len(curve) for curve in curves}) == 1:
        info["losses"] = _average([curve.to(curves[0]) for curve in curves])
    first, *rest = (set[str](each.info.get("zero_gradient", [])) for each in estimates)
    zero = first.intersection(*rest)
    if zero:
        info["zero_gradient"] = sorted(zero)
    seconds = sum(each.info.get("compile_seconds", 0.0) for each in estimates)
    if seconds:
        info["compile_seconds"] = seconds
    loss = _average([each.loss.to(estimates[0].loss) for each in estimates])
    grads = {k: share * sum((each.grads[k] for each in estimates[1:]), estimates[0].grads[k]) for k in theta}
    return Estimate(loss, grads, None, info)


def _average(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


def _require_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"TaskByTask: {name}={value!r} must be a positive, finite number")


def _places(carry: TaskByTaskCarry) -> Places:
    return carry.places or all_places(tree.size(carry.tasks))
