"""How one inner step moves: update rules as pure functions of their meta-parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from learnedopt.core.tree import Params, Theta

State: TypeAlias = Any
"""A rule's memory: a named tuple or dict of tensors and of dicts keyed as the parameters; ``()`` for none."""


class Bound(ABC):
    """Steps in place of one run, made ready for the very tensors that they read and write; see ``Kernel.bound``."""

    @abstractmethod
    def step(self, grads: Sequence[Tensor], **told: Any) -> bool:
        """Write over parameters and state what a step comes to; return whether it was done.

        Args:
            grads: the gradients, in the order of the parameters, which may be other tensors at every step.
            told: ``progress=``, a float, for a rule that reads the horizon.

        Returns:
            False where it does not serve such gradients, sparse ones for one, or where what is done here is recorded or
            transformed; nothing is written then.

        Raises:
            ValueError: a gradient has not its parameter's shape.
        """


class Kernel:
    """Faster ways to compute a rule's ``update`` and its derivatives; each is None where it does not serve.

    A kernel belongs to one ``update``: the class that defines one defines both, and whoever wraps a rule hands on its
    kernel only if ``update`` stays what it is. Whether a method serves must not depend on values.
    """

    def step(
        self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor
    ) -> tuple[Params, State] | None:
        """Return the new parameters and the new state, in fewer passes over memory.

        They are the same as ``params + deltas``, but for rounding, and the state that ``update`` returns.
        """
        return None

    def step_of_lanes(
        self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor, num_dims: int
    ) -> tuple[Params, State] | None:
        """Return what ``step`` returns under ``num_dims`` levels of ``torch.func.vmap``, without their cost.

        Every tensor has so many leading dimensions; where all lanes of one share it, that may be of size 1.
        """
        return None

    def update_in_place(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> Params | None:
        """Return the deltas and write the new state over ``state``, without a graph, to the same bits as ``update``.

        Where it does not serve, nothing is written.
        """
        return None

    def step_in_place(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> bool:
        """Write what ``step`` returns over ``params`` and ``state``, to the same bits; return whether it was done.

        Where it does not serve, nothing is written.
        """
        return False

    def bound(self, theta: Theta, state: State, params: Params) -> Bound | None:
        """Return steps as ``step_in_place`` takes them, made ready once, for a run of many small ones.

        Whoever asks promises that theta's values and the counts of steps in ``state`` are changed by nobody else, and
        that the tensors of ``state`` and ``params`` stay where they lie; else new ones must be made. Between steps
        ``state`` holds what it would otherwise, counts as well. It serves no rule that reads the loss.
        """
        return None

    def adjoint(
        self, theta: Theta, grads: Tensor, state: State, cotangents: Tensor, end: State | None, with_state: bool = True
    ) -> tuple[Theta, State | None] | None:
        """Back-propagate a window of steps at once; for coordinatewise rules that read neither params nor loss.

        Args:
            theta: the meta-parameters, without a graph.
            grads: of all steps, (num_steps, num_tasks, num_coordinates), as one flat parameter.
            state: batched, before the first step, as ``init`` returns it for that parameter.
            cotangents: of the deltas, of the same shape as ``grads``.
            end: cotangents of the last state, structured as ``state``; None for zeros.
            with_state: whether the cotangents of ``state`` are wanted.

        Returns:
            The cotangents of theta, and of ``state`` or None if not wanted. Where it does not serve, the engine
            back-propagates through ``update`` over pieces of the coordinates.
        """
        return None


_MOVED = {
    **dict.fromkeys(
        ("regularizer", "regularizer_gradient", "has_regularizer", "has_regularizer_gradient"),
        "an InnerObjective with a penalty",
    ),
    **dict.fromkeys(("step", "update_in_place", "adjoint"), "the rule's kernel"),
}
"""What rules had in version 0.1 -> where it is now."""


class UpdateRule(ABC):
    """How one inner step moves, with the meta-parameters ``theta`` passed in explicitly.

    All methods but ``init_theta`` see ONE task, are pure, and must work under ``torch.func.vmap``. A rule that counts
    steps counts them in a tensor of its state.

    A rule of one's own defines ``init_theta``, ``init`` and ``update``. All other members have an answer that serves,
    and are there for rules that wrap others, read the horizon, or have a faster step.

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
    """Coordinates do not interact: what ``update`` answers for one depends on no other one's gradient or memory.

    False promises nothing. The engine holds a rule that says True to it where it makes use of it.
    """

    kernel: Kernel | None = None
    """Faster ways to compute this class's ``update``, if there are any."""

    reads_horizon: bool = False
    """``update`` takes a further ``progress=``, the fraction of the horizon behind it, a scalar tensor in [0, 1].

    It is 0 at the first update and stays 1 past the end. So do the methods of its kernel. A loop of such a rule needs a
    horizon, ``InnerLoop(horizon=)`` or ``LearnedOptimizer(num_steps=)``.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an ``update`` that would leave the class with a kernel of another one.

        Raises:
            TypeError: the class overrides ``update`` of a base whose kernel it inherits, or defines what rules had
                in version 0.1.
        """
        super().__init_subclass__(**kwargs)
        gone = sorted(_MOVED.keys() & cls.__dict__.keys())
        if gone:
            raise TypeError(
                f"{cls.__name__} defines {', '.join(gone)}, which no rule has any more and the engine would not call; "
                f"put {'it' if len(gone) == 1 else 'them'} into {' and '.join(sorted({_MOVED[k] for k in gone}))}"
            )
        mro = cls.__mro__
        update, kernel = (next(c for c in mro if name in c.__dict__) for name in ("update", "kernel"))
        if mro.index(update) < mro.index(kernel) and kernel.__dict__["kernel"] is not None:
            raise TypeError(
                f"{cls.__name__} takes update from {update.__name__} and its kernel from {kernel.__name__}, which "
                "computes another update; set kernel = None in the class, give it a kernel of its own, or wrap the rule"
            )

    def start_faults(self, params: Params) -> list[str]:
        """Say, a sentence each, why these starting parameters, of a batch of tasks, are none that it can move from.

        Asked when a carry is begun, on concrete tensors and never under vmap; what is said is raised.
        """
        return []

    @abstractmethod
    def init_theta(self, generator: torch.Generator) -> Theta:
        """Draw the meta-parameters that meta-training starts from, on the generator's device.

        What is made after tensors of the rule's own, such as a template, may lie where these do.
        """

    def theta_scale(self) -> dict[str, float | Tensor]:
        """Say how large a step of size one is for each meta-parameter: 1 for all by default, and for what is left out.

        A number or a tensor of its shape, positive. ``MetaTrainer`` moves ``theta / scale``, and who perturbs theta
        does so by ``scale`` times as much: one learning rate then serves a log-rate as well as a small weight. Whoever
        wraps a rule hands on its scales.
        """
        return {}

    def theta_faults(self, theta: Theta) -> dict[str, str]:
        """Say of each meta-parameter that has left its range what it is and must be; of none by default.

        Asked where a meta-gradient was not finite, for the message: nothing keeps meta-training from moving a decay
        rate past 1. Whoever wraps a rule hands this on.
        """
        return {}

    @abstractmethod
    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Return where the inner loop starts (``params``, or a learned start out of ``theta``) and the first state."""

    def init_for(self, theta: Theta, params: Params, horizon: Tensor) -> tuple[Params, State]:
        """Return what ``init`` does, for a run of ``horizon`` steps, a scalar tensor: asked where ``reads_horizon``."""
        return self.init(theta, params)

    def within(self, horizon: int | None) -> UpdateRule:
        """Return the rule as it is stepped in a run of ``horizon`` steps, or of a length that is not known.

        Whoever wraps a rule hands this on to it, and says ``reads_horizon`` where the rule does.

        Raises:
            ValueError: it reads the horizon, and there is none.
        """
        if not self.reads_horizon:
            return self
        from learnedopt.core.horizon import Timed  # which is a rule

        if horizon is None:
            raise ValueError(
                f"{type(self).__name__} reads how far a run is, and nobody said how long it will be; pass "
                "InnerLoop(..., horizon=T), LearnedOptimizer(..., num_steps=T), or a recipe's horizon, with T the "
                "number of its steps"
            )
        return Timed(self, horizon)

    @abstractmethod
    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Return what to ADD to ``params``, and the new state.

        ``grads`` is the gradient of the inner objective at ``params``, ``loss`` its scalar value there, less its
        penalty where it has one.
        """

    def result(self, theta: Theta, params: Params, state: State) -> Params:
        """Return what is kept of a run that ends here and judged by: the parameters that the loop moves, by default.

        Another answer is for rules that take their gradients elsewhere, such as at a mixture with an average of
        iterates. Whoever wraps a rule hands this on.
        """
        return params
