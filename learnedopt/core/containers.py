"""Is it a container? ``isinstance`` asked such that whoever reads types knows that anything may lie inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard


def is_dict(x: object) -> TypeGuard[dict[Any, Any]]:
    """Whether it is a dict."""
    return isinstance(x, dict)


def is_mapping(x: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether it is a mapping."""
    return isinstance(x, Mapping)


def is_list(x: object) -> TypeGuard[list[Any]]:
    """Whether it is a list."""
    return isinstance(x, list)


def is_set(x: object) -> TypeGuard[set[Any]]:
    """Whether it is a set."""
    return isinstance(x, set)


def is_tuple(x: object) -> TypeGuard[tuple[Any, ...]]:
    """Whether it is a tuple, which a named one is as well."""
    return isinstance(x, tuple)


def is_list_or_tuple(x: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Whether it is a list or a tuple."""
    return isinstance(x, list | tuple)
