"""Recipes made small: each is valid, keeps its parts, and runs to its end in under a minute."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from learnedopt import (
    EvolutionStrategies,
    FinalLoss,
    PersistentES,
    TaskByTask,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    recipes,
    run,
)
from learnedopt.core.registry import Choice
from learnedopt.recipes import Recipe, Study
from learnedopt.training.tracking import Tracking


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_valid_when_small(name: str) -> None:
    recipe = recipes.make(name)
    small = recipes.smoke(recipe)
    assert type(small) is type(recipe) and small.name == f"{name}-smoke"
    if isinstance(recipe, Study):
        return
    assert isinstance(small, Recipe)
    assert small.num_meta_steps <= 3 and small.num_tasks <= 2 and small.validation.num_tasks <= 2
    assert small.start is None and not small.execution.compile
    assert (small.rule, small.family, small.inner_objective) == (recipe.rule, recipe.family, recipe.inner_objective)
    assert type(small.estimator) is type(recipe.estimator) and type(small.objective) is type(recipe.objective)
    if recipe.after is not None:
        assert small.after is not None and small.after.name == f"{recipe.after.name}-smoke"
    run.build(small)


@pytest.mark.parametrize(
    ("estimator", "small"),
    [
        (Truncated(20, horizon=100), Truncated(5, horizon=10)),
        (Truncated(20, horizon=20), Truncated(5, horizon=5)),
        (Truncated(2, horizon=100), Truncated(2, horizon=4)),
        (TruncatedBackprop(30, 10), TruncatedBackprop(5, 5)),
        (Unrolled(100, segment=10), Unrolled(5, segment=5)),
        (Unrolled(0), Unrolled(0)),
        (PersistentES(10, horizon=100, num_pairs=20, sigma=0.1), PersistentES(5, horizon=10, num_pairs=2, sigma=0.1)),
        (
            TaskByTask(Unrolled(9), ((9, 0.5), (50, 0.5)), EvolutionStrategies(9, 8, 0.1), exact_up_to=9),
            TaskByTask(Unrolled(5), ((5, 1.0),), EvolutionStrategies(5, 2, 0.1), exact_up_to=9),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_estimators_keep_their_shape(estimator: object, small: object) -> None:
    recipe = Recipe("r", Choice("quadratic"), Choice("lstm"), estimator, FinalLoss(), num_meta_steps=9)  # pyright: ignore[reportArgumentType]
    found = recipes.smoke(recipe)
    assert isinstance(found, Recipe) and found.estimator == small


def test_steps_that_a_rule_has_meta_parameters_for_stay() -> None:
    found = recipes.smoke(recipes.meta_training("distill-mnist"))
    assert isinstance(found, Recipe) and found.estimator == Unrolled(20) and found.validation.num_steps == 20


@dataclass(frozen=True)
class _Silent(Study):
    def run(self, folder: Path, tracker: object) -> None:
        raise NotImplementedError


def test_a_study_that_does_not_say_how_it_is_made_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not say how it is made small: let _Silent\.small return it"):
        recipes.smoke(_Silent("silent"))


@pytest.mark.long
@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_runs_small_in_under_a_minute(name: str, tmp_path: Path, data_root: Path) -> None:
    began = time.process_time()
    small = recipes.smoke(recipes.make(name))
    run.train(small, tmp_path / name, Tracking("disabled"))
    assert json.loads((tmp_path / name / "config.json").read_text("utf-8"))["recipe"]["name"] == small.name
    if isinstance(small, Recipe) and small.compare:
        compared = json.loads((tmp_path / name / "evaluation.json").read_text("utf-8"))
        assert next(iter(compared["optimizers"])) == name  # the run's name, not the recipe's
    assert time.process_time() - began < 60
