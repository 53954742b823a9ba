"""Texts of a command line and values of a configuration, read as values of annotated types."""

from __future__ import annotations

import ast
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal


def read_value(text: Any) -> Any:
    """Return the Python literal that ``text`` spells (also true, false, null), or what is no text as it is."""
    if not isinstance(text, str):
        return text
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # the last two of a deep nest
        return text


def typed(text: Any, hint: Any, path: str) -> Any:
    """Return a text, or the value of a configuration, as a value of the annotated type ``hint``.

    Raises:
        ValueError: it is none; the message calls it ``path``.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    for kind in (hint, *typing.get_args(hint)):
        if isinstance(text, str) and hasattr(kind, "__members__"):
            text = text.removeprefix(f"{kind.__name__}.")  # as configurations have a member of an Enum
    literal = read_value(text)
    # A container in a text is no YAML either: there, a None in it would be the word "None".
    if isinstance(literal, (dict, list, tuple)) or not isinstance(text, str):
        try:
            return parser.parse_object({"value": literal}).value
        except ArgumentError:
            pass  # not of the type as it is, but it may be as text
    try:
        return parser.parse_args([f"--value={text}"]).value
    except ArgumentError as error:
        raise ValueError(refusal(path, text, hint)) from error


def refusal(what: str, text: Any, hint: Any, kind: str = "setting") -> str:
    """Return why a text is no value of an annotated type, and what would be: of a few words these, and the nearest."""
    from learnedopt.core.registry import nearest

    words, alternatives = _words(hint), typing.get_args(hint) or (hint,)
    if words is not None:
        words = [word for word in words if word != "null" or kind == "setting"]  # an option is left out instead
        return f"{what}={text!r} is none of {', '.join(words)}{nearest(str(text), words)}"
    if dataclasses.is_dataclass(hint):
        fields = [field.name for field in dataclasses.fields(hint)]
        return f"{what}={text!r} cannot be: {what} is a group of settings; set these, such as {what}.{fields[0]}"
    number = _number(text)
    if number is not None and not math.isfinite(number) and float in alternatives:
        return f"{what}={text!r} is not finite; pass a finite number"
    whole = f"; write {number:.0f}" if number is not None and number.is_integer() and int in alternatives else ""
    return f"{what}={text!r} is not of the {kind}'s type {spelled(hint)}{whole}"


def spelled(hint: Any) -> str:
    """Return an annotated type as a user reads it: ``float | null``, ``online | offline``, ``(int, ...)``."""
    parts = [spelled(part) for part in typing.get_args(hint)]
    origin = typing.get_origin(hint)
    if (words := _words(hint)) and (parts or hasattr(hint, "__members__")):
        return " | ".join(words)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(parts)
    if parts and isinstance(origin, type) and issubclass(origin, Mapping):
        return f"{{{': '.join(parts)}}}"
    if parts:
        return f"({', '.join(parts)})"
    return {None: "null", types.NoneType: "null", Ellipsis: "...", Any: "any"}.get(hint) or _name(hint)


def _name(hint: Any) -> str:
    return "path" if isinstance(hint, type) and issubclass(hint, Path) else getattr(hint, "__name__", str(hint))


def _number(text: Any) -> float | None:
    try:
        return float(text) if isinstance(text, str | float) else None
    except ValueError:
        return None


def _words(hint: Any) -> list[str] | None:
    """Return all texts that are values of an annotated type, None where they are no few words."""
    if hint in (None, types.NoneType):
        return ["null"]
    if hint is bool:
        return ["true", "false"]
    if hasattr(hint, "__members__"):
        return [*hint.__members__]
    if typing.get_origin(hint) is Literal:
        return ["null" if word is None else str(word) for word in typing.get_args(hint)]
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return None
    found = [_words(part) for part in typing.get_args(hint)]
    return None if None in found else [word for words in found for word in words or []]
