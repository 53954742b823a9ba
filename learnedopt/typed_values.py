"""Texts of a command line and values of a configuration, read as values of annotated types."""

from __future__ import annotations

import ast
import typing
from typing import Any, Literal

from learnedopt.core.registry import nearest, nearest_or_all


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
        raise ValueError(f"{path}={text!r} is not of the setting's type {spelled(hint)}{near(text, hint)}") from error


def spelled(hint: Any) -> str:
    """Return an annotated type as its author wrote it."""
    return str(hint).replace("typing.", "") if typing.get_args(hint) else getattr(hint, "__name__", str(hint))


def near(text: Any, hint: Any) -> str:
    """Return a hint to the word nearest to ``text`` among those of an annotated type's Literals and Enums.

    Where none is, the members of Enums are listed: Literals are ``spelled`` with theirs.
    """
    kinds = (hint, *typing.get_args(hint))
    members = [word for kind in kinds for word in getattr(kind, "__members__", ())]
    literals = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    told = nearest(str(text), (word for word in literals if isinstance(word, str)))
    return told or nearest_or_all(str(text), members)
