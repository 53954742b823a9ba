"""Hyperparameters learned on a scale on which every number is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias, final, get_args

import torch
from torch import Tensor

from learnedopt.core.containers import is_mapping
from learnedopt.core.rule import State
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.wrapper import Wrapper, prefixed, unprefixed

Scale: TypeAlias = Literal["log", "logit"]
_SCALES: dict[Scale, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "log": (torch.log, torch.exp),
    "logit": (torch.logit, torch.sigmoid),
}
"""Scale -> how a value is put on it, and how it is read."""


@final
@dataclass(frozen=True, eq=False)
class Reparametrized(Wrapper):
    """Keep meta-parameters of ``rule`` as logarithms or logits, so that no meta-step takes them out of their range.

    A step of a meta-optimizer then changes a rate by a factor, whatever the rate's size.

    Args:
        rule: the rule that moves.
        scales: pattern of the names of the rule's meta-parameters -> "log" (positive values) or "logit" (values between
            0 and 1); ``*``, ``?`` and ``[...]`` are wildcards as in file names. The first pattern that matches counts;
            what none matches stays as it is.

    Theta: ``rule/<key>``, on its scale.

    Raises:
        TypeError: ``scales`` is not such a dict.
        ValueError: a scale is unknown; from ``init_theta``: a pattern matches nothing, or a value is not in its scale's
            range.

    Example:
        >>> rule = Reparametrized(Momentum(lr=0.1, momentum=0.5), {"lr": "log", "momentum": "logit"})
        >>> rule.init_theta(torch.Generator())["rule/momentum"]
        tensor(0.)
    """

    scales: Mapping[str, Scale]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_mapping(self.scales) or not all(isinstance(k, str) for k in self.scales):
            raise TypeError(f"Reparametrized: scales={self.scales!r} is not a dict of pattern -> scale")
        unknown = [scale for scale in self.scales.values() if scale not in get_args(Scale)]
        if unknown or not self.scales:
            raise ValueError(
                f"Reparametrized: scales={self.scales!r} must give each pattern one of {', '.join(get_args(Scale))}"
            )

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the rule's theta on its scales."""
        raw = self.rule.init_theta(generator)
        idle = [pattern for pattern in self.scales if not any(fnmatchcase(name, pattern) for name in raw)]
        if idle:
            raise ValueError(f"Reparametrized: {idle} match no meta-parameter of the rule, which has {list(raw)}")
        theta = {name: value if (to := self._scale(name)) is None else to[0](value) for name, value in raw.items()}
        outside = [f"{name}={raw[name]}" for name, value in theta.items() if not value.isfinite().all()]
        if outside:
            raise ValueError(
                f"Reparametrized: {', '.join(outside)} cannot be put on its scale; a logarithm needs a positive "
                "value, a logit one strictly between 0 and 1"
            )
        return prefixed("rule", theta)

    def theta_scale(self) -> dict[str, float | Tensor]:
        """Return the rule's scales of what stays as it is; what is put on a scale has a size of its own there, 1."""
        return prefixed("rule", {k: s for k, s in self.rule.theta_scale().items() if self._scale(k) is None})

    def theta_faults(self, theta: Theta) -> dict[str, str]:
        """Say what the rule says of the values read from their scales."""
        return prefixed("rule", self.rule.theta_faults(self._read(theta)))

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start as the rule does."""
        return self.rule.init(self._read(theta), params)

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Move as the rule does with the values read from their scales."""
        return self.rule.update(self._read(theta), grads, state, params, loss)

    def result(self, theta: Theta, params: Params, state: State) -> Params:
        """Return what the rule does."""
        return self.rule.result(self._read(theta), params, state)

    def _read(self, theta: Theta) -> Theta:
        scaled = unprefixed("rule", theta)
        return {name: value if (at := self._scale(name)) is None else at[1](value) for name, value in scaled.items()}

    def _scale(self, name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
        return next((_SCALES[scale] for pattern, scale in self.scales.items() if fnmatchcase(name, pattern)), None)
