"""A piece of the inner loop differentiated forward: tangents along with it, and one reverse pass of the objective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from learnedopt.core import carry as carries
from learnedopt.core import tree
from learnedopt.core.carry import Carry, Rollout
from learnedopt.core.estimator import as_leaves, call_objective
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Theta
from learnedopt.execution.tangents import Tangents, begin, contract, directions, floating, none_yet, push

MOST_BYTES = 2**26
"""Of tangents of one chunk of tasks at one point of the inner loop, where the size of blocks is left open."""


class Cotangents(NamedTuple):
    """Of an objective, by one reverse pass: None for what it does not read."""

    of_theta: list[Tensor | None]
    of_start: list[Tensor | None]
    of_end: list[Tensor | None]
    of_losses: Tensor | None


class ForwardChunk(NamedTuple):
    """What came of a chunk of tasks: its share of the objective, of its gradient (one vector) and of the curve."""

    value: Tensor
    gradient: Tensor
    curve: Tensor
    end: Carry
    named: bool
    tangents: Tangents | None
    read: Cotangents
    inner_steps: int


class ForwardRun(NamedTuple):
    """What the chunks of an estimate have in common."""

    loop: InnerLoop
    theta: Theta
    objective: MetaObjective
    num_steps: int
    block_size: int | None
    goes_on: bool

    def of_chunk(self, chunk: Carry, before: Tangents | None, weight: float) -> ForwardChunk:
        """Run a chunk of tasks, block by block of directions; the objective is asked once, after the first."""
        loop, theta = self.loop, self.theta
        begun = carries.detach(loop.begin(theta, chunk))
        pieces: list[Tensor] = []
        kept: list[Tangents] = []
        found: tuple[Rollout, Tensor, Carry | None, Cotangents] | None = None
        taken = 0
        for start, stop in self.blocks(begun):
            along = directions(theta, start, stop)
            with torch.no_grad():
                if before is not None:
                    first = tree.tree_map(lambda x, a=start, b=stop: x[:, a:b], before)
                else:
                    first = begin(loop, theta, along, chunk) if chunk.state is None else none_yet(chunk, stop - start)
                pushed = push(loop, theta, along, begun, first, self.num_steps)
            if found is None:
                first_rollout = Rollout(begun, pushed.end, pushed.losses)
                found = first_rollout, *_pull(loop, theta, self.objective, first_rollout, weight)
            rollout, value, onward, read = found
            with torch.no_grad():
                pieces.append(_contracted(read, first, pushed.tangents, pushed.of_losses, begun))
                if self.goes_on and onward is not None:
                    further = max(onward.step - pushed.end.step, 0)
                    pushed = push(loop, theta, along, pushed.end, pushed.tangents, further)
                    _require_same(onward, pushed.end, self.objective)
            if self.goes_on:
                kept.append(pushed.tangents)
            taken += tree.size(begun.params) * (pushed.end.step - begun.step)
        assert found is not None  # theta has a direction at least
        rollout, value, onward, read = found
        end = rollout.end if onward is None else onward
        tangents = tree.tree_map(lambda *xs: torch.cat(xs, 1), *kept) if kept else None
        curve = weight * rollout.losses.mean(1)
        return ForwardChunk(value, torch.cat(pieces), curve, end, onward is not None, tangents, read, taken)

    def blocks(self, begun: Carry) -> Iterator[tuple[int, int]]:
        """Yield the first direction of each block, and the one after its last."""
        count = sum(x.numel() for x in self.theta.values())
        each = sum(x.nbytes for x in (*moving(begun), *self.theta.values()))
        size = self.block_size or max(1, MOST_BYTES // each)
        yield from ((i, min(i + size, count)) for i in range(0, count, size))


def _pull(
    loop: InnerLoop, theta: Theta, objective: MetaObjective, rollout: Rollout, weight: float
) -> tuple[Tensor, Carry | None, Cotangents]:
    """Return ``weight`` times the objective of a rollout, the carry that it names, and its cotangents."""
    leaves = as_leaves(theta)
    start, of_start = _with_leaves(rollout.start)
    end, of_end = _with_leaves(rollout.end)
    losses = rollout.losses.detach().requires_grad_()
    value, onward = call_objective(objective, loop, leaves, Rollout(start, end, losses))
    value = value * weight
    inputs = [*leaves.values(), *of_start, *of_end, losses]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if value.requires_grad:
        found = torch.autograd.grad(value, inputs, allow_unused=True)
    groups = iter(found)
    of_theta, through_start, through_end = (
        [next(groups) for _ in range(len(group))] for group in (leaves, of_start, of_end)
    )
    read = Cotangents(of_theta, through_start, through_end, next(groups))
    return value.detach(), None if onward is None else carries.detach(onward), read


def _with_leaves(carry: Carry) -> tuple[Carry, list[Tensor]]:
    """Return a begun carry of new leaves, and these: its parameters, then the floating-point leaves of its state."""
    params = {k: p.detach().requires_grad_() for k, p in carry.params.items()}
    state = tree.tree_map(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x, carry.state)
    return carry._replace(params=params, state=state), [*params.values(), *floating(state)]


def _contracted(read: Cotangents, first: Tangents, last: Tangents, of_losses: Tensor, begun: Carry) -> Tensor:
    """Return the gradient along a block's directions, less what the objective reads of theta itself."""
    losses = None if read.of_losses is None else read.of_losses.flatten()
    total = contract(read.of_start, all_of(first)) + contract(read.of_end, all_of(last))
    total = total + contract([losses], [of_losses.flatten(0, 1)])
    return total if isinstance(total, Tensor) else next(iter(begun.params.values())).new_zeros(of_losses.shape[2])


def _require_same(named: Carry, reached: Carry, objective: MetaObjective) -> None:
    """Raise ValueError unless the rule's further steps, whose tangents are known, came to the carry that is named."""
    pairs = [*zip(moving(named), moving(reached), strict=True)]
    if named.step == reached.step and all(_close(x, y) for x, y in pairs):
        return
    raise ValueError(
        f"the objective {type(objective).__name__} goes on from a carry at step {named.step} that {reached.step} "
        "steps of the rule do not come to, so that its tangents are unknown; let it go on from the rollout's end "
        "(continue_from='rollout'), use Truncated, or ForwardMode without a horizon"
    )


def _close(x: Tensor, y: Tensor) -> bool:
    tolerance = torch.finfo(x.dtype).eps ** 0.5
    return torch.allclose(x, y, rtol=tolerance, atol=tolerance * float(x.abs().max()), equal_nan=True)


def moving(carry: Carry) -> list[Tensor]:
    """Return the tensors of a begun carry that have tangents, in their order."""
    return [*carry.params.values(), *floating(carry.state)]


def all_of(tangents: Tangents) -> list[Tensor]:
    """Return them in the order of ``moving``."""
    return [*tangents.params.values(), *tangents.state]
