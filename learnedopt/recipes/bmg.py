"""Bootstrapped against ordinary meta-gradients (Flennerhag et al. 2022), learning rates and momentum during one run."""

from __future__ import annotations

from learnedopt.core.carry import Tape
from learnedopt.core.execution import Execution
from learnedopt.core.objective import FinalLoss
from learnedopt.core.registry import Choice
from learnedopt.estimators.unrolled import Truncated
from learnedopt.objectives.target_matching import BootstrappedTarget
from learnedopt.recipes.online import Fixed, Learned, OnlineLearning
from learnedopt.recipes.recipe import ALL_TASKS

HEAVY_BALL = Choice(
    "reparametrized",
    {
        "rule": {"name": "momentum", "options": {"lr": 0.1, "momentum": 0.1}},
        "scales": {"lr": "log", "momentum": "logit"},
    },
)
"""Heavy-ball momentum that learns the logarithm of its rate and the logit of its momentum, both from 0.1."""

BOOTSTRAPPED = "bootstrapped, K = 1, L = 8, from the rollout"
"""The method of ``bmg-mnist-permuted`` that is compared."""
COMPARED = {
    "ordinary, K = 1": "0.85, stretch 0.78",
    "ordinary, K = 4": "",
    "Adam": "0.6",
    "SGD": "",
}
"""What it is compared with, and the ratio of the cumulative losses that is aimed at."""


def bmg_mnist_permuted() -> OnlineLearning:
    """Bootstrapped and ordinary meta-gradients learn rates and momentum on MNIST with labels that change."""
    options = {"hidden": (32,), "activation": "relu", "batch_size": 32, "size": 14, "standardize": True}
    rates = (0.01, 0.02, 0.04, 0.08, 0.16)
    return OnlineLearning(
        name="bmg-mnist-permuted",
        family=Choice("image-mlp", {**options, "relabel_every": 500}),
        rule=HEAVY_BALL,
        methods={
            "SGD": Fixed(Choice("sgd"), (0.1, 0.2, 0.3, 0.4, 0.6)),
            "Adam": Fixed(Choice("adam"), (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
            "ordinary, K = 1": Learned(_windows(1), FinalLoss(), rates),
            BOOTSTRAPPED: Learned(_windows(1), BootstrappedTarget(8, 1.0, continue_from="rollout"), rates),
            "ordinary, K = 4": Learned(_windows(4), FinalLoss(), rates),
            "bootstrapped, K = 4, L = 16": Learned(_windows(4), BootstrappedTarget(16, 1.0), rates),
        },
        num_steps=5000,
    )


def bmg_quadratic() -> OnlineLearning:
    """Bootstrapped and ordinary meta-gradients learn rate and momentum while random quadratics are minimised."""
    options = {"lr": 1e-3, "momentum": 0.1}
    rates = (0.01, 0.03, 0.1, 0.3)
    return OnlineLearning(
        name="bmg-quadratic",
        family=Choice("quadratic", {"dim": 10, "start_scale": 1.0}),
        rule=Choice("reparametrized", {**HEAVY_BALL.options, "rule": {"name": "momentum", "options": options}}),
        methods={
            "SGD": Fixed(Choice("sgd"), (0.001, 0.003, 0.01, 0.03)),
            "ordinary, K = 5": Learned(_windows(5), FinalLoss(), rates),
            "bootstrapped, K = 5, L = 5": Learned(_windows(5), BootstrappedTarget(5, 1e-3), rates),
        },
        num_steps=300,
        num_tasks=16,
        seeds=(0, 1, 2),
        tuning_seeds=(1000,),
        execution=Execution(chunk_size=ALL_TASKS),
    )


def _windows(num_steps: int) -> Truncated:
    return Truncated(num_steps, tape=Tape.FULL)
