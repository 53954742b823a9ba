"""Guess and grow: a radius that is multiplied wherever it has turned out too small."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch.optim.optimizer import ParamsT


@final
class GuessAndGrow(torch.optim.Optimizer):
    """``D ← factor · D`` where D's gradient is negative, from the second step on (Balcan et al. 2019, algorithm 2).

    For objectives such as ``LeaderAndRadius``, whose gradient for D is negative where D is too small and 0 elsewhere.
    Of the gradient only the sign counts. The first step leaves D alone: at the first task the start is nobody's mean.

    Args:
        params: as any ``torch.optim.Optimizer`` takes them; positive.
        factor: above 1.

    State of each parameter: ``step``.

    Raises:
        TypeError, ValueError: ``factor`` is not a number above 1, or a parameter is not positive.

    Example:
        >>> PerName({"init/*": FollowTheLeader, "*radius": lambda params: GuessAndGrow(params, factor=1.1)})
    """

    def __init__(self, params: ParamsT, factor: float = 1.1) -> None:
        super().__init__(params, {"factor": factor})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have a factor of its own."""
        factor = param_group.get("factor", self.defaults["factor"])
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise TypeError(f"GuessAndGrow: factor={factor!r} is a {type(factor).__name__}; pass a number above 1")
        if not 1 < factor < math.inf:
            raise ValueError(f"GuessAndGrow: factor={factor!r} does not let a guess grow; pass a finite number above 1")
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not bool((p > 0).all()):
                raise ValueError(
                    f"GuessAndGrow: a guess of {float(p.min()):g} stays there or shrinks; start from a positive one"
                )

    @torch.no_grad()
    # One signature in place of torch's two overloads.
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Let what is too small grow, and return what ``closure`` does."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                if state["step"] > 1:
                    p.copy_(torch.where(p.grad < 0, group["factor"] * p, p))
        return loss
