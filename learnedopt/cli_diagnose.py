"""The command ``learnedopt diagnose``: which estimator of the meta-gradient a recipe should take."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from learnedopt.cli_recipe import Chosen
    from learnedopt.core.estimator import GradientEstimator
    from learnedopt.evaluation.diagnose_plans import Tried
    from learnedopt.recipes import Recipe


def diagnose(
    chosen: Chosen,
    theta: str | None = None,
    horizon: int | None = None,
    tasks: int | None = None,
    batches: int = 16,
    truth_batches: int | None = None,
    budget: float | None = None,
    memory_limit: float | None = None,
    truth_dtype: Literal["float64", "own"] = "float64",
    compile: bool = False,
    out: Path | None = None,
) -> int:
    """Say which estimator of the meta-gradient suits a recipe.

    Takes the meta-gradient of a recipe by every estimator that applies, on the same tasks, and compares it with the
    exact one through the whole episode: bias, variance, cosine, time and peak memory, and which to take by a stated
    rule. Writes a table (diagnosis.md), all numbers (diagnosis.json) and a figure (diagnosis.png). Bias and variance
    depend on theta: diagnose where training starts, and a trained one.

    Args:
        chosen: the recipe
        theta: a run's folder, a checkpoint or a packaged name: where; by default where training starts
        horizon: inner steps of an episode; by default the recipe's
        tasks: of a batch; by default the recipe's
        batches: estimates of each
        truth_batches: exact gradients; by default 4 times --batches
        budget: seconds that errors are compared at; by default those of one exact gradient
        memory_limit: MB above which nothing is recommended
        truth_dtype: of the exact gradients; own is the recipe's
        compile: compile as the recipe says; by default nothing is compiled
        out: a folder; by default runs/diagnose-RECIPE
    """
    import torch

    from learnedopt.evaluation import diagnose as evaluation
    from learnedopt.evaluation.diagnose_plans import spelled
    from learnedopt.evaluation.diagnose_report import OWN
    from learnedopt.recipes import Study
    from learnedopt.run import build
    from learnedopt.stages import start_theta

    recipe = chosen.recipe
    if isinstance(recipe, Study):
        raise ValueError(f"{recipe.name} sets several methods side by side; diagnose a recipe of one meta-training")
    recipe = _asked(recipe, theta, compile=compile)
    if memory_limit is not None and not 0 < memory_limit < math.inf:
        raise ValueError(f"--memory-limit {memory_limit} is no size: pass a positive, finite number of MB")
    horizon = horizon_of(recipe, horizon)
    if recipe.horizon is not None:
        recipe = replace(recipe, horizon=horizon)
    torch.set_num_threads(recipe.num_threads)
    loop, _ = build(recipe)
    start = start_theta(recipe, loop, Path())
    out = out or Path("runs") / f"diagnose-{chosen.name}"
    out.mkdir(parents=True, exist_ok=True)  # before the work, which may take minutes
    found = evaluation.diagnose(
        loop, recipe.objective, start, horizon=horizon, num_tasks=recipe.num_tasks if tasks is None else tasks,
        num_batches=batches, num_truth_batches=truth_batches, seed=recipe.seed, also=_more(recipe.estimator, horizon),
        budget=budget, memory_limit=None if memory_limit is None else int(memory_limit * 1e6),
        truth_dtype=torch.float64 if truth_dtype == "float64" else None,
        report=lambda line: print(line, flush=True),
    )  # fmt: skip
    about = {"recipe": chosen.name, "set": chosen.changes, "theta": recipe.start, OWN: spelled(recipe.estimator)}
    found = replace(found, settings={**about, **found.settings})
    print(f"\n{found.to_markdown()}", flush=True)
    paths = found.save(out)
    print("Written: " + ", ".join(map(str, paths.values())))
    return 0


def _asked(recipe: Recipe, theta: str | None, *, compile: bool) -> Recipe:
    """Return the recipe at the theta that was asked for, and compiled only where that was."""
    if not compile:
        recipe = replace(recipe, execution=replace(recipe.execution, compile=False))
    if theta is not None:
        return replace(recipe, start=theta, after=None, start_partly=False)
    if recipe.after is not None:
        raise ValueError(
            f"{recipe.name} starts where the stage {recipe.after.name!r} ends; name that stage's folder with --theta"
        )
    return recipe


def horizon_of(recipe: Recipe, asked: int | None) -> int:
    """Return the inner steps of an episode: as asked, else of the recipe's estimator, else of its validation.

    Raises:
        ValueError: the estimator is of a kind that says nothing of its steps.
    """
    from learnedopt.config import as_config
    from learnedopt.estimators.whole_episodes import pairs_of

    if asked is not None:
        return asked
    told = as_config(recipe.estimator)
    told = told.get("back_propagated") or told.get("estimator") or told
    longest = max((steps for steps, _ in pairs_of(as_config(recipe.estimator).get("horizons"))), default=None)
    endless = told["type"] == "Truncated" and told["horizon"] is None
    found = longest or told.get("horizon") or (recipe.validation.num_steps if endless else told.get("num_steps"))
    if found is None:
        raise ValueError(f"{recipe.estimator!r} says nothing of how long an episode is; pass --horizon")
    return found


def _more(own: GradientEstimator, horizon: int) -> dict[str, Tried]:
    """Return the recipe's own estimator, where it is of this horizon, and other kinds that nobody has a hint for."""
    from learnedopt.estimators.registry import ESTIMATORS
    from learnedopt.evaluation.diagnose_plans import HINTS, NO_HINT, windows_of

    known = {*HINTS, type(own)}
    found: dict[str, Tried] = {kind.__name__: NO_HINT for kind in ESTIMATORS if kind not in known}
    try:
        windows_of(own, horizon)
    except ValueError as error:
        return {**found, "the recipe's": str(error)}
    return {**found, "the recipe's": own}
