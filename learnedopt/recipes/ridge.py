"""Ridge regression with a learned strength for each coordinate."""

from __future__ import annotations

from learnedopt.core.execution import Execution
from learnedopt.core.objective import FinalLoss
from learnedopt.core.registry import Choice
from learnedopt.estimators.hessian_free import HessianFree
from learnedopt.estimators.implicit import Implicit
from learnedopt.estimators.linear_solvers import ConjugateGradient
from learnedopt.recipes.recipe import ALL_TASKS, HeldOut, MetaLearning, Recipe


def ridge() -> Recipe:
    """An L2 strength for each coordinate of regressions on 20 points, 5 of 20 inputs matter; solved to the end."""
    family = {"dim": 20, "num_train": 20, "num_valid": 20, "num_relevant": 5, "noise": 1.0, "mean_weight": 0.0}
    return Recipe(
        name="ridge",
        family=Choice("linear-regression", {**family, "condition_number": 1.0, "dtype": "float64"}),
        # Newton steps do the work; the rule gives the start, and its own steps are stable for strengths up to about 30.
        rule=Choice("sgd", {"lr": 0.05, "learn": ()}),
        inner_objective=Choice("l2", {"strength": 0.1, "per": "coordinate"}),
        estimator=Implicit(2, ConjugateGradient(20), inner=HessianFree(20)),
        objective=FinalLoss(),
        num_meta_steps=400,
        num_tasks=64,
        meta=MetaLearning(lr=0.05),
        validation=HeldOut(FinalLoss(), num_steps=2, num_tasks=500, every=50),
        execution=Execution(chunk_size=ALL_TASKS),
    )
