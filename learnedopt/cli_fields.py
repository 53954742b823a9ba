"""What ``--help`` says of a recipe: every field, nested ones as well, with type, value and meaning."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from types import NoneType
from typing import Any, Literal, NamedTuple

import docstring_parser

from learnedopt.cli_parser import Parser
from learnedopt.config import INTERCHANGEABLE
from learnedopt.core.registry import Choice


class Field(NamedTuple):
    """A setting: its dotted path, its type, its value, and what it is."""

    path: str
    hint: Any
    value: Any
    about: str


def add_fields(parser: Parser, recipe: Any) -> None:
    """Add the fields of a recipe to what a parser's help lists, in a group each."""
    groups: dict[str, Any] = {}
    for field in fields_of(recipe):
        above = field.path.rpartition(".")[0]
        if above not in groups:
            groups[above] = parser.add_argument_group(f"fields of {above or 'the recipe'}")
        if f"--{field.path}" not in parser._option_string_actions:  # an option of that name comes first
            name = field.path.rpartition(".")[2]
            groups[above].add_argument(
                f"--{field.path}", type=field.hint, default=field.value, metavar=name.upper(), as_it_is=True,
                help=field.about or name.replace("_", " "),
            )  # fmt: skip


def fields_of(value: Any, prefix: str = "") -> Iterator[Field]:
    """Yield every field of a dataclass, those below a field after it."""
    about, hints = _meanings(type(value)), typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        if not field.init:
            continue
        path, held, said = f"{prefix}{field.name}", getattr(value, field.name), about.get(field.name, "")
        if hints[field.name] is Choice or Choice in typing.get_args(hints[field.name]):
            yield from _choice(path, held, said)
        elif dataclasses.is_dataclass(held):
            group = next((group for group in INTERCHANGEABLE if type(held) in group), ())
            names = tuple(kind.__name__ for kind in group)
            if names:
                yield Field(path, _one_of(names), type(held).__name__, said)
            yield from fields_of(held, f"{path}.")
        elif not any(dataclasses.is_dataclass(kind) for kind in typing.get_args(hints[field.name])):
            yield Field(path, _plain(hints[field.name]), held, said)


def _choice(path: str, held: Choice | None, about: str) -> Iterator[Field]:
    registry = _registry_of(path.rpartition(".")[2])
    names = (*registry.names(), *(() if held else (None,)))
    yield Field(path, _one_of(names), held and held.name, about)
    if held is None:
        return
    factory = registry.factory(held.name)
    hints, meanings = _hints(factory), _meanings(factory)
    for name, parameter in inspect.signature(factory).parameters.items():
        if name not in ("template", "params", "lr" if path == "meta.optimizer" else ""):
            default = None if parameter.default is parameter.empty else parameter.default
            yield Field(f"{path}.{name}", hints.get(name, Any), held.options.get(name, default), meanings.get(name, ""))


def _registry_of(field: str) -> Any:
    """Return where the names come from that a field takes, a ``Choice`` of its registry."""
    from learnedopt.inner_objectives.registry import INNER_OBJECTIVES
    from learnedopt.meta_optimizers import registry
    from learnedopt.optimizers.registry import RULES
    from learnedopt.tasks.registry import FAMILIES

    known = {"family": FAMILIES, "rule": RULES, "inner_objective": INNER_OBJECTIVES, "optimizer": registry}
    return known[field]


def _one_of(names: tuple[str | None, ...]) -> Any:
    return Literal.__getitem__(names)  # pyright: ignore[reportAttributeAccessIssue] - names of this moment


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(factory)
    except NameError:  # a user's own may name what is imported for a type checker alone
        return {}


def _plain(hint: Any) -> Any:
    """Return a type if it is built of plain ones, which a help can show, else Any."""
    parts = (part for part in typing.get_args(hint) if part is not Ellipsis)
    known = hint in (int, float, str, bool, NoneType, Any) or (isinstance(hint, type) and issubclass(hint, Enum))
    built = bool(typing.get_args(hint)) and all(_plain(part) is not Any or part is Any for part in parts)
    return hint if known or typing.get_origin(hint) is Literal or built else Any


def _meanings(kind: Callable[..., Any]) -> dict[str, str]:
    """Return the first sentence that its docstring says of each parameter, or that of a class it inherits from."""
    lines = reversed(kind.__mro__) if isinstance(kind, type) else (kind,)
    return {
        param.arg_name: re.split(r"(?<=\.)\s+(?=[A-Z])| \(default:", " ".join((param.description or "").split()))[0]
        for each in lines
        for param in docstring_parser.parse(each.__doc__ or "").params
    }
