"""How good theta is on tasks that it is not trained on, and how the tasks of a training are drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from learnedopt.core import tree
from learnedopt.core.counts import require_count
from learnedopt.core.estimator import call_objective, check_objective
from learnedopt.core.inner import InnerLoop, InnerSolver, solve_inner
from learnedopt.core.objective import MetaObjective
from learnedopt.core.parts import parts_of
from learnedopt.core.task import Tasks
from learnedopt.core.tree import Theta

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
        """Raise what ``measure`` would raise on bad input, by measuring two tasks at most."""
        replace(self, num_tasks=min(self.num_tasks, 2)).measure(theta)

    def measure(self, theta: Theta) -> float:
        """Return the objective on the held-out tasks, without a graph."""
        tasks = self.loop.family.sample(self.num_tasks, task_generator(self.seed, VALIDATION))
        found = [(len(p.positions), self._value(p.loop, theta, p.tasks)) for p in parts_of(self.loop, tasks)]
        return sum(count * value for count, value in found) / self.num_tasks if len(found) > 1 else found[0][1]

    def _value(self, loop: InnerLoop, theta: Theta, tasks: Tasks) -> float:
        theta = tree.detach(theta)
        carry = loop.begin(theta, loop.start(tasks))
        if self.inner is not None:
            check_objective(loop, theta, self.objective, carry, self.num_steps, end_only=True)
        rollout = solve_inner(loop, theta, carry, self.num_steps, self.inner)
        return float(call_objective(self.objective, loop, theta, rollout)[0])
