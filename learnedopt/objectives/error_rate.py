"""The error rate of few-shot learners, to choose theta by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from learnedopt.core.carry import Rollout
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import TaskMean
from learnedopt.core.tree import Theta

_ACCURACY = "accuracy"
"""What a family of classifiers calls it among its metrics."""


@final
@dataclass(frozen=True)
class ErrorRate(TaskMean):
    """One minus the accuracy on the valid split at the end; to choose theta by, as it has no gradient."""

    end_only = True

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        """Return the mean over tasks."""
        metrics = loop.metrics(rollout.end, "valid")
        if _ACCURACY not in metrics:
            raise ValueError(
                f"ErrorRate needs a family with an accuracy among its metrics, but {type(loop.family).__name__} has "
                f"{sorted(metrics) or 'none'}; use FinalLoss"
            )
        return 1 - metrics[_ACCURACY].mean()
