"""The base of rules that wrap another one, and the prefixes under which wrapped rules keep their theta."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta


@dataclass(frozen=True, eq=False)
class Wrapper(UpdateRule):
    """A rule around ``rule``, whose theta is found under ``rule/``; by itself it changes nothing.

    Args:
        rule: the rule that is wrapped.

    Raises:
        TypeError: ``rule`` is not an update rule.
    """

    rule: UpdateRule

    def __post_init__(self) -> None:
        if not isinstance(self.rule, UpdateRule):
            raise TypeError(
                f"{type(self).__name__}: rule={self.rule!r} is a {type(self.rule).__name__}, not an update rule; pass "
                "an instance, such as SGD(lr=0.1)"
            )

    @property
    def coordinatewise(self) -> bool:
        """Whether the wrapped rule is."""
        return self.rule.coordinatewise

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the wrapped rule's theta under the prefix."""
        return prefixed("rule", self.rule.init_theta(generator))

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start as the wrapped rule does."""
        return self.rule.init(unprefixed("rule", theta), params)

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Move as the wrapped rule does."""
        return self.rule.update(unprefixed("rule", theta), grads, state, params, loss)

    def step(
        self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor
    ) -> tuple[Params, State] | None:
        """Step as the wrapped rule does."""
        return self.rule.step(unprefixed("rule", theta), grads, state, params, loss)


def prefixed(prefix: str, theta: Theta) -> Theta:
    """Return ``theta`` with every name ``x`` as ``<prefix>/x``."""
    return {f"{prefix}/{name}": value for name, value in theta.items()}


def unprefixed(prefix: str, theta: Theta) -> Theta:
    """Return the entries named ``<prefix>/x``, as ``x``; the inverse of ``prefixed``."""
    return {name[len(prefix) + 1 :]: value for name, value in theta.items() if name.startswith(f"{prefix}/")}
