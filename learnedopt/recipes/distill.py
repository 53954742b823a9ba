"""Dataset distillation: one learned image for each class of MNIST, or several (Wang et al. 2018)."""

from __future__ import annotations

from dataclasses import replace

from learnedopt.core.execution import Execution
from learnedopt.core.objective import FinalLoss
from learnedopt.core.registry import Choice
from learnedopt.estimators.unrolled import Unrolled
from learnedopt.recipes.recipe import HeldOut, MetaLearning, Recipe

NUM_STEPS = 20


def distill_mnist() -> Recipe:
    """One learned image a class, on which an MLP for MNIST trains from any start (Wang et al. 2018).

    The more the rates grow, the closer training comes to chaos, where meta-gradients are huge and mean nothing: few
    meta-steps of a falling rate end before that.
    """
    return Recipe(
        name="distill-mnist",
        family=mlp("relu"),
        rule=rates(NUM_STEPS),
        inner_objective=Choice("distilled", {"shape": (784,), "per_class": 1, "std": 0.1}),
        estimator=Unrolled(NUM_STEPS),
        objective=FinalLoss(),
        num_meta_steps=1500,
        num_tasks=4,  # fresh starts a meta-step, each with real images of its own
        meta=MetaLearning(lr=0.01, final_lr_fraction=0.01, max_grad_norm=0.1),
        validation=HeldOut(
            FinalLoss(), num_steps=NUM_STEPS, num_tasks=16, every=100, family_options={"batch_size": 512}
        ),
        execution=Execution(compile=True),
    )


def distill_mnist_ten() -> Recipe:
    """Ten learned images a class, on which an MLP for MNIST trains from any start (Wang et al. 2018)."""
    return replace(
        distill_mnist(),
        name="distill-mnist-ten",
        family=mlp("gelu"),  # learns faster than with "relu"; with one image a class it is the first to become chaotic
        inner_objective=Choice("distilled", {"shape": (784,), "per_class": 10, "std": 0.1}),
        num_meta_steps=4000,
    )


def mlp(activation: str) -> Choice:
    """Return the family of MLPs 784-128-10."""
    return Choice("image-mlp", {"dataset": "mnist", "hidden": (128,), "activation": activation, "batch_size": 128})


def rates(num_steps: int) -> Choice:
    """Return the rule: a rate for each step, as logarithms, so that a meta-step changes it by a factor."""
    rule = {"name": "step-rates", "options": {"num_steps": num_steps, "lr": 0.1}}
    return Choice("reparametrized", {"rule": rule, "scales": {"lr": "log"}})
