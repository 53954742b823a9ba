"""A rule whose steps follow a schedule over the horizon."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, final, get_args

import torch
from torch import Tensor

from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import check_number
from learnedopt.optimizers.bases.precision import wide, wide_dtype
from learnedopt.optimizers.bases.wrapper import Wrapper

Schedule: TypeAlias = Literal["cosine", "linear-end"]
_FIRST = 0.1  # of the rate, at the first step of a warm-up


@final
@dataclass(frozen=True, eq=False)
class Scheduled(Wrapper):
    """Scale all that ``rule`` adds by a factor of how far the run is: p, 0 at the first step, (T - 1)/T at the last.

        warm-up, p < w:   0.1 + 0.9 p / w
        "cosine":         (1 + cos(pi (p - w) / (1 - w))) / 2      (Loshchilov and Hutter 2017, one period)
        "linear-end":     1, then linearly to 0 over the last share ``decay``: min(1, (1 - p) / decay)

    Of rules whose step is proportional to their learning rate, and whose memory does not hold it, this is a schedule of
    that rate, as ``torch.optim.lr_scheduler`` has them. A decoupled weight decay, as AdamW's, is part of the step, and
    scheduled with it. Past the horizon p is 1 and the rule stands still.

    Args:
        rule: the rule that moves.
        schedule: what the factor is after the warm-up.
        warmup: w, the share of the steps that warm up; 0 for none.
        decay: of "linear-end", the share of the steps over which the factor falls.

    Theta: ``rule/<key>``, the rule's own. State: the rule's own.

    Raises:
        TypeError, ValueError: an option is out of its range, or has no effect.

    Example:
        >>> loop = InnerLoop(family, Scheduled(AdamW(lr=1e-3), "cosine"), horizon=500)
    """

    schedule: Schedule = "cosine"
    warmup: float = 0.05
    decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"Scheduled: schedule={self.schedule!r} is none of {', '.join(get_args(Schedule))}")
        check_number("Scheduled", "warmup", self.warmup, 0.0, 1.0)
        if self.decay is None:
            return
        if self.schedule == "cosine":
            raise ValueError(f"Scheduled: decay={self.decay!r} has no effect with schedule='cosine'; leave it out")
        check_number("Scheduled", "decay", self.decay, 0.0, 1.0)
        if not 0 < self.decay <= 1 - self.warmup:
            raise ValueError(f"Scheduled: decay={self.decay} must be positive, and what the warm-up leaves at most")

    @property
    def reads_horizon(self) -> bool:
        """True, whatever the rule does."""
        return True

    def within(self, horizon: int | None) -> UpdateRule:
        """Return this with a clock around it, and around the rule where that reads the horizon too."""
        return UpdateRule.within(replace(self, rule=self.rule.within(horizon)), horizon)

    def factor(self, progress: Tensor) -> Tensor:
        """Return what the deltas are multiplied by at ``progress``."""
        if self.schedule == "cosine":
            after = (progress - self.warmup) / (1 - self.warmup)
            found = (1 + torch.cos(torch.pi * after)) / 2
        else:
            found = ((1 - progress) / (0.4 if self.decay is None else self.decay)).clamp(max=1)
        if self.warmup == 0:
            return found
        return torch.where(progress < self.warmup, _FIRST + (1 - _FIRST) * progress / self.warmup, found)

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]  # as rules that read the horizon have it
        self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor, *, progress: Tensor
    ) -> tuple[Params, State]:
        """Move as the rule does, as far as the schedule lets it."""
        wide_grads, wide_params = ({k: wide(x) for k, x in tensors.items()} for tensors in (grads, params))
        deltas, state = super().update(theta, wide_grads, state, wide_params, loss)
        factor = self.factor(progress)
        return {k: (factor.to(wide_dtype(g)) * deltas[k]).to(g.dtype) for k, g in grads.items()}, state
