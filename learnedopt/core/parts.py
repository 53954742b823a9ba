"""A meta-batch in parts: the tasks of each family of a mixture, on a loop of their own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, cast

from learnedopt.core import tree
from learnedopt.core.cache import PROGRAMS, Cache
from learnedopt.core.inner import InnerLoop
from learnedopt.core.task import TaskFamily, Tasks

OF_THE_FAMILY = ("losses", ("vetted", True), ("vetted", False))
"""What a loop's cache holds that is as true over another horizon: that the family's losses were checked and vetted."""


class Mixed(Protocol):
    """A family made of several."""

    @property
    def families(self) -> tuple[TaskFamily, ...]:
        """Its members, each once."""
        ...

    def split(self, tasks: Tasks) -> list[tuple[TaskFamily, Tasks, Sequence[int]]]:
        """Return each member that has some of these tasks, with these, batched, and where each of them stood."""
        ...


class Part(NamedTuple):
    """Tasks of one family, with the loop that runs them.

    ``member`` is the family's place among ``TaskFamily.families``, ``positions`` where each task stood in the batch.
    """

    loop: InnerLoop
    tasks: Tasks
    positions: tuple[int, ...]
    member: int


def parts_of(loop: InnerLoop, tasks: Tasks) -> list[Part]:
    """Return the tasks by family: one part, on the loop itself, unless its family is a mixture.

    Raises:
        ValueError: the family's ``split`` loses tasks, has some twice, or names a family that is not of it.
    """
    if loop.family.families[0] is loop.family:
        return [Part(loop, tasks, tuple(range(tree.size(tasks))), 0)]
    found: list[Part] = []
    for family, own, positions in cast(Mixed, loop.family).split(tasks):
        places = tuple(int(place) for place in positions)
        member = _member(loop.family, family)
        found.append(Part(loop_of(loop, member), own, places, member))
    places = sorted(place for part in found for place in part.positions)
    if places != [*range(len(places))] or not places:
        raise ValueError(
            f"{type(loop.family).__name__}.split must give each task to one family, got the positions {places}"
        )
    return found


def loop_of(loop: InnerLoop, member: int, horizon: int | None = None) -> InnerLoop:
    """Return the loop of one of its families, over ``horizon`` steps where one is given.

    It is made once and kept in the loop's cache, so that what was vetted and compiled for it is kept as well.
    """
    family = loop.family.families[member]
    # All are kept: there are no more than members times horizons.
    parts = loop.cache.remember("parts", dict[Hashable, InnerLoop])
    own = loop
    if family is not loop.family:
        if member not in parts:
            parts[member] = replace(loop, family=family)
        own = parts[member]
    if horizon is None or horizon == loop.horizon:
        return own
    if (member, horizon) not in parts:
        parts[member, horizon] = replace(own, horizon=horizon)
    found = parts[member, horizon]
    for what in OF_THE_FAMILY:
        if what in own.cache and what not in found.cache:
            found.cache.put(what, True)
    found.cache.remember(PROGRAMS, lambda: own.cache.remember(PROGRAMS, Cache))
    return found


def _member(family: TaskFamily, part: TaskFamily) -> int:
    places = [i for i, each in enumerate(family.families) if each is part]
    if len(places) != 1:
        raise ValueError(
            f"{type(family).__name__}.split returned a {type(part).__name__} that is {len(places)} times among its "
            f"families {[type(each).__name__ for each in family.families]}; it must be there once"
        )
    return places[0]
