"""The registry of update rules: name -> rule, and rule <-> configuration."""

from __future__ import annotations

import glob
from typing import Any, Final

from learnedopt.core.registry import Registry
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params

_TABLE = {
    "sgd": "sgd:SGD",
    "momentum": "momentum:Momentum",
    "nesterov": "nesterov:Nesterov",
    "rmsprop": "rmsprop:RMSprop",
    "adam": "adam:Adam",
    "adamw": "adamw:AdamW",
    "nadam": "nadam:NAdam",
    "muon": "muon:Muon",
    "schedule-free": "schedule_free:ScheduleFree",
    "lstm": "lstm:LSTM",
    "recurrent-hyperparameters": "recurrent_hyperparameters:RecurrentHyperparameters",
    "small-mlp": "small_mlp:SmallMLP",
    "celo2": "celo2:Celo2",
    "rnnprop": "rnnprop:RNNprop",
    "tensor-gru": "tensor_gru:TensorGRU",
    "normalised": "normalised:Normalised",
    "normalised-mlp": "normalised_mlp:NormalisedMLP",
    "normalised-lstm": "normalised_lstm:NormalisedLSTM",
    "general": "general:General",
    "learned-rates": "meta_sgd:LearnedRates",
    "step-rates": "step_rates:StepRates",
    "meta-sgd": "meta_sgd:meta_sgd",
    "maml": "meta_sgd:maml",
    "balanced-rates": "balanced_rates:BalancedRates",
    "aruba": "balanced_rates:aruba",
    "anil": "anil:ANIL",
    "learned-init": "learned_init:LearnedInit",
    "clip": "clip:Clip",
    "partition": "partition:Partition",
    "mirror-descent": "mirror_descent:MirrorDescent",
    "projected": "projected:Projected",
    "averaged": "averaged:Averaged",
    "iterate": "iterate:Iterate",
    "reparametrized": "reparametrized:Reparametrized",
    "recorded": "recorded:Recorded",
    "scheduled": "scheduled:Scheduled",
}
_PARTS = {
    "euclidean": "bases.geometry:Euclidean",
    "entropic": "bases.geometry:Entropic",
    "ball": "bases.convex_sets:Ball",
    "box": "bases.convex_sets:Box",
    "simplex": "bases.convex_sets:Simplex",
}
_RETIRED = {
    "imaml": 'it is the rule "maml" with the inner objective "proximal": learnedopt.optimizers.make("maml", '
    'template=..., lr=...) and learnedopt.inner_objectives.make("proximal", template=..., strength=...)',
}
RULES = Registry(
    UpdateRule, "update rule", "update rules", "learnedopt.optimizers", _TABLE, templated=True, retired=_RETIRED,
    parts=_PARTS,
)  # fmt: skip
names: Final = RULES.names
register: Final = RULES.register
make: Final = RULES.make
describe: Final = RULES.describe
build: Final = RULES.build


def example(name: str, template: Params) -> UpdateRule:
    """Make the named rule with options that have no default filled in: what tests and benchmarks walk over."""
    heavy_ball = {"name": "momentum", "options": {"lr": 0.05}}
    options: dict[str, dict[str, Any]] = {
        "learned-init": {"rule": heavy_ball},
        "clip": {"rule": heavy_ball, "max_value": 0.5},
        "averaged": {"rule": heavy_ball, "weights": "linear"},
        "anil": {"head": glob.escape(next(reversed(template), ""))},
        "mirror-descent": {"lipschitz": 3.0, "num_steps": 4, "learn": ("radius",)},
        "projected": {"rule": heavy_ball, "onto": {"name": "ball", "options": {"radius": 8.0}}},
        "balanced-rates": {"eps": 0.6, "zeta": 3.0},
        "aruba": {"eps": 0.6, "zeta": 3.0},
        "reparametrized": {"rule": heavy_ball, "scales": {"lr": "log", "momentum": "logit"}},
        "recorded": {"rule": heavy_ball, "num_steps": 20},
        "scheduled": {"rule": heavy_ball},
        "muon": {"orthogonal": ("first", "middle", "last")},
        "step-rates": {"num_steps": 3},
        "rnnprop": {"hidden_size": 2, "step_scale": 0.3},
        "tensor-gru": {"lr": 0.1, "hidden_size": 2},
        "celo2": {"lr": 0.1, "rest_lr": 0.1, "units": 2},
        "normalised-mlp": {"hidden": 2},
        "normalised-lstm": {"units": 2},
        "partition": {"groups": {str(i): [glob.escape(key), heavy_ball] for i, key in enumerate(template)}},
    }
    return make(name, template=template, **options.get(name, {}))
