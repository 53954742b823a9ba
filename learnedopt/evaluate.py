"""Learned optimizers against hand-designed ones, whose learning rates were tuned on other tasks of the same family."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from learnedopt import tree
from learnedopt.files import write_atomically, write_json
from learnedopt.inner import Execution, InnerLoop, Tape, require_count
from learnedopt.rule import UpdateRule
from learnedopt.task import TaskFamily, Tasks
from learnedopt.tracker import plain_json
from learnedopt.tree import Theta

Measure: TypeAlias = Literal["final_loss", "sum_of_losses", "last_ten"]
"""What a run is judged by, lower is better: the loss on the valid split after the last step; the sum of the train
losses before each update; the mean of the last ten of those."""
MEASURES: tuple[Measure, ...] = get_args(Measure)

_SMALL = 1000  # parameters of a task, up to which tasks run together
_TOGETHER = 50_000  # parameters that run together: a rule's states for them stay near the cache
_EXTENSIONS = 8  # of a grid, at most, while its winner is at the edge
_REFINEMENTS = 2  # of half decades: to an eighth of a decade on both sides of the winner


class TuningWarning(UserWarning):
    """The best learning rate lies at the edge of what was tried."""


@dataclass(frozen=True)
class Baseline:
    """Optimizers that differ in one number, which is tuned.

    Args:
        make: learning rate -> rule and theta.
        rates: the grid to begin with, positive and growing.
    """

    make: Callable[[float], tuple[UpdateRule, Theta]]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.rates) < 2 or self.rates[0] <= 0 or list(self.rates) != sorted(set(self.rates)):
            raise ValueError(f"rates={self.rates!r} is no grid; pass at least two positive numbers that grow")


def hand_designed(name: str, low: int = -4, high: int = 2, **options: Any) -> Baseline:
    """Return a registered rule with a learning rate as a baseline, its grid the half decades from 10^low to 10^high.

    Example:
        >>> baselines = {**BASELINES, "momentum 0.99": hand_designed("momentum", momentum=0.99)}
    """
    return Baseline(partial(_make, name, options), tuple(10.0 ** (k / 2) for k in range(2 * low, 2 * high + 1)))


def _make(name: str, options: dict[str, Any], rate: float) -> tuple[UpdateRule, Theta]:
    from learnedopt import optimizers

    return optimizers.make(name, lr=rate, learn=(), **options), {}


BASELINES: Mapping[str, Baseline] = {
    "SGD": hand_designed("sgd"),
    "momentum": hand_designed("momentum"),
    "Nesterov": hand_designed("nesterov"),
    "RMSprop": hand_designed("rmsprop", low=-5, high=1),
    "Adam": hand_designed("adam", low=-5, high=1),
}
"""Momentum 0.9; everything else but the learning rate as in ``torch.optim``."""


@dataclass(frozen=True)
class Summary:
    """Mean and median over tasks, and the 95 % interval of the mean by Student's t.

    A value that is not finite makes the mean infinite and the interval NaN; the median may survive it.
    """

    mean: float
    median: float
    low: float
    high: float


def summarise(values: Tensor) -> Summary:
    """Summarise one number per task (num_tasks,), at least two."""
    n = values.numel()
    mean, median = float(values.mean()), float(values.quantile(0.5))
    half = _student_t(n - 1) * float(values.std()) / math.sqrt(n) if values.isfinite().all() else math.nan
    return Summary(mean, median, mean - half, mean + half)


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
    """The learning rate that was found, and the score of each one tried: the measure's mean over the tuning tasks."""

    rate: float
    scores: dict[float, float]

    @property
    def at_edge(self) -> bool:
        """Whether a rate beyond those tried might be better."""
        return self.rate in (min(self.scores), max(self.scores))


@dataclass(frozen=True)
class Outcome:
    """What one optimizer did.

    Args:
        values: (num_tasks,) by measure, float64 on the CPU, infinite where not finite.
        curve: (num_steps,), the train loss before each update, a mean over tasks.
        tuning: how its learning rate was found; None where nothing was tuned.
    """

    values: dict[Measure, Tensor]
    curve: Tensor
    tuning: Tuning | None = None

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
                "num_diverged": outcome.num_diverged,
                "measures": {name: vars(summarise(values)) for name, values in outcome.values.items()},
                "tried": outcome.tuning and [*sorted(outcome.tuning.scores.items())],
                "curve": outcome.curve.tolist(),
            }
            for label, outcome in self.outcomes.items()
        }
        differences = [{**vars(d), "summary": vars(d.summary)} for d in self.differences]
        return plain_json({"settings": self.settings, "optimizers": optimizers, "differences": differences})

    def markdown(self) -> str:
        """Return the table of all optimizers and that of the paired differences, as Markdown."""
        head = ["optimizer", "learning rate"]
        head += [column for name in MEASURES for column in (name.replace("_", " "), "median")] + ["diverged"]
        rows = []
        for label, outcome in self.outcomes.items():
            row = [label, f"{outcome.tuning.rate:.3g}" if outcome.tuning else ""]
            for name in MEASURES:
                summary = summarise(outcome.values[name])
                row += [f"{summary.mean:.4g} ± {summary.high - summary.mean:.2g}", f"{summary.median:.4g}"]
            rows.append([*row, str(outcome.num_diverged)])
        paired = [
            [d.candidate, d.baseline, d.measure.replace("_", " "), f"{d.summary.mean:.4g}"]
            + [f"{d.summary.low:.4g} to {d.summary.high:.4g}"]
            for d in self.differences
        ]
        text = _align([head, *rows])
        if paired:
            text += "\n" + _align([["optimizer", "minus the best baseline", "in", "mean", "95 % interval"], *paired])
        return text

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write ``evaluation.json``, ``.md`` and ``.png`` (the loss curves) into ``folder``; return the paths by suffix."""
        from learnedopt.plots import plot_curves

        paths = {suffix: Path(folder) / f"evaluation.{suffix}" for suffix in ("json", "md", "png")}
        write_json(paths["json"], self.describe())
        write_atomically(paths["md"], lambda partial: _write(partial, self.markdown()))
        curves = {label: outcome.curve for label, outcome in self.outcomes.items()}
        title = f"Training loss before each update, mean over {self.settings['num_tasks']} tasks"
        plot_curves(paths["png"], curves, emphasis=self.candidates, title=title)
        return paths


def _align(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|-" + "-|-".join("-" * w for w in widths) + "-|", *lines[1:]]) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def measure(rule: UpdateRule, theta: Theta, family: TaskFamily, tasks: Tasks, num_steps: int, execution: Execution) -> Outcome:
    """Run an optimizer for ``num_steps`` from a fresh start on each of ``tasks``."""
    loop = InnerLoop(family, rule, execution)
    rollout = loop.run(tree.to(theta, execution.device, execution.dtype), loop.start(tasks), num_steps, Tape.NONE)
    losses = rollout.losses.double().cpu()
    values: dict[Measure, Tensor] = {
        "final_loss": loop.losses(rollout.end, "valid").double().cpu(),
        "sum_of_losses": losses.sum(0),
        "last_ten": losses[-10:].mean(0),
    }
    return Outcome({k: torch.where(v.isfinite(), v, math.inf) for k, v in values.items()}, losses.mean(1))


def tune(score: Callable[[float], float], rates: tuple[float, ...]) -> Tuning:
    """Return the rate with the lowest score; NaN counts as infinite, and of equal scores the lower rate wins.

    While the winner is at the grid's edge, the grid is extended beyond it by the same ratio, at most 8 times; then the
    two gaps beside the winner are halved (geometrically), twice.

    Raises:
        ValueError: no rate has a finite score.
    """
    scores: dict[float, float] = {}

    def best() -> tuple[float, int, list[float]]:
        tried = sorted(scores)
        rate = min(tried, key=lambda r: scores[r])
        return rate, tried.index(rate), tried

    def attempt(new: list[float]) -> None:
        scores.update({rate: math.inf if math.isnan(value := score(rate)) else value for rate in new})

    attempt([*rates])
    for _ in range(_EXTENSIONS):
        rate, i, tried = best()
        if 0 < i < len(tried) - 1:
            break
        attempt([rate * rate / tried[1 if i == 0 else i - 1]])
    for _ in range(_REFINEMENTS):
        rate, i, tried = best()
        attempt([math.sqrt(rate * neighbour) for neighbour in tried[max(i - 1, 0) : i] + tried[i + 1 : i + 2]])
    rate, _, tried = best()
    if math.isinf(scores[rate]):
        raise ValueError(f"every learning rate from {tried[0]:.3g} to {tried[-1]:.3g} diverged on the tuning tasks")
    return Tuning(rate, scores)


def compare(
    candidates: Mapping[str, tuple[UpdateRule, Theta]],
    family: TaskFamily,
    *,
    tuning_family: TaskFamily | None = None,
    num_steps: int = 100,
    num_tasks: int = 100,
    num_tuning_tasks: int | None = None,
    seed: int = 0,
    baselines: Mapping[str, Baseline] = BASELINES,
    tune_for: Measure = "final_loss",
    execution: Execution | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Run candidates and tuned baselines on the same fresh tasks.

    Args:
        candidates: label -> rule and theta.
        family: where the fresh tasks come from, such as a family with ``meta_split="test"``.
        tuning_family: where the baselines' tuning tasks come from, such as the same with ``meta_split="train"``; by
            default the family itself. Seeds differ between the two in any case.
        num_steps: inner steps from a fresh start.
        num_tasks: fresh tasks, at least 2.
        num_tuning_tasks: by default as many as fresh ones where tasks are small (see ``execution``), else at most 8.
        seed: of the tasks.
        baselines: label -> what is tuned and run beside the candidates.
        tune_for: the measure whose mean over the tuning tasks chooses a learning rate.
        execution: how tasks are run; by default together, in chunks, where a task has at most 1,000 parameters, and
            as the engine likes it above.
        report: is told, in one line each, what goes on.

    Raises:
        ValueError: bad input, before the first inner step; or a baseline that diverges at every rate.

    Warns:
        TuningWarning: a baseline's best rate is at the edge even of the extended grid: it may be better than shown.

    Example:
        >>> comparison = compare({"LSTM": learnedopt.load("lstm-quadratic")}, learnedopt.tasks.make("quadratic"))
        >>> print(comparison.markdown())
    """
    settings = {k: v for k, v in locals().items() if k.startswith("num_") or k in ("seed", "tune_for")}
    _check(candidates, baselines, num_steps, num_tasks, tune_for)
    fresh = _sample(family, num_tasks, "fresh", seed)
    if execution is None:
        execution = _fitting_execution(family, fresh)
    if num_tuning_tasks is None:
        num_tuning_tasks = num_tasks if (execution.chunk_size or 1) > 1 else min(num_tasks, 8)
    require_count("num_tuning_tasks", num_tuning_tasks, least=1)
    for rule, theta in candidates.values():  # what does not fit is refused before anything is run
        loop = InnerLoop(family, rule, execution)
        loop.begin(tree.to(theta, execution.device, execution.dtype), loop.start(tree.narrow(fresh, 0, 1)))
    outcomes = {}
    for label, (rule, theta) in candidates.items():
        report(f"Running {label} on {num_tasks} fresh tasks")
        outcomes[label] = measure(rule, theta, family, fresh, num_steps, execution)
    tuning_family = tuning_family or family
    others = _sample(tuning_family, num_tuning_tasks, "tuning", seed)
    for label, baseline in baselines.items():
        def score(rate: float) -> float:
            return float(measure(*baseline.make(rate), tuning_family, others, num_steps, execution).values[tune_for].mean())
