"""Optimizers meta-trained towards bootstrapped targets beside the same by the ordinary meta-gradient, on MNIST's MLP.

Run ``python benchmarks/results_bootstrapped.py RECIPE ...``, by default with the three named at the end. Each objective
is meta-trained at three meta-rates, all else as in the recipe, in ``runs/results-bootstrapped``. The rate with the best
validation is then set beside tuned baselines on test images, after as many steps as it was validated for and after five
times as many. Started again it goes on.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import learnedopt
from learnedopt import FinalLoss, recipes, run
from learnedopt.core.objective import MetaObjective
from learnedopt.evaluation.evaluate import BASELINES, Candidate, compare
from learnedopt.training.tracking import Tracking

RUNS = Path("runs/results-bootstrapped")
META_RATES = (1e-3, 3e-3, 1e-2)
NUM_TASKS = {1: 64, 5: 32}
"""How many times the steps validated for -> how many fresh tasks."""


def best(name: str, label: str, objective: MetaObjective) -> tuple[str, Candidate]:
    """Meta-train at every meta-rate; return the label of the best by validation, with its rate, and what it learned."""
    recipe, found = recipes.meta_training(name), {}
    for rate in META_RATES:
        folder = RUNS / f"{name}-{label}-{rate:g}"
        varied = replace(recipe, objective=objective, meta=replace(recipe.meta, lr=rate))
        result = run.train(varied, folder, Tracking("disabled"))
        assert result is not None
        found[rate] = result.best_value, learnedopt.load(folder)
        print(f"{name}, {label}, meta-rate {rate:g}: best validation {result.best_value:.4f}", flush=True)
    rate = min(found, key=lambda rate: found[rate][0])
    return f"{label}, meta-rate {rate:g}", found[rate][1]


def main(names: list[str]) -> None:
    """Print the tables of the recipes named."""
    problem = {"dataset": "mnist", "hidden": (20,), "activation": "sigmoid", "batch_size": 128}
    fresh, others = (learnedopt.tasks.make("image-mlp", **problem, meta_split=split) for split in ("test", "train"))
    for name in names:
        objectives = {"bootstrapped": recipes.meta_training(name).objective, "ordinary": FinalLoss()}
        candidates = dict(best(name, label, objective) for label, objective in objectives.items())
        for times, num_tasks in NUM_TASKS.items():
            num_steps = times * recipes.meta_training(name).validation.num_steps
            comparison = compare(
                candidates,
                fresh,
                tuning_family=others,
                num_steps=num_steps,
                num_tasks=num_tasks,
                num_tuning_tasks=8,
                baselines={label: BASELINES[label] for label in ("SGD", "momentum", "Adam")},
            )
            comparison.save(RUNS / f"{name}-{num_steps}-steps")
            print(f"## {name}\n\n{comparison.markdown()}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["recurrent-bootstrapped", "lstm-mnist-bootstrapped", "meta-sgd-bootstrapped"])
