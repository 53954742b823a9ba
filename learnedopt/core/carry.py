"""Where an inner loop stands, and what a piece of it leaves behind."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.rule import State
from learnedopt.core.task import Tasks
from learnedopt.core.tree import Params


class Tape(Enum):
    """How much of the inner loop is recorded for back-propagation to theta.

    ``NONE`` records nothing. ``FIRST_ORDER`` lets gradients and losses enter the rule detached, so that no second
    derivative of the optimizee is taken (Andrychowicz et al. 2016, "drop the dashed edges"); parameters and states
    keep their graph. ``FULL`` records everything.
    """

    NONE = "none"
    FIRST_ORDER = "first-order"
    FULL = "full"


class Carry(NamedTuple):
    """Where the inner loop stands, without a graph between runs: all trees batched.

    ``state`` is None on a fresh carry, before the rule's ``init``; ``step`` counts inner steps from the start.
    """

    tasks: Tasks
    params: Params
    state: State | None = None
    step: int = 0


class Rollout(NamedTuple):
    """A piece of the inner loop; ``losses`` (num_steps, num_tasks) are the outer losses on the train batch before each
    update."""

    start: Carry
    end: Carry
    losses: Tensor


def narrow(carry: Carry, start: int, stop: int) -> Carry:
    """Return tasks ``start`` to ``stop - 1`` of a carry."""
    tasks, params, state = tree.narrow(
        (carry.tasks, carry.params, () if carry.state is None else carry.state), start, stop
    )
    return Carry(tasks, params, None if carry.state is None else state, carry.step)


def join(carries: list[Carry]) -> Carry:
    """Put chunks of tasks, all at the same step, together again."""
    tasks, params, state = tree.concatenate([carry[:3] for carry in carries])
    return Carry(tasks, params, state, carries[0].step)


def detach(carry: Carry) -> Carry:
    """Cut a carry from the autograd graph."""
    state = None if carry.state is None else tree.detach(carry.state)
    return Carry(tree.detach(carry.tasks), tree.detach(carry.params), state, carry.step)
