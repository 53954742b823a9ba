"""Meta-SGD and bootstrapped learned rates against gradient descent at its best fixed rate, on the MNIST MLP.

Run ``python benchmarks/results_rates.py`` after ``python train_meta.py meta-sgd-mnist`` and ``... bootstrapped-mnist``.
With all rates equal either rule is gradient descent, so that is the rule at a fixed rate.
"""

from __future__ import annotations

import learnedopt
from learnedopt.evaluation.evaluate import compare, hand_designed

NUM_STEPS = {"meta-sgd-mnist": 10, "bootstrapped-mnist": 100}
SGD = {"SGD": hand_designed("sgd", low=-4, high=2)}  # half decades: 13 rates


def main() -> None:
    """Print the two tables."""
    problem = {"dataset": "mnist", "hidden": (20,), "activation": "sigmoid", "batch_size": 128}
    fresh, others = (learnedopt.tasks.make("image-mlp", **problem, meta_split=split) for split in ("test", "train"))
    for name, num_steps in NUM_STEPS.items():
        comparison = compare(
            {name: learnedopt.load(f"runs/{name}")},
            fresh,
            tuning_family=others,
            num_steps=num_steps,
            num_tasks=200,
            num_tuning_tasks=16,
            baselines=SGD,
        )
        print(f"## {name}\n\n{comparison.markdown()}", flush=True)


if __name__ == "__main__":
    main()
