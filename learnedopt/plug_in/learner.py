"""Theta as one training run learns it: its values, what moves it, and what it has been told so far."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from learnedopt.core.estimator import as_leaves
from learnedopt.core.theta_scale import Scaled
from learnedopt.core.tree import Theta
from learnedopt.plug_in.members import shapes


class RunDiverged(RuntimeError):
    """Too many meta-gradients in a row were not finite."""


@final
class Learner:
    """Theta, and the meta-optimizer that moves it.

    Args:
        theta: where it starts; it is copied, in float32 at least.
        scale: what says the scales of a theta, as ``InnerLoop.theta_scale``.
        meta_optimizer: makes a ``torch.optim.Optimizer`` from theta's tensors, each over its scale.
        scheduler: makes a learning-rate scheduler from the meta-optimizer, stepped after each of its steps; or None.
        max_skips_in_a_row: so many meta-gradients in a row may be not finite; the next one raises ``RunDiverged``.

    Raises:
        TypeError: what ``meta_optimizer`` makes is no optimizer.
        ValueError: there are no meta-parameters, the meta-optimizer moves others, or it is one of theta itself and
            there are scales.
    """

    def __init__(
        self,
        theta: Theta,
        scale: Callable[[Theta], Theta],
        meta_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None,
        max_skips_in_a_row: int,
    ) -> None:
        # A rate per coordinate of half-precision parameters is drawn in theirs, where small meta-steps would be lost.
        wide = {k: v.detach().clone().to(torch.promote_types(v.dtype, torch.float32)) for k, v in theta.items()}
        self.theta: Theta = as_leaves(wide)
        self.scaled: Scaled = Scaled(self.theta, scale(self.theta))
        self.meta_optimizer: torch.optim.Optimizer = meta_optimizer(self.scaled.tensors)
        if not isinstance(cast("object", self.meta_optimizer), torch.optim.Optimizer):
            raise TypeError(
                f"meta_optimizer must make a torch.optim.Optimizer from a list of tensors, got "
                f"{type(self.meta_optimizer).__name__}; pass a function such as lambda params: torch.optim.Adam(params)"
            )
        moved = {id(p) for group in self.meta_optimizer.param_groups for p in group["params"]}
        if moved != {id(v) for v in self.scaled.phi.values()}:
            raise ValueError(
                "the meta-optimizer must move the tensors that it is handed, all of them, as they are: what else it "
                "moved would not be the theta of this run"
            )
        self.scaled.require_movable(self.meta_optimizer)
        self.scheduler: LRScheduler | None = None if scheduler is None else scheduler(self.meta_optimizer)
        self.max_skips_in_a_row = max_skips_in_a_row
        self.num_skipped: int = 0
        self.skips_in_a_row: int = 0
        self.values: Theta = self._copied()

    def learn(self, grads: Theta) -> None:
        """Move theta along a meta-gradient; one that is not finite is skipped and counted.

        Raises:
            RunDiverged: too many were skipped in a row.
        """
        if not all(bool(torch.isfinite(g).all()) for g in grads.values()):
            self.num_skipped, self.skips_in_a_row = self.num_skipped + 1, self.skips_in_a_row + 1
            if self.skips_in_a_row > self.max_skips_in_a_row:
                raise RunDiverged(
                    f"{self.skips_in_a_row} meta-gradients in a row were not finite, so that theta cannot move: losses "
                    "or gradients overflow (start from smaller rates, or clip the gradients before step()), or the "
                    "objective reads losses that step() was not told: pass step(loss=loss)"
                )
            return
        self.skips_in_a_row = 0
        for k, g in self.scaled.gradients(grads).items():
            self.scaled.phi[k].grad = g.detach()
        self.scaled.move(self.meta_optimizer.step)
        if self.scheduler is not None:
            self.scheduler.step()
        self.values = self._copied()

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, copied: what moves theta writes to its memory in place."""
        return {
            "theta": {k: v.clone() for k, v in self.values.items()},
            "meta_optimizer": copy.deepcopy(self.meta_optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
            "skipped": [self.num_skipped, self.skips_in_a_row],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        self.check(state_dict)
        with torch.no_grad():
            for k, v in self.theta.items():
                v.copy_(state_dict["theta"][k])
        self.meta_optimizer.load_state_dict(copy.deepcopy(state_dict["meta_optimizer"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(state_dict["scheduler"]))
        self.num_skipped, self.skips_in_a_row = state_dict["skipped"]
        self.values = self._copied()

    def check(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError where what is to be loaded is of another theta."""
        if (self.scheduler is None) != (state_dict.get("scheduler") is None):
            raise ValueError("one of this state and the optimizer has a meta_scheduler, the other has none")
        found = shapes(state_dict.get("theta", {}))
        if found != shapes(self.theta):
            raise ValueError(
                f"this state holds a theta of shapes {found}, the optimizer's has {shapes(self.theta)}; make the "
                "optimizer with the rule that it was saved with"
            )

    def _copied(self) -> Theta:
        # What a rule or a window keeps of theta must not move with it.
        return {k: v.detach().clone() for k, v in self.theta.items()}
