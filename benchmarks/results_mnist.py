"""The packaged ``lstm-mnist``, unchanged, on what it was trained for and on other problems.

Run ``python benchmarks/results_mnist.py`` (about half an hour on one core), or name settings to run only those. Tasks
have seeds that meta-training never sees. "mnist" draws their minibatches from the 50,000 training images, as the
published figures do; "mnist_test_images" from the 10,000 test images, which a hundred minibatches see once and more.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import learnedopt
from learnedopt.evaluation.comparison import Comparison
from learnedopt.evaluation.evaluate import compare

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "mnist.png"
SETTINGS: dict[str, tuple[int, dict[str, Any], str]] = {
    "mnist": (100, {}, "as meta-trained"),
    "mnist_test_images": (100, {"meta_split": "test"}, "on test images"),
    "mnist_200_steps": (200, {}, "as meta-trained"),
    "mnist_40_units": (100, {"hidden": (40,)}, "40 hidden units"),
    "mnist_2_layers": (100, {"hidden": (20, 20)}, "two hidden layers"),
    "mnist_relu": (100, {"activation": "relu"}, "ReLU"),
}


def measure(num_steps: int, options: dict[str, Any], num_tasks: int = 16) -> Comparison:
    """Compare on fresh tasks; the baselines are tuned on others of the same kind."""
    problem = {"dataset": "mnist", "hidden": (20,), "activation": "sigmoid", "batch_size": 128, **options}
    return compare(
        {"LSTM": learnedopt.load("lstm-mnist")},
        learnedopt.tasks.make("image-mlp", **problem),
        num_steps=num_steps,
        num_tasks=num_tasks,
        num_tuning_tasks=3,
        tune_for="last_ten",
    )


def main(names: list[str]) -> None:
    """Print the tables and draw the curves of the first."""
    torch.set_num_threads(1)
    for name in names or SETTINGS:
        num_steps, options, label = SETTINGS[name]
        comparison = measure(num_steps, options)
        print(f"### `{name}`: {num_steps} steps, {label}\n\n{comparison.markdown()}", flush=True)
        if name == "mnist":
            comparison.draw(FIGURE, "MLP with 20 sigmoid units on MNIST")


if __name__ == "__main__":
    main(sys.argv[1:])
