"""Rules that evolution strategies trained, against hand-designed ones at tuned rates and the packaged LSTMs.

Run ``python benchmarks/results_evolution_recipes.py`` (a few CPU minutes) after ``python train_meta.py pes-quadratic``
and ``... es-mnist``.
"""

from __future__ import annotations

import warnings

import torch

import learnedopt
from learnedopt.evaluation.comparison import Comparison
from learnedopt.evaluation.evaluate import compare

MNIST = {"dataset": "mnist", "hidden": (20,), "activation": "sigmoid", "batch_size": 128}


def quadratics() -> Comparison:
    """Compare on fresh quadratics, as benchmarks/results_quadratic.py does."""
    family = learnedopt.tasks.make("quadratic", dim=10, meta_split="test")
    candidates = {"pes-quadratic": learnedopt.load("runs/pes-quadratic"), "LSTM": learnedopt.load("lstm-quadratic")}
    return compare(candidates, family, num_tasks=10_000, num_tuning_tasks=1_000, tune_for="sum_of_losses")


def mnist(crop: int) -> Comparison:
    """Compare on the test images, on the central square that the rule was trained on or on another."""
    fresh, others = (
        learnedopt.tasks.make("image-mlp", **MNIST, crop=crop, meta_split=split) for split in ("test", "train")
    )
    candidates = {"es-mnist": learnedopt.load("runs/es-mnist"), "LSTM": learnedopt.load("lstm-mnist")}
    return compare(candidates, fresh, tuning_family=others, num_tasks=32, num_tuning_tasks=8)


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    print(f"#### `pes-quadratic`\n\n{quadratics().markdown()}", flush=True)
    for crop in (28, 20):
        print(f"#### `es-mnist`, the central {crop} x {crop} pixels\n\n{mnist(crop).markdown()}", flush=True)


if __name__ == "__main__":
    main()
