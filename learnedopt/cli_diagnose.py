"""The command ``learnedopt diagnose``: which estimator of the meta-gradient a recipe should take."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learnedopt.cli_train import add_recipe_arguments, configured, list_recipes

if TYPE_CHECKING:
    from learnedopt.core.estimator import GradientEstimator
    from learnedopt.evaluation.diagnose_plans import Tried
    from learnedopt.recipes import Recipe


def add_parser(commands: Any) -> None:
    """Add ``diagnose`` to the commands of a parser."""
    about = "say which estimator of the meta-gradient suits a recipe"
    parser = commands.add_parser(
        "diagnose",
        help=about,
        description="Take the meta-gradient of a recipe by every estimator that applies, on the same tasks, and "
        "compare it with the exact one through the whole episode: bias, variance, cosine, time and peak memory, and "
        "which to take by a stated rule. Writes a table (diagnosis.md), all numbers (diagnosis.json) and a figure "
        "(diagnosis.png). Bias and variance depend on theta: diagnose where training starts, and a trained one.",
    )
    parser.set_defaults(command=run)
    add_recipe_arguments(parser)
    parser.add_argument(
        "--theta", "--checkpoint", metavar="PATH",
        help="a run's folder, a checkpoint or a packaged name: where (default: where training starts)",
    )  # fmt: skip
    parser.add_argument("--horizon", type=int, metavar="N", help="inner steps of an episode (default: the recipe's)")
    parser.add_argument("--tasks", type=int, metavar="N", help="of a batch (default: the recipe's)")
    parser.add_argument("--batches", type=int, default=16, metavar="N", help="estimates of each (default 16)")
    parser.add_argument("--truth-batches", type=int, metavar="N", help="exact gradients (default: 4 times --batches)")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="errors are compared at (default: one exact gradient's)"
    )
    parser.add_argument("--memory-limit", type=float, metavar="MB", help="above which nothing is recommended")
    parser.add_argument(
        "--truth-dtype", choices=("float64", "own"), default="float64", help="own: the recipe's (default float64)"
    )
    parser.add_argument("--compile", action="store_true", help="as the recipe says; by default nothing is compiled")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default runs/diagnose-RECIPE")


def run(arguments: argparse.Namespace) -> int:
    """Diagnose the recipe that the arguments name; return 0."""
    import torch

    from learnedopt.evaluation.diagnose import diagnose
    from learnedopt.evaluation.diagnose_plans import spelled
    from learnedopt.evaluation.diagnose_report import OWN
    from learnedopt.recipes import Study
    from learnedopt.run import build
    from learnedopt.stages import start_theta

    if arguments.list:
        return list_recipes()
    recipe = configured(arguments)
    if isinstance(recipe, Study):
        raise ValueError(f"{recipe.name} sets several methods side by side; diagnose a recipe of one meta-training")
    recipe, limit = _asked(recipe, arguments), arguments.memory_limit
    if limit is not None and not 0 < limit < math.inf:
        raise ValueError(f"--memory-limit {limit} is no size: pass a positive, finite number of MB")
    horizon = horizon_of(recipe, arguments.horizon)
    if recipe.horizon is not None:
        recipe = replace(recipe, horizon=horizon)
    torch.set_num_threads(recipe.num_threads)
    loop, _ = build(recipe)
    theta = start_theta(recipe, loop, Path())
    out = arguments.out or Path("runs") / f"diagnose-{arguments.recipe}"
    out.mkdir(parents=True, exist_ok=True)  # before the work, which may take minutes
    found = diagnose(
        loop, recipe.objective, theta, horizon=horizon,
        num_tasks=recipe.num_tasks if arguments.tasks is None else arguments.tasks, num_batches=arguments.batches,
        num_truth_batches=arguments.truth_batches, seed=recipe.seed, also=_more(recipe.estimator, horizon),
        budget=arguments.budget, memory_limit=None if limit is None else int(limit * 1e6),
        truth_dtype=torch.float64 if arguments.truth_dtype == "float64" else None,
        report=lambda line: print(line, flush=True),
    )  # fmt: skip
    about = {
        "recipe": arguments.recipe, "set": arguments.set, "theta": recipe.start,
        OWN: spelled(recipe.estimator),
    }  # fmt: skip
    found = replace(found, settings={**about, **found.settings})
    print(f"\n{found.to_markdown()}", flush=True)
    paths = found.save(out)
    print("Written: " + ", ".join(map(str, paths.values())))
    return 0


def _asked(recipe: Recipe, arguments: argparse.Namespace) -> Recipe:
    """Return the recipe at the theta that was asked for, and compiled only where that was."""
    if not arguments.compile:
        recipe = replace(recipe, execution=replace(recipe.execution, compile=False))
    if arguments.theta is not None:
        return replace(recipe, start=arguments.theta, after=None, start_partly=False)
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
    """Return the recipe's own estimator, where it is of this horizon, and the kinds that nobody has a hint for."""
    from learnedopt.config import INTERCHANGEABLE
    from learnedopt.evaluation.diagnose_plans import HINTS, NO_HINT, windows_of

    found: dict[str, Tried] = {kind.__name__: NO_HINT for kind in INTERCHANGEABLE[0] if kind not in HINTS}
    try:
        windows_of(own, horizon)
    except ValueError as error:
        return {**found, "the recipe's": str(error)}
    return {**found, "the recipe's": own}
