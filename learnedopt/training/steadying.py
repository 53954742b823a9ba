"""Meta-training that holds: a running average of theta, and the way back to it when training diverges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch

from learnedopt.core.tree import Theta

PACE = 0.1
"""How far a meta-loss pulls the running mean of meta-losses to itself."""


@dataclass
class Steadied:
    """What steadying remembers: the average of theta, the running mean of meta-losses and its lowest value so far."""

    average: Theta | None = None
    mean_loss: float | None = None
    lowest_mean: float = math.inf
    num_rollbacks: int = 0

    def learned(self, theta: Theta) -> Theta:
        """Return a copy of what has been learned so far: the average of theta, or theta without one."""
        return {k: v.detach().clone() for k, v in (theta if self.average is None else self.average).items()}


@final
@dataclass(frozen=True)
class Steadying:
    """How theta is averaged, and when it goes back; without an average nothing of this happens.

    Args:
        average: after every meta-step that moves theta, ``theta_avg += average (theta - theta_avg)``, from the start
            of training on. None for no average.
        rollback_above: where a meta-loss or meta-gradient is not finite, or a meta-loss exceeds the lowest running mean
            so far by more than this, theta goes back to its average instead of moving. None for never.
    """

    average: float | None = None
    rollback_above: float | None = None

    def __post_init__(self) -> None:
        for name in ("average", "rollback_above"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass a number or None")
        if self.average is not None and not 0 < self.average <= 1:
            raise ValueError(
                f"average={self.average!r} is the share of the newest theta in the average: pass a number above 0 and "
                "at most 1, such as 0.15, or None for no average"
            )
        if self.rollback_above is not None and not 0 < self.rollback_above < math.inf:
            raise ValueError(
                f"rollback_above={self.rollback_above!r} says how far a meta-loss may exceed the lowest mean of them, "
                "and must be positive and finite; None never goes back"
            )
        if self.rollback_above is not None and self.average is None:
            raise ValueError(
                f"rollback_above={self.rollback_above!r} goes back to the average of theta, and there is none: pass "
                "average= as well, such as 0.15"
            )

    def begin(self, theta: Theta) -> Steadied:
        """Return the memory at the start."""
        return Steadied({k: v.detach().clone() for k, v in theta.items()} if self.average is not None else None)

    def too_high(self, loss: float, memory: Steadied) -> bool:
        """Whether a finite meta-loss says that training has diverged."""
        return self.rollback_above is not None and loss > memory.lowest_mean + self.rollback_above

    def moved(self, theta: Theta, loss: float, memory: Steadied) -> None:
        """Take in a meta-step that moved theta, of which ``loss`` was seen before."""
        if self.average is None or memory.average is None:
            return
        with torch.no_grad():
            for k, x in memory.average.items():
                x.add_(self.average * (theta[k] - x))
        mean = loss if memory.mean_loss is None else memory.mean_loss + PACE * (loss - memory.mean_loss)
        memory.mean_loss, memory.lowest_mean = mean, min(memory.lowest_mean, mean)

    def go_back(self, theta: Theta, optimizer: torch.optim.Optimizer, memory: Steadied) -> None:
        """Put theta where its average is; the meta-optimizer forgets what it remembers of the way that diverged.

        Its learning rates, and with them the schedule, stay. The mean of meta-losses stays as well: what was high is
        not in it.
        """
        if self.rollback_above is None or memory.average is None:
            return
        with torch.no_grad():
            for k, x in theta.items():
                x.copy_(memory.average[k])
        optimizer.state.clear()
        memory.num_rollbacks += 1
