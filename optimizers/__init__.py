"""Update rules: one file each, and the registry that makes them by name.

Rules are imported when first used. ``make("meta-sgd", ...)``, ``make("maml", ...)`` and ``make("aruba", ...)`` are
compositions of the classes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from learnedopt.optimizers.registry import build, describe, example, make, names, register

if TYPE_CHECKING:
    from learnedopt.optimizers.adam import Adam
    from learnedopt.optimizers.adamw import AdamW
    from learnedopt.optimizers.anil import ANIL
    from learnedopt.optimizers.averaged import Averaged
    from learnedopt.optimizers.balanced_rates import BalancedRates, as_meta_sgd
    from learnedopt.optimizers.bases.convex_sets import Ball, Box, ConvexSet, Simplex
    from learnedopt.optimizers.bases.geometry import Entropic, Euclidean, Geometry
    from learnedopt.optimizers.celo2 import Celo2
    from learnedopt.optimizers.clip import Clip
    from learnedopt.optimizers.general import General
    from learnedopt.optimizers.iterate import Iterate
    from learnedopt.optimizers.learned_init import LearnedInit
    from learnedopt.optimizers.lstm import LSTM
    from learnedopt.optimizers.meta_sgd import LearnedRates
    from learnedopt.optimizers.mirror_descent import MirrorDescent
    from learnedopt.optimizers.momentum import Momentum
    from learnedopt.optimizers.muon import Muon
    from learnedopt.optimizers.nadam import NAdam
    from learnedopt.optimizers.nesterov import Nesterov
    from learnedopt.optimizers.normalised import Normalised
    from learnedopt.optimizers.normalised_lstm import NormalisedLSTM
    from learnedopt.optimizers.normalised_mlp import NormalisedMLP
    from learnedopt.optimizers.partition import Partition, per_tensor
    from learnedopt.optimizers.projected import Projected
    from learnedopt.optimizers.recorded import Recorded
    from learnedopt.optimizers.recurrent_hyperparameters import RecurrentHyperparameters
    from learnedopt.optimizers.reparametrized import Reparametrized
    from learnedopt.optimizers.rmsprop import RMSprop
    from learnedopt.optimizers.rnnprop import RNNprop
    from learnedopt.optimizers.schedule_free import ScheduleFree
    from learnedopt.optimizers.scheduled import Scheduled
    from learnedopt.optimizers.sgd import SGD
    from learnedopt.optimizers.small_mlp import SmallMLP
    from learnedopt.optimizers.step_rates import StepRates
    from learnedopt.optimizers.tensor_gru import TensorGRU

_LAZY = {
    "ANIL": "anil",
    "Adam": "adam",
    "AdamW": "adamw",
    "Averaged": "averaged",
    "Ball": "bases.convex_sets",
    "Box": "bases.convex_sets",
    "BalancedRates": "balanced_rates",
    "Celo2": "celo2",
    "Clip": "clip",
    "ConvexSet": "bases.convex_sets",
    "Entropic": "bases.geometry",
    "Euclidean": "bases.geometry",
    "General": "general",
    "Geometry": "bases.geometry",
    "Iterate": "iterate",
    "LSTM": "lstm",
    "LearnedInit": "learned_init",
    "LearnedRates": "meta_sgd",
    "MirrorDescent": "mirror_descent",
    "Momentum": "momentum",
    "Muon": "muon",
    "NAdam": "nadam",
    "Nesterov": "nesterov",
    "Normalised": "normalised",
    "NormalisedLSTM": "normalised_lstm",
    "NormalisedMLP": "normalised_mlp",
    "Partition": "partition",
    "Projected": "projected",
    "RMSprop": "rmsprop",
    "RNNprop": "rnnprop",
    "RecurrentHyperparameters": "recurrent_hyperparameters",
    "Recorded": "recorded",
    "Reparametrized": "reparametrized",
    "SGD": "sgd",
    "ScheduleFree": "schedule_free",
    "Scheduled": "scheduled",
    "Simplex": "bases.convex_sets",
    "StepRates": "step_rates",
    "SmallMLP": "small_mlp",
    "TensorGRU": "tensor_gru",
    "as_meta_sgd": "balanced_rates",
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
    "AdamW",
    "Averaged",
    "BalancedRates",
    "Ball",
    "Box",
    "Celo2",
    "Clip",
    "ConvexSet",
    "Entropic",
    "Euclidean",
    "General",
    "Geometry",
    "Iterate",
    "LearnedInit",
    "LearnedRates",
    "MirrorDescent",
    "Momentum",
    "Muon",
    "NAdam",
    "Nesterov",
    "Normalised",
    "NormalisedLSTM",
    "NormalisedMLP",
    "Partition",
    "Projected",
    "RMSprop",
    "RNNprop",
    "Recorded",
    "RecurrentHyperparameters",
    "Reparametrized",
    "ScheduleFree",
    "Scheduled",
    "Simplex",
    "SmallMLP",
    "StepRates",
    "TensorGRU",
    "as_meta_sgd",
    "build",
    "describe",
    "example",
    "make",
    "names",
    "per_tensor",
    "register",
]
