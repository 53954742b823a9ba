"""What vetting a loop costs, once before its first estimate, beside one meta-step and the whole run of a recipe.

Run ``python benchmarks/results_vetting.py`` (a minute). Compiled recipes run uncompiled here: compiling takes longer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from learnedopt import recipes
from learnedopt.core.estimator import check_loop
from learnedopt.run import build

RECIPES = ("demo", "lstm-mnist", "maml-omniglot", "imaml-regression", "maml-sine", "reweighting-mnist")


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def row(name: str) -> str:
    """Return the table's row of a recipe."""
    recipe = recipes.meta_training(name)
    loop, _ = build(recipe)
    loop = replace(loop, execution=replace(loop.execution, compile=False))
    generator = torch.Generator().manual_seed(0)
    theta = loop.init_theta(generator)
    carry = loop.start(loop.family.sample(recipe.num_tasks, generator))
    loop.begin(theta, carry)  # reads the data
    second = recipe.estimator.takes_second_derivatives
    vetting = seconds(lambda: check_loop(loop, theta, carry, second_derivatives=second))

    def step() -> object:
        return recipe.estimator.estimate(loop, theta, recipe.objective, carry)

    step()
    one = statistics.median(seconds(step) for _ in range(5))
    share = 100 * vetting / (one * recipe.num_meta_steps)
    return f"| {name} | {1e3 * vetting:.0f} ms | {1e3 * one:.0f} ms | {vetting / one:.2f} | {share:.3f} % |"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| recipe | vetting | a meta-step | vetting in meta-steps | of the run |\n|---|---|---|---|---|")
    for name in RECIPES:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
