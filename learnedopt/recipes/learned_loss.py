"""A learned loss for few-shot regression of sine waves."""

from __future__ import annotations

from learnedopt.core.execution import Execution
from learnedopt.core.objective import FinalLoss
from learnedopt.core.registry import Choice
from learnedopt.estimators.unrolled import Unrolled
from learnedopt.recipes.recipe import ALL_TASKS, HeldOut, MetaLearning, Recipe


def learned_loss_sine() -> Recipe:
    """A learned loss, and a rate, for 20 steps of gradient descent on sine waves, 20 shots (Bechtle et al. 2021)."""
    rate = {"rule": {"name": "sgd", "options": {"lr": 0.03}}, "scales": {"lr": "log"}}
    return Recipe(
        name="learned-loss-sine",
        # Every task starts from a network of its own: a loss for all of them, and no learned start in disguise.
        family=Choice("sine", {"shots": 20, "queries": 20, "init_seed": None}),
        rule=Choice("reparametrized", rate),
        inner_objective=Choice("learned-loss", {"num_outputs": 1, "targets": "values", "hidden": [32, 32]}),
        estimator=Unrolled(20),
        objective=FinalLoss(),
        num_meta_steps=500,
        num_tasks=16,
        # A few tasks of large amplitude come close to running away, and have most of the gradient.
        meta=MetaLearning(lr=0.01, final_lr_fraction=0.03, max_grad_norm=1.0),
        validation=HeldOut(FinalLoss(), num_steps=20, num_tasks=200, every=50),
        execution=Execution(chunk_size=ALL_TASKS),
    )
