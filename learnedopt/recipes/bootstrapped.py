"""Bootstrapped meta-gradients (Flennerhag et al. 2022), on an MLP for MNIST."""

from __future__ import annotations

from dataclasses import replace

from learnedopt.core.execution import Execution
from learnedopt.core.inner import Tape
from learnedopt.core.objective import FinalLoss, SumOfLosses
from learnedopt.core.registry import Choice
from learnedopt.estimators.unrolled import Truncated, Unrolled
from learnedopt.objectives.matching import KLDivergence
from learnedopt.objectives.target_matching import BootstrappedTarget
from learnedopt.recipes.lstm import lstm_mnist
from learnedopt.recipes.rates import meta_sgd_mnist
from learnedopt.recipes.recipe import HeldOut, MetaLearning, Recipe


def bootstrapped_mnist() -> Recipe:
    """Learned rates for the MNIST MLP, meta-trained towards a bootstrapped target (Flennerhag et al. 2022)."""
    return replace(
        meta_sgd_mnist(),
        name="bootstrapped-mnist",
        rule=Choice("learned-rates", {"rates": "coordinate", "lr": 3.0}),
        estimator=Truncated(5, horizon=100, tape=Tape.FULL),
        objective=BootstrappedTarget(num_target_steps=6, step_size=1.0),
        validation=HeldOut(FinalLoss(), num_steps=100, num_tasks=32, every=50),
    )


def meta_sgd_bootstrapped() -> Recipe:
    """Meta-SGD as in meta-sgd-mnist, towards a bootstrapped target: 5 recorded steps of 10 (Flennerhag et al. 2022)."""
    # A learned start has a gradient where an episode starts, and nowhere else: every meta-step starts one.
    return replace(
        meta_sgd_mnist(),
        name="meta-sgd-bootstrapped",
        estimator=Unrolled(5),
        objective=BootstrappedTarget(num_target_steps=6, step_size=1.0),
    )


def recurrent_bootstrapped() -> Recipe:
    """A recurrent net that sets rate, momentum and decay on the MNIST MLP, towards a bootstrapped target, by KL."""
    return replace(
        lstm_mnist(),
        name="recurrent-bootstrapped",
        rule=Choice("recurrent-hyperparameters", {"lr": 0.1, "momentum": 0.9}),
        estimator=Truncated(10, horizon=100, tape=Tape.FULL),
        # The squared distance drives rates up here as well, long before it is infinite: outputs are matched.
        objective=BootstrappedTarget(num_target_steps=11, step_size=1.0, matching=KLDivergence()),
        num_meta_steps=150,
        num_tasks=4,
        meta=MetaLearning(lr=3e-3, final_lr_fraction=0.01, max_grad_norm=1.0),
        validation=HeldOut(FinalLoss(), num_steps=100, num_tasks=16, every=50),
        execution=Execution(chunk_size=4),
    )


def lstm_mnist_bootstrapped() -> Recipe:
    """The LSTM of lstm-mnist, towards a bootstrapped target, by KL: 5 recorded steps of 10 (Flennerhag et al. 2022)."""
    return replace(
        lstm_mnist(),
        name="lstm-mnist-bootstrapped",
        estimator=Truncated(5, horizon=100, tape=Tape.FULL),
        # Its inputs are nearly normalised, so that squared distances would grow with the updates: outputs are matched.
        objective=BootstrappedTarget(num_target_steps=6, step_size=1.0, matching=KLDivergence()),
        num_meta_steps=500,
        validation=HeldOut(SumOfLosses(), num_steps=100, num_tasks=4, every=100),
    )
