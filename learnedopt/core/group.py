"""Groups: classes that may stand for one another in a recipe, each called by its own name; users add theirs."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")


def is_again(given: object, before: object) -> bool:
    """Whether one is the other, or takes its place: a notebook's cell was run twice, or a module loaded anew."""
    names = [(getattr(x, "__module__", None), getattr(x, "__qualname__", "<")) for x in (given, before)]
    # What a function or a lambda makes is another thing each time.
    return given is before or (names[0] == names[1] and "<" not in names[0][1])


class Group(Collection[Callable[..., Any]]):
    """The library's classes, and functions that make one, each imported when it is asked for; then the users'.

    Recipes and files say one as ``{"type": <its name>, <field>: <value>, ...}``: see ``learnedopt.config``.

    Args:
        kind: what each class is a subclass of.
        noun: what messages call one, such as "gradient estimator".
        plural: what they call several.
        table: name -> module that has it. A new one joins with a line there.

    Attributes:
        registered: what users have added, by name.
    """

    def __init__(self, kind: type[Any], noun: str, plural: str, table: Mapping[str, str]) -> None:
        self.kind: type[Any] = kind
        self.noun: str = noun
        self.plural: str = plural
        self.table: Mapping[str, str] = table
        self.registered: dict[str, type[Any]] = {}

    def names(self) -> list[str]:
        """Return all names, the users' last."""
        return [*self.table, *self.registered]

    def register(self, kind: type[T]) -> type[T]:
        """Add a class of your own under its own name, so that recipes can say it, and files record it; return it.

        Args:
            kind: a dataclass, best a frozen one, whose fields are plain values or again such dataclasses: a recipe
                sets them, and a file keeps them.

        Raises:
            TypeError: it is no dataclass itself, whatever its base is, or of another kind.
            ValueError: the name is taken, and not by what this is a new definition of; or a field is called ``type``,
                as records call the class.

        Example:
            >>> @learnedopt.estimators.register
            ... @dataclass(frozen=True)
            ... class Differences(GradientEstimator): ...
        """
        given = cast("object", kind)
        # By its own decorator: what it has of a base does not know the fields that it adds.
        if not (isinstance(given, type) and issubclass(given, self.kind) and "__dataclass_fields__" in vars(given)):
            raise TypeError(
                f"register({given!r}): pass the class of a {self.noun} (a subclass of {self.kind.__name__}, or what "
                "works as one) that is a dataclass itself: its fields are what a recipe sets and what files keep"
            )
        name = kind.__name__
        if name in self.table or not is_again(kind, self.registered.get(name, kind)):
            raise ValueError(f"the name {name!r} of {self.plural} is already registered; give the class another one")
        if any(field.name == "type" for field in dataclasses.fields(cast("Any", kind))):
            raise ValueError(f"{name} has a field 'type', under which records keep the class; give it another name")
        self.registered[name] = kind
        return kind

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        for name, module in self.table.items():
            yield getattr(importlib.import_module(module), name)
        yield from self.registered.values()

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, value: object) -> bool:
        return any(each is value for each in self)
