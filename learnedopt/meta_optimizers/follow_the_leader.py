"""Follow the leader: theta as the weighted mean of what the tasks so far would have wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch.optim.optimizer import ParamsT

from learnedopt.core.theta_scale import ThetaItself
from learnedopt.core.weights import require_positive


@final
class FollowTheLeader(torch.optim.Optimizer, ThetaItself):
    """``w ← w - lr · (weight_t / Σ_{s<=t} weight_s) · g_t`` (Balcan, Khodak and Talwalkar 2019, algorithm 1).

    For losses ``½‖w - c_t‖²``, of which g_t = w - c_t is the gradient, and ``lr=1``, w is the weighted mean of c_1 to
    c_t after step t, the leader: it has the least weighted sum of losses so far, and where it began is forgotten.

    Args:
        params: as any ``torch.optim.Optimizer`` takes them.
        weight: a positive number for all steps, or a function of t = 1, 2, ... that returns one. FMRL weighs a task of
            m losses by the root of m.
        lr: a positive factor of every step; other than 1 it is no leader.

    State of each parameter: ``step``, ``total`` (the sum of weights).

    Raises:
        TypeError, ValueError: a weight or ``lr`` is not positive, said before anything has moved.

    Example:
        >>> MetaTrainer(loop, Unrolled(0), TargetMatching(BestInHindsight(solver, 16)), FollowTheLeader)
    """

    def __init__(self, params: ParamsT, weight: float | Callable[[int], float] = 1.0, *, lr: float = 1.0) -> None:
        self.weight = weight
        self._weight_at(1)
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have a factor of its own."""
        require_positive("FollowTheLeader", "lr", param_group.get("lr", self.defaults["lr"]))
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Keep what torch's own leaves out of copies."""
        return {**super().__getstate__(), "weight": self.weight}

    @torch.no_grad()
    # One signature in place of torch's two overloads.
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move the parameters that have a gradient, and return what ``closure`` does."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        moved = [(p, group["lr"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        weights = [self._weight_at(self.state[p].get("step", 0) + 1) for p, _ in moved]
        for (p, lr), weight in zip(moved, weights, strict=True):
            state = self.state[p]
            state["step"], state["total"] = state.get("step", 0) + 1, state.get("total", 0.0) + weight
            p.sub_(p.grad, alpha=lr * weight / state["total"])
        return loss

    def _weight_at(self, step: int) -> float:
        name, weight = ("weight", self.weight)
        if callable(weight):
            name, weight = f"weight({step})", weight(step)
        require_positive("FollowTheLeader", name, weight)
        return weight
