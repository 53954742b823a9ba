"""Any recipe, made so small that it ends in under a minute: to see that all of it works before hours are spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from learnedopt.core.containers import is_mapping
from learnedopt.estimators.implicit import Implicit
from learnedopt.recipes.recipe import Recipe
from learnedopt.recipes.study import Study

META_STEPS, TASKS, STEPS, PAIRS = 3, 2, 5, 2
"""The most there are of each: meta-steps, tasks a meta-batch and held out, inner steps of a window, particle pairs."""


def smoke(recipe: Recipe | Study) -> Recipe | Study:
    """Return a recipe of the same parts that is over in under a minute; what it learns is worth nothing.

    Few meta-steps, on few tasks, over short windows, two of which are an episode; as many inner steps as the rule has
    meta-parameters for stay, and those of ``Implicit``, whose inner problem has to be solved. Nothing is compiled, and
    theta starts anew instead of from another run's. Earlier stages are made small too. Its name ends in ``-smoke``. A
    study says itself what it is when small.

    Raises:
        ValueError: it is a study that does not say so.
    """
    name = f"{recipe.name}-smoke"
    if isinstance(recipe, Study):
        return replace(recipe.small(), name=name)
    steps = max([STEPS, *_of_rule(recipe.rule.options)])
    meta, held_out = recipe.meta, recipe.validation
    after = None if recipe.after is None else smoke(recipe.after)
    assert after is None or isinstance(after, Recipe)
    return replace(
        recipe,
        name=name,
        num_meta_steps=min(recipe.num_meta_steps, META_STEPS),
        num_tasks=min(recipe.num_tasks, TASKS),
        estimator=_small(recipe.estimator, steps),
        objective=_small(recipe.objective, steps),
        horizon=recipe.horizon and min(recipe.horizon, steps),
        meta=replace(meta, micro_batch=meta.micro_batch and min(meta.micro_batch, TASKS)),
        validation=replace(
            held_out, objective=_small(held_out.objective, steps), num_steps=min(held_out.num_steps, steps),
            num_tasks=min(held_out.num_tasks, TASKS),
        ),
        execution=replace(recipe.execution, compile=False),
        start=None,
        start_partly=recipe.start_partly and after is not None,
        after=after,
    )  # fmt: skip


def _small(part: Any, steps: int) -> Any:
    """Return an estimator or objective of few steps; anything else, and what it has no such field of, as it is."""
    if not dataclasses.is_dataclass(part) or isinstance(part, type | Implicit):
        return part
    most = {
        "num_steps": steps, "num_backward_steps": steps, "segment": steps, "num_target_steps": steps + 1,
        "num_pairs": PAIRS,
    }  # fmt: skip
    found = {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.init}
    small = {name: min(found[name], most[name]) for name in found.keys() & most.keys() if found[name] is not None}
    small |= {name: _small(value, steps) for name, value in found.items() if dataclasses.is_dataclass(value)}
    if found.get("horizon") is not None and "num_steps" in found:
        windows = found["horizon"] // max(found["num_steps"], 1)
        small["horizon"] = min(windows, 2) * small["num_steps"]
    if found.get("horizons"):  # pairs of inner steps and a weight
        small["horizons"] = ((steps, 1.0),)
    return replace(part, **small)


def _of_rule(options: Mapping[str, Any]) -> Iterator[int]:
    """Yield every number of inner steps that a rule has meta-parameters for, those of rules in it too."""
    for key, value in options.items():
        if key == "num_steps" and isinstance(value, int):
            yield value
        elif is_mapping(value):
            yield from _of_rule(value)
