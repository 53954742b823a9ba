"""Few-shot regression of sine waves."""

from __future__ import annotations

from dataclasses import replace

from learnedopt.core.execution import Execution
from learnedopt.core.objective import FinalLoss
from learnedopt.core.registry import Choice
from learnedopt.estimators.unrolled import Unrolled
from learnedopt.recipes.recipe import ALL_TASKS, HeldOut, MetaLearning, Recipe


def maml_sine() -> Recipe:
    """MAML on sine regression, 10 shots, one step (Finn et al. 2017), the distribution of Li et al. (2017)."""
    return Recipe(
        name="maml-sine",
        family=Choice("sine", {"protocol": "meta-sgd", "shots": 10, "init_std": 0.01}),
        rule=Choice("maml", {"lr": 0.01}),
        estimator=Unrolled(1),
        objective=FinalLoss(),
        num_meta_steps=60_000,
        num_tasks=4,
        meta=MetaLearning(lr=1e-3),
        validation=HeldOut(FinalLoss(), num_steps=1, num_tasks=1000, every=1000),
        execution=Execution(chunk_size=ALL_TASKS, compile=True),
        checkpoint_every=1000,
    )


def meta_sgd_sine() -> Recipe:
    """Meta-SGD on sine regression, 10 shots, one step (Li et al. 2017)."""
    return replace(maml_sine(), name="meta-sgd-sine", rule=Choice("meta-sgd"))  # rates start from U[0.005, 0.1]
