"""What persistent evolution strategies keep between windows: particles and perturbations, by phase of their episode."""

from __future__ import annotations

from typing import NamedTuple

from learnedopt.core import tree
from learnedopt.core.carry import Carry
from learnedopt.core.rule import State
from learnedopt.core.shares import Places, all_places, require_same
from learnedopt.core.task import Tasks
from learnedopt.core.tree import Params, Theta


class Cohort(NamedTuple):
    """Pairs at one phase of their episode, on the same tasks.

    ``params`` and ``state`` are (num_tasks, 2 num_pairs, ...); on a fresh cohort ``state`` is None and ``params`` are
    the tasks' own. ``drift`` (num_pairs, ...) sums the perturbations since the episode began, in units of their length;
    ``episode`` counts the cohort's episodes.
    """

    tasks: Tasks
    params: Params
    state: State | None
    step: int
    drift: Theta
    episode: int


class PersistentCarry(NamedTuple):
    """The cohorts, the seed of all draws, the number of the next window, what the drifts were made with, the places of
    the cohorts' tasks in their meta-batches, and which of the cohorts these are: the first, and the one after the last.
    """

    cohorts: tuple[Cohort, ...]
    seed: int
    window: int
    sigma: float
    reuse_noise: bool
    places: Places | None = None  # None in files of before: all
    phases: tuple[int, int] | None = None  # None for all, and in files of before


def places_of(carry: PersistentCarry) -> Places:
    """Return the places of its tasks."""
    return carry.places or all_places(tree.size(carry.cohorts[0].params))


def first_particle(cohort: Cohort) -> Carry:
    """Return the first particle of every task."""
    if cohort.state is None:
        return Carry(cohort.tasks, cohort.params, None, cohort.step)
    params, state = tree.tree_map(lambda x: x[:, 0], (cohort.params, cohort.state))
    return Carry(cohort.tasks, params, state, cohort.step)


def narrow_cohort(cohort: Cohort, start: int, stop: int) -> Cohort:
    """Return tasks ``start`` to ``stop - 1``."""
    tasks, params = tree.narrow((cohort.tasks, cohort.params), start, stop)
    state = None if cohort.state is None else tree.narrow(cohort.state, start, stop)
    return cohort._replace(tasks=tasks, params=params, state=state)


def join_cohorts(shares: tuple[Cohort, ...]) -> Cohort:
    """Return the cohort of all tasks of these shares."""
    require_same("phase", [(x.step, x.episode, x.state is None) for x in shares], "PersistentES")
    tasks, params = tree.concatenate([(x.tasks, x.params) for x in shares])
    state = None if shares[0].state is None else tree.concatenate([x.state for x in shares])
    return shares[0]._replace(tasks=tasks, params=params, state=state)
