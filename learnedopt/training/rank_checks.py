"""What must be the same on all ranks before they train together."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from learnedopt.core.fingerprint import words
from learnedopt.training.ranks import Ranks

_SHOWN = 80


def require_same(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Compare what is to be trained, and with which versions, on all ranks.

    Args:
        ranks: all of them.
        facts: by name; numbers, text, dataclasses, and nested mappings of them.

    Raises:
        ValueError: on every rank, naming what differs and where.
    """
    if ranks.alone:
        return
    versions = {"learnedopt": sys.modules["learnedopt"].__version__, "torch": str(torch.__version__)}
    found = ranks.everyones(_flat({**versions, **facts}), "the comparison of what ranks train")
    told = []
    for key in dict.fromkeys(k for each in found for k in each):
        others = [r for r, each in enumerate(found) if each.get(key) != found[0].get(key)]
        if others:
            first = others[0]
            more = f" (so do {len(others) - 1} more)" if len(others) > 1 else ""
            told.append(
                f"{key} is {_shown(found[first], key)} on rank {first}{more}, {_shown(found[0], key)} on rank 0"
            )
    if told:
        raise ValueError(
            f"the ranks do not train the same: {'; '.join(told)}; start all of them with one command and one "
            "installation"
        )


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return facts as text, those of nested mappings by dotted names."""
    found: dict[str, str] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else " ".join(words(value))
    return found


def _shown(facts: Mapping[str, str], key: str) -> str:
    text = facts.get(key)
    if text is None:
        return "not there"
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
