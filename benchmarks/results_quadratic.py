"""Packaged rules beside tuned baselines on fresh quadratics (Andrychowicz et al. 2016, figure 4).

Run ``python benchmarks/results_quadratic.py [RUN ...]``: ``lstm-quadratic``, ``tensor-gru-quadratic``, and folders of
further runs, such as those of other seeds. Sums over functions have heavy tails, so there are many of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

import learnedopt
from learnedopt.core.task import Tasks
from learnedopt.evaluation.evaluate import compare, sample_tasks

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "quadratic.png"
NUM_STEPS, NUM_TASKS = 100, 10_000
FIRST_RATE = 0.02
"""Of memoryless BFGS, which has no rate before its first step: the better of 0.01 and 0.02 on other functions."""


def main(runs: list[str]) -> None:
    """Print the table and draw the curves."""
    family = learnedopt.tasks.make("quadratic", dim=10, meta_split="test")
    candidates = {"LSTM": "lstm-quadratic", "tensor GRU": "tensor-gru-quadratic", **{run: run for run in runs}}
    comparison = compare(
        {label: learnedopt.load(name) for label, name in candidates.items()},
        family,
        num_steps=NUM_STEPS,
        num_tasks=NUM_TASKS,
        num_tuning_tasks=1_000,
        tune_for="sum_of_losses",
        report=lambda line: print(line, flush=True),
    )
    print(comparison.markdown())
    fresh = sample_tasks(family, NUM_TASKS, "fresh", 0)
    for label, losses in (("memoryless BFGS", memoryless_bfgs(fresh)), ("conjugate gradient", conjugate(fresh))):
        sums = losses.sum(0)
        print(f"{label}: sum of losses {sums.mean():.2f} ± {1.96 * sums.std() / len(sums) ** 0.5:.2f}")
    comparison.draw(FIGURE, "10-d quadratics", leave=runs)


def memoryless_bfgs(tasks: Tasks) -> Tensor:
    """Return the losses before each step of the hand-designed rule that the tensor GRU can become.

    Its rate is the shorter one of Barzilai and Borwein.
    """
    w, y = (tasks[name].double() for name in "Wy")
    x, losses = torch.zeros_like(y), []
    step, before = x, x
    for t in range(NUM_STEPS):
        residual = torch.einsum("nij,nj->ni", w, x) - y
        losses.append(residual.square().sum(1))
        solved = losses[-1][:, None] < 1e-20  # what is left is rounding
        grad = torch.where(solved, 0.0, 2 * torch.einsum("nij,ni->nj", w, residual))
        if t == 0:
            step = -FIRST_RATE * grad
        else:
            change = grad - before
            curvature, along = _dot(step, change).clamp(min=1e-300), _dot(step, grad)
            corrected = grad - along / curvature * change
            conjugate = corrected - _dot(change, corrected) / curvature * step
            step = -curvature / _dot(change, change).clamp(min=1e-300) * conjugate - along / curvature * step
        x, before = x + step, grad
    return torch.stack(losses)


def conjugate(tasks: Tasks) -> Tensor:
    """Return the losses before each step of conjugate gradient, which is told each direction's curvature: a bound."""
    w, y = (tasks[name].double() for name in "Wy")
    x, residual, losses = torch.zeros_like(y), y, []
    slope = torch.einsum("nij,ni->nj", w, residual)
    direction = slope
    for _ in range(NUM_STEPS):
        losses.append(residual.square().sum(1))
        seen = torch.einsum("nij,nj->ni", w, direction)
        rate = _dot(slope, slope) / _dot(seen, seen).clamp(min=1e-300)
        x, residual = x + rate * direction, residual - rate * seen
        new = torch.einsum("nij,ni->nj", w, residual)
        direction = new + _dot(new, new) / _dot(slope, slope).clamp(min=1e-300) * direction
        slope = new
    return torch.stack(losses)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(1, keepdim=True)


if __name__ == "__main__":
    main(sys.argv[1:])
