"""Where an inner loop's end should have been: targets that are found without a graph."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, cast, final

import torch

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Tape, detach
from learnedopt.core.counts import require_count
from learnedopt.core.inner import InnerLoop
from learnedopt.core.task import Split
from learnedopt.core.tree import Theta
from learnedopt.core.weights import require_positive

TargetSolver: TypeAlias = Callable[..., Carry]
"""``(loop, theta, carry, num_steps, strength=0.0, center=None) -> Carry``: of each task, where the sum of the outer
losses on the train batches of steps ``carry.step`` to ``carry.step + num_steps - 1`` is least, plus ``strength / 2
|x - center|^2`` (``center`` as ``carry.params``). It starts at ``carry``, and returns it with other parameters."""


class Found(NamedTuple):
    """A target, and ``ahead``, where training goes on that continues from the bootstrap; neither has a graph."""

    target: Carry
    ahead: Carry


class Target(ABC):
    """Where the rollout's end is to come to; a function of theta and that end, through which no gradient flows.

    Example:
        >>> class Origin(Target):
        ...     def find(self, loop, theta, end):
        ...         zeros = {k: torch.zeros_like(p) for k, p in end.params.items()}
        ...         return Found(detach(end)._replace(params=zeros), detach(end))
    """

    split: Split = "train"
    """On whose batch a matching of outputs compares, where it has no split of its own."""

    @property
    def rule_steps(self) -> int:
        """How many further steps of the rule it is made of; none by default."""
        return 0

    @abstractmethod
    def find(self, loop: InnerLoop, theta: Theta, end: Carry) -> Found:
        """Return the target of every task, without a graph, from a begun carry."""

    def check(self, loop: InnerLoop, theta: Theta, end: Carry) -> None:  # noqa: B027 - optional
        """Raise ValueError where it cannot serve this loop; asked once, of up to two tasks, before the first step."""


@final
@dataclass(frozen=True)
class Bootstrap(Target):
    """What the rule itself, run further, comes to (Flennerhag et al. 2022, section 3).

    From the end ``num_target_steps - 1`` further steps of the rule, then one plain gradient step on the outer loss of
    ``split``, at the step reached. Training that goes on from the bootstrap goes on from the rule's own last step.

    Args:
        num_target_steps: L, at least 1. With L = 1 and the squared distance the meta-gradient is ``step_size`` times
            that of the final loss on ``split``.
        step_size: of the plain gradient step, positive.
        split: "train" or "valid", for the plain step, and for the outputs that a matching compares.
    """

    num_target_steps: int
    step_size: float
    split: Split = "valid"

    def __post_init__(self) -> None:
        require_count("num_target_steps", self.num_target_steps, least=1)
        require_positive("Bootstrap", "step_size", self.step_size)
        if self.split not in ("train", "valid"):
            raise ValueError(f"split={self.split!r} is neither 'train' nor 'valid'")

    @property
    def rule_steps(self) -> int:
        """All but the plain step."""
        return self.num_target_steps - 1

    def find(self, loop: InnerLoop, theta: Theta, end: Carry) -> Found:
        """Run the rule further, then take the plain step."""
        theta = tree.detach(theta)
        ahead = loop.run(theta, detach(end), self.num_target_steps - 1, Tape.NONE).end
        with torch.enable_grad():
            params = {k: p.detach().requires_grad_() for k, p in ahead.params.items()}
            losses = loop.losses(theta, ahead._replace(params=params), self.split)
        grads = torch.autograd.grad(losses.sum(), tuple(params.values()), materialize_grads=True)
        moved = {k: p.detach() - self.step_size * g for (k, p), g in zip(params.items(), grads, strict=True)}
        return Found(ahead._replace(params=moved), ahead)


@final
@dataclass(frozen=True)
class LastIterate(Target):
    """Where ``num_steps`` further steps of the rule come to: the last iterate, FLI (Balcan et al. 2019, section 3).

    After no inner steps, on a learned start, the squared distance to it has Reptile's meta-gradient. Training that goes
    on from the bootstrap goes on from it.

    Args:
        num_steps: at least 1.
    """

    num_steps: int

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps, least=1)

    @property
    def rule_steps(self) -> int:
        """All of them."""
        return self.num_steps

    def find(self, loop: InnerLoop, theta: Theta, end: Carry) -> Found:
        """Run the rule further."""
        ahead = loop.run(theta, detach(end), self.num_steps, Tape.NONE).end
        return Found(ahead, ahead)


@final
@dataclass(frozen=True)
class BestInHindsight(Target):
    """Where the sum of the next ``num_steps`` train losses is least: the leader, FAL (Balcan et al. 2019, section 3).

    Training goes on from the end: the solver's way is no part of it.

    Args:
        solver: finds it, such as ``SumOfLossesSolver()``; see ``TargetSolver``.
        num_steps: how many losses, the first on the batch of the end's own step.

    Raises:
        ValueError: what the solver raises, as where a task has no minimiser; before the first step, too.
    """

    solver: TargetSolver
    num_steps: int

    def __post_init__(self) -> None:
        _require_solver(self.solver)
        require_count("num_steps", self.num_steps, least=1)

    def find(self, loop: InnerLoop, theta: Theta, end: Carry) -> Found:
        """Solve for it."""
        end = detach(end)
        return Found(_solved(self.solver, end, self.solver(loop, tree.detach(theta), end, self.num_steps)), end)

    def check(self, loop: InnerLoop, theta: Theta, end: Carry) -> None:
        """Solve for it."""
        self.find(loop, theta, end)


@final
@dataclass(frozen=True)
class RegularizedSolution(Target):
    """Where the sum of losses plus ``strength / 2 |x - end|^2`` is least: FLI-batch (Balcan et al. 2019, section 3).

    As ``BestInHindsight``, drawn to where it starts from; with strength ``1 / eta`` it is the last iterate of follow
    the regularised leader at rate eta.

    Args:
        solver: as that of ``BestInHindsight``.
        num_steps: how many losses.
        strength: of the pull, positive.
    """

    solver: TargetSolver
    num_steps: int
    strength: float

    def __post_init__(self) -> None:
        _require_solver(self.solver)
        require_count("num_steps", self.num_steps, least=1)
        if not 0 < self.strength < math.inf:
            raise ValueError(
                f"strength={self.strength!r} draws to the end and must be positive and finite; BestInHindsight has none"
            )

    def find(self, loop: InnerLoop, theta: Theta, end: Carry) -> Found:
        """Solve for it."""
        end = detach(end)
        found = self.solver(loop, tree.detach(theta), end, self.num_steps, strength=self.strength, center=end.params)
        return Found(_solved(self.solver, end, found), end)

    def check(self, loop: InnerLoop, theta: Theta, end: Carry) -> None:
        """Solve for it."""
        self.find(loop, theta, end)


def _require_solver(solver: TargetSolver) -> None:
    if isinstance(solver, type) or not callable(solver):
        raise TypeError(
            f"solver={solver!r} cannot be called on (loop, theta, carry, num_steps); pass SumOfLossesSolver(), or a "
            "function of your own"
        )


def _solved(solver: TargetSolver, end: Carry, found: Carry) -> Carry:
    """Return what a solver found, without a graph; raise TypeError unless it is a carry of the same parameters."""
    same = isinstance(cast("object", found), Carry) and {k: p.shape for k, p in found.params.items()} == {
        k: p.shape for k, p in end.params.items()
    }
    if not same:
        raise TypeError(
            f"the solver {solver!r} must return the carry it was given with other parameters of the same shapes, "
            f"carry._replace(params=...), got {type(found).__name__}"
        )
    return detach(end._replace(params=found.params))
