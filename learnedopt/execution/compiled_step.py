"""One inner step, compiled forward and back, and called over an unroll.

A program of a whole unroll takes the longer to compile the more steps it has; that of one step serves them all. The
engine's own step is recorded twice: what it computes, and how cotangents of that go back to theta, parameters and
state. The way back computes the step anew from where it began, so that an unroll keeps the starts of its steps and
their batches, and never a graph. Everything around the steps, the objective too, is differentiated as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.cache import MISSING
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
    theta = tree.detach(theta) if tape is Tape.NONE else theta
    with torch.set_grad_enabled(tape is not Tape.NONE):
        start = here = loop.begin(theta, carry)
        losses = []
        for _ in range(num_steps):
            here, loss = _take(loop, theta, here, tape)
            losses.append(loss)
        return Rollout(start, here, torch.cat(losses))


def _take(loop: InnerLoop, theta: Theta, here: Carry, tape: Tape) -> tuple[Carry, Tensor]:
    """Take one step; return where it leads and its losses (1, num_tasks)."""
    batch = loop.batch(here.tasks, here.step, "train")
    # What comes out of a step goes into the next: one layout for all steps is one program for all.
    given = tree.tree_map(torch.Tensor.contiguous, (theta, here.params, here.state))
    inputs, structure = inspected((*given, batch))
    one = _OneStep(loop, here.tasks, (*given, batch), len(inputs) - len(tree.leaves(batch)))
    forward = _forward_program(one, inputs, structure)
    backward = None if tape is Tape.NONE or forward is None else _backward_program(one, inputs, structure, tape)
    if forward is None or (backward is None and tape is not Tape.NONE):
        rollout = loop.run(theta, here, 1, tape)
        return rollout.end, rollout.losses
    outputs = forward(*inputs) if backward is None else _Call.apply(forward, backward, *inputs)
    *moved, losses = outputs
    _, restore = tree.flatten((here.params, here.state))
    params, state = restore(moved)
    return Carry(here.tasks, params, state, here.step + 1), losses


@final
@dataclass(frozen=True)
class _OneStep:
    """One step as a function of the leaves of ``example``: theta, parameters, state and batch, of which the first
    ``num_given`` are not the batch's."""

    loop: InnerLoop
    tasks: Any
    example: tree.Tree
    num_given: int

    def outputs(self, tensors: Sequence[Tensor], tape: Tape) -> list[Tensor]:
        """Return the leaves of the new parameters and state, and the losses."""
        _, restore = tree.flatten(self.example)
        theta, params, state, batch = restore(tensors)
        loop = with_batches(self.loop, lambda tasks, step, split: batch)
        rollout = loop.run(theta, Carry(self.tasks, params, state), 1, tape)
        return [*tree.leaves((rollout.end.params, rollout.end.state)), rollout.losses]

    def pulled_back(self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor], tape: Tape) -> list[Tensor | None]:
        """Return the cotangents of the first ``num_given`` tensors, None where the step does not read them.

        Args:
            cotangents: of the outputs of floating-point numbers.
        """
        at = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors[: self.num_given]]
        with torch.enable_grad():
            outputs = self.outputs([*at, *tensors[self.num_given :]], tape)
        floating = [x for x in outputs if x.is_floating_point()]
        pairs = [(x, c) for x, c in zip(floating, cotangents, strict=True) if x.requires_grad]
        wanted = [x for x in at if x.requires_grad]
        reached, onward = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(reached, wanted, onward, allow_unused=True))
        return [next(found) if x.requires_grad else None for x in at]


def _forward_program(one: _OneStep, inputs: Sequence[Tensor], structure: Any) -> Program | None:
    """Return the compiled step, built now where there is none yet; None where it cannot be built."""
    cache, key = one.loop.cache, ("step", structure)
    program = cache.get(key)
    if program is not MISSING:
        return program

    # A graph that nobody goes back through is no part of a record; without one, a rule may leave torch for a kernel.
    def record(*tensors: Tensor) -> list[Tensor]:
        return [x.detach() for x in one.outputs(tensors, Tape.FULL)]

    right = record(*inputs)

    def build() -> Program:
        program = _without_graph(compiled(record, inputs))
        require_close({"step": (_floating(program(*inputs)), _floating(right))})
        return program

    return cache.put(key, build_once(one.loop, "an inner step", build))


class _Backward(NamedTuple):
    """``call(*inputs, *cotangents)`` returns the cotangents of those inputs that are ``reached``."""

    call: Program
    reached: Sequence[bool]

    def all_of(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Return a cotangent, or None, for every input."""
        found = iter(self.call(*tensors))
        return [next(found) if reached else None for reached in self.reached]


def _backward_program(one: _OneStep, inputs: Sequence[Tensor], structure: Any, tape: Tape) -> _Backward | None:
    """Return the compiled way back, built now where there is none yet; None where it cannot be built."""
    cache, key = one.loop.cache, ("step", tape, structure)
    program = cache.get(key)
    if program is not MISSING:
        return program
    n, reached = len(inputs), [False] * len(inputs)

    def record(*tensors: Tensor) -> list[Tensor]:
        found = one.pulled_back(tensors[:n], tensors[n:], tape)
        reached[: one.num_given] = [x is not None for x in found]
        return [x for x in found if x is not None]

    generator = torch.Generator().manual_seed(0)
    outputs = _floating(one.outputs(inputs, tape))
    cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for x in outputs]
    right = one.pulled_back(inputs, cotangents, tape)

    def build() -> _Backward:
        program = _Backward(_without_graph(compiled(record, [*inputs, *cotangents])), reached)
        found = program.all_of([*inputs, *cotangents])[: one.num_given]
        theta = len(one.example[0])
        require_close(
            {
                "gradient of a step for theta": (found[:theta], right[:theta]),
                "gradient of a step for parameters and state": (found[theta:], right[theta:]),
            }
        )
        return program

    return cache.put(key, build_once(one.loop, "the way back through an inner step", build))


def _without_graph(program: Program) -> Program:
    def call(*tensors: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return program(*[x.detach() for x in tensors])

    return call


def _floating(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.is_floating_point()]


class _Call(torch.autograd.Function):
    """One step: forward by one program, back by the other."""

    @staticmethod
    def forward(ctx: Any, forward: Program, backward: _Backward, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.program = backward
        ctx.save_for_backward(*inputs)
        outputs = tuple(x.detach() for x in forward(*inputs))  # some may be one tensor, or an input as it is
        ctx.floating = [x.is_floating_point() for x in outputs]
        ctx.mark_non_differentiable(*[x for x in outputs if not x.is_floating_point()])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        given = [c.contiguous() for c, floating in zip(cotangents, ctx.floating, strict=True) if floating]
        return None, None, *ctx.program.all_of([*ctx.saved_tensors, *given])
