"""What a file says of the plug-ins that it needs: they are named to the user, never imported because a file says so."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from learnedopt.core.containers import is_list

MODULES, DISTRIBUTIONS = "imports", "plugins"
"""Keys of a record: the modules that were imported by name, and the distributions that brought some."""
_LONGEST, _MOST = 100, 10
"""Of what a message names: letters of a name, and names."""


def needed(record: Mapping[str, Any]) -> str:
    """Return what to say behind an error that something is not registered; empty where the record names nothing more.

    What is no name of a module or distribution is left out: whoever wrote the file does not choose what a message says.
    """
    missing = [f"--import {name}" for name in modules(record) if name not in sys.modules]
    told = [f"pass {' '.join(missing)} if you trust what that runs"] if missing else []
    told += [f"install {name}" for name in distributions(record)]
    return f". It was written where plug-ins were loaded: {', and '.join(told)}" if told else ""


def modules(record: Mapping[str, Any]) -> list[str]:
    """Return the names of the modules that were imported by name."""
    return _names(record, MODULES, ".")


def distributions(record: Mapping[str, Any]) -> list[str]:
    """Return the names of the distributions that brought plug-ins."""
    return _names(record, DISTRIBUTIONS, ".-_")


def _names(record: Mapping[str, Any], key: str, punctuation: str) -> list[str]:
    found = record.get(key)
    names = [name for name in found if isinstance(name, str)] if is_list(found) else []
    plain = [name for name in names if name.translate(dict.fromkeys(map(ord, punctuation))).isidentifier()]
    return [name for name in plain if name.isascii() and len(name) <= _LONGEST][:_MOST]
