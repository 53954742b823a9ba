"""Dataset distillation: one learned image for each class of MNIST, or several (Wang et al. 2018)."""

from __future__ import annotations

from learnedopt.core.execution import Execution
from learnedopt.core.objective import FinalLoss
from learnedopt.core.registry import Choice
from learnedopt.estimators.unrolled import Unrolled
from learnedopt.recipes.recipe import HeldOut, MetaLearning, Recipe

NUM_STEPS = 20


def distill_mnist() -> Recipe:
    """One learned image a class, on which an MLP for MNIST trains from any start (Wang et al. 2018)."""
    return Recipe(
        name="distill-mnist",
        family=Choice("image-mlp", {"dataset": "mnist", "hidden": (128,), "activation": "relu", "batch_size": 128}),
        # Logarithms, so that a meta-step changes a rate by a factor and no rate turns negative.
        rule=Choice(
            "reparametrized",
            {"rule": {"name": "step-rates", "options": {"num_steps": NUM_STEPS, "lr": 0.1}}, "scales": {"lr": "log"}},
        ),
        inner_objective=Choice("distilled", {"shape": (784,), "per_class": 1}),
        estimator=Unrolled(NUM_STEPS),
        objective=FinalLoss(),
        num_meta_steps=4000,
        num_tasks=4,
        meta=MetaLearning(lr=0.01, final_lr_fraction=0.01, max_grad_norm=0.1),
        validation=HeldOut(
            FinalLoss(), num_steps=NUM_STEPS, num_tasks=16, every=100, family_options={"batch_size": 512}
        ),
        execution=Execution(compile=True),
    )
