"""The packaged ``lstm-mnist``, unchanged, on what it was trained for and on five other problems.

Run ``python benchmarks/results_mnist.py`` (about half an hour on one core). Tasks are drawn from the test images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import learnedopt
from learnedopt.comparison import Comparison
from learnedopt.evaluate import compare
from learnedopt.plots import plot_curves

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "mnist": (100, {}),
    "mnist_200_steps": (200, {}),
    "mnist_40_units": (100, {"hidden": (40,)}),
    "mnist_2_layers": (100, {"hidden": (20, 20)}),
    "mnist_relu": (100, {"activation": "relu"}),
    "fashion_mnist": (100, {"dataset": "fashion-mnist"}),
}


def measure(num_steps: int, options: dict[str, Any], num_tasks: int = 32) -> Comparison:
    """Compare on fresh tasks from test images, the baselines tuned on tasks from training images."""
    problem = {"dataset": "mnist", "hidden": (20,), "activation": "sigmoid", "batch_size": 128, **options}
    fresh, others = (learnedopt.tasks.make("image-mlp", **problem, meta_split=split) for split in ("test", "train"))
    return compare(
        {"LSTM": learnedopt.load("lstm-mnist")},
        fresh,
        tuning_family=others,
        num_steps=num_steps,
        num_tasks=num_tasks,
        num_tuning_tasks=4,
        tune_for="last_ten",
    )


def main() -> None:
    """Print the tables and draw the curves."""
    for name, (num_steps, options) in SETTINGS.items():
        comparison = measure(num_steps, options)
        print(f"## {name}: {num_steps} steps, {options or 'as meta-trained'}\n\n{comparison.markdown()}", flush=True)
        curves = {label: outcome.curve for label, outcome in comparison.outcomes.items()}
        plot_curves(FIGURES / f"{name}.png", curves, emphasis=["LSTM"], title=name.replace("_", " "))


if __name__ == "__main__":
    main()
