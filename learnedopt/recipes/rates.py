"""Learned rates from a learned start (Li et al. 2017), on an MLP for MNIST."""

from __future__ import annotations

from learnedopt.core.objective import FinalLoss
from learnedopt.core.registry import Choice
from learnedopt.estimators.unrolled import Unrolled
from learnedopt.recipes.recipe import HeldOut, MetaLearning, Recipe


def meta_sgd_mnist() -> Recipe:
    """Meta-SGD: a learned start and a learned rate per coordinate for the MNIST MLP, 10 steps (Li et al. 2017)."""
    return Recipe(
        name="meta-sgd-mnist",
        family=Choice("image-mlp", {"dataset": "mnist", "hidden": (20,), "activation": "sigmoid", "batch_size": 128}),
        rule=Choice("meta-sgd", {"lr": 0.1}),
        estimator=Unrolled(10),
        objective=FinalLoss(),
        num_meta_steps=600,
        num_tasks=4,
        meta=MetaLearning(lr=3e-3, final_lr_fraction=0.1, max_grad_norm=10.0),
        validation=HeldOut(FinalLoss(), num_steps=10, num_tasks=32, every=50),
    )
