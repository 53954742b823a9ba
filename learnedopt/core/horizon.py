"""Rules that read how far a run is: the clock that tells them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from learnedopt.core.rule import Bound, Kernel, State, UpdateRule
from learnedopt.core.tree import Params, Theta


class HorizonWarning(UserWarning):
    """A run goes on past the horizon that its rule was told."""


class Clock(NamedTuple):
    """The state of ``Timed``: the updates taken and the horizon, scalars, and the rule's own state.

    The horizon is here so that a program of a step, compiled or not, serves runs of every length.
    """

    step: Tensor
    horizon: Tensor
    rule: State


@final
@dataclass(frozen=True, eq=False)
class Timed(UpdateRule):
    """A rule that reads the horizon, told ``progress``: updates taken / ``horizon``, 1 from the horizon on.

    Theta: the rule's own. State: ``Clock``.
    """

    rule: UpdateRule
    horizon: int

    # The base has plain attributes: what a wrapper answers for the rule inside is read, and never set.
    @property
    def coordinatewise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the rule is: progress is the same for all coordinates."""
        return self.rule.coordinatewise

    @property
    def kernel(self) -> Kernel | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The rule's, told progress."""
        return None if self.rule.kernel is None else TimedKernel(self.rule.kernel, self)

    def start_faults(self, params: Params) -> list[str]:
        """Say what the rule says."""
        return self.rule.start_faults(params)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the rule's."""
        return self.rule.init_theta(generator)

    def theta_scale(self) -> dict[str, float | Tensor]:
        """Return the rule's."""
        return self.rule.theta_scale()

    def init(self, theta: Theta, params: Params) -> tuple[Params, Clock]:
        """Start as the rule does, at step 0."""
        first = next(iter(params.values()))
        horizon = torch.tensor(float(self.horizon), dtype=_dtype(params), device=first.device)
        start, state = self.rule.init_for(theta, params, horizon)
        step = torch.zeros((), dtype=torch.int64, device=first.device)
        return start, Clock(step, horizon, () if state is None else state)

    def update(self, theta: Theta, grads: Params, state: Clock, params: Params, loss: Tensor) -> tuple[Params, Clock]:
        """Move as the rule does at this progress."""
        rule: Any = self.rule  # one whose update takes progress
        found, own = rule.update(theta, grads, state.rule, params, loss, progress=self.progress(state, params))
        return found, self.after(state, own)

    def result(self, theta: Theta, params: Params, state: Clock) -> Params:
        """Return the rule's."""
        return self.rule.result(theta, params, state.rule)

    def progress(self, state: Clock, params: Params) -> Tensor:
        """Return the fraction of the horizon that is behind, a scalar in [0, 1]."""
        return (state.step.to(_dtype(params)) / state.horizon).clamp(max=1.0)

    def after(self, state: Clock, own: State) -> Clock:
        """Return the state after an update that left the rule in state ``own``."""
        return Clock(state.step + 1, state.horizon, () if own is None else own)


@final
@dataclass(frozen=True)
class TimedKernel(Kernel):
    """The kernel of a rule that reads the horizon; it has no adjoint, which would need the progress of every step."""

    kernel: Any
    timed: Timed

    def step(
        self, theta: Theta, grads: Params, state: Clock, params: Params, loss: Tensor
    ) -> tuple[Params, State] | None:
        """Step as the rule's kernel does at this progress."""
        if not self._has("step"):
            return None
        progress = self.timed.progress(state, params)
        found = self.kernel.step(theta, grads, state.rule, params, loss, progress=progress)
        return None if found is None else (found[0], self.timed.after(state, found[1]))

    def step_of_lanes(
        self, theta: Theta, grads: Params, state: Clock, params: Params, loss: Tensor, num_dims: int
    ) -> tuple[Params, State] | None:
        """Step as the rule's kernel does, at each lane's progress."""
        if not self._has("step_of_lanes"):
            return None
        progress = self.timed.progress(state, params)
        found = self.kernel.step_of_lanes(theta, grads, state.rule, params, loss, num_dims, progress=progress)
        return None if found is None else (found[0], self.timed.after(state, found[1]))

    def update_in_place(self, theta: Theta, grads: Params, state: Clock, params: Params, loss: Tensor) -> Params | None:
        """Write over the state as the rule's kernel does."""
        if not self._has("update_in_place"):
            return None
        progress = self.timed.progress(state, params)
        deltas = self.kernel.update_in_place(theta, grads, state.rule, params, loss, progress=progress)
        if deltas is not None:
            state.step.add_(1)
        return deltas

    def step_in_place(self, theta: Theta, grads: Params, state: Clock, params: Params, loss: Tensor) -> bool:
        """Write over state and parameters as the rule's kernel does."""
        if not self._has("step_in_place"):
            return False
        progress = self.timed.progress(state, params)
        done = self.kernel.step_in_place(theta, grads, state.rule, params, loss, progress=progress)
        if done:
            state.step.add_(1)
        return done

    def bound(self, theta: Theta, state: Clock, params: Params) -> Bound | None:
        """Make the rule's steps ready, and count them."""
        own = self.kernel.bound(theta, state.rule, params) if self._has("bound") else None
        return None if own is None else TimedBound(own, state)

    def _has(self, method: str) -> bool:
        """Whether the rule's kernel has a method of its own: those of the base know no progress."""
        kernel: object = self.kernel
        return getattr(type(kernel), method) is not getattr(Kernel, method)


@final
class TimedBound(Bound):
    """The steps of a rule that reads the horizon, each told its progress."""

    def __init__(self, bound: Bound, clock: Clock) -> None:
        self._bound, self._clock = bound, clock
        self._taken, self._horizon = int(clock.step), float(clock.horizon)

    def step(self, grads: Sequence[Tensor], **told: Any) -> bool:
        """Take one, and count it."""
        done = self._bound.step(grads, progress=min(self._taken / self._horizon, 1.0))
        if done:
            self._taken += 1
            self._clock.step.add_(1)
        return done


def later(state: State, steps: int) -> State:
    """Return a state whose clocks, wherever rules around rules have them, are so many steps further."""

    def moved(found: Any) -> Any:
        if not isinstance(found, Clock):
            return found
        return Clock(found.step + steps, found.horizon, later(found.rule, steps))

    return pytree.tree_map(moved, state, is_leaf=lambda x: isinstance(x, Clock))


def _dtype(params: Params) -> torch.dtype:
    return torch.promote_types(next(iter(params.values())).dtype, torch.float32)
