"""Data hyper-cleaning: learned weights for 5,000 MNIST images, half of whose labels are random.

Run ``python benchmarks/results_reweighting.py`` (2 CPU minutes). Meta-training sees the 5,000 noisy images and 5,000
clean ones, never the test images. Baselines take the best of five rates, by the loss on the same clean images.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from learnedopt import Execution, FinalLoss, InnerLoop, InnerObjective, Tape, TaskLoss, Theta, recipes
from learnedopt.evaluation.style import COLOURS, EMPHASIS, add_axes, draw_lines, floats, new_figure, write_figure
from learnedopt.inner_objectives import WeightedExamples
from learnedopt.optimizers import SGD
from learnedopt.tasks import NoisyImages

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "reweighting.png"
RECIPE = recipes.meta_training("reweighting-mnist")
NUM_STEPS, RATE = RECIPE.validation.num_steps, RECIPE.rule.options["lr"]
RATES = (0.5, 1.0, 2.0, 4.0, 8.0)
SURE = 1e4
"""A raw weight whose sigmoid is 1, and with the other sign 0."""


class Row(NamedTuple):
    """A way to train: the test accuracy after 40 steps, in per cent, and the rate."""

    label: str
    accuracy: float
    rate: float


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """Return the chance that a positive has a higher score than another, drawn at random; ties count half."""
    higher, lower = scores[positive].double(), scores[~positive].double()
    order = (higher[:, None] - lower).sign()
    return float((order.mean() + 1) / 2)


def meta_train(family: NoisyImages) -> tuple[Theta, list[float]]:
    """Return theta as the recipe trains it, and the loss on the clean images at each meta-step."""
    loop = inner_loop(family, RATE, WeightedExamples(family.num_train))
    generator, losses = torch.Generator().manual_seed(0), []
    theta = loop.init_theta(generator)
    adam = torch.optim.Adam(theta.values(), RECIPE.meta.lr)
    for _ in range(RECIPE.num_meta_steps):
        carry = loop.start(family.sample(1, generator))
        found = RECIPE.estimator.estimate(loop, theta, FinalLoss(), carry)
        for name, value in theta.items():
            value.grad = found.grads[name]
        adam.step()
        losses.append(float(found.loss))
    return theta, losses


def inner_loop(family: NoisyImages, rate: float, objective: InnerObjective) -> InnerLoop:
    return InnerLoop(family, SGD(rate, learn=()), Execution(), objective)


def trained(loop: InnerLoop, theta: Theta) -> tuple[Tensor, Tensor]:
    """Return the loss and the accuracy on the "valid" batch after 40 steps, from one start."""
    tasks = loop.family.sample(1, torch.Generator().manual_seed(1))
    end = loop.run(theta, loop.start(tasks), NUM_STEPS, Tape.NONE).end
    return loop.losses(theta, end, "valid").mean(), loop.metrics(end, "valid")["accuracy"].mean()


def tested(
    label: str,
    family: NoisyImages,
    rates: tuple[float, ...],
    objective: InnerObjective,
    theta: Theta,
    scale: float = 1.0,
) -> Row:
    """Choose a rate by the clean images, then test; ``scale`` multiplies every rate."""
    clean = {rate: float(trained(inner_loop(family, scale * rate, objective), theta)[0]) for rate in rates}
    best = min(rates, key=lambda rate: clean[rate])
    test = dataclasses.replace(family, meta_split="test")
    return Row(label, 100 * float(trained(inner_loop(test, scale * best, objective), theta)[1]), best)


def compare(family: NoisyImages, theta: Theta, wrong: Tensor) -> list[Row]:
    """Return what the learned weights reach, then what others do."""
    objective = WeightedExamples(family.num_train)
    # The mean is over all images: the rate makes up for those of weight 0.
    alone, scale = {"example_weights": torch.where(wrong, -SURE, SURE)}, len(wrong) / int((~wrong).sum())
    return [
        tested("learned weights", family, (RATE,), objective, theta),
        tested("rightly labelled images alone", family, RATES, objective, alone, scale),
        tested("all images alike", family, RATES, TaskLoss(), {}),
        tested("all images, labels right", dataclasses.replace(family, noise=0.0), RATES, TaskLoss(), {}),
    ]


def main() -> None:
    """Print the table and draw the figure."""
    torch.set_num_threads(1)
    print("| labels from seed | AUC | CPU s | way to train | test accuracy, % | rate |\n|---|---|---|---|---|---|")
    for seed in range(3):
        family = NoisyImages(**RECIPE.family.options, data_seed=seed)
        wrong = family.wrong_labels()
        began = time.process_time()
        theta, losses = meta_train(family)
        seconds = time.process_time() - began
        weights = theta["example_weights"].sigmoid()
        auc = area_under_curve(-weights, wrong)
        for label, accuracy, rate in compare(family, theta, wrong):
            print(f"| {seed} | {auc:.3f} | {seconds:.0f} | {label} | {accuracy:.2f} | {rate:g} |", flush=True)
        if seed == 0:
            draw(weights, wrong, losses, auc)


def draw(weights: Tensor, wrong: Tensor, losses: list[float], auc: float) -> None:
    """Draw how the weights of right and wrong labels come apart, and the loss on clean images."""
    figure = new_figure(10, 4)
    figure.get_layout_engine().set(wspace=0.06)
    left = add_axes(figure, (1, 2, 1), xlabel="learned weight of a training image", ylabel="images")
    left.set_title(f"area under the curve {auc:.3f}")
    bins = torch.linspace(0, 1, 41).tolist()
    for label, colour, hatch, chosen in (("right", COLOURS[0], "", ~wrong), ("wrong", EMPHASIS, "////", wrong)):
        shown = f"label is {label} ({int(chosen.sum()):,} images)"
        style = {"histtype": "stepfilled", "facecolor": f"{colour}60", "edgecolor": colour, "hatch": hatch}
        left.hist(weights[chosen].tolist(), bins, label=shown, **style)
    left.legend(frameon=False)
    right = add_axes(
        figure, (1, 2, 2), xlabel="meta-step", ylabel="loss after 40 inner steps", title="5,000 clean images"
    )
    draw_lines(right, {"": (floats(range(1, len(losses) + 1)), losses)}, [""], False, False, legend=False)
    right.set_ylim(0, None)
    write_figure(figure, FIGURE)


if __name__ == "__main__":
    main()
