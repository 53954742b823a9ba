"""Update rules: one file each, and the registry that makes them by name.

Rules are imported when first used. ``make("meta-sgd", ...)`` and ``make("maml", ...)`` are compositions of the classes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from learnedopt.optimizers.registry import build, describe, example, make, names, register

if TYPE_CHECKING:
    from learnedopt.optimizers.adam import Adam
    from learnedopt.optimizers.anil import ANIL
    from learnedopt.optimizers.averaged import Averaged
    from learnedopt.optimizers.clip import Clip
    from learnedopt.optimizers.iterate import Iterate
    from learnedopt.optimizers.learned_init import LearnedInit
    from learnedopt.optimizers.lstm import LSTM
    from learnedopt.optimizers.meta_sgd import LearnedRates
    from learnedopt.optimizers.momentum import Momentum
    from learnedopt.optimizers.nesterov import Nesterov
    from learnedopt.optimizers.partition import Partition, per_tensor
    from learnedopt.optimizers.rmsprop import RMSprop
    from learnedopt.optimizers.sgd import SGD

_LAZY = {
    "ANIL": "anil",
    "Adam": "adam",
    "Averaged": "averaged",
    "Clip": "clip",
    "Iterate": "iterate",
    "LSTM": "lstm",
    "LearnedInit": "learned_init",
    "LearnedRates": "meta_sgd",
    "Momentum": "momentum",
    "Nesterov": "nesterov",
    "Partition": "partition",
    "RMSprop": "rmsprop",
    "SGD": "sgd",
    "per_tensor": "partition",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'learnedopt.optimizers' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"learnedopt.optimizers.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


__all__ = [
    "ANIL",
    "LSTM",
    "SGD",
    "Adam",
    "Averaged",
    "Clip",
    "Iterate",
    "LearnedInit",
    "LearnedRates",
    "Momentum",
    "Nesterov",
    "Partition",
    "RMSprop",
    "build",
    "describe",
    "example",
    "make",
    "names",
    "per_tensor",
    "register",
]
