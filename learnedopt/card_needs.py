"""What must be at hand before a theta can be loaded whose rule or inner objective is somebody's own."""

from __future__ import annotations

from typing import Any, NamedTuple

from learnedopt.checkpoint import Checkpoint
from learnedopt.core import plugged
from learnedopt.core.containers import is_list_or_tuple, is_mapping
from learnedopt.core.inner_objective import TaskLoss
from learnedopt.core.registry import Registry


class Needs(NamedTuple):
    """Registered names that are not the library's, and what the file says was loaded where it was written.

    Args:
        names: of rule and inner objective, and of what they are made of.
        modules: that were imported by name.
        distributions: that were installed and brought some.
    """

    names: tuple[str, ...]
    modules: tuple[str, ...]
    distributions: tuple[str, ...]

    def __str__(self) -> str:
        """Say so."""
        names = ", ".join(f"`{name}`" for name in self.names)
        ways = [f"the module `{name}` (`--import {name}`)" for name in self.modules]
        ways += [f"the distribution `{name}`, installed" for name in self.distributions]
        known = f"it was {' and '.join(ways)}" if ways else "which module did so is not on record"
        return f"Code of its author's that registers {names}, which the library does not have: {known}."


def needs_of(learned: Checkpoint) -> Needs | None:
    """Return what a checkpoint needs beside the library; None for nothing."""
    from learnedopt.inner_objectives.registry import INNER_OBJECTIVES
    from learnedopt.optimizers.registry import RULES

    found = _own(RULES, learned.rule)
    if not isinstance(learned.inner_objective, TaskLoss):
        found += _own(INNER_OBJECTIVES, learned.inner_objective)
    if not found:
        return None
    modules, distributions = plugged.modules(learned.metadata), plugged.distributions(learned.metadata)
    return Needs(tuple(dict.fromkeys(found)), tuple(modules), tuple(distributions))


def _own(registry: Registry[Any], thing: Any) -> list[str]:
    return [name for name in _names(registry.describe(thing)) if name not in {*registry.table, *registry.parts}]


def _names(described: Any) -> list[str]:
    """Return the names in a description, of what it is of and of what that is made of."""
    if is_list_or_tuple(described):
        return [name for value in described for name in _names(value)]
    if not is_mapping(described):
        return []
    own = [str(described["name"])] if {*described} == {"name", "options"} else []
    return own + [name for value in described.values() for name in _names(value)]
