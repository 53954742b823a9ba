"""Many particles run together: copies of the inner loop on the same tasks and batches, each trained by its own theta.

A *slot* is one task at one inner step, whose batch is gathered once for all its particles; every tree of particles has
two leading dimensions, (num_slots, num_particles, ...). Losses and updates run under ``torch.func.vmap`` over both, so
that where a layer reads the batch itself one matrix product serves all particles of a slot.

Torch fails at some operations under two levels of ``vmap``, or is silently wrong: so a loop's first step is tried, on a
few particles, against each of them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Tape
from learnedopt.core.inner import InnerLoop
from learnedopt.core.rule import State
from learnedopt.core.task import Batch, Split, Tasks
from learnedopt.core.tree import Params, Theta
from learnedopt.execution import particle_trial
from learnedopt.execution.captured import CapturedStep
from learnedopt.execution.particle_maps import ParticleMap, Particles, joined, piece_of, sizes


def begin(loop: InnerLoop, theta: Theta, tasks: Tasks, params: Params, step: int = 0) -> Particles:
    """Return the particles where the rule's ``init`` puts them; ``tasks`` and ``params`` are (num_slots, ...)."""
    num_slots, num_particles = sizes(theta)
    params = {k: p.unsqueeze(1).expand(num_slots, num_particles, *p.shape[1:]) for k, p in params.items()}
    fresh = Particles(tasks, (step,) * num_slots, theta, params, ())
    loop.rule_theta(theta)  # what it finds out once, it cannot find out under vmap

    def of_piece(piece: Particles) -> tuple[Params, State]:
        mapped = ParticleMap(*sizes(piece.theta))
        with torch.no_grad():
            found = mapped.apply_theta(loop.init_task, *map(mapped.unbatch, (piece.theta, piece.params)))
        return tree.tree_map(lambda x: x.contiguous(), mapped.rebatch(found))

    try:
        begun = _pieced(loop, fresh, of_piece, begun=False)
    except RuntimeError as error:
        if loop.execution.chunk_size == 1:
            raise
        raise ValueError(
            f"{type(loop.rule).__name__}.init cannot start particles together: {str(error).partition(chr(10))[0]}. "
            "Execution(chunk_size=1) starts and runs them one after the other"
        ) from error
    return fresh._replace(params=begun[0], state=begun[1])


def concatenate(parts: Sequence[Particles]) -> Particles:
    """Put slots side by side: of as many particles each, at whatever steps."""
    trees = tree.concatenate([(part.tasks, part.theta, part.params, part.state) for part in parts])
    return Particles(trees[0], tuple(step for part in parts for step in part.steps), *trees[1:])


def split(particles: Particles, counts: Sequence[int]) -> list[Particles]:
    """Cut into pieces of so many slots; the inverse of ``concatenate``."""
    ends = list(accumulate(counts))
    _, num_particles = sizes(particles.theta)
    return [piece_of(particles, (end - n, n), (0, num_particles)) for end, n in zip(ends, counts, strict=True)]


def run(loop: InnerLoop, particles: Particles, num_steps: int, *, graph: bool = False) -> tuple[Particles, Tensor]:
    """Take ``num_steps`` inner steps; return the particles and the outer losses before each update.

    Losses are (num_steps, num_slots, num_particles), on the train batches. ``Execution.chunk_size`` bounds how many
    particles, of all slots, are run together; by default all are. With 1 nothing runs under vmap. With ``graph`` the
    first step is captured as a CUDA graph and played again for all: a GPU is then not waiting for Python.

    Raises:
        ValueError: ``graph`` where the parameters do not lie on a GPU.
    """
    loop.require_end(max(particles.steps) + num_steps)
    params, state, losses = _pieced(loop, particles, lambda piece: _run_piece(loop, piece, num_steps, graph))
    steps = tuple(step + num_steps for step in particles.steps)
    return particles._replace(params=params, state=state, steps=steps), losses.movedim(2, 0)


def losses(loop: InnerLoop, particles: Particles, split: Split) -> Tensor:
    """Return the outer losses (num_slots, num_particles) on each slot's batch of ``split`` at its step."""

    def of_piece(piece: Particles) -> Tensor:
        mapped = ParticleMap(*sizes(piece.theta))

        def loss(theta: Theta, params: Params, batch: Batch) -> Tensor:
            return loop.inner_objective.outer_loss(theta, loop.family, params, batch)

        batch = mapped.share(_batch(loop, piece, 0, split))
        with torch.no_grad():
            return mapped.rebatch(mapped.apply_theta(loss, *map(mapped.unbatch, (piece.theta, piece.params)), batch))

    return _pieced(loop, particles, of_piece)


def results(loop: InnerLoop, particles: Particles) -> Particles:
    """Return the particles with the parameters that their rule would have kept and judged by, see ``result``."""

    def of_piece(piece: Particles) -> Params:
        mapped = ParticleMap(*sizes(piece.theta))
        own = (loop.rule_theta(piece.theta), piece.params, piece.state)
        with torch.no_grad():
            return mapped.rebatch(mapped.apply_theta(loop.mover.result, *map(mapped.unbatch, own)))

    return particles._replace(params=_pieced(loop, particles, of_piece))


def _run_piece(loop: InnerLoop, piece: Particles, num_steps: int, graph: bool) -> tuple[Params, State, Tensor]:
    mapped = ParticleMap(*sizes(piece.theta))
    loop.rule_theta(piece.theta)  # see begin
    theta, params, state = (mapped.unbatch(x) for x in (piece.theta, piece.params, piece.state))

    def step(params: Params, state: State, batch: Batch) -> tuple[Params, State, Tensor]:
        at = loop.gradient(mapped, theta, params, mapped.share(batch), Tape.NONE)
        return *loop.move(mapped, theta, at.grads, state, tree.detach(at.params), at.loss), at.outer

    found: list[Tensor] = []
    with torch.no_grad():
        taken: Callable[..., tuple[Params, State, Tensor]] = step
        if graph and num_steps:
            taken = CapturedStep(step, params, state, _batch(loop, piece, 0, "train"))
        for i in range(num_steps):
            params, state, outer = taken(params, state, _batch(loop, piece, i, "train"))
            found.append(mapped.rebatch(outer))
        like = tree.leaves(piece.params)[0]
        stacked = torch.stack(found, dim=-1) if found else like.new_empty(*like.shape[:2], 0)
    return mapped.rebatch(params), mapped.rebatch(state), stacked


def _batch(loop: InnerLoop, particles: Particles, ahead: int, split: Split) -> Batch:
    """Gather each slot's batch, ``ahead`` of where it stands; those at one step in one call."""
    pieces: list[Batch] = []
    first = 0
    for step, group in groupby(particles.steps):
        last = first + len(list(group))
        pieces.append(loop.batch(tree.narrow(particles.tasks, first, last), step + ahead, split))
        first = last
    return tree.concatenate(pieces)


def _pieced(loop: InnerLoop, particles: Particles, fn: Callable[[Particles], Any], *, begun: bool = True) -> Any:
    """Call ``fn`` on pieces that ``Execution.chunk_size`` allows, and put the results together again.

    Particles that have ``begun`` can take a step, which is tried first.
    """
    num_slots, num_particles = sizes(particles.theta)
    limit = loop.execution.chunk_size or num_slots * num_particles
    wide, high = min(limit, num_particles), min(max(limit // num_particles, 1), num_slots)
    if begun and wide * high > 1 and not particle_trial.serves_together(loop, particles, high):
        high = 1
    rows: list[tree.Tree] = []
    for first in range(0, num_slots, high):
        rows.append(
            joined([fn(piece_of(particles, (first, high), (at, wide))) for at in range(0, num_particles, wide)], 1)
        )
    return joined(rows, 0)
