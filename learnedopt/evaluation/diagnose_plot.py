"""The figure of a diagnosis: a line for each estimator, its error and where that comes from, cosine, time, memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learnedopt.evaluation.style import COLOURS, EMPHASIS, add_axes, new_figure, scale_axis, write_figure

if TYPE_CHECKING:
    from learnedopt.evaluation.diagnose_report import Diagnosis, Row

_FLOOR = 1e-3  # of the true gradient's length, below which a bias is drawn at the axis' end


def plot_diagnosis(path: str | Path, found: Diagnosis) -> Path:
    """Draw those estimators that have numbers, the smallest error on top and the recommended one in the signal colour.

    Bias (circles, hollow where it is not told from none) and noise at the budget (hollow diamonds) are the roots of the
    two terms of the error (bars); what is below the axis is drawn at its end. No two differ by colour alone.

    Raises:
        ValueError: no estimator has numbers.
    """
    rows = sorted((row for row in found.rows if row.accuracy is not None), key=_error, reverse=True)
    if not rows:
        raise ValueError(f"{path}: nothing to draw, no estimator has enough finite estimates of a known gradient")
    figure = new_figure(11, 1.5 + 0.3 * len(rows))
    grid = figure.add_gridspec(1, 4, width_ratios=(2.2, 1.2, 1, 1))
    first = add_axes(figure, grid[0])
    panels = [first, *(add_axes(figure, grid[i], sharey=first) for i in (1, 2, 3))]
    unit = "the true gradient's length" if found.truth.known else "a batch's median length"
    names = (f"error, of {unit}", "cosine of one estimate:\nmedian and quartiles", "seconds an episode", "peak MB")
    colours = [EMPHASIS if row.label == found.recommendation.chosen else "#999999" for row in rows]
    for axes, name in zip(panels, names, strict=True):
        axes.set_xlabel(name)
        axes.tick_params(labelleft=axes is first, axis="y", length=0)
    _draw_errors(first, rows, colours)
    _draw_cosines(panels[1], rows, colours)
    places = range(len(rows))
    for axes, values in zip(panels[2:], ([r.seconds for r in rows], [r.peak_bytes / 1e6 for r in rows]), strict=True):
        axes.barh(places, values, color=colours, height=0.6)
        scale_axis(axes, "x")
    first.set_yticks(places, [row.label for row in rows], fontsize=8)
    for tick, row in zip(first.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row.label == found.recommendation.chosen else "normal")
    first.set_ylim(-0.6, len(rows) - 0.4)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return write_figure(figure, path)


def _draw_errors(axes: Any, rows: list[Row], colours: list[str]) -> None:
    places = range(len(rows))
    noises = [math.sqrt(max(_error(row) - row.bias**2, 0.0)) for row in rows]
    biases = [row.bias for row in rows]
    totals = [math.sqrt(_error(row)) for row in rows]
    floor = max(_FLOOR, min([x for x in (*noises, *biases) if x > _FLOOR], default=_FLOOR) / 2)
    axes.barh(places, totals, color=colours, height=0.6, alpha=0.5, label="root of the expected squared error")
    for told, fill, label in ((True, "#000000", "bias"), (False, "#ffffff", "bias, not told from none")):
        kept = [place for place in places if rows[place].biased is told]
        at = [max(biases[place], floor) for place in kept]
        axes.plot(at, kept, "o", color="#000000", markerfacecolor=fill, markersize=5, label=label)
    axes.plot(
        [max(x, floor) for x in noises], places, "D", color=COLOURS[0], markersize=5, markerfacecolor="#ffffff",
        label="noise at the budget",
    )  # fmt: skip
    scale_axis(axes, "x")
    axes.set_xlim(left=floor * 0.9)


def _draw_cosines(axes: Any, rows: list[Row], colours: list[str]) -> None:
    for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        assert row.accuracy is not None
        _, low, median, high = row.accuracy.cosine
        axes.plot([low, high], [place, place], color=colour, linewidth=5, solid_capstyle="butt")
        axes.plot([median], [place], "|", color="#000000", markersize=10)
    axes.set_xlim(right=1.03)


def _error(row: Row) -> float:
    return math.nan if row.accuracy is None else row.accuracy.error
