"""Dataset distillation on MNIST: how well fresh MLPs train on nothing but a few learned images.

Run ``python benchmarks/results_distill.py`` (hours on one core: runs are kept in ``runs/`` and go on where they
stopped), or name runs to meta-train only those; ``--table`` measures those that are there. Meta-training sees the
50,000 training images, the settings were chosen on the 10,000 after them, and the test images are used here alone.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnedopt import (
    DistilledData,
    EvolutionStrategies,
    Execution,
    InnerLoop,
    Tape,
    Theta,
    UpdateRule,
    load_checkpoint,
    recipes,
)
from learnedopt.core.files import write_json
from learnedopt.estimators.unrolled import Unrolled
from learnedopt.evaluation.style import add_axes, draw_lines, floats, labelled, legend_below, new_figure, write_figure
from learnedopt.optimizers import SGD
from learnedopt.recipes import Recipe
from learnedopt.recipes.distill import NUM_STEPS, mlp, rates
from learnedopt.run import train
from learnedopt.run_folder import find_run
from learnedopt.tasks import ImageMLP
from learnedopt.tasks.data import images
from learnedopt.training.json_tracker import read_metrics
from learnedopt.training.tracking import Tracking

RUNS = Path("runs")
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "distill.png"
NUM_STARTS = 32
TEST_SEED = 7919
"""Of the fresh MLPs that are tested; their starts are none that meta-training or validation has seen."""


def one(seed: int = 0) -> Recipe:
    """Return the recipe: one image a class."""
    return replace(recipes.meta_training("distill-mnist"), seed=seed)


def shorter(num_steps: int) -> Recipe:
    """Return the recipe with fewer inner steps, in meta-training and after it."""
    recipe = one()
    return replace(
        recipe,
        rule=rates(num_steps),
        estimator=Unrolled(num_steps),
        validation=replace(recipe.validation, num_steps=num_steps),
    )


def smooth(num_meta_steps: int, num_tasks: int) -> Recipe:
    """Return the recipe with gelu for an activation, which learns faster, and another number of meta-steps."""
    return replace(one(), family=mlp("gelu"), num_meta_steps=num_meta_steps, num_tasks=num_tasks)


def bounded() -> Recipe:
    """Return 4,000 meta-steps with all rates between 0 and 1."""
    recipe = smooth(4000, 2)
    return replace(recipe, rule=replace(recipe.rule, options={**recipe.rule.options, "scales": {"lr": "logit"}}))


def perturbed() -> Recipe:
    """Return the recipe with evolution strategies for its meta-gradient, for as many CPU seconds."""
    recipe = one()
    return replace(
        recipe,
        estimator=EvolutionStrategies(NUM_STEPS, num_pairs=8, sigma=0.1),
        num_tasks=1,
        num_meta_steps=350,
        meta=replace(recipe.meta, lr=0.03),  # the best of 0.003, 0.01 and 0.03 by validation
        execution=Execution(),
    )


VARIANTS: dict[str, Recipe] = {
    "distill-mnist": one(),
    "distill-mnist-1": one(1),
    "distill-mnist-2": one(2),
    "distill-mnist-ten": recipes.meta_training("distill-mnist-ten"),
    "distill-mnist-10-steps": shorter(10),
    "distill-mnist-5-steps": shorter(5),
    "distill-mnist-5-steps-gelu": replace(shorter(5), family=mlp("gelu"), num_meta_steps=3000),
    "distill-mnist-es": perturbed(),
    "distill-mnist-gelu": smooth(1500, 8),
    "distill-mnist-4000": smooth(4000, 4),
    "distill-mnist-bounded": bounded(),
}
"""Run -> what it meta-trains."""
LABELS = {
    "distill-mnist": "one image a class",
    "distill-mnist-1": "meta-training seed 1",
    "distill-mnist-2": "meta-training seed 2",
    "distill-mnist-ten": "ten images a class (gelu)",
    "distill-mnist-10-steps": "10 steps",
    "distill-mnist-5-steps": "5 steps",
    "distill-mnist-5-steps-gelu": "5 steps, gelu",
    "distill-mnist-es": "evolution strategies",
    "distill-mnist-gelu": "gelu",
    "distill-mnist-4000": "gelu, 4,000 meta-steps",
    "distill-mnist-bounded": "gelu, 4,000 meta-steps, rates in (0, 1)",
}


class Row(NamedTuple):
    """What a finished run gave: test accuracies of fresh MLPs in per cent, and the course of its validation."""

    accuracies: Tensor
    meta_steps: int
    starts: int
    cpu_seconds: float | None
    best_step: int
    best: float
    last: float

    def text(self, label: str) -> str:
        """Return the row of the table."""
        spent = "" if self.cpu_seconds is None else f"{self.cpu_seconds:,.0f}"
        return (
            f"| {label} | {interval(self.accuracies)} | {float(self.accuracies.min()):.1f} | {self.meta_steps:,} × "
            f"{self.starts} | {spent} | {self.best:.3f} at {self.best_step:,} | {self.last:.3f} |"
        )


HEADER = (
    "| run | test accuracy, % | worst start | meta-steps × starts | CPU s | best validation loss | last |\n"
    "|---|---|---|---|---|---|---|"
)


def meta_train(name: str) -> None:
    """Meta-train a run where it is not finished yet, and keep the CPU seconds it took."""
    folder, recipe = RUNS / name, VARIANTS[name]
    if (folder / "theta.safetensors").exists() and find_run(folder, recipe):
        return
    spent, began = folder / "cpu.json", cpu_seconds()
    before = json.loads(spent.read_text("utf-8"))["seconds"] if spent.exists() else 0.0
    try:
        train(recipe, folder, Tracking("disabled"))
    finally:
        write_json(spent, {"seconds": before + cpu_seconds() - began})


def cpu_seconds() -> float:
    """Return what this process and its children, such as a compiler, have spent."""
    return sum(os.times()[:4])


def tested(rule: UpdateRule, theta: Theta, recipe: Recipe, split: str, seed: int) -> Tensor:
    """Return the accuracies (NUM_STARTS,) of fresh MLPs trained on theta's images, in per cent of a split's images."""
    # What is recorded along the way is of no interest, so that one real image is enough.
    options: dict[str, Any] = {**recipe.family.options, "batch_size": 1, "meta_split": split}
    family = ImageMLP(**options)
    objective = DistilledData((images.NUM_PIXELS,), per_class=len(theta["images"]) // images.NUM_CLASSES)
    loop = InnerLoop(family, rule, Execution(), objective)
    tasks = family.sample(NUM_STARTS, torch.Generator().manual_seed(seed))
    params = loop.run(theta, loop.start(tasks), recipe.validation.num_steps, Tape.NONE).end.params
    pixels, labels = family.data().all_images("train")
    whole = {"inputs": pixels.to(torch.float32) / 255, "targets": labels}
    found = []
    for start in range(NUM_STARTS):
        found.append(family.metrics({k: v[start] for k, v in params.items()}, whole)["accuracy"])
    return 100 * torch.stack(found)


def real(per_class: int, *, means: bool) -> Theta:
    """Return training images in place of learned ones: the first of each class, or each class's mean."""
    pixels, labels = images.load("mnist", "train")
    classes = [pixels[labels == label].to(torch.float32) / 255 for label in range(images.NUM_CLASSES)]
    return {"images": torch.cat([x.mean(0, keepdim=True) if means else x[:per_class] for x in classes])}


def on_real_images(label: str, theta: Theta) -> str:
    """Test real images at the best of nine fixed rates by the validation images, as a row of the table."""
    recipe, rates = one(), [10**power for power in (-2, -1.5, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5)]
    best = max(rates, key=lambda lr: float(tested(SGD(lr, learn=()), theta, recipe, "valid", 0).mean()))
    found = tested(SGD(best, learn=()), theta, recipe, "test", TEST_SEED)
    return f"| {label}, rate {best:.2g} | {interval(found)} | {float(found.min()):.1f} | | | | |"


def interval(found: Tensor) -> str:
    """Return a mean with half its 95 % interval."""
    return f"{float(found.mean()):.2f} ± {1.96 * float(found.std()) / math.sqrt(len(found)):.2f}"


def measure(name: str, split: str = "test", seed: int = TEST_SEED) -> Row:
    """Test a finished run."""
    folder, recipe = RUNS / name, VARIANTS[name]
    rule, _, theta, _ = load_checkpoint(folder)
    course = [(value, step) for step, value in course_of(name)]
    best, best_step = min(course)
    spent = folder / "cpu.json"
    seconds = json.loads(spent.read_text("utf-8"))["seconds"] if spent.exists() else None
    found = tested(rule, theta, recipe, split, seed)
    return Row(found, recipe.num_meta_steps, recipe.num_tasks, seconds, best_step, best, course[-1][0])


def draw(path: Path, learned: dict[str, Theta], courses: dict[str, list[tuple[int, float]]]) -> None:
    """Draw the images, one a class and ten a class, and the validation along meta-training."""
    figure = new_figure(10.5, 3.8)
    grid = figure.add_gridspec(1, 3, width_ratios=(1.6, 1, 1.5))
    for i, ((label, theta), columns) in enumerate(zip(learned.items(), (5, 10), strict=True)):
        axes = figure.add_subplot(grid[i], title=label)
        axes.imshow(sheet(theta["images"], columns), cmap="gray", vmin=-1, vmax=1)
        axes.axis("off")
    right = add_axes(figure, grid[2], xlabel="meta-step", ylabel="validation loss")
    lines = {label: (floats(step for step, _ in c), floats(value for _, value in c)) for label, c in courses.items()}
    draw_lines(right, lines, ["the recipe"], False, True, legend=False)
    legend_below(figure, labelled(right), ncols=3)
    write_figure(figure, path)


def sheet(learned: Tensor, columns: int) -> Tensor:
    """Return images (n, 784), row by row as they come, as one picture; each divided by its largest pixel."""
    side = images.SIDE
    tiles = (learned / learned.abs().amax(1, keepdim=True)).reshape(-1, columns, side, side)
    return tiles.permute(0, 2, 1, 3).reshape(-1, columns * side)


def course_of(name: str) -> list[tuple[int, float]]:
    """Return meta-steps and validation losses of a run."""
    rows = read_metrics(RUNS / name / "metrics.jsonl")
    return [(row["step"], row["validation"]) for row in rows if "validation" in row]


def main(arguments: list[str]) -> None:
    """Meta-train what is not finished, print the table and draw the figure."""
    torch.set_num_threads(1)
    if "--table" not in arguments:
        for name in arguments or VARIANTS:
            meta_train(name)
    if arguments and "--table" not in arguments:
        return
    finished = [name for name in VARIANTS if (RUNS / name / "theta.safetensors").exists()]
    print(HEADER)
    for name in finished:
        print(measure(name).text(LABELS[name]), flush=True)
    for per_class in (1, 10):
        print(on_real_images(f"real images, {per_class} a class", real(per_class, means=False)), flush=True)
    print(on_real_images("the mean image of each class", real(1, means=True)), flush=True)
    pictures = {"one a class": "distill-mnist", "ten a class": "distill-mnist-ten"}
    shown = {
        "the recipe": "distill-mnist",
        "gelu, 4,000 meta-steps": "distill-mnist-4000",
        "the same, rates in (0, 1)": "distill-mnist-bounded",
    }
    if {*pictures.values(), *shown.values()} <= {*finished}:
        learned = {label: load_checkpoint(RUNS / name).theta for label, name in pictures.items()}
        draw(FIGURE, learned, {label: course_of(name) for label, name in shown.items()})


if __name__ == "__main__":
    main(sys.argv[1:])
