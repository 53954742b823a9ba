"""A training that goes on for longer than it was begun for."""

from __future__ import annotations

import math

from torch.optim.lr_scheduler import CosineAnnealingLR


def lengthen(scheduler: CosineAnnealingLR, num_steps: int) -> None:
    """Let a half cosine be one over ``num_steps`` steps, from the step on that it has come to.

    The rate is at once what a schedule of that length has there,
    ``eta_min + (lr - eta_min) (1 + cos(pi t / num_steps)) / 2`` after ``t`` steps, so that it may rise; where it was
    annealed to ``lr`` itself it stays as it is, to the bit.
    """
    # The scheduler makes each rate out of the one before: from the end of the old cosine it would never rise again.
    share = (1 + math.cos(math.pi * scheduler.last_epoch / num_steps)) / 2
    scheduler.T_max = num_steps
    for group, lr in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["lr"] = scheduler.eta_min + (lr - scheduler.eta_min) * share
