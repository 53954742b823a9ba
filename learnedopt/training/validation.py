"""How good theta is on tasks that it is not trained on, and how the tasks of a training are drawn."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from learnedopt.core import tree
from learnedopt.core.carry import Rollout, narrow
from learnedopt.core.checks import NotFinite
from learnedopt.core.counts import require_count
from learnedopt.core.estimator import call_objective, check_objective
from learnedopt.core.inner import InnerLoop, InnerSolver, solve_inner
from learnedopt.core.objective import MetaObjective
from learnedopt.core.parts import parts_of
from learnedopt.core.task import Tasks
from learnedopt.core.tree import Theta
from learnedopt.training.ranks import ALONE, Ranks

VALIDATION = -1
"""The episode that validation tasks count as: none that training ever reaches."""


def task_generator(seed: int, episode: int) -> torch.Generator:
    """Return the generator that an episode's tasks are drawn with."""
    # Torch's CPU generator reads the low 32 bits of a seed only: both numbers must be mixed into these.
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + episode) % 2**32)


def require_seed(seed: int) -> None:
    """Raise ValueError unless ``seed`` is a count that fits into the 32 bits that torch's generators read."""
    require_count("seed", seed)
    if seed >= 2**32:
        raise ValueError(f"seed={seed!r} is too large: of a seed torch's generators read 32 bits; pass one below 2**32")


class Judgement(NamedTuple):
    """How good a theta is: ``value``, the mean over the tasks on which it is finite (NaN where there is none), and on
    how many it is not."""

    value: float
    num_failed: int

    def beats(self, other: Judgement | None) -> bool:
        """Whether it is the better one; what is finite on no task never is, and all else beats None.

        A task that fails counts as infinitely bad: fewer of these come first, whatever the others are like, and then
        the mean. So no theta wins by letting the tasks fail that are hard for it, and a task that fails under every
        theta hides none.
        """
        if not math.isfinite(self.value):
            return False
        return other is None or (self.num_failed, self.value) < (other.num_failed, other.value)


@dataclass(frozen=True)
class Validation:
    """How good theta is on tasks that it is not trained on; the same tasks every time.

    Args:
        loop: the inner loop of held-out tasks, such as a family with ``meta_split="valid"``.
        objective: what is measured, a mean over tasks; lower is better.
        num_steps: inner steps from a fresh start.
        num_tasks: how many tasks.
        every: meta-steps between two validations; theta is also measured before the first meta-step and after the last.
        seed: which tasks; not those of a training of the same seed.
        inner: solves the inner problem in place of the rule's own steps, as in ``Implicit``; the objective then reads
            the end alone.
    """

    loop: InnerLoop
    objective: MetaObjective
    num_steps: int
    num_tasks: int = 16
    every: int = 100
    seed: int = 0
    inner: InnerSolver | None = None

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_tasks", "every"):
            require_count(name, getattr(self, name), least=0 if name == "num_steps" else 1)
        require_seed(self.seed)

    def require_measurable(self, theta: Theta) -> None:
        """Raise what ``measure`` would raise on bad input, by measuring two tasks at most; all where these fail."""
        try:
            replace(self, num_tasks=min(self.num_tasks, 2)).measure(theta)
        except NotFinite:
            self.measure(theta)

    def measure(self, theta: Theta) -> float:
        """Return the objective on the held-out tasks, without a graph; not finite where it is not on all of them."""
        found = self.judge(theta)
        return math.nan if found.num_failed else found.value

    def judge(self, theta: Theta, ranks: Ranks = ALONE) -> Judgement:
        """Return the objective on those of the held-out tasks on which it is finite, and on how many it is not.

        Each rank measures a share of them.
        """
        tasks = self.loop.family.sample(self.num_tasks, task_generator(self.seed, VALIDATION))
        start, stop = ranks.share(self.num_tasks)
        parts = parts_of(self.loop, tree.narrow(tasks, start, stop)) if start < stop else []
        found = [self._judge(p.loop, theta, p.tasks) for p in parts]
        if not ranks.alone:
            sums = [[count, count * value if count else 0.0, num_failed] for count, value, num_failed in found]
            own = torch.tensor(sums, dtype=torch.float64).reshape(-1, 3).sum(0)
            count, total, num_failed = tree.numbers(ranks.sum(own, "the validation"))
            return Judgement(total / count if count else math.nan, int(num_failed))
        kept = [(count, value) for count, value, _ in found if count]
        total = sum(count for count, _ in kept)
        mean = (
            sum(count * value for count, value in kept) / total if len(kept) > 1 else kept[0][1] if kept else math.nan
        )
        return Judgement(mean, sum(num_failed for *_, num_failed in found))

    def _judge(self, loop: InnerLoop, theta: Theta, tasks: Tasks) -> tuple[int, float, int]:
        """Return over how many tasks of one family the objective is finite, their mean, and on how many it is not."""
        theta = tree.detach(theta)
        carry = loop.begin(theta, loop.start(tasks))
        if self.inner is not None:
            check_objective(loop, theta, self.objective, carry, self.num_steps, end_only=True)
        rollout = solve_inner(loop, theta, carry, self.num_steps, self.inner)
        value = float(call_objective(self.objective, loop, theta, rollout)[0])
        num_tasks = rollout.losses.shape[1]
        if math.isfinite(value):
            return num_tasks, value, 0
        each = [call_objective(self.objective, loop, theta, _of_task(rollout, i))[0] for i in range(num_tasks)]
        finite = [x for x in map(float, each) if math.isfinite(x)]
        return len(finite), statistics.fmean(finite) if finite else math.nan, num_tasks - len(finite)


def _of_task(rollout: Rollout, i: int) -> Rollout:
    return Rollout(narrow(rollout.start, i, i + 1), narrow(rollout.end, i, i + 1), rollout.losses[:, i : i + 1])
