"""Rules trained by evolution strategies: persistent ones on quadratics, whole episodes on an MLP for MNIST."""

from __future__ import annotations

from learnedopt.core.execution import Execution
from learnedopt.core.objective import MeanLogLoss, SumOfLosses
from learnedopt.core.registry import Choice
from learnedopt.estimators.evolution import EvolutionStrategies
from learnedopt.estimators.persistent import PersistentES
from learnedopt.recipes.recipe import ALL_TASKS, HeldOut, MetaLearning, Recipe


def pes_quadratic() -> Recipe:
    """A recurrent net that sets rate and momentum on random quadratics, by persistent evolution strategies.

    2.3 CPU minutes. With 16 tasks at three times the meta-rate some held-out functions diverged, again and again.
    """
    return Recipe(
        name="pes-quadratic",
        family=Choice("quadratic", {"dim": 10}),
        rule=Choice("recurrent-hyperparameters", {"lr": 0.01, "weight_decay": 0.0, "reads_loss": True}),
        estimator=PersistentES(10, horizon=100, num_pairs=20, sigma=0.03),
        objective=SumOfLosses(),
        num_meta_steps=2000,
        num_tasks=32,
        meta=MetaLearning(lr=1e-2, final_lr_fraction=0.01, max_grad_norm=1.0),
        validation=HeldOut(SumOfLosses(), num_steps=100, num_tasks=2000, every=100),
        execution=Execution(chunk_size=ALL_TASKS),
    )


def es_mnist() -> Recipe:
    """A small network for every coordinate of an MLP on MNIST, by evolution strategies through whole episodes.

    3.3 CPU minutes, most of them for 480,000 inner steps. The rule's own ``step_scale`` of 1e-3 is a hundredth of what
    an MLP of this kind needs in 100 steps, and its own ``exp_scale`` lets the network hardly vary it.
    """
    return Recipe(
        name="es-mnist",
        family=Choice(
            "image-mlp",
            {"dataset": "mnist", "hidden": (20,), "activation": "sigmoid", "batch_size": 128, "crop": 20},
        ),
        rule=Choice("small-mlp", {"step_scale": 0.1, "exp_scale": 1.0}),
        estimator=EvolutionStrategies(100, num_pairs=8, sigma=0.05),
        objective=MeanLogLoss(),
        num_meta_steps=300,
        meta=MetaLearning(lr=5e-2, final_lr_fraction=0.1, max_grad_norm=1.0),
        validation=HeldOut(SumOfLosses(), num_steps=100, num_tasks=4, every=25),
    )
