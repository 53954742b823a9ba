"""A learned loss beside the mean squared error that it is judged by: sine waves, after the same steps of descent.

Run ``python benchmarks/results_learned_loss.py`` (4 CPU minutes; it goes on where it stopped). The recipe
``learned-loss-sine`` is meta-trained with three seeds. Two others descend the plain loss: at the rate that was learned
together with the loss, and at the best of many rates, by as many validation tasks as test tasks. Nothing is chosen on
the test tasks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from learnedopt import InnerLoop, Tape, Tasks, Theta, recipes
from learnedopt import optimizers as rules
from learnedopt.run import build, train
from learnedopt.training.tracking import Tracking

RECIPE = recipes.meta_training("learned-loss-sine")
SEEDS = (0, 1, 2)
RATES = [10 ** (-2.4 + 0.1 * i) for i in range(15)]
"""From 0.004 to 0.1, where descent runs away."""
NUM_TASKS, VALIDATION, TEST = 2000, 10_000, 20_000
"""How many tasks, and seeds that no training draws from."""


def losses(loop: InnerLoop, theta: Theta, tasks: Tasks) -> Tensor:
    """Return each task's loss on its other points after the recipe's steps."""
    end = loop.run(theta, loop.start(tasks), RECIPE.validation.num_steps, Tape.NONE).end
    return loop.losses(theta, end, "valid")


def plain(loop: InnerLoop, rate: float, tasks: Tasks) -> Tensor:
    """Return the same of descent on the plain loss."""
    return losses(InnerLoop(loop.family, rules.make("sgd", lr=rate, learn=()), loop.execution), {}, tasks)


def main() -> None:
    """Train what is not trained yet, and print the table."""
    torch.set_num_threads(1)
    family = build(RECIPE)[0].family
    validation, test = (family.sample(NUM_TASKS, torch.Generator().manual_seed(seed)) for seed in (VALIDATION, TEST))
    print(
        "| seed | descent on | rate | test loss | beside the learned loss | of 2,000 tasks |\n|---|---|---|---|---|---|"
    )
    for seed in SEEDS:
        recipe = replace(RECIPE, seed=seed)
        loop = build(recipe)[0]
        result = train(recipe, Path("runs") / f"{RECIPE.name}-{seed}", Tracking("disabled"))
        assert result is not None
        theta = result.best_theta
        learned, own = losses(loop, theta, test), float(theta["rule/lr"].exp())
        means = [float(plain(loop, rate, validation).mean()) for rate in RATES]
        tuned = min((mean, rate) for mean, rate in zip(means, RATES, strict=True) if mean == mean)[1]
        print(f"| {seed} | the learned loss | {own:.4f} | {float(learned.mean()):.3f} | | |")
        for rate, what in ((own, "its rate"), (tuned, f"the best of {len(RATES)} rates")):
            found = plain(loop, rate, test)
            more = found - learned
            error = float(more.std() / len(more) ** 0.5)
            print(
                f"| {seed} | the plain loss, {what} | {rate:.4f} | {float(found.mean()):.3f} | "
                f"+{float(more.mean()):.3f} ± {error:.3f} | worse on {int((more > 0).sum()):,} |", flush=True
            )  # fmt: skip


if __name__ == "__main__":
    main()
