"""What a diagnosis found: a row for each estimator, which one to take by a stated rule, and the files that show it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learnedopt.core.files import plain_json, write_json
from learnedopt.evaluation.comparison import align, write_text
from learnedopt.evaluation.diagnose_numbers import UNCERTAIN, Accuracy, Truth, spread

RULE = (
    "The estimator with the smallest expected squared error of the mean gradient for one budget of compute, bias² + "
    "variance x seconds / budget, relative to the true gradient's square; those with estimates that are not finite, "
    "and those above the memory limit, are left out."
)
OWN = "recipe's estimator"
"""Under which key of the settings that is, where a recipe was diagnosed."""
_HEAVY = 3.0  # mean over median of batches' gradient lengths, from which on a few decide
_SURE = 2.0  # standard errors
_CLOSE = 1.1  # ratio of errors up to which the measured times decide nothing


@dataclass(frozen=True)
class Row:
    """One estimator over a whole episode of each batch.

    ``refused`` says why it does not apply; the rest is then empty. ``accuracy`` is None also where too few estimates
    are finite. ``seconds`` is the median of one estimate, ``peak_bytes`` the most that tensors of one take at a time.
    ``notes``: what was warned of.
    """

    label: str
    estimator: str
    refused: str | None = None
    num_windows: int = 1
    num_not_finite: int = 0
    accuracy: Accuracy | None = None
    seconds: float = math.nan
    peak_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def biased(self) -> bool:
        """Whether the bias is told from none, by two standard errors."""
        return self.accuracy is not None and self.accuracy.bias_squared > _SURE * self.accuracy.bias_error

    @property
    def bias(self) -> float:
        """The bias over ``Truth.unit``; 0 where noise explains all of it."""
        return math.nan if self.accuracy is None else math.sqrt(max(self.accuracy.bias_squared, 0.0))


@dataclass(frozen=True)
class Recommendation:
    """Which estimator to take, None where nothing can be said; why; and what is to be said of each of the others."""

    chosen: str | None
    runner_up: str | None
    text: str
    verdicts: dict[str, str]


def recommend(rows: Sequence[Row], truth: Truth, memory_limit: int | None = None) -> Recommendation:
    """Choose by ``RULE``; nothing where the truth itself is not to be trusted.

    That is where an exact gradient is not finite; where the standard error of their mean is half its length or more;
    where their mean length is three times their median or more, so that a few batches decide.
    """
    if not rows:
        raise ValueError("there are no rows to choose from")
    doubts = distrust(truth)
    kept = [row for row in rows if _unfit(row, memory_limit) is None]
    best = min(kept, key=_error, default=None)
    if doubts or best is None:
        verdicts = {row.label: _unfit(row, memory_limit) or "" for row in rows}
        text = doubts or "No estimator is left: each is refused, not finite at times, or over the memory limit."
        return Recommendation(None, None, text, verdicts)
    others = sorted((row for row in kept if row is not best), key=_error)
    verdicts = {row.label: _unfit(row, memory_limit) or _why_not(row, best) for row in rows}
    verdicts[best.label] = "taken"
    told = f"Take {best.label!r}, {best.estimator}: its squared error for the budget is {_error(best):.3g} of the true "
    told += f"gradient's square, {max(_accuracy(best).bias_squared, 0.0):.2g} of it bias."
    if others:
        told += f" Runner-up: {others[0].label!r}, {others[0].estimator}, with {_error(others[0]):.3g}"
        told += ", which these batches cannot tell apart." if _tied(others[0], best) else "."
    return Recommendation(best.label, others[0].label if others else None, told, verdicts)


def distrust(truth: Truth) -> str | None:
    """Say why the true gradient is not to be trusted, and what to do; None where it is."""
    if truth.num_not_finite:
        return (
            f"The exact gradient of {truth.num_not_finite} of {truth.num_batches} batches is not finite: it explodes "
            "through this episode, and no bias can be told. Take fewer inner steps (--horizon), an estimator that "
            "does not go back through them (evolution strategies, persistent ones), or TaskByTask, which leaves such "
            "tasks out."
        )
    if truth.mean_length >= _HEAVY * truth.median_length:
        return (
            f"A few batches decide the true gradient: their lengths have a mean of {truth.mean_length:.3g} and a "
            f"median of {truth.median_length:.3g}, as where inner loops are chaotic. Its mean is no direction to "
            "follow: clip each task's (TaskByTask with max_task_grad_norm), take evolution strategies, or fewer steps."
        )
    if not truth.known:
        needed = "many more"
        if math.isfinite(truth.uncertainty):
            needed = f"about {math.ceil(truth.num_batches * (truth.uncertainty / UNCERTAIN) ** 2)}"
        return (
            f"The true gradient is not known: the standard error of its mean over {truth.num_batches} batches is "
            f"{truth.uncertainty:.2g} of its length, and below {UNCERTAIN} is asked for. Take {needed} batches of "
            "truth, or more tasks. Close to an optimum there is no gradient to compare with: bias matters little there."
        )
    return None


def _unfit(row: Row, memory_limit: int | None) -> str | None:
    """Say why an estimator is not one to choose from; None where it is."""
    if row.refused is not None:
        return row.refused
    if row.num_not_finite:
        return f"not finite in {row.num_not_finite} batches"
    if memory_limit is not None and row.peak_bytes > memory_limit:
        return f"takes {row.peak_bytes / 1e6:.3g} MB, over the limit of {memory_limit / 1e6:.3g}"
    return None if row.accuracy is not None else "too few estimates"


def _why_not(row: Row, best: Row) -> str:
    if _tied(row, best):
        return "not told apart from the one taken"
    bias, rest = max(_accuracy(row).bias_squared, 0.0), _error(row) - max(_accuracy(row).bias_squared, 0.0)
    what = "bias" if bias > rest else "noise for its time"
    return (
        f"{_error(row) / _error(best):.3g}x the error, mostly {what}" if _error(best) > 0 else f"error, mostly {what}"
    )


def _tied(row: Row, best: Row) -> bool:
    """Whether the ratio of two errors may be one: of the same batches, so that chance in the tasks cancels."""
    pairs = [*zip(_accuracy(row).left_out, _accuracy(best).left_out, strict=True), (_error(row), _error(best))]
    if not all(x > 0 for pair in pairs for x in pair):
        return _error(row) == _error(best)
    *left_out, whole = [math.log(mine / its) for mine, its in pairs]
    return whole <= max(_SURE * spread(left_out), math.log(_CLOSE))


def _accuracy(row: Row) -> Accuracy:
    assert row.accuracy is not None
    return row.accuracy


def _error(row: Row) -> float:
    return _accuracy(row).error


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` returns: its settings, the truth, a row for each estimator, and which one to take."""

    settings: dict[str, Any]
    truth: Truth
    rows: tuple[Row, ...]
    recommendation: Recommendation

    def row(self, label: str) -> Row:
        """Return one row; ValueError where there is none of that label."""
        for row in self.rows:
            if row.label == label:
                return row
        raise ValueError(f"there is no row {label!r}; there are {[row.label for row in self.rows]}")

    def to_json(self) -> dict[str, Any]:
        """Return everything as nested dicts and lists that JSON can hold."""
        rows = [{**vars(row), "accuracy": row.accuracy and row.accuracy._asdict()} for row in self.rows]
        about = {"settings": self.settings, "truth": self.truth._asdict(), "rule": RULE}
        return plain_json({**about, "rows": rows, "recommendation": vars(self.recommendation)})

    def to_markdown(self) -> str:
        """Return what was measured, the recommendation, the table, and why the rest does not apply."""
        about, truth = self.settings, self.truth
        head = ["estimator", "bias", "variance", "of one task", "cosine (quartiles)", "of the mean", "s", "MB", "error"]
        table = [[*head, "verdict"]]
        table += [self._cells(row) for row in sorted(self.rows, key=_order) if row.refused is None]
        own = f" The recipe's estimator is {about[OWN]}." if OWN in about else ""
        unit = "the true gradient's length" if truth.known else "the median length of a batch's exact gradient"
        length = f"has the length {truth.norm:.4g}, known up to {100 * truth.uncertainty:.2g} %"
        text = (
            f"Episodes of {about['horizon']} steps, {about['num_batches']} batches of {about['num_tasks']} tasks; the "
            f"exact gradient over {truth.num_batches} batches {length if truth.known else 'is not known'}. Lengths of "
            f"single batches: median {truth.median_length:.4g}, mean {truth.mean_length:.4g}. Bias, variance and error "
            f"are over {unit}, or its square; variance is that of one estimate of {about['num_tasks']} tasks, and so "
            f"many times as large of one; seconds are of one episode, the budget is {about['budget']:.3g} s; MB are "
            f"the peak of tensors.{own}\n\n**{self.recommendation.text}**\n\nThe rule: {RULE}\n\n{align(table)}"
        )
        refused = [(row.refused, row.label) for row in self.rows if row.refused is not None]
        notes = [(note, row.label) for row in self.rows for note in row.notes]
        return text + _listed("Does not apply", refused) + _listed("Warned", notes)

    def _cells(self, row: Row) -> list[str]:
        found, verdict = row.accuracy, self.recommendation.verdicts[row.label]
        cost = [f"{row.seconds:.3g}", f"{row.peak_bytes / 1e6:.3g}"]
        if found is None:
            return [row.label, "", "", "", "", "", *cost, "", verdict]
        top = math.sqrt(max(found.bias_squared, 0.0) + _SURE * found.bias_error)
        bias = f"{row.bias:.2g} ± {found.bias_error / (2 * row.bias):.1g}" if row.biased else f"below {top:.1g}"
        mean, low, _, high = found.cosine
        own = found.variance * self.settings["num_tasks"]
        cells = [row.label, bias, f"{found.variance:.3g}", f"{own:.3g}", f"{mean:.2f} ({low:.2f} to {high:.2f})"]
        return [*cells, f"{found.cosine_of_mean:.3f}", *cost, f"{found.error:.3g}", verdict]

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write diagnosis.json, .md and, where any estimator has numbers, .png into ``folder``; return the paths."""
        from learnedopt.evaluation.diagnose_plot import plot_diagnosis

        drawn = any(row.accuracy is not None for row in self.rows)
        paths = {end: Path(folder) / f"diagnosis.{end}" for end in ("json", "md", *(["png"] if drawn else []))}
        write_json(paths["json"], self.to_json())
        write_text(paths["md"], self.to_markdown())
        if drawn:
            plot_diagnosis(paths["png"], self)
        return paths


def _listed(title: str, told: Sequence[tuple[str, str]]) -> str:
    """Return one line for each thing that is told of estimators, with all of whom it is."""
    whose: dict[str, list[str]] = {}
    for text, label in told:
        whose.setdefault(text, []).append(label)
    lines = "".join(f"- {'; '.join(labels)}: {text}.\n" for text, labels in whose.items())
    return f"\n{title}:\n\n{lines}" if lines else ""


def _order(row: Row) -> tuple[bool, float]:
    """Return what rows are sorted by: the error, those without one last."""
    return (row.accuracy is None, 0.0 if row.accuracy is None else row.accuracy.error)
