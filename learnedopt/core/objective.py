"""What the outer level wants of an inner loop.

A meta-objective is a callable ``(loop, theta, rollout) -> scalar``, or ``-> (scalar, next carry)`` where training goes
on from elsewhere than the rollout's end. The scalar must be a mean over tasks, so that tasks may be run in chunks.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, TypeAlias, final

import torch
from torch import Tensor

from learnedopt.core.carry import Carry, Rollout
from learnedopt.core.inner import InnerLoop
from learnedopt.core.registry import nearest
from learnedopt.core.task import Split
from learnedopt.core.tree import Theta

MetaObjective: TypeAlias = Callable[[InnerLoop, Theta, Rollout], "Tensor | tuple[Tensor, Carry]"]


class TaskMean:
    """Marks an objective that is a mean over tasks by construction, which spares it the check of others."""

    end_only: bool = False
    """A function of the state at the end alone, as an implicit meta-gradient needs it."""
    reads_theta: tuple[str, ...] = ()
    """Patterns, as of ``fnmatch``, of the meta-parameters that it reads from ``theta`` itself: those reach it, whatever
    the inner steps make of them."""
    holds_fixed: bool = False
    """Part of it is held fixed where it is differentiated, such as a target: differences of its values as theta moves
    are then not its gradient."""

    def check(self, loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> None:
        """Raise ValueError where it cannot be read after ``num_steps`` steps from ``carry``; nothing by default.

        Asked once a loop, before the first step.
        """


class OfLosses(TaskMean):
    """An objective of each task's outer losses, those along the way and the one at the end."""

    split: Split = "train"
    """Of the loss at the end."""

    @abstractmethod
    def of_losses(self, before: Tensor, end: Tensor) -> Tensor:
        """Return each task's value (num_tasks,).

        Args:
            before: the losses before each update, (num_steps, num_tasks), on the train batches.
            end: those at the end, (num_tasks,), on the batch of ``split``.
        """

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        """Return the mean over tasks."""
        return self.of_losses(rollout.losses, loop.losses(theta, rollout.end, self.split)).mean()


@final
@dataclass(frozen=True)
class FinalLoss(OfLosses):
    """Loss on the valid split at the end, as in MAML (Finn et al. 2017)."""

    end_only = True
    split: ClassVar[Split] = "valid"  # pyright: ignore[reportIncompatibleVariableOverride] - no field

    def of_losses(self, before: Tensor, end: Tensor) -> Tensor:
        """Return the last one."""
        return end


@final
@dataclass(frozen=True)
class SumOfLosses(OfLosses):
    """Sum of the train losses after steps 1..K (Andrychowicz et al. 2016, equation 3 with all weights 1)."""

    def of_losses(self, before: Tensor, end: Tensor) -> Tensor:
        """Return the sum over steps."""
        return _after_steps(before, end).sum(0)


@final
@dataclass(frozen=True)
class MeanLogLoss(OfLosses):
    """Mean over steps 1..K of the logarithm of the train loss: every decade of progress counts the same.

    The losses must be positive: the logarithm is not shifted or clamped.
    """

    def of_losses(self, before: Tensor, end: Tensor) -> Tensor:
        """Return the mean over steps."""
        return _after_steps(before, end).log().mean(0)


@final
@dataclass(frozen=True)
class LogMeans(OfLosses):
    """``scale (ln mean + weight_last ln mean_last)`` of the train losses after steps 1..K.

    ``mean`` is over all steps, ``mean_last`` over the last of them, a share of ``last`` rounded to steps, one at least.
    Losses of tasks of every size count the same, as ratios; unlike those of ``MeanLogLoss``, means before the logarithm
    do not reward a single batch's small loss. The losses must be positive: the logarithm is not shifted or clamped.

    Args:
        weight_last: how much the end counts beside the whole way, at least 0.
        last: which share of the steps is the end, above 0 and at most 1.
        scale: of the whole, positive; ``1 / (1 + weight_last)`` makes it a weighted mean.
    """

    weight_last: float = 1.0
    last: float = 0.1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight_last < math.inf:
            raise ValueError(f"weight_last={self.weight_last!r} must be finite and not negative; 0 leaves the end out")
        if not 0 < self.last <= 1:
            raise ValueError(f"last={self.last!r} is a share of the steps: pass a number above 0 and at most 1")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale!r} must be positive and finite")

    def of_losses(self, before: Tensor, end: Tensor) -> Tensor:
        """Return the weighted sum of the two logarithms."""
        losses = _after_steps(before, end)
        num_last = max(1, round(self.last * len(losses)))
        return self.scale * (losses.mean(0).log() + self.weight_last * losses[-num_last:].mean(0).log())


def _after_steps(before: Tensor, end: Tensor) -> Tensor:
    """Return the losses (max(num_steps, 1), num_tasks) after each step."""
    return torch.cat([before[1:], end.unsqueeze(0)])


def read_directly(objective: MetaObjective | TaskMean, theta: Theta) -> set[str]:
    """Return the meta-parameters that an objective says it reads from theta itself (``TaskMean.reads_theta``).

    Raises:
        ValueError: a pattern of it matches none.
    """
    patterns = objective.reads_theta if isinstance(objective, TaskMean) else ()
    found: set[str] = set()
    for pattern in patterns:
        matched = [name for name in theta if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(
                f"{type(objective).__name__}.reads_theta names {pattern!r}, which matches none of the meta-parameters "
                f"{sorted(theta)}{nearest(pattern, theta)}; name what the objective reads of this loop's theta"
            )
        found.update(matched)
    return found
