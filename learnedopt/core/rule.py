"""How one inner step moves: update rules as pure functions of their meta-parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from learnedopt.core.tree import Params, Theta

State: TypeAlias = Any
"""A rule's memory: a named tuple or dict of tensors and of dicts keyed as the parameters; ``()`` for none."""


class UpdateRule(ABC):
    """How one inner step moves, with the meta-parameters ``theta`` passed in explicitly.

    All methods but ``init_theta`` see ONE task, are pure, and must work under ``torch.func.vmap``. A rule that counts
    steps counts them in a tensor of its state.

    Example:
        >>> class SignDescent(UpdateRule):
        ...     coordinatewise = True
        ...     def init_theta(self, generator):
        ...         return {"log_lr": torch.tensor(-3.0)}
        ...     def init(self, theta, params):
        ...         return params, ()
        ...     def update(self, theta, grads, state, params, loss):
        ...         return {k: -theta["log_lr"].exp() * g.sign() for k, g in grads.items()}, state
    """

    coordinatewise: bool = False
    """``update`` commutes with permuting coordinates."""

    @abstractmethod
    def init_theta(self, generator: torch.Generator) -> Theta:
        """Draw the meta-parameters that meta-training starts from."""

    @abstractmethod
    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Return where the inner loop starts (``params``, or a learned start out of ``theta``) and the first state."""

    @abstractmethod
    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Return what to ADD to ``params``, and the new state.

        ``grads`` is the gradient of the inner objective at ``params``, ``loss`` its scalar value there, less its
        penalty where it has one.
        """

    def step(
        self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor
    ) -> tuple[Params, State] | None:
        """Optional: ``update`` with the deltas added already, in fewer passes over memory.

        Returns the new parameters, the same as ``params + deltas`` but for rounding, and the new state; None where it
        does not serve, as by default, which must not depend on values.
        """
        return None

    def update_in_place(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> Params | None:
        """Optional: ``update`` that writes the new state over ``state``, without a graph, to the same bits.

        Returns the deltas; None, with nothing written, where it does not serve, as by default.
        """
        return None

    def adjoint(
        self, theta: Theta, grads: Tensor, state: State, cotangents: Tensor, end: State | None, with_state: bool = True
    ) -> tuple[Theta, State | None] | None:
        """Optional, of coordinatewise rules that read neither ``params`` nor ``loss``: back-propagate a window at once.

        Args:
            theta: the meta-parameters, without a graph.
            grads: of all steps, (num_steps, num_tasks, num_coordinates), as one flat parameter.
            state: batched, before the first step, as ``init`` returns it for that parameter.
            cotangents: of the deltas, of the same shape as ``grads``.
            end: cotangents of the last state, structured as ``state``; None for zeros.
            with_state: whether the cotangents of ``state`` are wanted.

        Returns:
            The cotangents of theta, and of ``state`` or None if not wanted; None in place of both where it does not
            serve, as by default: the engine then back-propagates through ``update`` over pieces of the coordinates.
        """
        return None
