"""Plug-ins: the user's own modules, which register rules, families, estimators, objectives or recipes when imported.

A module is named by the user (``--import my_module``), or by an installed distribution, as an entry point of the group
``learnedopt.plugins``. Runs and files record what was imported, so that they can say what they need; a file's own word
never makes anything be imported.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from learnedopt.core.plugged import DISTRIBUTIONS, MODULES
from learnedopt.core.registry import nearest

GROUP = "learnedopt.plugins"
_loaded: dict[str, dict[str, None]] = {MODULES: {}, DISTRIBUTIONS: {}}


def load(modules: Sequence[str] = ()) -> None:
    """Import the plug-ins of installed distributions, then ``modules``, each once.

    The current folder counts as importable where modules are named, as for ``python -m``.

    Args:
        modules: as in Python's ``import`` statement, such as ``my_module`` or ``my_package.rules``.

    Raises:
        ValueError: there is no such module, or it ends in an error; the message names it, its distribution, and where.

    Example:
        >>> learnedopt.plugins.load(["my_module"])
    """
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        _load_point(point)
    if modules and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in modules:
        _import(name, f"--import {name}")
        _loaded[MODULES][name] = None


def record() -> dict[str, list[str]]:
    """Return what was imported, as a run records it: nothing for nothing."""
    return {key: [*names] for key, names in _loaded.items() if names}


def _load_point(point: EntryPoint) -> None:
    whose = "a distribution without a name" if point.dist is None else point.dist.name
    _import(point.module, f"the plug-in {point.name!r} of the installed distribution {whose!r}")
    if point.dist is not None:
        _loaded[DISTRIBUTIONS][point.dist.name] = None


def _import(name: str, what: str) -> None:
    """Import a module; raise ValueError, beginning with ``what``, where that cannot be done."""
    stem = name.removesuffix(".py")
    if stem != name or not all(part.isidentifier() for part in name.split(".")):
        meant = f"; did you mean {stem!r}?" if stem != name and stem.isidentifier() else ""
        raise ValueError(f"{what}: {name!r} is not the name of a module, as in Python's import statement{meant}")
    importlib.invalidate_caches()  # a file that was written a moment ago
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"{what}: {error}, which {name} imports{_where(error)}") from error
        raise ValueError(f"{what}: there is no module {error.name!r} here or installed{_hint(error.name)}") from error
    except (Exception, SystemExit) as error:  # a module may do anything when it is imported
        told = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".removesuffix(": ")
        raise ValueError(f"{what}: {name} cannot be imported: {told}{_where(error)}") from error


def _hint(name: str) -> str:
    """Return which of the modules beside it may be meant."""
    folder = Path(*name.split(".")[:-1])
    beside = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    near = nearest(name.rpartition(".")[2], beside - {"__init__"})
    return near or f" ({Path.cwd()} was looked through too)"


def _where(error: BaseException) -> str:
    """Return the line that raised it, outside of Python's own import machinery."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f" ({error.filename}:{error.lineno})"
    # Libraries that watch for sys.exit put a function of that name in its place.
    frames = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if "importlib" not in f.filename and f.name != "exit"]
    last = frames[-1] if frames else None
    return "" if last is None or last.filename == __file__ else f" ({last.filename}:{last.lineno})"
