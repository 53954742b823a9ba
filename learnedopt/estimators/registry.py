"""The registry of gradient estimators."""

from __future__ import annotations

from typing import Final

from learnedopt.core.estimator import GradientEstimator
from learnedopt.core.group import Group

ESTIMATORS = Group(
    GradientEstimator,
    "gradient estimator",
    "gradient estimators",
    {
        "Unrolled": "learnedopt.estimators.unrolled",
        "Truncated": "learnedopt.estimators.unrolled",
        "TruncatedBackprop": "learnedopt.estimators.unrolled",
        "Implicit": "learnedopt.estimators.implicit",
        "ForwardMode": "learnedopt.estimators.forward",
        "EvolutionStrategies": "learnedopt.estimators.evolution",
        "PersistentES": "learnedopt.estimators.persistent",
        "Combined": "learnedopt.estimators.combined",
        "TaskByTask": "learnedopt.estimators.task_by_task",
    },
)
names: Final = ESTIMATORS.names
register: Final = ESTIMATORS.register
