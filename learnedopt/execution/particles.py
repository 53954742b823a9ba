"""Many particles run together: copies of the inner loop on the same tasks and batches, each trained by its own theta.

A *slot* is one task at one inner step, whose batch is gathered once for all its particles; every tree of particles has
two leading dimensions, (num_slots, num_particles, ...). Losses and updates run under ``torch.func.vmap`` over both, so
that where a layer reads the batch itself one matrix product serves all particles of a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Tape
from learnedopt.core.inner import InnerLoop
from learnedopt.core.rule import State
from learnedopt.core.task import Batch, Split, Tasks
from learnedopt.core.tree import Params, Theta
from learnedopt.execution.shared_inputs import SharedInputs


class Particles(NamedTuple):
    """Where the particles stand, without a graph: ``tasks`` (num_slots, ...), each slot's inner step in ``steps``,
    ``theta``, ``params`` and ``state`` (num_slots, num_particles, ...)."""

    tasks: Tasks
    steps: tuple[int, ...]
    theta: Theta
    params: Params
    state: State


class _Shared(NamedTuple):
    """What all particles of a slot share."""

    value: tree.Tree


@final
@dataclass(frozen=True)
class _ParticleMap:
    """A function of one theta and one task, called as it is, or under vmap over particles, slots or both."""

    num_slots: int
    num_particles: int

    def unbatch(self, batched: tree.Tree) -> tree.Tree:
        """Drop the dimensions of size one of a tree (num_slots, num_particles, ...)."""
        dims = tuple(dim for dim, size in enumerate((self.num_slots, self.num_particles)) if size == 1)
        return tree.tree_map(lambda x: x.squeeze(dims), batched) if dims else batched

    def rebatch(self, inside: tree.Tree) -> tree.Tree:
        """Put them back."""
        if self.num_particles == 1:
            inside = tree.tree_map(lambda x: x.unsqueeze(0 if self.num_slots == 1 else 1), inside)
        return tree.unsqueeze(inside) if self.num_slots == 1 else inside

    def share(self, batched: tree.Tree) -> _Shared:
        """Return what a function takes for a tree (num_slots, ...) of which each slot's particles read the same."""
        return _Shared(tree.squeeze(batched) if self.num_slots == 1 else batched)

    def apply_theta(self, fn: Callable[..., Any], theta: tree.Tree, *each: tree.Tree) -> Any:
        """Call ``fn(theta, *each)``."""
        values = [x.value if isinstance(x, _Shared) else x for x in each]
        reads_batch = any(isinstance(x, _Shared) for x in each)
        if self.num_particles > 1:
            fn = torch.func.vmap(fn, in_dims=(0, *(None if isinstance(x, _Shared) else 0 for x in each)))
        if self.num_slots > 1:
            fn = torch.func.vmap(fn)
        with SharedInputs() if self.num_particles > 1 and reads_batch else nullcontext():
            return fn(theta, *values)


def begin(loop: InnerLoop, theta: Theta, tasks: Tasks, params: Params, step: int = 0) -> Particles:
    """Return the particles where the rule's ``init`` puts them; ``tasks`` and ``params`` are (num_slots, ...)."""
    num_slots, num_particles = _sizes(theta)
    mapped = _ParticleMap(num_slots, num_particles)
    with torch.no_grad():
        begun = mapped.apply_theta(loop.init_task, mapped.unbatch(theta), mapped.share(params))
        begun = tree.tree_map(lambda x: x.contiguous(), mapped.rebatch(begun))
    return Particles(tasks, (step,) * num_slots, theta, *begun)


def concatenate(parts: Sequence[Particles]) -> Particles:
    """Put slots side by side: of as many particles each, at whatever steps."""
    trees = tree.concatenate([(part.tasks, part.theta, part.params, part.state) for part in parts])
    return Particles(trees[0], tuple(step for part in parts for step in part.steps), *trees[1:])


def split(particles: Particles, sizes: Sequence[int]) -> list[Particles]:
    """Cut into pieces of so many slots; the inverse of ``concatenate``."""
    ends = list(accumulate(sizes))
    _, num_particles = _sizes(particles.theta)
    return [_piece(particles, (end - n, n), (0, num_particles)) for end, n in zip(ends, sizes, strict=True)]


def run(loop: InnerLoop, particles: Particles, num_steps: int) -> tuple[Particles, Tensor]:
    """Take ``num_steps`` inner steps; return the particles and the outer losses before each update.

    Losses are (num_steps, num_slots, num_particles), on the train batches. ``Execution.chunk_size`` bounds how many
    particles, of all slots, are run together; by default all are. With 1 nothing runs under vmap.
    """
    params, state, losses = _pieced(loop, particles, lambda piece: _run_piece(loop, piece, num_steps))
    steps = tuple(step + num_steps for step in particles.steps)
    return particles._replace(params=params, state=state, steps=steps), losses.movedim(2, 0)


def losses(loop: InnerLoop, particles: Particles, split: Split) -> Tensor:
    """Return the outer losses (num_slots, num_particles) on each slot's batch of ``split`` at its step."""

    def of_piece(piece: Particles) -> Tensor:
        mapped = _ParticleMap(*_sizes(piece.theta))

        def loss(theta: Theta, params: Params, batch: Batch) -> Tensor:
            return loop.inner_objective.outer_loss(theta, loop.family, params, batch)

        batch = mapped.share(_batch(loop, piece, 0, split))
        with torch.no_grad():
            return mapped.rebatch(mapped.apply_theta(loss, *map(mapped.unbatch, (piece.theta, piece.params)), batch))

    return _pieced(loop, particles, of_piece)


def _run_piece(loop: InnerLoop, piece: Particles, num_steps: int) -> tuple[Params, State, Tensor]:
    mapped = _ParticleMap(*_sizes(piece.theta))
    theta, params, state = (mapped.unbatch(x) for x in (piece.theta, piece.params, piece.state))
    found = []
    with torch.no_grad():
        for i in range(num_steps):
            batch = mapped.share(_batch(loop, piece, i, "train"))
            at = loop.gradient(mapped, theta, params, batch, Tape.NONE)
            params, state = loop.move(mapped, theta, at.grads, state, tree.detach(at.params), at.loss)
            found.append(mapped.rebatch(at.outer))
        like = tree.leaves(piece.params)[0]
        stacked = torch.stack(found, dim=-1) if found else like.new_empty(*like.shape[:2], 0)
    return mapped.rebatch(params), mapped.rebatch(state), stacked


def _batch(loop: InnerLoop, particles: Particles, ahead: int, split: Split) -> Batch:
    """Gather each slot's batch, ``ahead`` of where it stands; those at one step in one call."""
    pieces, first = [], 0
    for step, group in groupby(particles.steps):
        last = first + len(list(group))
        pieces.append(loop.batch(tree.narrow(particles.tasks, first, last), step + ahead, split))
        first = last
    return tree.concatenate(pieces)


def _pieced(loop: InnerLoop, particles: Particles, fn: Callable[[Particles], Any]) -> Any:
    """Call ``fn`` on pieces that ``Execution.chunk_size`` allows, and put the results together again."""
    num_slots, num_particles = _sizes(particles.theta)
    limit = loop.execution.chunk_size or num_slots * num_particles
    wide, high = min(limit, num_particles), min(max(limit // num_particles, 1), num_slots)
    rows = []
    for first in range(0, num_slots, high):
        rows.append(
            _joined([fn(_piece(particles, (first, high), (at, wide))) for at in range(0, num_particles, wide)], 1)
        )
    return _joined(rows, 0)


def _piece(particles: Particles, slots: tuple[int, int], lanes: tuple[int, int]) -> Particles:
    (i, high), (j, wide) = slots, lanes
    theta, params, state = tree.tree_map(lambda x: x[i : i + high, j : j + wide], particles[2:])
    return Particles(tree.narrow(particles.tasks, i, i + high), particles.steps[i : i + high], theta, params, state)


def _joined(trees: list[tree.Tree], dim: int) -> tree.Tree:
    return trees[0] if len(trees) == 1 else tree.tree_map(lambda *xs: torch.cat(xs, dim), trees[0], *trees[1:])


def _sizes(theta: Theta) -> tuple[int, int]:
    first = next(iter(theta.values()))
    return int(first.shape[0]), int(first.shape[1])
