"""A general rule: meta-trained on a mixture of small nets, for nets that it never saw."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from learnedopt.core.execution import Execution
from learnedopt.core.objective import LogMeans
from learnedopt.core.registry import Choice
from learnedopt.estimators.evolution import EvolutionStrategies
from learnedopt.estimators.task_by_task import TaskByTask
from learnedopt.estimators.unrolled import Unrolled
from learnedopt.recipes.recipe import HeldOut, MetaLearning, Recipe

_Member = tuple[float, dict[str, Any]]


def general() -> Recipe:
    """The rule "general" on MLPs, conv nets, transformers and logistic regression; runs of 50 to 800 steps.

    Longer runs come in the second stage, at smaller meta-steps.
    """
    first = _first()
    longer = ((100, 0.4), (200, 0.3), (400, 0.2), (800, 0.1))
    assert isinstance(first.estimator, TaskByTask)
    return replace(
        first,
        name="general",
        estimator=replace(first.estimator, horizons=longer),
        num_meta_steps=50,
        meta=replace(first.meta, lr=0.1),
        after=first,
    )


def _first() -> Recipe:
    """Runs of 50 to 400 steps.

    Exact meta-gradients up to 100 steps, evolution strategies beyond them, on text, and where an exact one is long: on
    transformers and through long runs they explode.
    """
    members = [*_mlps(), *_linear(), *_conv_nets(), *_transformers()]
    text = [i for i, (_, member) in enumerate(members) if _inner(member) == "text-transformer"]
    return Recipe(
        name="general-first",
        family=Choice("mixture", {"members": tuple(members)}),
        rule=Choice("general"),
        horizon=100,
        estimator=TaskByTask(
            Unrolled(100),
            horizons=((50, 0.25), (100, 0.45), (200, 0.2), (400, 0.1)),
            instead=EvolutionStrategies(100, num_pairs=4, sigma=0.4),
            exact_up_to=100,
            instead_for=tuple(text),
            instead_above=3.0,
            max_task_grad_norm=0.3,
            task_weights=tuple(2.5 if i in text else 1.0 for i in range(len(members))),
        ),
        objective=LogMeans(2.0, scale=2 / 3),
        num_meta_steps=100,
        num_tasks=8,
        meta=MetaLearning(
            lr=0.2, final_lr_fraction=0.05, optimizer=Choice("adam", {"betas": (0.8, 0.95)}), average=0.12
        ),
        validation=HeldOut(LogMeans(2.0, scale=2 / 3), num_steps=100, num_tasks=32, every=100),
        execution=Execution(vet=False),
        checkpoint_every=5,
    )


def _rescaled(weight: float, name: str, **options: Any) -> _Member:
    """Half of the tasks in other units: the rule cannot rely on those of one initialisation."""
    family = {"name": name, "options": options}
    scales = {"initial_scale": 0.35, "tensor_scale": 0.4, "probability": 0.5}
    return weight, {"name": "rescaled", "options": {"family": family, **scales}}


def _inner(member: dict[str, Any]) -> str:
    return member["options"]["family"]["name"]


def _mlps() -> list[_Member]:
    """One to four hidden layers of 16 to 96 units, 40 % of the tasks."""
    nets: list[tuple[tuple[int, ...], str, str, int, int]] = [
        ((16,), "sigmoid", "mnist", 28, 128),
        ((48,), "relu", "fashion-mnist", 14, 64),
        ((80,), "tanh", "mnist", 14, 128),
        ((32, 32), "relu", "mnist", 28, 128),
        ((96, 48), "gelu", "fashion-mnist", 14, 64),
        ((24, 24), "sigmoid", "mnist", 14, 128),
        ((40, 40, 40), "relu", "fashion-mnist", 14, 128),
        ((64, 32, 16), "gelu", "mnist", 14, 32),
        ((24, 24, 24, 24), "tanh", "fashion-mnist", 14, 64),
        ((48, 48, 48, 48), "relu", "mnist", 14, 128),
    ]
    return [
        _rescaled(4.0, "image-mlp", dataset=dataset, hidden=hidden, activation=activation, batch_size=batch, crop=28,
                  size=None if side == 28 else side)
        for hidden, activation, dataset, side, batch in nets
    ]  # fmt: skip


def _linear() -> list[_Member]:
    return [_rescaled(3.0, "image-mlp", dataset=data, hidden=(), size=14) for data in ("mnist", "fashion-mnist")]


def _conv_nets() -> list[_Member]:
    nets: list[tuple[tuple[int, ...], str, str, str, int]] = [
        ((8, 16), "none", "relu", "fashion-mnist", 32),
        ((8, 16), "batch", "relu", "mnist", 16),
        ((12, 12), "group", "gelu", "fashion-mnist", 16),
        ((6, 12), "none", "tanh", "mnist", 32),
        ((8, 8), "batch", "gelu", "fashion-mnist", 32),
    ]
    return [
        _rescaled(5.2, "image-conv", dataset=dataset, channels=channels, norm=norm, activation=activation,
                  batch_size=batch, size=14)
        for channels, norm, activation, dataset, batch in nets
    ]  # fmt: skip


def _transformers() -> list[_Member]:
    sizes = [(16, 1, 12), (24, 1, 16), (16, 2, 16), (24, 2, 12)]
    return [
        _rescaled(7.0, "text-transformer", dim=dim, num_layers=layers, num_heads=2, context=context, batch_size=8)
        for dim, layers, context in sizes
    ]
