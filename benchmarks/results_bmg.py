"""Bootstrapped against ordinary meta-gradients that learn rates and momentum during one run on MNIST.

Run ``python benchmarks/results_bmg.py``. It carries out the study ``bmg-mnist-permuted`` in ``runs``, and goes on with
what ``learnedopt train bmg-mnist-permuted`` has left there. Ratios are of the mean cumulative losses; their intervals
are of the ratios of single seeds, on which all methods see the same images, labels and start.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import learnedopt.run
from learnedopt import recipes
from learnedopt.evaluation.comparison import align, summarise
from learnedopt.recipes.bmg import BOOTSTRAPPED, COMPARED
from learnedopt.recipes.online import OnlineLearning, table
from learnedopt.training.tracker import NullTracker
from learnedopt.training.tracking import Tracking

NAME = "bmg-mnist-permuted"
IN_HINDSIGHT = ("ordinary, K = 1", "ordinary, K = 4", "Adam")
"""Methods whose runs at the rate chosen for them end far apart: they are shown at every rate."""


def ratios(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the rows of the table that sets the bootstrapped meta-gradient over what it is compared with."""
    rows = [[f"{BOOTSTRAPPED}, over", "ratio", "95 % interval over seeds", "goal"]]
    for label, goal in COMPARED.items():
        ours, theirs = (torch.tensor(found[k]["totals"], dtype=torch.float64) for k in (BOOTSTRAPPED, label))
        spread = summarise(ours / theirs)
        ratio = float(ours.mean() / theirs.mean())
        rows.append([label, f"{ratio:.3f}", f"{spread.low:.3f} to {spread.high:.3f}", goal])
    return rows


def at_every_rate(study: OnlineLearning, folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the methods ``IN_HINDSIGHT`` cost on the reported seeds at each of their rates."""
    methods = {
        f"{label}, at {rate:g}": replace(study.methods[label], rates=(rate,))
        for label in IN_HINDSIGHT
        for rate in study.methods[label].rates
    }
    name = f"{NAME}-at-every-rate"
    replace(study, name=name, methods=methods).run(folder, NullTracker())
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def main() -> None:
    """Carry out the study and print its tables."""
    folder = Path("runs") / NAME
    study = recipes.make(NAME)
    assert isinstance(study, OnlineLearning)
    learnedopt.run.train(study, folder, Tracking("disabled"))
    found = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
    print(f"\n{table(found)}\n{align(ratios(found))}")
    for label, each in found.items():
        print(f"{label}: mean over the tuning seeds at each rate: {each['tried']}")
    print(f"\nOn the reported seeds, at every rate:\n\n{table(at_every_rate(study, folder))}")


if __name__ == "__main__":
    main()
