"""Typed overrides ``key=value`` of nested frozen dataclasses, with errors that name the nearest valid key."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import typing
from typing import Any, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A registered rule or family: its name, and options that the registry checks when it is made."""

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def override(value: T, assignment: str) -> T:
    """Return a copy of the dataclass ``value`` with one field replaced.

    Args:
        value: a frozen dataclass; fields may be dataclasses again, reached by dots.
        assignment: ``path.to.field=text``; the text is read as the field's type. The options of a ``Choice`` are
            reached like fields, and ``choice=name`` names another.

    Raises:
        ValueError: there is no such field, or the text is not of its type; the message names the nearest field.

    Example:
        >>> override(recipe, "estimator.num_steps=10")
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ValueError(f"{assignment!r} is not of the form key=value, such as num_meta_steps=100")
    return _replace(value, path.split("."), text, path)


def read_value(text: str) -> Any:
    """Return the Python literal that ``text`` spells (also true, false, null), or the text itself."""
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _replace(value: Any, keys: list[str], text: str, path: str) -> Any:
    if isinstance(value, Choice) and keys[0] not in ("name", "options"):
        if len(keys) > 1:
            raise ValueError(f"{path!r} reaches into an option of {value.name!r}; set the option as a whole")
        return dataclasses.replace(value, options={**value.options, keys[0]: read_value(text)})
    names = [field.name for field in dataclasses.fields(value) if field.init]
    if keys[0] not in names:
        near = difflib.get_close_matches(keys[0], names, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no setting {path!r}: {type(value).__name__} has no {keys[0]!r}{hint}")
    inside = getattr(value, keys[0])
    if len(keys) > 1:
        if not dataclasses.is_dataclass(inside):
            raise ValueError(f"there is no setting {path!r}: {keys[0]!r} is {inside!r}, which has no fields")
        return dataclasses.replace(value, **{keys[0]: _replace(inside, keys[1:], text, path)})
    if isinstance(inside, Choice):
        return dataclasses.replace(value, **{keys[0]: Choice(text)})
    return dataclasses.replace(value, **{keys[0]: _typed(text, typing.get_type_hints(type(value))[keys[0]], path)})


def _typed(text: str, hint: Any, path: str) -> Any:
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_args([f"--value={text}"]).value
    except ArgumentError as error:
        name = getattr(hint, "__name__", None) or str(hint)
        raise ValueError(f"{path}={text!r} is not of the setting's type {name}") from error
