"""Meta-gradients by forward mode: tangents go along with the inner loop, and nothing of the way is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from learnedopt.core import carry as carries
from learnedopt.core import tree
from learnedopt.core.carry import Carry, Tape
from learnedopt.core.counts import require_count
from learnedopt.core.estimator import (
    Estimate,
    GradientEstimator,
    as_leaves,
    check_loop,
    check_objective,
    check_paths,
    no_path,
)
from learnedopt.core.inner import InnerLoop
from learnedopt.core.modes import recording_gradients
from learnedopt.core.objective import MetaObjective
from learnedopt.core.task import Tasks
from learnedopt.core.tree import Params, Theta
from learnedopt.estimators.unrolled import has_learned_start
from learnedopt.estimators.windows import require_windows
from learnedopt.execution.forward import Cotangents, ForwardChunk, ForwardRun, all_of, moving
from learnedopt.execution.forward_check import require_forward_mode
from learnedopt.execution.tangents import Tangents


class ForwardCarry(NamedTuple):
    """Where windows of forward mode stand: the inner loop, and what its parameters and state owe to theta so far.

    ``params`` and ``state`` hold the tangents (num_tasks, num_directions, ...), of each parameter and of each
    floating-point leaf of the state in order; None on a fresh carry. ``sizes`` are those of theta, by name: its entries
    in this order are the directions.
    """

    inner: Carry
    params: Params | None = None
    state: tuple[Tensor, ...] | None = None
    sizes: dict[str, int] | None = None


@final
@dataclass(frozen=True)
class ForwardMode(GradientEstimator):
    """The exact gradient through ``num_steps`` inner steps, by forward mode (Franceschi et al. 2017, section 3.2).

    With z = (params, state) and z' = step(z, theta), the tangents Z = dz/dtheta follow ``Z' = (d step/dz) Z + d
    step/dtheta``, second derivatives of the inner objective included, and the objective's gradient is its cotangents of
    start, end, losses and theta, from one reverse pass of the objective alone, contracted with theirs. What is held is
    ``num_directions`` times params and state, whatever the number of steps (and one number a step and direction, the
    losses'): for few meta-parameters and many steps. The time is about ``num_directions`` times a step's.

    Args:
        num_steps: inner steps of an estimate; 0 leaves the start alone.
        horizon: None for whole episodes, as ``Unrolled``. Else windows of ``num_steps`` of an episode of so many steps,
            a multiple: the tangents go on in the carry, so that each window's gradient is that of its objective through
            ALL steps so far, with no bias of truncation (real-time recurrent learning, Williams & Zipser 1989). Where
            theta moves between windows, they are the derivatives at the thetas that the steps were taken with, of a
            common shift of all of them: exact only in the limit of small steps of theta. They hold num_tasks x
            num_directions x (params and state) in the carry.
        block_size: directions taken together. By default as many as keep the tangents of a chunk of tasks below 64 MiB
            (at least one; a step's own intermediate results come on top). Each block repeats the steps themselves.

    The rule's ``update`` is differentiated, never its kernel, and ``Execution``'s ``compile`` and ``mixed_mode``, ways
    of going back, do not matter here. The carry is None after a whole episode, as with ``Unrolled``, unless the
    objective names one; in windows, at the horizon. Where it names one ahead in windows, the rule's further steps are
    taken with tangents, and must come to it. A begun ``Carry`` counts as a fixed start.

    ``info``: ``losses``; ``inner_steps``, the inner steps of one task that were taken; ``zero_gradient``.

    Raises:
        ValueError: before the first step: what ``Unrolled`` refuses; an operation without a forward derivative, or with
            a wrong one, by name; a carry of another theta. After it: windows of an objective that goes on from where
            the rule's own steps do not come to.
    """

    num_steps: int
    horizon: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps, least=0 if self.horizon is None else 1)
        if self.horizon is not None:
            require_windows(self.num_steps, self.horizon)
        if self.block_size is not None:
            require_count("block_size", self.block_size, least=1)

    def start(self, loop: InnerLoop, theta: Theta, tasks: Tasks, generator: torch.Generator) -> Carry | ForwardCarry:
        """Return a fresh carry, with room for tangents where windows go on."""
        carry = loop.start(tasks)
        return carry if self.horizon is None else ForwardCarry(carry)

    def forms(self, loop: InnerLoop, theta: Theta, carry: Carry | ForwardCarry) -> list[Any]:
        """Return the carry as it starts, and begun, in windows with tangents."""
        if not isinstance(carry, ForwardCarry):
            return super().forms(loop, theta, carry)
        inner, sizes = loop.begin(theta, carry.inner), _sizes(theta)
        tangents = [x.new_empty(len(x), sum(sizes.values()), *x.shape[1:], device="meta") for x in moving(inner)]
        params = dict(zip(inner.params, tangents, strict=False))
        return [carry, ForwardCarry(inner, params, (*tangents[len(params) :],), sizes)]

    def require_carry(self, theta: Theta, carry: Any) -> None:
        """Raise TypeError where a carry is of another class, ValueError where its tangents are of another theta."""
        self._opened(theta, carry)

    def count_tasks(self, carry: Carry | ForwardCarry) -> int:
        """Return of how many tasks a carry is."""
        return super().count_tasks(carry.inner if isinstance(carry, ForwardCarry) else carry)

    def narrow(self, carry: Carry | ForwardCarry, start: int, stop: int) -> Carry | ForwardCarry:
        """Return a share of the tasks, with its tangents."""
        if not isinstance(carry, ForwardCarry):
            return super().narrow(carry, start, stop)
        params, state = tree.narrow((carry.params or {}, carry.state or ()), start, stop)
        begun = carry.params is not None
        inner = super().narrow(carry.inner, start, stop)
        return ForwardCarry(inner, params if begun else None, state if begun else None, carry.sizes)

    def join(self, carries: Sequence[Carry | ForwardCarry]) -> Carry | ForwardCarry:
        """Return the carry of all tasks of these shares."""
        windows = [x for x in carries if isinstance(x, ForwardCarry)]
        if len(windows) < len(carries):
            return super().join(carries)
        inner = super().join([x.inner for x in windows])
        if windows[0].params is None:
            return ForwardCarry(inner)
        params, state = tree.concatenate([(x.params, x.state) for x in windows])
        return ForwardCarry(inner, params, state, windows[0].sizes)

    @recording_gradients
    def estimate(
        self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry | ForwardCarry
    ) -> Estimate:
        """Run ``num_steps`` steps from where the carry stands, tangents along."""
        loop.require_theta(theta)
        inner, before = self._opened(theta, carry)
        check_loop(loop, theta, inner, second_derivatives=self.num_steps > 0)
        check_objective(loop, theta, objective, inner, self.num_steps)
        # Where tangents have come along, theta's way through the start is open as it is from the start itself.
        example = inner if before is None else inner._replace(state=None)
        reach = self.horizon or self.num_steps
        zero = check_paths(loop, theta, example, reach, Tape.FULL, objective=objective)
        if self.num_steps > 0:
            require_forward_mode(loop, theta, inner)
        run = ForwardRun(loop, tree.detach(theta), objective, self.num_steps, self.block_size, self.horizon is not None)
        chunks: list[ForwardChunk] = []
        num_tasks, done = tree.size(inner.params), 0
        for chunk in loop.split(inner):
            count = tree.size(chunk.params)
            own = None if before is None else tree.narrow(before, done, done + count)
            chunks.append(run.of_chunk(chunk, own, count / num_tasks))
            done += count
        grads, lost = _gradient(theta, chunks, zero)
        if lost:
            lost = _without_path(loop, theta, example, reach, chunks[0].read, lost)
        if lost:
            raise ValueError(no_path(lost, f"the objective {getattr(objective, '__name__', type(objective).__name__)}"))
        info: dict[str, Any] = {"losses": torch.stack([x.curve for x in chunks]).sum(0)}
        info["inner_steps"] = sum(x.inner_steps for x in chunks)
        if zero:
            info["zero_gradient"] = zero
        onward = self._onward(loop, theta, inner, chunks)
        return Estimate(torch.stack([x.value for x in chunks]).sum(), grads, onward, info)

    def _opened(self, theta: Theta, carry: Any) -> tuple[Carry, Tangents | None]:
        """Return the inner loop's carry, and the tangents that have come along."""
        if isinstance(carry, Carry):
            return carry, None
        if not isinstance(carry, ForwardCarry):
            raise TypeError(
                f"ForwardMode goes on from a Carry or a ForwardCarry, got a {type(carry).__name__}; take the carry "
                "from its own start() or from loop.start(tasks)"
            )
        if self.horizon is None:
            raise ValueError(
                "this carry holds the tangents of windows, but ForwardMode without a horizon takes whole episodes; "
                "pass horizon=, or carry.inner to hold its start fixed"
            )
        if carry.params is None or carry.state is None:
            return carry.inner, None
        sizes, inner = _sizes(theta), carry.inner
        tangents = Tangents(carry.params, carry.state)
        if list((carry.sizes or {}).items()) != list(sizes.items()):
            raise ValueError(
                f"this carry's tangents are along {carry.sizes}, the entries of another theta: this one has {sizes}; "
                "begin a new episode, with the estimator's start()"
            )
        expected = [(len(x), sum(sizes.values()), *x.shape[1:]) for x in moving(inner)]
        found = [tuple(x.shape) for x in all_of(tangents)]
        if found != expected or carry.params.keys() != inner.params.keys():
            raise ValueError(
                f"this carry's tangents have the shapes {found}, its parameters and state need {expected} (tasks, "
                "directions, ...); begin a new episode, with the estimator's start()"
            )
        return inner, tangents

    def _onward(
        self, loop: InnerLoop, theta: Theta, inner: Carry, chunks: list[ForwardChunk]
    ) -> Carry | ForwardCarry | None:
        """Return where the next estimate goes on from."""
        if self.horizon is None:
            if not chunks[0].named or has_learned_start(loop, theta, inner):
                return None
            return carries.join([x.end for x in chunks])
        if chunks[0].end.step >= self.horizon:
            return None
        params, state = tree.concatenate([x.tangents for x in chunks])
        return ForwardCarry(carries.join([x.end for x in chunks]), params, state, _sizes(theta))


def _gradient(theta: Theta, chunks: list[ForwardChunk], zero: list[str]) -> tuple[Theta, list[str]]:
    """Return the gradient by name, and the names of which nothing at all came."""
    total, offset = torch.stack([x.gradient for x in chunks]).sum(0), 0
    grads: Theta = {}
    lost: list[str] = []
    for i, (name, value) in enumerate(theta.items()):
        through = total[offset : offset + value.numel()].reshape(value.shape).to(value.dtype)
        direct = [x for x in (chunk.read.of_theta[i] for chunk in chunks) if x is not None]
        grads[name] = sum(direct, through)
        if not direct and name not in zero and not through.any():
            lost.append(name)
        offset += value.numel()
    return grads, lost


def _without_path(
    loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int, read: Cotangents, names: list[str]
) -> list[str]:
    """Return which of ``names``, whose gradient is zero, have no path to what the objective reads."""
    lost = names
    for steps in sorted({min(num_steps, 3), num_steps}):
        leaves = as_leaves({k: theta[k] for k in lost})
        rollout = loop.run(theta | leaves, carries.detach(carries.narrow(carry, 0, 1)), steps, Tape.FULL)
        pairs = [*zip(moving(rollout.start), read.of_start, strict=True)]
        pairs += [*zip(moving(rollout.end), read.of_end, strict=True), (rollout.losses, read.of_losses)]
        reached = [x.sum() for x, c in pairs if c is not None and x.requires_grad]
        found = [None] * len(leaves)
        if reached:
            found = torch.autograd.grad(torch.stack(reached).sum(), list(leaves.values()), allow_unused=True)
        lost = [k for k, g in zip(leaves, found, strict=True) if g is None]
        if not lost:
            break
    return lost


def _sizes(theta: Theta) -> dict[str, int]:
    return {k: v.numel() for k, v in theta.items()}
