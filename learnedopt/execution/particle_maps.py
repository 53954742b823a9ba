"""Trees of particles, and how a function of one theta and one task is mapped over them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch

from learnedopt.core import tree
from learnedopt.core.rule import Kernel, State
from learnedopt.core.task import Tasks
from learnedopt.core.tree import Params, Theta
from learnedopt.execution.lane_functions import LaneFunctions


class Particles(NamedTuple):
    """Where the particles stand, without a graph: ``tasks`` (num_slots, ...), each slot's inner step in ``steps``,
    ``theta``, ``params`` and ``state`` (num_slots, num_particles, ...)."""

    tasks: Tasks
    steps: tuple[int, ...]
    theta: Theta
    params: Params
    state: State


class Shared(NamedTuple):
    """What all particles of a slot share."""

    value: tree.Tree


@final
@dataclass(frozen=True)
class ParticleMap:
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

    def share(self, batched: tree.Tree) -> Shared:
        """Return what a function takes for a tree (num_slots, ...) of which each slot's particles read the same."""
        return Shared(tree.squeeze(batched) if self.num_slots == 1 else batched)

    def apply_theta(self, fn: Callable[..., Any], theta: tree.Tree, *each: tree.Tree) -> Any:
        """Call ``fn(theta, *each)``."""
        values = [x.value if isinstance(x, Shared) else x for x in each]
        reads_batch = any(isinstance(x, Shared) for x in each)
        if self.num_particles > 1:
            fn = torch.func.vmap(fn, in_dims=(0, *(None if isinstance(x, Shared) else 0 for x in each)))
        if self.num_slots > 1:
            fn = torch.func.vmap(fn)
        with LaneFunctions() if self.num_particles > 1 and reads_batch else nullcontext():
            return fn(theta, *values)

    def apply_kernel(self, kernel: Kernel, theta: tree.Tree, *each: tree.Tree) -> Any:
        """Call ``kernel.step_of_lanes`` on all slots and particles; None for a single one, which has no lanes."""
        num_dims = (self.num_slots > 1) + (self.num_particles > 1)
        return kernel.step_of_lanes(theta, *each, num_dims=num_dims) if num_dims else None


def piece_of(particles: Particles, slots: tuple[int, int], lanes: tuple[int, int]) -> Particles:
    """Return so many slots and particles from where each first one is said: ``(first, count)``."""
    (i, high), (j, wide) = slots, lanes
    theta, params, state = tree.tree_map(lambda x: x[i : i + high, j : j + wide], particles[2:])
    return Particles(tree.narrow(particles.tasks, i, i + high), particles.steps[i : i + high], theta, params, state)


def joined(trees: list[tree.Tree], dim: int) -> tree.Tree:
    """Put trees together along one of the two leading dimensions."""
    return trees[0] if len(trees) == 1 else tree.tree_map(lambda *xs: torch.cat(xs, dim), trees[0], *trees[1:])


def sizes(theta: Theta) -> tuple[int, int]:
    """Return the numbers of slots and of particles."""
    first = next(iter(theta.values()))
    return int(first.shape[0]), int(first.shape[1])
