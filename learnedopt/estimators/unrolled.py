"""Meta-gradients by back-propagation through the inner loop: whole, in windows, or through its last steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from learnedopt.core import carry as carries
from learnedopt.core import tree
from learnedopt.core.carry import Carry, Tape
from learnedopt.core.counts import require_count
from learnedopt.core.estimator import (
    Estimate,
    GradientEstimator,
    Recording,
    as_leaves,
    check_loop,
    check_objective,
    check_paths,
    no_path,
)
from learnedopt.core.inner import InnerLoop
from learnedopt.core.modes import recording_gradients
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Theta
from learnedopt.estimators.windows import require_windows
from learnedopt.execution.adjoint import Unroll
from learnedopt.execution.choice import adjoint_of
from learnedopt.execution.programs import seconds_spent


def back_propagate(
    loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry, unroll: Unroll, *, goes_on: bool
) -> tuple[Estimate, bool]:
    """Differentiate the objective through ``unroll``, chunk by chunk of tasks so that only one chunk's graph is held.

    Returns the estimate with the carry to go on from, and whether the objective named that carry itself; without
    ``goes_on`` the carry is None unless it did, and no task's end outlives its chunk. ``info["inner_steps"]`` counts
    the inner steps of one task, those forward and no more.
    """
    num_steps = unroll.ahead + unroll.num_steps
    check_loop(loop, theta, carry, second_derivatives=unroll.tape is Tape.FULL and unroll.num_steps > 0)
    check_objective(loop, theta, objective, carry, num_steps, from_start=unroll.ahead == 0)
    adjoint = adjoint_of(loop, theta, carry, unroll)
    # Of what enters through a start that lies behind this window the gradient is zero, as ``info`` says.
    example = adjoint.example(carry)
    zero = check_paths(
        loop, theta, example, unroll.num_steps, unroll.tape, from_start=unroll.ahead == 0, objective=objective
    )
    leaves = as_leaves(theta)
    num_tasks = tree.size(carry.params)
    values: list[Tensor] = []
    curves: list[Tensor] = []
    ends: list[Carry] = []
    sums: Theta = {}
    named = False
    for chunk in loop.split(carry):
        weight = tree.size(chunk.params) / num_tasks
        found = adjoint.differentiate(loop, leaves, objective, chunk, weight)
        for k, g in _complete(found.grads, leaves, objective, zero).items():
            # The first sum is a tensor of our own: what autograd returns may be shared, the rest is added in place.
            sums[k] = g if k not in sums else sums[k].add_(g) if len(values) > 1 else sums[k] + g
        values.append(found.value)
        named = found.named
        if goes_on or named:
            ends.append(found.end)
        curves.append(weight * found.losses.mean(1))
        del found  # the next chunk has no use for its end
    info: dict[str, Any] = {"losses": torch.stack(curves).sum(0), "inner_steps": num_tasks * num_steps}
    if zero:
        info["zero_gradient"] = zero
    seconds = seconds_spent(loop)
    if seconds:
        info["compile_seconds"] = seconds
    return Estimate(torch.stack(values).sum(), sums, carries.join(ends) if ends else None, info), named


def _episode(estimate: Estimate, named: bool, loop: InnerLoop, theta: Theta, carry: Carry) -> Estimate:
    """Return the estimate of a whole episode: it goes on where the objective named a carry, from no learned start."""
    goes_on = named and not has_learned_start(loop, theta, carry)
    return estimate if goes_on else estimate._replace(carry=None)


def _complete(found: Sequence[torch.Tensor | None], leaves: Theta, objective: MetaObjective, zero: list[str]) -> Theta:
    """Return the gradient by name, zero where that is known; ValueError where nothing reached a meta-parameter."""
    lost = sorted(k for k, g in zip(leaves, found, strict=True) if g is None and k not in zero)
    if lost:
        raise ValueError(no_path(lost, f"the objective {getattr(objective, '__name__', type(objective).__name__)}"))
    return {k: torch.zeros_like(x) if g is None else g for (k, x), g in zip(leaves.items(), found, strict=True)}


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
    def takes_second_derivatives(self) -> bool:
        """Under the full tape."""
        return self.tape is Tape.FULL

    @property
    def recording(self) -> Recording:
        """All steps, or a segment of them at a time."""
        return Recording(self.num_steps, self.tape, partial(Unrolled, tape=self.tape), self.segment)

    @recording_gradients
    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry) -> Estimate:
        """Run ``num_steps`` steps, and back-propagate through all of them."""
        unroll = Unroll(self.num_steps, self.tape, segment=self.segment, offload=self.offload)
        found = back_propagate(loop, theta, objective, carry, unroll, goes_on=False)
        return _episode(*found, loop, theta, carry)


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
            an objective that goes on from further ahead. None for one episode without end, as online learning has it: a
            learned start is then learned in the first window only.
        tape: what is recorded.
    """

    num_steps: int
    horizon: int | None = None
    tape: Tape = Tape.FIRST_ORDER

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps, least=1)
        require_recording(self.tape)
        if self.horizon is not None:
            require_windows(self.num_steps, self.horizon)

    @property
    def takes_second_derivatives(self) -> bool:
        """Under the full tape."""
        return self.tape is Tape.FULL

    @property
    def recording(self) -> Recording:
        """One window."""
        return Recording(self.num_steps, self.tape, partial(Unrolled, tape=self.tape), goes_on=True)

    @recording_gradients
    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry) -> Estimate:
        """Run one window from where the carry stands."""
        unroll = Unroll(self.num_steps, self.tape)
        estimate, _ = back_propagate(loop, theta, objective, carry, unroll, goes_on=True)
        over = estimate.carry is None or (self.horizon is not None and estimate.carry.step >= self.horizon)
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

    @recording_gradients
    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry) -> Estimate:
        """Run all steps, the last ones recorded with the full tape."""
        unroll = Unroll(self.num_backward_steps, Tape.FULL, ahead=self.num_steps - self.num_backward_steps)
        found = back_propagate(loop, theta, objective, carry, unroll, goes_on=False)
        return _episode(*found, loop, theta, carry)


def require_recording(tape: Tape) -> None:
    """Raise ValueError for ``Tape.NONE``, through which nothing can be differentiated."""
    if tape is not Tape.FULL and tape is not Tape.FIRST_ORDER:
        raise ValueError(f"tape={tape!r} records nothing to back-propagate through; use Tape.FULL or Tape.FIRST_ORDER")


def has_learned_start(loop: InnerLoop, theta: Theta, carry: Carry) -> bool:
    """Whether the rule's ``init`` puts part of theta into the starting parameters."""
    params, _ = loop.init_task(as_leaves(theta), tree.squeeze(tree.narrow(carry.params, 0, 1)))
    return any(p.requires_grad for p in params.values())
