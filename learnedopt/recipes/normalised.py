"""The normalised rules on an MLP for MNIST: the frame by evolution strategies, then a network in it, by gradients."""

from __future__ import annotations

from dataclasses import replace

from learnedopt.core.execution import Execution
from learnedopt.core.objective import LogMeans, SumOfLosses
from learnedopt.core.registry import Choice
from learnedopt.estimators.evolution import EvolutionStrategies
from learnedopt.estimators.task_by_task import TaskByTask
from learnedopt.estimators.unrolled import Unrolled
from learnedopt.recipes.recipe import HeldOut, MetaLearning, Recipe

_FAMILY = Choice(
    "image-mlp", {"dataset": "mnist", "hidden": (20,), "activation": "sigmoid", "batch_size": 128, "crop": 20}
)
_QUICK = Choice("adam", {"betas": (0.8, 0.95)})


def normalised_mnist() -> Recipe:
    """The frame's 24 numbers on an MLP with 20 sigmoid units on MNIST, by evolution strategies through 100 steps."""
    return Recipe(
        name="normalised-mnist",
        family=_FAMILY,
        rule=Choice("normalised"),
        horizon=100,
        estimator=EvolutionStrategies(100, num_pairs=8, sigma=0.3),
        objective=LogMeans(1.0),
        num_meta_steps=60,
        num_tasks=2,
        meta=MetaLearning(lr=0.5, final_lr_fraction=0.05, optimizer=_QUICK),
        validation=HeldOut(SumOfLosses(), num_steps=100, num_tasks=8, every=20),
        checkpoint_every=10,
    )


def normalised_mlp_mnist() -> Recipe:
    """A network of 8 units in the frame, by the exact meta-gradient through all 100 steps."""
    return _for_the_course(_for_both_ends("normalised-mlp-mnist-first", "normalised-mlp"), "normalised-mlp-mnist")


def normalised_lstm_mnist() -> Recipe:
    """An LSTM of 10 units in the frame, by the exact meta-gradient through all 100 steps."""
    return _for_the_course(_for_both_ends("normalised-lstm-mnist-first", "normalised-lstm"), "normalised-lstm-mnist")


def _for_both_ends(name: str, rule: str) -> Recipe:
    """Train for the last losses as much as for the whole course."""
    return Recipe(
        name=name,
        family=_FAMILY,
        rule=Choice(rule),
        horizon=100,
        estimator=TaskByTask(Unrolled(100), max_task_grad_norm=1.0, drop_above=10.0),
        objective=LogMeans(1.0),
        num_meta_steps=90,
        num_tasks=4,
        meta=MetaLearning(lr=0.1, final_lr_fraction=0.5, optimizer=_QUICK, average=0.15, rollback_above=1.0),
        validation=HeldOut(SumOfLosses(), num_steps=100, num_tasks=8, every=15),
        execution=Execution(compile=True),
        checkpoint_every=10,
        after=normalised_mnist(),
        start_partly=True,
    )


def _for_the_course(first: Recipe, name: str) -> Recipe:
    """Then train for the whole course more."""
    meta = replace(first.meta, lr=0.15, final_lr_fraction=0.02)
    return replace(
        first, name=name, objective=LogMeans(0.25), num_meta_steps=150, meta=meta, after=first, start_partly=False
    )
