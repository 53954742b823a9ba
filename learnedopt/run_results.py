"""What a finished run leaves: theta with its description, figures, and a comparison where the recipe asks for one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from learnedopt import checkpoint, plugins
from learnedopt.core import tree
from learnedopt.core.files import plain_json
from learnedopt.core.inner import InnerLoop
from learnedopt.recipes.recipe import Recipe
from learnedopt.run_folder import configuration
from learnedopt.training.json_tracker import read_metrics
from learnedopt.training.result import TrainingResult
from learnedopt.training.tracker import Charting, Tracker


def metadata_of(recipe: Recipe, result: TrainingResult) -> dict[str, Any]:
    """Return what is said of a theta beside it."""
    found = {"meta_step": result.meta_step, "best_validation": result.best_value}
    return plain_json({**configuration(recipe), **plugins.record(), **found})


def save_theta(recipe: Recipe, folder: Path, loop: InnerLoop, result: TrainingResult) -> Path:
    """Write the best theta with its description into the run's folder; return where."""
    metadata, path = metadata_of(recipe, result), folder / "theta.safetensors"
    return checkpoint.save(path, loop.rule, result.best_theta, metadata, loop.inner_objective)


def report(recipe: Recipe, folder: Path, loop: InnerLoop, result: TrainingResult, tracker: Tracker) -> None:
    """Write the best theta and a figure into the run's folder, and tell the tracker."""
    from learnedopt.evaluation.training_plot import plot_training, windows_of

    theta = save_theta(recipe, folder, loop, result)
    figure = folder / "training.png"
    windows = windows_of(configuration(recipe)["estimator"])
    plot_training(figure, read_metrics(folder / "metrics.jsonl"), windows=windows)
    tracker.figure("training", figure)
    tracker.artifact(recipe.name, [theta, theta.with_suffix(".json")], metadata_of(recipe, result))
    if recipe.compare:
        compare(recipe, folder, checkpoint.load_checkpoint(theta), tracker)


def compare(recipe: Recipe, folder: Path, learned: checkpoint.Checkpoint, tracker: Tracker) -> None:
    """Print the learned optimizer beside tuned hand-designed ones on fresh tasks, and draw their loss curves."""
    from learnedopt.evaluation.runs import compare_runs

    comparison = compare_runs(
        {folder.resolve().name: learned}, recipe.family.name, recipe.family.options,
        num_steps=recipe.validation.num_steps, num_tasks=500, report=partial(print, flush=True),
    )  # fmt: skip
    paths = comparison.save(folder)
    print(f"\n{comparison.markdown()}\nLoss curves: {paths['png']}")
    if isinstance(tracker, Charting):
        tracker.lines(
            "losses", {label: tree.numbers(each.curve) for label, each in comparison.outcomes.items()}, "inner step"
        )
    tracker.figure("evaluation", paths["png"])
