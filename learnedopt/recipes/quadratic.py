"""A recurrent rule for whole tensors on the random quadratics of Andrychowicz et al. (2016)."""

from __future__ import annotations

from learnedopt.core.execution import Execution
from learnedopt.core.inner import Tape
from learnedopt.core.objective import SumOfLosses
from learnedopt.core.registry import Choice
from learnedopt.estimators.unrolled import Truncated
from learnedopt.recipes.recipe import ALL_TASKS, HeldOut, MetaLearning, Recipe


def tensor_gru_quadratic() -> Recipe:
    """A GRU that paces heavy ball and memoryless BFGS on random 10-d quadratics."""
    return Recipe(
        name="tensor-gru-quadratic",
        family=Choice("quadratic", {"dim": 10}),
        rule=Choice("tensor-gru", {"lr": 0.01, "momentum": 0.5}),
        estimator=Truncated(20, horizon=100, tape=Tape.FULL),
        objective=SumOfLosses(),
        num_meta_steps=1000,
        num_tasks=128,
        meta=MetaLearning(lr=1e-2, final_lr_fraction=0.01, max_grad_norm=1.0),
        validation=HeldOut(SumOfLosses(), num_steps=100, num_tasks=2000, every=100),
        execution=Execution(chunk_size=ALL_TASKS),
    )
