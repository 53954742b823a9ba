"""Learned rules of the normalised family, unchanged, on the MNIST problem of their training and on others beside it.

Run ``python benchmarks/results_normalised.py --folder runs/normalised --candidates 0=CHECKPOINT 1=CHECKPOINT``, one for
each seed of the meta-training; ``--settings`` names some of the settings. What is done already is not run again, and
``--tables-only`` runs nothing. Minibatches are drawn from the training images, as the published figures' are, by seeds
that no meta-training sees. Baselines are tuned for the mean of the last ten losses, on 16 other tasks of each setting.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from results_suite import learned
from torch import Tensor

from learnedopt.core.execution import Execution
from learnedopt.evaluation.comparison import align, summarise
from learnedopt.evaluation.grids import named
from learnedopt.evaluation.nets import Net
from learnedopt.evaluation.style import (
    add_axes,
    draw_band,
    legend_below,
    look,
    new_figure,
    scale_axis,
    write_figure,
)
from learnedopt.evaluation.suite import Protocol, run_suite
from learnedopt.evaluation.suite_table import Result, collect, thinned

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "normalised.png"
BASELINES = ("Nesterov", "Nesterov, linear end", "Adam + cosine")


class Setting(NamedTuple):
    """A problem: a net, and how many tasks of it are reported."""

    net: Net
    num_tasks: int = 32


def setting(name: str, num_steps: int = 100, num_tasks: int = 32, **options: Any) -> Setting:
    """Return the MLP that the rules were trained on, but for ``options``."""
    own = {"dataset": "mnist", "hidden": (20,), "activation": "sigmoid", "batch_size": 128}
    return Setting(Net(name, "image-mlp", {**own, **options}, num_steps), num_tasks)


SETTINGS: tuple[Setting, ...] = (
    setting("as trained"),
    setting("200 steps", 200),
    setting("2 layers", hidden=(20, 20)),
    setting("40 units", hidden=(40,)),
    setting("ReLU", activation="relu"),
    setting("Fashion", dataset="fashion-mnist"),
    setting("test images", meta_split="test"),
    setting("500 steps", 500, 8),
    setting("1,000 steps", 1000, 8),
)


def main() -> None:
    """Run what the command line names, then print the table and draw the figure."""
    arguments = parser().parse_args()
    torch.set_num_threads(1)
    wanted = [each.strip() for each in arguments.settings.split(";") if each.strip()]
    unknown = {*wanted} - {each.net.name for each in SETTINGS}
    if unknown:
        raise SystemExit(f"no settings {sorted(unknown)}; there are {'; '.join(each.net.name for each in SETTINGS)}")
    for each in [] if arguments.tables_only else SETTINGS:
        if not wanted or each.net.name in wanted:
            run_suite(
                learned(arguments.candidates), [each.net], named(arguments.baselines),
                folder=arguments.folder, protocol=Protocol(num_seeds=each.num_tasks, tune_for="last_ten"),
                execution=Execution(vet=False), report=lambda line: print(line, flush=True),
            )  # fmt: skip
    results = collect(arguments.folder, [each.net.name for each in SETTINGS]).results
    print(table(results))
    print(draw(FIGURE if arguments.figure is None else arguments.figure, results))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--folder", type=Path, default=Path("runs/normalised"), help="of the results")
    own = ["normalised-lstm=normalised-lstm-mnist"]
    found.add_argument("--candidates", nargs="*", default=own, metavar="NAME=CHECKPOINT", help="default that packaged")
    found.add_argument("--settings", default="", metavar="A;B", help="default all")
    found.add_argument("--baselines", default="; ".join(BASELINES), metavar="A;B", help="default %(default)s")
    found.add_argument("--figure", type=Path, help=f"default {FIGURE.name} of the documentation")
    found.add_argument("--tables-only", action="store_true", help="run nothing")
    return found


def table(results: Mapping[str, Mapping[str, Result]]) -> str:
    """Return all optimizers on all settings: sum, last ten, and ratios of the last ten on the same tasks."""
    rows = [["setting", "steps", "tasks", "optimizer", "sum", "last ten", *(f"/ {name}" for name in BASELINES[:2])]]
    for name, by in results.items():
        for label, result in by.items():
            num_steps, num_tasks = result.losses.shape
            ratios = [_ratio(result, by[other]) if label != other and other in by else "" for other in BASELINES[:2]]
            numbers = [_mean(result.losses.sum(0)), _mean(last_ten(result))]
            shown = label if result.is_candidate else f"{label} ({result.record['values']['lr']:.2g})"
            rows.append([name, f"{num_steps:,}", str(num_tasks), shown, *numbers, *ratios])
    return align(rows)


def last_ten(result: Result) -> Tensor:
    """Return the mean of the last ten losses of each task, infinite where a run diverged."""
    return torch.where(result.losses.isfinite().all(0), result.losses[-10:].mean(0), math.inf)


def _mean(values: Tensor) -> str:
    found = summarise(values)
    return f"{found.mean:.4g} ± {(found.high - found.low) / 2:.2g}"


def _ratio(ours: Result, theirs: Result) -> str:
    """Return the geometric mean of the ratios, task by task, and half its 95 % interval."""
    found = summarise(last_ten(ours).log() - last_ten(theirs).log())
    low, mean, high = (math.exp(x) for x in (found.low, found.mean, found.high))
    return f"{mean:.3f} ± {(high - low) / 2:.2g}"


def draw(path: Path, results: Mapping[str, Mapping[str, Result]]) -> Path:
    """Draw a panel a setting: mean losses on logarithmic axes, with bands from the tenth of tasks to the ninetieth."""
    num_rows, handles = -(-len(results) // 3), {}
    figure = new_figure(13, 3 * num_rows + 0.6)
    for i, (name, by) in enumerate(results.items(), start=1):
        axes = add_axes(figure, (num_rows, 3, i), xlabel="step", ylabel="train loss", title=name)
        for label, result in by.items():
            steps, values = thinned(result.losses)
            index = BASELINES.index(label) + 1 if label in BASELINES else 0
            shape = look(index, strong=not index) | {"linewidth": 1.4 if index else 1.8}
            shown = label if index else "learned, a line for each meta-training"
            (handles[shown],) = axes.plot(steps, values.mean(1).tolist(), **shape)
            draw_band(axes, handles[shown], *(values.quantile(q, dim=1).tolist() for q in (0.1, 0.9)))
        for axis in ("x", "y"):
            scale_axis(axes, axis)
    legend_below(figure, handles, ncols=5, shaded="10 % to 90 % of tasks")
    return write_figure(figure, path, dpi=70)  # nine panels: at more, the file alone is large


if __name__ == "__main__":
    main()
