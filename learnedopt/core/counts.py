"""The one check of an argument that everything asks: is it a count?"""

from __future__ import annotations


def require_count(name: str, value: object, least: int = 0) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is not a count; pass an integer of at least {least}")
