"""The packaged ``lstm-quadratic`` beside tuned baselines on fresh quadratics (Andrychowicz et al. 2016, figure 4).

Run ``python benchmarks/results_quadratic.py``. Sums over functions have heavy tails, so there are many of them.
"""

from __future__ import annotations

from pathlib import Path

import learnedopt
from learnedopt.evaluation.evaluate import compare
from learnedopt.evaluation.plots import plot_curves

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "quadratic.png"


def main() -> None:
    """Print the table and draw the curves."""
    comparison = compare(
        {"LSTM": learnedopt.load("lstm-quadratic")},
        learnedopt.tasks.make("quadratic", dim=10, meta_split="test"),
        num_steps=100,
        num_tasks=10_000,
        num_tuning_tasks=1_000,
        tune_for="sum_of_losses",
        report=lambda line: print(line, flush=True),
    )
    print(comparison.markdown())
    curves = {label: outcome.curve for label, outcome in comparison.outcomes.items()}
    plot_curves(FIGURE, curves, emphasis=["LSTM"], title="10-d quadratics, mean over functions")


if __name__ == "__main__":
    main()
