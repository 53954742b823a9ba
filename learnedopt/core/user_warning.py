"""Warnings that point at the user's own line, however deep in the library they are found."""

from __future__ import annotations

import inspect
import warnings

_INSIDE = ("learnedopt", "torch")


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn, as of the nearest line that is neither this library's nor torch's."""
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
