"""The LSTM optimizer (Andrychowicz et al. 2016), on quadratics and on an MLP for MNIST."""

from __future__ import annotations

from dataclasses import replace

from learnedopt.core.execution import Execution
from learnedopt.core.inner import Tape
from learnedopt.core.objective import SumOfLosses
from learnedopt.core.registry import Choice
from learnedopt.estimators.unrolled import Truncated
from learnedopt.recipes.recipe import ALL_TASKS, HeldOut, MetaLearning, Recipe


def lstm_quadratic() -> Recipe:
    """LSTM on random 10-d quadratics, the first experiment of Andrychowicz et al. (2016)."""
    return Recipe(
        name="lstm-quadratic",
        family=Choice("quadratic", {"dim": 10}),
        rule=Choice("lstm", {"preprocess_factor": None}),
        estimator=Truncated(20, horizon=100, tape=Tape.FULL),
        objective=SumOfLosses(),
        num_meta_steps=6000,
        num_tasks=128,
        meta=MetaLearning(lr=5e-3, final_lr_fraction=0.01, max_grad_norm=10.0),
        validation=HeldOut(SumOfLosses(), num_steps=100, num_tasks=2000, every=250),
        execution=Execution(chunk_size=ALL_TASKS),
    )


def demo() -> Recipe:
    """LSTM on quadratics in a minute, then compared with tuned SGD, Adam and others."""
    recipe = lstm_quadratic()
    return replace(recipe, name="demo", num_meta_steps=700, compare=True)


def lstm_mnist() -> Recipe:
    """LSTM on an MLP with 20 sigmoid units on MNIST (Andrychowicz et al. 2016)."""
    return Recipe(
        name="lstm-mnist",
        family=Choice("image-mlp", {"dataset": "mnist", "hidden": (20,), "activation": "sigmoid", "batch_size": 128}),
        rule=Choice("lstm", {"preprocess_factor": 10.0, "output_scale": 0.1}),
        estimator=Truncated(20, horizon=100, tape=Tape.FULL),
        objective=SumOfLosses(),
        num_meta_steps=5000,
        meta=MetaLearning(lr=5e-3, final_lr_fraction=0.01, max_grad_norm=1.0),
        validation=HeldOut(SumOfLosses(), num_steps=100, num_tasks=4, every=200),
    )


def lstm_mnist_long() -> Recipe:
    """The LSTM of lstm-mnist, refined with four tasks a meta-step on the images' central 20x20 pixels."""
    recipe = lstm_mnist()
    return replace(
        recipe,
        name="lstm-mnist-long",
        family=Choice("image-mlp", {**recipe.family.options, "crop": 20}),
        start="runs/lstm-mnist",
        num_meta_steps=900,
        num_tasks=4,
        meta=MetaLearning(lr=1e-3, final_lr_fraction=0.01, max_grad_norm=10.0),
        validation=replace(recipe.validation, num_tasks=8, every=100),
    )
