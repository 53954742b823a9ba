"""The base of rules that wrap another one, and the prefixes under which wrapped rules keep their theta."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar, cast, final

import torch
from torch import Tensor

from learnedopt.core.rule import Bound, Kernel, State, UpdateRule
from learnedopt.core.tree import Params, Theta

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Wrapper(UpdateRule):
    """A rule around ``rule``, whose theta is found under ``rule/``; by itself it changes nothing.

    It has no kernel: a wrapper that leaves ``update`` as it is may hand on the rule's by ``handed_on``.

    Args:
        rule: the rule that is wrapped.

    Raises:
        TypeError: ``rule`` is not an update rule.
    """

    rule: UpdateRule

    def __post_init__(self) -> None:
        if not isinstance(cast("object", self.rule), UpdateRule):
            raise TypeError(
                f"{type(self).__name__}: rule={self.rule!r} is a {type(self.rule).__name__}, not an update rule; pass "
                "an instance, such as SGD(lr=0.1)"
            )

    @property
    def coordinatewise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """Whether the wrapped rule is."""
        return self.rule.coordinatewise

    @property
    def reads_horizon(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """Whether the wrapped rule does."""
        return self.rule.reads_horizon

    def within(self, horizon: int | None) -> UpdateRule:
        """Return the wrapper around the rule as it is stepped in such a run."""
        return replace(self, rule=self.rule.within(horizon)) if self.rule.reads_horizon else self

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the wrapped rule's theta under the prefix."""
        return prefixed("rule", self.rule.init_theta(generator))

    def theta_scale(self) -> dict[str, float | Tensor]:
        """Return the wrapped rule's scales under the prefix."""
        return prefixed("rule", self.rule.theta_scale())

    def theta_faults(self, theta: Theta) -> dict[str, str]:
        """Say what the wrapped rule says, under the prefix."""
        return prefixed("rule", self.rule.theta_faults(unprefixed("rule", theta)))

    def start_faults(self, params: Params) -> list[str]:
        """Say what the wrapped rule says."""
        return self.rule.start_faults(params)

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start as the wrapped rule does."""
        return self.rule.init(unprefixed("rule", theta), params)

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Move as the wrapped rule does."""
        return self.rule.update(unprefixed("rule", theta), grads, state, params, loss)

    def result(self, theta: Theta, params: Params, state: State) -> Params:
        """Return what the wrapped rule does."""
        return self.rule.result(unprefixed("rule", theta), params, state)


@final
@dataclass(frozen=True)
class HandedOn(Kernel):
    """The kernel of a wrapped rule, whose theta is found under ``rule/``."""

    kernel: Kernel

    def step(
        self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor
    ) -> tuple[Params, State] | None:
        """Step as the wrapped rule's kernel does."""
        return self.kernel.step(unprefixed("rule", theta), grads, state, params, loss)

    def step_of_lanes(
        self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor, num_dims: int
    ) -> tuple[Params, State] | None:
        """Step as the wrapped rule's kernel does."""
        return self.kernel.step_of_lanes(unprefixed("rule", theta), grads, state, params, loss, num_dims)

    def update_in_place(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> Params | None:
        """Write over the state as the wrapped rule's kernel does."""
        return self.kernel.update_in_place(unprefixed("rule", theta), grads, state, params, loss)

    def step_in_place(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> bool:
        """Write over state and parameters as the wrapped rule's kernel does."""
        return self.kernel.step_in_place(unprefixed("rule", theta), grads, state, params, loss)

    def bound(self, theta: Theta, state: State, params: Params) -> Bound | None:
        """Make the wrapped rule's steps ready."""
        return self.kernel.bound(unprefixed("rule", theta), state, params)

    def adjoint(
        self, theta: Theta, grads: Tensor, state: State, cotangents: Tensor, end: State | None, with_state: bool = True
    ) -> tuple[Theta, State | None] | None:
        """Back-propagate as the wrapped rule's kernel does; ``update`` reads nothing else of theta."""
        served = self.kernel.adjoint(unprefixed("rule", theta), grads, state, cotangents, end, with_state)
        if served is None:
            return None
        zeros = {name: torch.zeros_like(value) for name, value in theta.items()}
        return zeros | prefixed("rule", served[0]), served[1]


def handed_on(rule: UpdateRule) -> HandedOn | None:
    """Return the kernel of a wrapper of ``rule`` with the same ``update``."""
    return None if rule.kernel is None else HandedOn(rule.kernel)


def prefixed(prefix: str, theta: Mapping[str, T]) -> dict[str, T]:
    """Return ``theta`` with every name ``x`` as ``<prefix>/x``."""
    return {f"{prefix}/{name}": value for name, value in theta.items()}


def unprefixed(prefix: str, theta: Theta) -> Theta:
    """Return the entries named ``<prefix>/x``, as ``x``; the inverse of ``prefixed``."""
    return {name[len(prefix) + 1 :]: value for name, value in theta.items() if name.startswith(f"{prefix}/")}
