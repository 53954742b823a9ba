"""What families that wrap others hand on to them."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from learnedopt.core.task import TaskFamily
from learnedopt.tasks.data import arguments


def with_common(
    family: TaskFamily, dtype: arguments.DType | None, meta_split: arguments.MetaSplit | None
) -> TaskFamily:
    """Return the family with these options in place of its own, where they are given.

    Raises:
        TypeError: it is no task family.
        ValueError: a value is none that the option takes, the family has no such option, or it is a mixture.
    """
    if not isinstance(cast("object", family), TaskFamily):
        raise TypeError(f"{family!r} ({type(family).__name__}) is no task family; pass one, or its configuration")
    if family.families != (family,):
        raise ValueError(
            f"{type(family).__name__} is itself made of families of different shapes: wrap each of its members, and "
            "mix these"
        )
    given = {"dtype": dtype, "meta_split": meta_split}
    given = {name: value for name, value in given.items() if value is not None}
    arguments.require_common(dtype, meta_split or "train")
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(family) if dataclasses.is_dataclass(family) else ()
    own = {f.name for f in fields if f.init}
    if missing := given.keys() - own:
        raise ValueError(
            f"{type(family).__name__} has no option {' or '.join(sorted(missing))}, which its wrapper would hand on to "
            "it; leave it out of the wrapper, or make the family a frozen dataclass with that field"
        )
    return dataclasses.replace(cast("Any", family), **given) if given else family
