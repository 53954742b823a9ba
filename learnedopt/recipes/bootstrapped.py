"""Bootstrapped meta-gradients (Flennerhag et al. 2022), on an MLP for MNIST."""

from __future__ import annotations

from dataclasses import replace

from learnedopt.core.inner import Tape
from learnedopt.core.objective import FinalLoss
from learnedopt.core.registry import Choice
from learnedopt.estimators.unrolled import Truncated
from learnedopt.objectives.target_matching import BootstrappedTarget
from learnedopt.recipes.rates import meta_sgd_mnist
from learnedopt.recipes.recipe import HeldOut, Recipe


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
