"""Inner objectives: what the inner steps descend, one file each, and the registry; imports ``learnedopt.core`` only.

They are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from learnedopt.inner_objectives.registry import build, describe, example, make, names, register

if TYPE_CHECKING:
    from learnedopt.inner_objectives.distilled import DistilledData
    from learnedopt.inner_objectives.l2 import L2
    from learnedopt.inner_objectives.learned_loss import LearnedLoss
    from learnedopt.inner_objectives.proximal import Proximal
    from learnedopt.inner_objectives.weighted_examples import WeightedExamples

_LAZY = {
    "DistilledData": "distilled",
    "L2": "l2",
    "LearnedLoss": "learned_loss",
    "Proximal": "proximal",
    "WeightedExamples": "weighted_examples",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'learnedopt.inner_objectives' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"learnedopt.inner_objectives.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


__all__ = [
    "L2",
    "DistilledData",
    "LearnedLoss",
    "Proximal",
    "WeightedExamples",
    "build",
    "describe",
    "example",
    "make",
    "names",
    "register",
]
