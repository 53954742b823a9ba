"""FMRL: regret over tasks beside its bounds, and on Fashion-MNIST beside learners that know less or more; float64.

Run ``python benchmarks/results_fmrl.py [folder]`` (about 20 CPU minutes; what is finished in the folder, ``runs`` by
default, is not computed again). It runs the studies ``fmrl-convex`` and ``fmrl-fashion`` as they are, prints their
tables, and puts their figures into ``docs/figures``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

import learnedopt.run
from learnedopt import recipes
from learnedopt.training.tracking import Tracking

FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def summary(name: str, runs: Path) -> dict[str, Any]:
    """Return what a study comes to, its figure put into the documentation."""
    learnedopt.run.train(recipes.make(name), runs / name, Tracking("disabled"))
    shutil.copyfile(runs / name / f"{name}.png", FIGURES / f"{name.replace('-', '_')}.png")
    return json.loads((runs / name / "summary.json").read_text(encoding="utf-8"))


def convex(found: dict[str, Any]) -> None:
    """Print what the bounds are worth, over tasks and over the clusters' radius."""
    print("| 1,000 tasks, mean of 3 seeds | TAR | bound | violations at any T | last D | single task | omniscient |")
    print("|---|---|---|---|---|---|---|")
    for geometry, seeds in found["over_tasks"].items():
        for who in seeds[0]:
            columns = {k: [run[who][k] for run in seeds] for k in seeds[0][who]}
            means = {k: sum(v) / len(v) for k, v in columns.items()}
            print(
                f"| {geometry}, {who} | {means['tar']:.3f} | {means['bound']:.3f} | {sum(columns['violations'])} | "
                f"{means['radius']:.2f} | {means['single']:.3f} | {means['omniscient']:.3f} |"
            )
    rows = found["over_radii"]
    radii = recipes.make("fmrl-convex").radii  # type: ignore[union-attr]
    print("\n| radius of the clusters | " + " | ".join(f"{r:g}" for r in radii) + " |")
    print("|---" * (1 + len(radii)) + "|")
    for key in rows[0]:
        print(f"| {key} | " + " | ".join(f"{row[key]:.3f}" for row in rows) + " |")


def fashion(found: dict[str, Any]) -> None:
    """Print the regret per example of every method and number of examples."""
    print("\n| examples a class | " + " | ".join(str(n) for n in found["shots"]) + " |")
    print("|---" * (1 + len(found["shots"])) + "|")
    for key in found["rows"][0]:
        cells = [f"{row[key]:.4f}" if isinstance(row[key], float) else str(row[key]) for row in found["rows"]]
        print(f"| {key} | " + " | ".join(cells) + " |")


def main() -> None:
    """Print the tables and draw the figures."""
    torch.set_num_threads(1)
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    convex(summary("fmrl-convex", runs))
    fashion(summary("fmrl-fashion", runs))


if __name__ == "__main__":
    main()
