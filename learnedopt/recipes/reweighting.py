"""A learned weight for every training image, where half of the labels are random (data hyper-cleaning)."""

from __future__ import annotations

from learnedopt.core.objective import FinalLoss
from learnedopt.core.registry import Choice
from learnedopt.estimators.unrolled import Unrolled
from learnedopt.recipes.recipe import HeldOut, MetaLearning, Recipe


def reweighting_mnist() -> Recipe:
    """A weight for each of 5,000 MNIST images, half of the labels random, by 5,000 clean ones (Shaban et al. 2019)."""
    return Recipe(
        name="reweighting-mnist",
        family=Choice("noisy-images", {"num_train": 5000, "num_valid": 5000, "noise": 0.5}),
        # The inner loss is a mean over all images, of which half end with a weight near 0: on the others' mean this
        # rate is about 2.
        rule=Choice("sgd", {"lr": 4.0, "learn": ()}),
        inner_objective=Choice("weighted-examples", {"num_examples": 5000}),
        estimator=Unrolled(40),
        objective=FinalLoss(),
        num_meta_steps=50,
        num_tasks=1,
        meta=MetaLearning(lr=0.1),
        validation=HeldOut(FinalLoss(), num_steps=40, num_tasks=1, every=10),
    )
