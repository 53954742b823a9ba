"""One inner step, compiled forward and back, and called over an unroll.

A program of a whole unroll takes the longer to compile the more steps it has; that of one step serves them all. The
engine's own step is recorded twice: what it computes, and how cotangents of that go back to theta, parameters and
state. The way back computes the step anew from where it began, so that an unroll keeps the starts of its steps and
their batches, and never a graph. Everything around the steps, the objective too, is differentiated as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.cache import MISSING, PROGRAMS, Cache
from learnedopt.core.carry import Carry, Rollout, Tape
from learnedopt.core.inner import InnerLoop
from learnedopt.core.tree import Theta
from learnedopt.execution.given_batches import with_batches
from learnedopt.execution.programs import build_once, compiled, inspected, require_close

Program: TypeAlias = Callable[..., Sequence[Tensor]]


def run(loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int, tape: Tape) -> Rollout:
    """Equal ``loop.run`` in values and gradients, by the programs of one step where they can be built.

    The first step of its kind is computed both ways, forward and, with a tape, back: where they differ by more than the
    square root of the precision, the program is not used. Warns, once, where steps run uncompiled instead.
    """
    if num_steps == 0:
        return loop.run(theta, carry, 0, tape)
    loop.require_end(carry.step + num_steps)
    theta = tree.detach(theta) if tape is Tape.NONE else theta
    with torch.set_grad_enabled(tape is not Tape.NONE):
        start = loop.begin(theta, carry)
        # Flat throughout, as walking trees would be a tenth of a small step.
        fixed, (moving, restore) = _of_one_layout(tree.leaves(theta)), tree.flatten((start.params, start.state))
        losses: list[Tensor] = []
        programs, kind = None, None
        for step in range(carry.step, carry.step + num_steps):
            batch = loop.batch(carry.tasks, step, "train")
            drawn, drawn_kind = inspected(batch)
            moving = _of_one_layout(moving)
            if programs is None or drawn_kind != kind or not programs.go_on:
                one = _OneStep(loop, carry.tasks, (theta, *restore(moving), batch), len(fixed), len(moving))
                kind, programs = drawn_kind, _programs(one, [*fixed, *moving, *drawn], tape)
            if programs.forward is None:
                params, state = restore(moving)
                here = loop.run(theta, Carry(carry.tasks, params, state, step), 1, tape)
                moving, loss = tree.leaves(here.end[1:3]), here.losses
            else:
                *moving, loss = programs.take([*fixed, *moving, *drawn])
            losses.append(loss)
        params, state = restore(moving)
        return Rollout(start, Carry(carry.tasks, params, state, carry.step + num_steps), torch.cat(losses))


def _of_one_layout(tensors: Sequence[Tensor]) -> list[Tensor]:
    # What comes out of a step goes into the next: one layout for all steps is one program for all.
    return [x.contiguous() for x in tensors]


@final
@dataclass(frozen=True)
class _OneStep:
    """One step as a function of the leaves of ``example``: those of theta, those that move (of parameters and state),
    and those of the batch."""

    loop: InnerLoop
    tasks: Any
    example: tree.Tree
    num_theta: int
    num_moving: int

    def outputs(self, tensors: Sequence[Tensor], tape: Tape) -> list[Tensor]:
        """Return what has moved, and the losses (1, num_tasks)."""
        _, restore = tree.flatten(self.example)
        theta, params, state, batch = restore(tensors)
        loop = with_batches(self.loop, lambda tasks, step, split: batch)
        rollout = loop.run(theta, Carry(self.tasks, params, state), 1, tape)
        return [*tree.leaves(rollout.end[1:3]), rollout.losses]

    def pulled_back(self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor], tape: Tape) -> list[Tensor | None]:
        """Return the cotangents of theta's leaves and of those that move, None where nothing reaches them.

        Args:
            cotangents: of the outputs of floating-point numbers.
        """
        num_given = self.num_theta + self.num_moving
        at = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors[:num_given]]
        with torch.enable_grad():
            outputs = _floating(self.outputs([*at, *tensors[num_given:]], tape))
        pairs = [(x, c) for x, c in zip(outputs, cotangents, strict=True) if x.requires_grad]
        reached, onward = zip(*pairs, strict=True)
        wanted = [x for x in at if x.requires_grad]
        found = iter(torch.autograd.grad(reached, wanted, onward, allow_unused=True))
        return [next(found) if x.requires_grad else None for x in at]


class _Forward(NamedTuple):
    """``call(*inputs)`` takes the step; ``goes_on``: what has moved is of the same kinds as before."""

    call: Program
    goes_on: bool


class _Backward(NamedTuple):
    """``call(*inputs, *cotangents)`` returns the cotangents of those inputs that are ``reached``, of which each has an
    entry."""

    call: Program
    reached: Sequence[bool]

    def complete(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Return a cotangent, or None, for every input."""
        found = iter(self.call(*tensors))
        return [next(found) if reached else None for reached in self.reached]


class _Programs(NamedTuple):
    """Those of a step: without a tape there is no ``backward``; no ``forward`` where it is to run uncompiled."""

    forward: _Forward | None
    backward: _Backward | None

    @property
    def go_on(self) -> bool:
        """Whether the next step is of the same kind, if its batch is."""
        return self.forward is not None and self.forward.goes_on

    def take(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what ``_OneStep.outputs`` does, with a graph where there is a way back."""
        assert self.forward is not None
        if self.backward is None:
            return self.forward.call(*inputs)
        # torch gives it no types.
        return cast("Sequence[Tensor]", _Call.apply(*self, *inputs))  # pyright: ignore[reportUnknownMemberType]


def _programs(one: _OneStep, inputs: Sequence[Tensor], tape: Tape) -> _Programs:
    """Return the programs of such a step, built now where there are none yet."""
    cache, (_, kind) = one.loop.cache.remember(PROGRAMS, Cache), inspected(one.example)
    forward, backward = cache.get(kind), None
    if forward is MISSING:
        forward = cache.put(kind, _compile_forward(one, inputs))
    if forward is not None and tape is not Tape.NONE:
        backward = cache.get((kind, tape))
        if backward is MISSING:
            backward = cache.put((kind, tape), _compile_backward(one, inputs, tape))
        forward = None if backward is None else forward
    return _Programs(forward, backward)


def _compile_forward(one: _OneStep, inputs: Sequence[Tensor]) -> _Forward | None:
    # Recorded with a graph, which leaves no trace in the record: without one, a rule may leave torch for its kernel.
    def record(*tensors: Tensor) -> list[Tensor]:
        return [x.detach() for x in one.outputs(tensors, Tape.FULL)]

    right = record(*inputs)
    before = inputs[one.num_theta : one.num_theta + one.num_moving]
    goes_on = all(x.shape == y.shape and x.dtype is y.dtype for x, y in zip(before, right[:-1], strict=True))

    def build() -> _Forward:
        program = _Forward(_without_graph(compiled(record, inputs)), goes_on)
        require_close({"inner step": (_floating(program.call(*inputs)), _floating(right))})
        return program

    return build_once(one.loop, "an inner step", build)


def _compile_backward(one: _OneStep, inputs: Sequence[Tensor], tape: Tape) -> _Backward | None:
    generator, num_inputs = torch.Generator().manual_seed(0), len(inputs)
    outputs = _floating(one.outputs(inputs, tape))
    cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for x in outputs]
    right, reached = one.pulled_back(inputs, cotangents, tape), []

    def record(*tensors: Tensor) -> list[Tensor]:
        found = one.pulled_back(tensors[:num_inputs], tensors[num_inputs:], tape)
        reached[:] = [x is not None for x in found]
        return [x for x in found if x is not None]

    def build() -> _Backward:
        program = _Backward(_without_graph(compiled(record, [*inputs, *cotangents])), reached)
        found, n = program.complete([*inputs, *cotangents]), one.num_theta
        where = {"theta": (found[:n], right[:n]), "parameters and state": (found[n:], right[n:])}
        require_close({f"way back through an inner step, to {name}": pair for name, pair in where.items()})
        return program

    return build_once(one.loop, "the way back through an inner step", build)


def _without_graph(program: Program) -> Program:
    def call(*tensors: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return program(*tensors)

    return call


def _floating(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.is_floating_point()]


class _Call(torch.autograd.Function):
    """One step: forward by one program, back by the other."""

    @staticmethod
    def forward(ctx: Any, forward: _Forward, backward: _Backward, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.backward_program = backward
        ctx.save_for_backward(*inputs)
        outputs = tuple([x.detach() for x in forward.call(*inputs)])  # some may be one tensor, or an input as it is
        ctx.floating = [x.is_floating_point() for x in outputs]
        ctx.mark_non_differentiable(*[x for x in outputs if not x.is_floating_point()])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch gives its decorator no types
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Any, ...]:
        given = [c.contiguous() for c, floating in zip(cotangents, ctx.floating, strict=True) if floating]
        found, inputs = ctx.backward_program.complete([*ctx.saved_tensors, *given]), ctx.saved_tensors
        return None, None, *found, *[None] * (len(inputs) - len(found))
