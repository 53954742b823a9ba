"""How an objective is differentiated through a piece of the inner loop: an object that an estimator is handed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from learnedopt.core import carry as carries
from learnedopt.core.carry import Carry, Rollout, Tape
from learnedopt.core.estimator import call_objective
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Theta
from learnedopt.execution.segments import Run, run_in_segments


class ChunkGradient(NamedTuple):
    """The objective and its gradient of a chunk of tasks.

    ``value`` is the objective times the chunk's weight; ``grads`` has one gradient for each of theta's leaves, None
    where nothing reaches it; training goes on from ``end``, which the objective ``named`` or which is the rollout's;
    ``losses`` is (num_steps, num_tasks). Nothing has a graph.
    """

    value: Tensor
    grads: Sequence[Tensor | None]
    end: Carry
    named: bool
    losses: Tensor


@final
@dataclass(frozen=True)
class Unroll:
    """Which inner steps are taken, and which of them are recorded: ``ahead`` without a tape, then ``num_steps`` with.

    With ``segment`` so many steps are held at a time, with ``offload`` the starts of segments in the CPU's memory.
    """

    num_steps: int
    tape: Tape
    ahead: int = 0
    segment: int | None = None
    offload: bool = False

    def run(self, loop: InnerLoop, theta: Theta, start: Carry, run: Run = InnerLoop.run) -> Rollout:
        """Take the steps, those that are recorded by ``run``."""
        num_steps, tape = self.num_steps, self.tape
        if self.segment is not None:
            return run_in_segments(loop, theta, start, num_steps, tape, self.segment, offload=self.offload, run=run)
        if self.ahead == 0:
            return run(loop, theta, start, num_steps, tape)
        first = _run_ahead(loop, theta, start, self.ahead)
        last = run(loop, theta, first.end, num_steps, tape)
        return Rollout(first.start, last.end, torch.cat([first.losses, last.losses]))


def _run_ahead(loop: InnerLoop, theta: Theta, start: Carry, num_steps: int) -> Rollout:
    """Take steps without a tape; where theta enters the outer loss, its part in these losses is kept."""
    if loop.inner_objective.reads_task_loss:
        return loop.run(theta, start, num_steps, Tape.NONE)
    start = here = carries.detach(loop.begin(theta, start))
    losses: list[Tensor] = []
    for _ in range(num_steps):
        losses.append(loop.losses(theta, here, "train"))
        here = loop.run(theta, here, 1, Tape.NONE).end
    return Rollout(start, here, torch.stack(losses))


class Adjoint(ABC):
    """A way of differentiating an objective through an unroll of a chunk of tasks."""

    @abstractmethod
    def differentiate(
        self, loop: InnerLoop, leaves: Theta, objective: MetaObjective, chunk: Carry, weight: float | Tensor
    ) -> ChunkGradient:
        """Return ``weight`` times the objective of the chunk, and its gradient for theta's ``leaves``."""

    def example(self, carry: Carry) -> Carry:
        """Return a carry, as small as can be, that shows by which ways theta reaches the end."""
        return carry


@final
@dataclass(frozen=True)
class Eager(Adjoint):
    """Record the unroll, whose steps ``run`` takes, as the tape says, and back-propagate through it."""

    unroll: Unroll
    run: Run = InnerLoop.run

    def differentiate(
        self, loop: InnerLoop, leaves: Theta, objective: MetaObjective, chunk: Carry, weight: float | Tensor
    ) -> ChunkGradient:
        """Run the chunk's steps, then go back through all that was recorded."""
        with torch.enable_grad():
            rollout = self.unroll.run(loop, leaves, chunk, self.run)
            value, onward = call_objective(objective, loop, leaves, rollout)
            value = value * weight
        end = carries.detach(onward if onward is not None else rollout.end)
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if value.requires_grad:
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        return ChunkGradient(value.detach(), found, end, onward is not None, rollout.losses.detach())
