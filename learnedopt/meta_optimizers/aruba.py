"""ARUBA: rates in closed form, out of running means with a prior that fades."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from learnedopt.core.named_tensors import names_of
from learnedopt.core.theta_scale import ThetaItself
from learnedopt.core.weights import require_positive


@final
class ARUBA(torch.optim.Optimizer, ThetaItself):
    """The meta-optimizer of ARUBA (Khodak, Balcan & Talwalkar 2019, algorithm 2), with ``MomentMatching``.

    With ``x - gradient`` what the t-th batch of tasks shows, t = 1, 2, ..., distances and squares become

    ``x_t = (x_0 + sum_{s<=t} (shown_s + x_0 / (s + 1)**power)) / (t + 1)``

    with x_0 where they started, ``eps**2`` and ``zeta**2``: the published b and g over t + 1, which the rates, roots of
    their ratios, do not see. A start, by its name, becomes the plain mean ``sum_{s<=t} shown_s / t``: it follows the
    leader. To move it otherwise, such as by Adam as in Reptile, give ARUBA the rest alone, see ``PerName``.

    Args:
        params: theta's tensors with their names, as ``MetaTrainer`` hands them on.
        power: p, how fast the prior fades, not negative.
        start: pattern, as of ``fnmatch``, of the names that follow the leader.
        lr: a positive factor of every step; 1 is the algorithm.

    State of each tensor: ``step`` (t), and of distances and squares ``prior`` (x_0).

    Raises:
        TypeError: the tensors have no names; ``lr`` is not a number.
        ValueError: ``power`` is negative or not finite, or ``lr`` not positive.

    Example:
        >>> MetaTrainer(loop, Unrolled(0), MomentMatching(5), ARUBA)
        >>> MetaTrainer(loop, Unrolled(0), MomentMatching(5), PerName({"init/*": torch.optim.Adam, "rule/*": ARUBA}))
    """

    def __init__(self, params: Sequence[Tensor], power: float = 1.0, start: str = "init/*", *, lr: float = 1.0) -> None:
        names = names_of(params, "ARUBA")
        require_positive("ARUBA", "lr", lr)
        if not 0 <= power < math.inf:
            raise ValueError(
                f"power={power!r} must be a finite number, 0 or more: the prior of round t is over t**power"
            )
        leads = [fnmatch.fnmatchcase(name, start) for name in names]
        parts = [[p for p, lead in zip(params, leads, strict=True) if lead is want] for want in (True, False)]
        groups = [{"params": part, "leader": lead} for part, lead in zip(parts, (True, False), strict=True) if part]
        super().__init__(groups, {"lr": lr, "power": float(power), "leader": False})

    @torch.no_grad()
    # One signature in place of torch's two overloads.
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take in what one batch of tasks shows; a tensor without a gradient stays."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._take_in(p, p.grad, group)
        return loss

    def _take_in(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            if not group["leader"]:
                state["prior"] = p.detach().clone()
        state["step"] += 1
        t = state["step"]
        if group["leader"]:
            p.sub_(grad, alpha=group["lr"] / t)
        else:
            p.add_(state["prior"] / (t + 1) ** group["power"] - grad, alpha=group["lr"] / (t + 1))
