"""What a comparison of optimizers found: numbers per task, their summaries, and the files that show them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.files import plain_json, write_atomically, write_json
from learnedopt.evaluation.plots import plot_curves

Measure: TypeAlias = Literal["final_loss", "sum_of_losses", "last_ten"]
"""What a run is judged by, lower is better: the loss on the valid split after the last step; the sum of the train
losses before each update; the mean of the last ten of those."""
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True)
class Summary:
    """Mean and median over tasks, and the 95 % interval of the mean by Student's t.

    A value that is not finite makes the mean infinite or NaN and the interval NaN; the median may survive it.
    """

    mean: float
    median: float
    low: float
    high: float


def summarise(values: Tensor) -> Summary:
    """Summarise one number per task (num_tasks,), at least two."""
    n = values.numel()
    ordered = values.sort().values  # quantile() would take inf - inf
    mean, median = float(values.mean()), float((ordered[(n - 1) // 2] + ordered[n // 2]) / 2)
    half = _student_t(n - 1) * float(values.std()) / math.sqrt(n) if values.isfinite().all() else math.nan
    return Summary(mean, median, mean - half, mean + half)


def interval_of_means(values: Tensor) -> Tensor:
    """Return (2, n): the 95 % interval of each row's mean, of (n, num_tasks) values; NaN where one is not finite."""
    half = _student_t(values.shape[1] - 1) * values.std(1) / math.sqrt(values.shape[1])
    return torch.stack([values.mean(1) - half, values.mean(1) + half])


def _student_t(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t (Abramowitz and Stegun 1964, 26.7.5; 0.2 % off at 3 degrees)."""
    z = 1.959963984540054
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**k for k, term in enumerate(terms, start=1))


@dataclass(frozen=True)
class Tuning:
    """The learning rate that was found, and the score of each one tried: the measure's mean over the tuning tasks.

    ``others`` are hyperparameters that were chosen with it; the scores are those at them.
    """

    rate: float
    scores: dict[float, float]
    others: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def at_edge(self) -> bool:
        """Whether a rate beyond those tried might be better."""
        return len(self.scores) > 1 and self.rate in (min(self.scores), max(self.scores))


@dataclass(frozen=True)
class Outcome:
    """What one optimizer did.

    Args:
        values: (num_tasks,) by measure, float64 on the CPU, infinite where not finite.
        curve: (num_steps,), the train loss before each update, a mean over tasks.
        tuning: how its learning rate was found; None where nothing was tuned.
        interval: (2, num_steps), the 95 % interval of the curve's means by Student's t; None where it is not known.
    """

    values: dict[Measure, Tensor]
    curve: Tensor
    tuning: Tuning | None = None
    interval: Tensor | None = None

    @property
    def num_diverged(self) -> int:
        """Tasks on which a loss was not finite."""
        return int(torch.stack([v.isinf() for v in self.values.values()]).any(0).sum())


@dataclass(frozen=True)
class Difference:
    """Candidate minus baseline, task by task; below zero the candidate is better.

    The baseline is the one with the lowest mean on these very tasks, which favours the baselines.
    """

    candidate: str
    baseline: str
    measure: Measure
    summary: Summary


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` returns: its settings, each optimizer's outcome on the fresh tasks, the paired differences."""

    settings: dict[str, Any]
    outcomes: dict[str, Outcome]
    differences: list[Difference]

    @property
    def candidates(self) -> list[str]:
        """The labels of the optimizers that were given; the others are baselines."""
        return [label for label, outcome in self.outcomes.items() if outcome.tuning is None]

    def describe(self) -> dict[str, Any]:
        """Return everything but the values of single tasks as nested dicts and lists that JSON can hold."""
        optimizers = {
            label: {
                "learning_rate": outcome.tuning and outcome.tuning.rate,
                "chosen": outcome.tuning and outcome.tuning.others,
                "num_diverged": outcome.num_diverged,
                "measures": {name: vars(summarise(values)) for name, values in outcome.values.items()},
                "tried": outcome.tuning and [*sorted(outcome.tuning.scores.items())],
                "curve": tree.numbers(outcome.curve),
                "interval": None if outcome.interval is None else tree.numbers(outcome.interval),
            }
            for label, outcome in self.outcomes.items()
        }
        differences = [{**vars(d), "summary": vars(d.summary)} for d in self.differences]
        return plain_json({"settings": self.settings, "optimizers": optimizers, "differences": differences})

    def markdown(self) -> str:
        """Return what was measured, the table of all optimizers and that of the paired differences, as Markdown."""
        head = ["optimizer", "learning rate"]
        head += [column for name in MEASURES for column in (name.replace("_", " "), "median")] + ["diverged"]
        rows: list[list[str]] = []
        for label, outcome in self.outcomes.items():
            row = [label, f"{outcome.tuning.rate:.3g}" if outcome.tuning else ""]
            for name in MEASURES:
                summary = summarise(outcome.values[name])
                row += [f"{summary.mean:.4g} ± {summary.high - summary.mean:.2g}", f"{summary.median:.4g}"]
            rows.append([*row, str(outcome.num_diverged)])
        paired: list[list[str]] = []
        for d in self.differences:
            interval = f"{d.summary.low:.4g} to {d.summary.high:.4g}"
            paired.append([d.candidate, d.baseline, d.measure.replace("_", " "), f"{d.summary.mean:.4g}", interval])
        about = self.settings
        text = (
            f"{about['num_tasks']} fresh tasks, {about['num_steps']} steps each: mean ± 95 % interval, and median. "
            f"Learning rates are tuned for the lowest mean {about['tune_for'].replace('_', ' ')} on "
            f"{about['num_tuning_tasks']} other tasks. Diverged are tasks on which a loss was not finite.\n\n"
            + align([head, *rows])
        )
        if paired:
            text += "\n" + align([["optimizer", "minus the best baseline", "in", "mean", "95 % interval"], *paired])
        return text

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write evaluation.json, .md and .png (the loss curves) into ``folder``; return the paths by suffix."""
        paths = {suffix: Path(folder) / f"evaluation.{suffix}" for suffix in ("json", "md", "png")}
        write_json(paths["json"], self.describe())
        write_text(paths["md"], self.markdown())
        self.draw(paths["png"])
        return paths

    def draw(
        self, path: str | Path, title: str = "Training loss before each update", leave: Collection[str] = ()
    ) -> Path:
        """Draw the loss curves of all optimizers but those in ``leave``, with bands, and return the path."""
        kept = {label: outcome for label, outcome in self.outcomes.items() if label not in leave}
        curves = {label: outcome.curve for label, outcome in kept.items()}
        bands = {k: (o.interval[0], o.interval[1]) for k, o in kept.items() if o.interval is not None}
        emphasis = [label for label in self.candidates if label in kept]
        title = f"{title}, mean over {self.settings['num_tasks']:,} tasks"
        shaded = "95 % interval of the mean"
        return plot_curves(path, curves, emphasis=emphasis, title=title, bands=bands, shaded=shaded)


def align(rows: list[list[str]]) -> str:
    """Return rows of cells, the heading first, as a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|-" + "-|-".join("-" * w for w in widths) + "-|", *lines[1:]]) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text, atomically."""
    write_atomically(path, lambda partial: _write(partial, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
