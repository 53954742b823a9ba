"""The registry of inner objectives: name -> inner objective, and inner objective <-> configuration."""

from __future__ import annotations

from typing import Any, Final

from learnedopt.core.inner_objective import InnerObjective, TaskLoss
from learnedopt.core.registry import Registry
from learnedopt.core.tree import Params

_TABLE = {
    "proximal": "proximal:Proximal",
    "l2": "l2:L2",
    "weighted-examples": "weighted_examples:WeightedExamples",
    "learned-loss": "learned_loss:LearnedLoss",
    "distilled": "distilled:DistilledData",
}
"""name -> module in this package:class; imported when first made."""

INNER_OBJECTIVES = Registry(
    InnerObjective,
    "inner objective",
    "inner objectives",
    "learnedopt.inner_objectives",
    _TABLE,
    templated=True,
    registered={"task-loss": TaskLoss},  # the default, which lies in the core
)
names: Final = INNER_OBJECTIVES.names
register: Final = INNER_OBJECTIVES.register
make: Final = INNER_OBJECTIVES.make
describe: Final = INNER_OBJECTIVES.describe
build: Final = INNER_OBJECTIVES.build


def example(name: str, template: Params, num_examples: int, num_outputs: int, shape: tuple[int, ...]) -> InnerObjective:
    """Make the named inner objective with options that have no default filled in: what tests walk over.

    Args:
        name: one of ``names()``.
        template: one task's parameters.
        num_examples: the size of the training set.
        num_outputs: of the family's model for one example, of which each is a class.
        shape: of one example's inputs.
    """
    options: dict[str, dict[str, Any]] = {
        "l2": {"strength": 0.5},
        "weighted-examples": {"num_examples": num_examples},
        "learned-loss": {"num_outputs": num_outputs},
        # As many images as leave no direction of a small classifier flat, where implicit gradients have no solution.
        "distilled": {"shape": shape, "num_classes": num_outputs, "per_class": 3},
    }
    return make(name, template=template, **options.get(name, {}))
