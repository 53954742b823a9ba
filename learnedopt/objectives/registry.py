"""The registry of meta-objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from learnedopt.core.group import Group

OBJECTIVES = Group(
    Callable,  # pyright: ignore[reportArgumentType] - the abstract class of what has __call__
    "meta-objective",
    "meta-objectives",
    {
        "FinalLoss": "learnedopt.core.objective",
        "SumOfLosses": "learnedopt.core.objective",
        "MeanLogLoss": "learnedopt.core.objective",
        "LogMeans": "learnedopt.core.objective",
        "TargetMatching": "learnedopt.objectives.target_matching",
        "BootstrappedTarget": "learnedopt.objectives.target_matching",
        "ErrorRate": "learnedopt.objectives.error_rate",
        "RegretBound": "learnedopt.objectives.regret_bound",
        "MomentMatching": "learnedopt.objectives.regret_bound",
        "LeaderAndRadius": "learnedopt.objectives.leader_and_radius",
        "HypergradientFeedback": "learnedopt.objectives.feedback",
    },
)
names: Final = OBJECTIVES.names
register: Final = OBJECTIVES.register
