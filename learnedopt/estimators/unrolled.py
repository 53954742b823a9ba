"""Meta-gradients by back-propagation through the inner loop: whole, in windows, or through its last steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch

from learnedopt.core import inner, tree
from learnedopt.core.checks import require_count
from learnedopt.core.estimator import (
    Estimate,
    GradientEstimator,
    Recording,
    as_leaves,
    call_objective,
    check_objective,
    check_paths,
    no_path,
)
from learnedopt.core.inner import Carry, InnerLoop, Rollout, Tape
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Theta
from learnedopt.execution import compiled, coordinatewise
from learnedopt.execution.allocator import keep_freed_memory

Unroll = Callable[[Theta, Carry], Rollout]


def back_propagate(
    loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry, unroll: Unroll, zero: list[str],
    *, estimator: GradientEstimator, goes_on: bool, by_coordinates: int | None = None,
) -> tuple[Estimate, bool]:  # fmt: skip
    """Differentiate the objective through ``unroll``, chunk by chunk of tasks so that only one chunk's graph is held.

    With ``by_coordinates`` steps, the coordinatewise adjoint of so many steps takes the place of ``unroll``, which
    otherwise depends on ``estimator`` alone, so that a program compiled for one estimate serves the next.

    Returns the estimate with the carry to go on from, and whether the objective named that carry itself; without
    ``goes_on`` the carry is None unless it did, and no task's end outlives its chunk. The names in
    ``zero`` are known to enter through a start that lies behind this window: their gradient is zero, as ``info`` says.
    """
    keep_freed_memory()
    leaves = as_leaves(theta)
    num_tasks = tree.size(carry.params)
    values, sums, ends, curves, named = [], {}, [], [], False

    def eager(leaves: Theta, chunk: Carry, weight: float | torch.Tensor) -> compiled.Piece:
        with torch.enable_grad():
            rollout = unroll(leaves, chunk)
            value, onward = call_objective(objective, loop, leaves, rollout)
            value = value * weight
        end = inner.detach(onward if onward is not None else rollout.end)
        found = _gradient(value, leaves)
        return compiled.Piece(value.detach(), found, end, onward is not None, rollout.losses.detach())

    for chunk in loop.split(carry):
        weight = tree.size(chunk.params) / num_tasks
        if by_coordinates is not None:
            value, found, end, named, losses = coordinatewise.back_propagate(
                loop, leaves, objective, chunk, by_coordinates, weight
            )
        elif loop.execution.compile:
            value, found, end, named, losses = compiled.differentiate(
                loop, eager, leaves, chunk, weight, (estimator, objective)
            )
        else:
            value, found, end, named, losses = eager(leaves, chunk, weight)
        for k, g in _complete(found, leaves, objective, zero).items():
            # The first sum is a tensor of our own: what autograd returns may be shared, the rest is added in place.
            sums[k] = g if k not in sums else sums[k].add_(g) if len(values) > 1 else sums[k] + g
        values.append(value.detach())
        if goes_on or named:
            ends.append(end)
        curves.append(weight * losses.detach().mean(1))
        del found, end  # the next chunk has no use for them
    info: dict[str, Any] = {"losses": torch.stack(curves).sum(0)}
    if zero:
        info["zero_gradient"] = zero
    seconds = compiled.seconds_spent(loop)
    if seconds:
        info["compile_seconds"] = seconds
    return Estimate(torch.stack(values).sum(), sums, inner.join(ends) if ends else None, info), named


def _gradient(value: torch.Tensor, leaves: Theta) -> Sequence[torch.Tensor | None]:
    if not value.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(value, list(leaves.values()), allow_unused=True)


def _complete(found: Sequence[torch.Tensor | None], leaves: Theta, objective: MetaObjective, zero: list[str]) -> Theta:
    """Return the gradient by name, zero where that is known; ValueError where nothing reached a meta-parameter."""
    lost = sorted(k for k, g in zip(leaves, found, strict=True) if g is None and k not in zero)
    if lost:
        raise ValueError(no_path(lost, f"the objective {getattr(objective, '__name__', type(objective).__name__)}"))
    return {k: torch.zeros_like(x) if g is None else g for (k, x), g in zip(leaves.items(), found, strict=True)}


def _checked(
    loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry, num_steps: int, tape: Tape
) -> tuple[list[str], int | None]:
    """Ask what must hold before the first step.

    Returns the names whose gradient is known to be zero in this window, and ``num_steps`` where the coordinatewise
    adjoint serves, which is exact, faster and leaner; else None.
    """
    loop.vet(tree.detach(theta), carry)
    check_objective(loop, theta, objective, carry, num_steps)
    params = tree.squeeze(tree.narrow(carry.params, 0, 1))
    if coordinatewise.reason_against(loop, theta, params, tape) is not None:
        return check_paths(loop, theta, carry, num_steps, tape), None
    # All coordinates go the same ways: two of them show which there are.
    two = carry._replace(params={"x": next(iter(params.values())).new_zeros(1, 2)})
    return check_paths(loop, theta, two, num_steps, tape), num_steps


@final
@dataclass(frozen=True)
class Unrolled(GradientEstimator):
    """The exact gradient through ``num_steps`` inner steps (Maclaurin et al. 2015; MAML, Finn et al. 2017).

    Args:
        num_steps: inner steps; 0 leaves the start alone.
        tape: what is recorded; ``Tape.FIRST_ORDER`` drops the optimizee's second derivatives.
        segment: recompute in pieces of so many steps: only the pieces' starts are stored, and each piece is run again
            on the way back (Chen et al. 2016). Memory grows with num_steps / segment states and segment steps of graph;
            segment = sqrt(num_steps) is the least, 1 stores the iterates only. None stores everything.
        offload: keep the starts of segments in the CPU's memory until they are gone back through; for tasks on a GPU.

    The carry is None after the estimate, for the episode is over, unless the objective names one that training goes on
    from. A learned start always begins a new episode, since going on would leave it without a gradient.
    """

    num_steps: int
    tape: Tape = Tape.FULL
    segment: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps)
        require_recording(self.tape)
        if self.segment is not None:
            require_count("segment", self.segment, least=1)
        elif self.offload:
            raise ValueError("offload=True moves the starts of segments, and there are none; pass segment= as well")

    @property
    def recording(self) -> Recording:
        """All steps, or a segment of them at a time."""
        return Recording(self.num_steps, self.tape, lambda n: Unrolled(n, self.tape), self.segment)

    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry) -> Estimate:
        """Run ``num_steps`` steps, and back-propagate through all of them."""
        zero, window = _checked(loop, theta, objective, carry, self.num_steps, self.tape)

        def unroll(leaves: Theta, chunk: Carry) -> Rollout:
            if self.segment is None:
                return loop.run(leaves, chunk, self.num_steps, self.tape)
            return run_in_segments(loop, leaves, chunk, self.num_steps, self.tape, self.segment, offload=self.offload)

        estimate, named = back_propagate(
            loop, theta, objective, carry, unroll, zero, estimator=self, goes_on=False, by_coordinates=window
        )
        goes_on = named and not has_learned_start(loop, theta, carry)
        return estimate if goes_on else estimate._replace(carry=None)


def FirstOrder(num_steps: int) -> Unrolled:
    """First-order MAML and its kin: ``Unrolled(num_steps, tape=Tape.FIRST_ORDER)``."""
    return Unrolled(num_steps, tape=Tape.FIRST_ORDER)


@final
@dataclass(frozen=True)
class Truncated(GradientEstimator):
    """Back-propagation in windows of an episode (Andrychowicz et al. 2016, section 2.1; Werbos 1990).

    Each estimate covers one window; parameters and states go on into the next, detached.

    Args:
        num_steps: length of a window.
        horizon: length of an episode, a multiple of ``num_steps``; the carry is None once it is reached, or passed by
            an objective that goes on from further ahead.
        tape: what is recorded.
    """

    num_steps: int
    horizon: int
    tape: Tape = Tape.FIRST_ORDER

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps, least=1)
        require_count("horizon", self.horizon, least=1)
        require_recording(self.tape)
        if self.horizon % self.num_steps:
            raise ValueError(
                f"horizon={self.horizon} is not a multiple of the window num_steps={self.num_steps}: the last window "
                f"would be cut short; use {self.horizon - self.horizon % self.num_steps or self.num_steps} or "
                f"{self.horizon + self.num_steps - self.horizon % self.num_steps}"
            )

    @property
    def recording(self) -> Recording:
        """One window."""
        return Recording(self.num_steps, self.tape, lambda n: Unrolled(n, self.tape), goes_on=True)

    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry) -> Estimate:
        """Run one window from where the carry stands."""
        zero, window = _checked(loop, theta, objective, carry, self.num_steps, self.tape)
        estimate, _ = back_propagate(
            loop,
            theta,
            objective,
            carry,
            lambda leaves, chunk: loop.run(leaves, chunk, self.num_steps, self.tape),
            zero,
            estimator=self,
            goes_on=True,
            by_coordinates=window,
        )
        over = estimate.carry is None or estimate.carry.step >= self.horizon
        return estimate._replace(carry=None) if over else estimate


@final
@dataclass(frozen=True)
class TruncatedBackprop(GradientEstimator):
    """K-RMD: run ``num_steps`` steps, back-propagate through the last ``num_backward_steps`` (Shaban et al. 2019).

    A learned start lies before the recorded steps, so it gets no gradient unless the rule also pulls towards it.
    """

    num_steps: int
    num_backward_steps: int

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps)
        require_count("num_backward_steps", self.num_backward_steps)
        if self.num_backward_steps > self.num_steps:
            raise ValueError(
                f"num_backward_steps={self.num_backward_steps} exceeds num_steps={self.num_steps}: there are not so "
                "many steps to go back through; Unrolled(num_steps) goes through all of them"
            )

    @property
    def recording(self) -> Recording:
        """The last steps."""
        return Recording(self.num_backward_steps, Tape.FULL, Unrolled)

    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry) -> Estimate:
        """Run all steps, the last ones recorded with the full tape."""
        loop.vet(tree.detach(theta), carry)
        check_objective(loop, theta, objective, carry, self.num_steps)
        ahead = self.num_steps - self.num_backward_steps
        zero = check_paths(loop, theta, carry, self.num_backward_steps, Tape.FULL, from_start=ahead == 0)

        def unroll(leaves: Theta, chunk: Carry) -> Rollout:
            if ahead == 0:
                return loop.run(leaves, chunk, self.num_steps, Tape.FULL)
            first = loop.run(leaves, chunk, ahead, Tape.NONE)
            last = loop.run(leaves, first.end, self.num_backward_steps, Tape.FULL)
            return Rollout(first.start, last.end, torch.cat([first.losses, last.losses]))

        estimate, named = back_propagate(loop, theta, objective, carry, unroll, zero, estimator=self, goes_on=False)
        goes_on = named and not has_learned_start(loop, theta, carry)
        return estimate if goes_on else estimate._replace(carry=None)


def run_in_segments(
    loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int, tape: Tape, segment: int, *, offload: bool = False
) -> Rollout:
    """Equal ``loop.run`` in values and gradients, but store only where each segment begins."""
    start = here = loop.begin(theta, carry)
    losses = []
    for taken in range(0, num_steps, segment):
        with _saved_on_cpu(here) if offload else nullcontext():
            piece = _recomputed(loop, theta, here, min(segment, num_steps - taken), tape)
        here = piece.end
        losses.append(piece.losses)
    return Rollout(start, here, torch.cat(losses) if losses else loop.run(theta, start, 0, tape).losses)


def _saved_on_cpu(carry: Carry) -> AbstractContextManager[Any]:
    # What is copied from pinned memory does not make the GPU wait.
    return torch.autograd.graph.save_on_cpu(pin_memory=next(iter(carry.params.values())).is_cuda)


def _recomputed(loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int, tape: Tape) -> Rollout:
    inputs, rebuild = tree.flatten((theta, carry.params, carry.state))

    def run(tensors: Any, tape: Tape) -> tuple[Rollout, list[torch.Tensor]]:
        theta, params, state = rebuild(tensors)
        rollout = loop.run(theta, Carry(carry.tasks, params, state, carry.step), num_steps, tape)
        return rollout, tree.leaves((rollout.end.params, rollout.end.state, rollout.losses))

    def forward(tensors: Any) -> list[torch.Tensor]:
        return run(tensors, Tape.NONE)[1]

    outputs = _Segment.apply(forward, lambda tensors: run(tensors, tape)[1], *inputs)
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
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.recorded(inputs)
        pairs = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if c is not None and y.requires_grad]
        wanted = [x for x in inputs if x.requires_grad]
        outputs, cotangents = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))
        return (None, None, *[next(found) if x.requires_grad else None for x in inputs])


def require_recording(tape: Tape) -> None:
    """Raise ValueError for ``Tape.NONE``, through which nothing can be differentiated."""
    if tape is not Tape.FULL and tape is not Tape.FIRST_ORDER:
        raise ValueError(f"tape={tape!r} records nothing to back-propagate through; use Tape.FULL or Tape.FIRST_ORDER")


def has_learned_start(loop: InnerLoop, theta: Theta, carry: Carry) -> bool:
    """Whether the rule's ``init`` puts part of theta into the starting parameters."""
    params, _ = loop.rule.init(as_leaves(theta), {k: p[0] for k, p in carry.params.items()})
    return any(p.requires_grad for p in params.values())
