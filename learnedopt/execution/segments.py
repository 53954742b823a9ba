"""A run of which only the starts of segments are stored: each segment runs again, recorded, on the way back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, cast

import torch

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Rollout, Tape
from learnedopt.core.inner import InnerLoop
from learnedopt.core.tree import Theta

Run: TypeAlias = Callable[[InnerLoop, Theta, Carry, int, Tape], Rollout]
"""A way of taking inner steps that equals ``InnerLoop.run`` in values and gradients."""


def run_in_segments(
    loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int, tape: Tape, segment: int, *,
    offload: bool = False, run: Run = InnerLoop.run,
) -> Rollout:  # fmt: skip
    """Equal ``loop.run`` in values and gradients, but store only where each segment begins; ``run`` takes its steps."""
    start = here = loop.begin(theta, carry)
    losses: list[torch.Tensor] = []
    for taken in range(0, num_steps, segment):
        with _saved_on_cpu(here) if offload else nullcontext():
            piece = _recomputed(loop, theta, here, min(segment, num_steps - taken), tape, run)
        here = piece.end
        losses.append(piece.losses)
    return Rollout(start, here, torch.cat(losses) if losses else loop.run(theta, start, 0, tape).losses)


def _saved_on_cpu(carry: Carry) -> AbstractContextManager[Any]:
    # What is copied from pinned memory does not make the GPU wait.
    return torch.autograd.graph.save_on_cpu(pin_memory=next(iter(carry.params.values())).is_cuda)


def _recomputed(loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int, tape: Tape, run: Run) -> Rollout:
    inputs, rebuild = tree.flatten((theta, carry.params, carry.state))

    def run_on(tensors: Any, tape: Tape) -> tuple[Rollout, list[torch.Tensor]]:
        theta, params, state = rebuild(tensors)
        rollout = run(loop, theta, Carry(carry.tasks, params, state, carry.step), num_steps, tape)
        return rollout, tree.leaves((rollout.end.params, rollout.end.state, rollout.losses))

    def forward(tensors: Any) -> list[torch.Tensor]:
        return run_on(tensors, Tape.NONE)[1]

    def recorded(tensors: Any) -> list[torch.Tensor]:
        return run_on(tensors, tape)[1]

    # torch gives it no types.
    outputs = cast("Any", _Segment.apply(forward, recorded, *inputs))  # pyright: ignore[reportUnknownMemberType]
    _, restore = tree.flatten((carry.params, carry.state, None))
    params, state, losses = restore(outputs)
    return Rollout(carry, Carry(carry.tasks, params, state, carry.step + num_steps), losses)


class _Segment(torch.autograd.Function):
    """Run a segment without a graph; run it again, recorded, when its cotangents arrive."""

    @staticmethod
    def forward(ctx: Any, forward: Any, recorded: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.recorded = recorded
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        outputs = tuple(forward(inputs))
        ctx.mark_non_differentiable(*[x for x in outputs if not x.is_floating_point()])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch gives its decorator no types
        ctx: Any, *cotangents: Any
    ) -> tuple[Any, ...]:
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.recorded(inputs)
        pairs = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if c is not None and y.requires_grad]
        wanted = [x for x in inputs if x.requires_grad]
        outputs, cotangents = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))
        return (None, None, *[next(found) if x.requires_grad else None for x in inputs])
