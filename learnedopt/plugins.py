"""What users add to the library: modules, named or of installed packages, that register things when imported."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import entry_points


def load(modules: Sequence[str]) -> None:
    """Import the named modules, after those of the entry points ``learnedopt.plugins`` of installed packages.

    Raises:
        ValueError: there is no such module, or one cannot be imported.
    """
    for entry in entry_points(group="learnedopt.plugins"):
        _import(entry.module, f"the entry point {entry.name} of learnedopt.plugins")
    for module in modules:
        _import(module, f"--import {module}")


def _import(module: str, what: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{what}: {error}; name a module as in Python's import statement") from error
