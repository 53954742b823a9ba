"""Optimistic meta-gradients of one convex problem: bounds, slopes and what other methods reach; float64.

Run ``python benchmarks/results_optimistic.py`` (about 15 CPU minutes; what was finished in ``runs/`` is not computed
again). It is the study ``optimistic-convex`` on more problems, and needs scikit-learn. The plain form is held to
``L‖x0 - x*‖²/(2T)``, the optimistic one to ``4L‖x0 - x*‖²/(T(T+1))``, at every T to 2,000, with a slack of 1e-12.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from learnedopt import recipes
from learnedopt.recipes.convex import METHODS
from learnedopt.recipes.optimistic import Curves, OptimisticConvex, draw
from learnedopt.training.tracker import NullTracker

ROOT = Path(__file__).parents[1]
FIGURE, FOLDER = ROOT / "docs" / "figures" / "optimistic_convex.png", ROOT / "runs" / "results-optimistic"
QUADRATICS = ("power:2", "power:3", "power:4", "geometric:4", "geometric:6")
LOGISTIC = tuple(f"{data}:{l2}" for data in ("breast-cancer", "digits") for l2 in ("1e-4", "1e-3", "1e-2"))
PANELS = ("power:3", "geometric:4", "breast-cancer:1e-3", "digits:1e-3")
HELD = {"plain": "plain", "optimistic": "optimistic", "plain, linear weights": "optimistic"}
"""Method -> whose bound it is held to; no bound is known of plain meta-gradients with linear weights."""


def print_bounds(found: dict[str, Curves]) -> None:
    """Print at how many T each method exceeds the bound, and the largest part of it that is reached."""
    heads = "".join(f" {method}: T above the bound, largest part of it |" for method in HELD)
    print(f"| problem | L | ‖x0 - x*‖² |{heads}\n|---|---|---|{'---|' * len(HELD)}")
    for name, curves in found.items():
        cells = []
        for method, bound in HELD.items():
            part = max(gap / curves.bound(bound, t) for t, gap in enumerate(curves.gaps[method], 1))
            cells.append(f"{curves.violations(method, bound)}, {part:.3f}")
        print(f"| {name} | {curves.smoothness:.4g} | {curves.squared_distance:.4g} | {' | '.join(cells)} |")


def print_last(found: dict[str, Curves]) -> None:
    """Print what every method has reached at the last T, and the settings of those that were tuned."""
    print(f"\n| f - min f at the last T | {' | '.join(METHODS)} | tuned |\n|---|{'---|' * (len(METHODS) + 1)}")
    for name, curves in found.items():
        momentum, adagrad = (curves.settings[method] for method in ("momentum", "AdaGrad"))
        scaled = momentum["lr"] * curves.smoothness
        tuned = f"momentum {momentum['momentum']:g} at {scaled:.3g}/L, AdaGrad {adagrad['lr']:g}"
        print(f"| {name} | {' | '.join(f'{max(g[-1], 0):.2e}' for g in curves.gaps.values())} | {tuned} |")


def print_slopes(found: dict[str, Curves]) -> None:
    """Print the slopes under power laws, T from 50 on, and their ratios to gradient descent's."""
    print(
        f"\n| slope | 1 - 1/a | {' | '.join(METHODS)} | optimistic over descent |\n|---|{'---|' * (len(METHODS) + 2)}"
    )
    for name, curves in found.items():
        kind, _, decay = name.partition(":")
        if kind == "power":
            slopes = {method: curves.slope(method) for method in METHODS}
            cells = " | ".join(f"{slope:.3f}" for slope in slopes.values())
            ratio = slopes["optimistic"] / slopes["gradient descent"]
            print(f"| {name} | {1 - 1 / float(decay):.3f} | {cells} | {ratio:.3f} |")


def main() -> None:
    """Compute what is missing, print the tables and draw the figure."""
    study = recipes.make("optimistic-convex")
    assert isinstance(study, OptimisticConvex)
    torch.set_num_threads(study.num_threads)
    study = replace(study, problems=(*QUADRATICS, *LOGISTIC))
    study.run(FOLDER, NullTracker())
    numbers = json.loads((FOLDER / f"{study.name}.json").read_text("utf-8"))
    found = {name: Curves(**numbers[name]) for name in study.problems}
    print_bounds(found)
    print_last(found)
    print_slopes(found)
    draw(FIGURE, {name: found[name].gaps for name in PANELS})


if __name__ == "__main__":
    main()
