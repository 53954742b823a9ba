"""The safe optimizer behind a learned one: made once, started cold whenever it gets control."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

MakeOptimizer: TypeAlias = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]


def adamw(groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return AdamW of rate 1e-3 without weight decay."""
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)


class Fallback:
    """Any ``torch.optim`` optimizer over the groups of another one, whose ``lr`` are factors on its own rates.

    Step n after a cold start, from 0, has the factor (n + 1) / warm_up until that is 1. The groups' ``weight_decay``
    takes off the share that it takes off beside the learned rule: it is not the optimizer's own.

    Args:
        make: gets a list of groups, each ``{"params": [...]}``, and makes the optimizer.
        groups: the groups whose parameters it moves; ``lr`` and ``maximize`` are read at every step.
        warm_up: steps until the rate is whole.

    Raises:
        TypeError: ``make`` made no optimizer, or one that cannot step without a closure.
        ValueError: what it made moves other parameters; or a group is to be maximized, and the optimizer cannot.
    """

    def __init__(self, make: MakeOptimizer, groups: list[dict[str, Any]], warm_up: int) -> None:
        made = make([{"params": [*group["params"]]} for group in groups])
        if not isinstance(cast("object", made), torch.optim.Optimizer):
            raise TypeError(
                f"the guard's fallback made a {type(made).__name__}, which is no torch.optim.Optimizer; pass a "
                "function of parameter groups, such as lambda params: torch.optim.SGD(params, lr=0.1)"
            )
        closure = inspect.signature(made.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise TypeError(
                f"the guard's fallback is {type(made).__name__}, whose step must have a closure; pass one that steps "
                "from the gradients that are there, such as torch.optim.SGD"
            )
        self.optimizer: torch.optim.Optimizer = made
        self.warm_up = warm_up
        self.taken: int = 0
        self.rates: list[float] = [float(group["lr"]) for group in made.param_groups]
        for group in groups:
            _require_maximize(made.param_groups[0], group)
        if [[*map(id, g["params"])] for g in made.param_groups] != [[*map(id, g["params"])] for g in groups]:
            raise ValueError(
                "the guard's fallback moves other parameters, or in other groups, than it was given; make it of its "
                "argument, such as lambda params: torch.optim.SGD(params, lr=0.1)"
            )

    def add(self, group: dict[str, Any]) -> None:
        """Take over a group that was added."""
        _require_maximize(self.optimizer.param_groups[0], group)
        self.optimizer.add_param_group({"params": [*group["params"]]})
        self.rates.append(float(self.optimizer.param_groups[-1]["lr"]))

    @torch.no_grad()
    def step(self, groups: list[dict[str, Any]]) -> None:
        """Move the parameters once."""
        self.taken += 1
        share = min(1.0, self.taken / self.warm_up)
        for own, rate, group in zip(self.optimizer.param_groups, self.rates, groups, strict=True):
            own["lr"] = rate * float(group["lr"]) * share
            if "maximize" in own:
                own["maximize"] = bool(group.get("maximize", False))
            share_off = float(group["lr"]) * float(group.get("weight_decay", 0.0))
            for p in group["params"] if share_off else ():
                if p.grad is not None:
                    p.mul_(1 - share_off)
        self.optimizer.step()

    def cool(self) -> None:
        """Forget all moments: the next step is a first one."""
        self.optimizer.state.clear()
        self.taken = 0

    def entries(self, param: Tensor) -> dict[str, Any]:
        """Return a copy of what is remembered of a parameter, tensors and numbers: steps write to the original."""
        kept = self.optimizer.state.get(param, {})
        return {k: x.clone() if isinstance(x, Tensor) else x for k, x in kept.items() if x is not None}

    def recall(self, param: Tensor, entries: dict[str, Any]) -> None:
        """Remember of a parameter what ``entries`` returned, on the device where torch would have it."""
        group = self.optimizer.param_groups[0]
        here = () if group.get("capturable") or group.get("fused") else ("step",)
        if entries:
            self.optimizer.state[param] = {
                k: x.to(x.device if k in here else param.device, copy=True) if isinstance(x, Tensor) else x
                for k, x in entries.items()
            }


def _require_maximize(own: dict[str, Any], group: dict[str, Any]) -> None:
    if group.get("maximize") and "maximize" not in own:
        raise ValueError(
            "a group is to be maximized, which the guard's fallback cannot do; give it one that has maximize"
        )
