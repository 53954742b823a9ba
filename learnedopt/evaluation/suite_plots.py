"""The figures of a suite: a matrix of optimizers by nets, and loss curves with bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learnedopt.evaluation.style import (
    COLOURS,
    add_axes,
    draw_band,
    legend_below,
    look,
    mark_end,
    new_figure,
    scale_axis,
    write_figure,
)

if TYPE_CHECKING:
    from learnedopt.evaluation.suite_table import Suite

_FACTOR = 2.0  # a loss so many times the best baseline's, or a part of it, has the colour map's end
_DARK = 0.85  # times the best baseline's, below which the colour is dark
_CEILING = 3.0  # times the first loss, above which a curve is left out: it would flatten the others
_COLUMNS = 3
_DRAWN = ("Nesterov + cosine", "Adam", "AdamW + cosine", "Schedule-Free", "Muon + cosine")


def plot_matrix(path: str | Path, suite: Suite) -> Path:
    """Draw the last 20 losses of all optimizers on all nets over those of each net's best tuned baseline.

    Dark and bold is better than it, light worse, also in grey; a cross is a run that diverged on any seed, white one
    that was not run.
    """
    from matplotlib.colors import LogNorm

    labels, nets = [*suite.candidates, *suite.baselines], [*suite.results]
    table = [[_over_best(suite, net, label) for net in nets] for label in labels]
    figure = new_figure(2.5 + 0.62 * len(nets), 2.4 + 0.3 * len(labels))
    axes = figure.add_subplot()
    shown = [[value if value is not None and math.isfinite(value) else math.nan for value in row] for row in table]
    image = axes.imshow(shown, cmap="cividis", norm=LogNorm(1 / _FACTOR, _FACTOR), aspect="auto")
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            if value is not None:
                text = "×" if math.isinf(value) else f"{value:.2f}" if value < 10 else f"{value:.0f}"
                dark, bold = value < _DARK, "bold" if value < 1 else "normal"
                colour = "white" if dark else "black"
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour, fontweight=bold)
    axes.set_xticks(range(len(nets)), nets, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    for tick in axes.get_yticklabels()[: len(suite.candidates)]:
        tick.set_fontweight("bold")
    bar = figure.colorbar(image, ax=axes, ticks=[0.5, 0.7, 1, 1.4, 2], shrink=0.8)
    bar.ax.set_yticklabels(["0.5", "0.7", "1", "1.4", "2"])
    bar.ax.minorticks_off()
    bar.set_label("last 20 losses /\nbest tuned baseline's", fontsize=8)
    return write_figure(figure, path)


def plot_suite_curves(path: str | Path, suite: Suite) -> Path:
    """Draw a panel a net: train losses, means over seeds, with bands from the lowest to the highest seed.

    A line that ends with a cross diverged there: over three times the first loss, or not finite.
    """
    num_rows = -(-len(suite.results) // _COLUMNS)
    figure = new_figure(4.3 * _COLUMNS, 2.9 * num_rows + 0.6)
    handles: dict[str, Any] = {}
    for i, (net, by) in enumerate(suite.results.items(), start=1):
        axes = add_axes(figure, (num_rows, _COLUMNS, i), xlabel="step", ylabel="train loss")
        axes.set_title(net, fontsize=9)
        for label in _drawn(suite):
            if label in by:
                handles[label] = _draw(axes, suite, net, label)
        for name in ("x", "y"):
            scale_axis(axes, name)
    legend_below(figure, handles, shaded="lowest to highest seed")
    return write_figure(figure, path, dpi=72)  # many panels: at more, the file is large


def _drawn(suite: Suite) -> Sequence[str]:
    known = [label for label in _DRAWN if label in suite.baselines]
    return [*(known or suite.baselines[: len(COLOURS)]), *suite.candidates]  # candidates in front


def _draw(axes: Any, suite: Suite, net: str, label: str) -> Any:
    from learnedopt.core import tree
    from learnedopt.evaluation.suite_table import thinned

    steps, values = thinned(suite.results[net][label].losses)
    values = values.masked_fill(~(values <= _CEILING * values[0].max()), math.nan)
    index, strong = _drawn(suite).index(label), label in suite.candidates
    front = label in suite.candidates[:1]
    shape = look(0 if front else index, front) | {
        "linewidth": 2.4 if strong else 1.4,
        "dashes": () if front else look(index + 1)["dashes"],
    }
    (line,) = axes.plot(steps, tree.numbers(values.mean(1)), label=label, **shape)
    mark_end(axes, line)
    draw_band(axes, line, tree.numbers(values.amin(1)), tree.numbers(values.amax(1)))
    return line


def _over_best(suite: Suite, net: str, label: str) -> float | None:
    best = suite.best_tuned(net)
    if best is None or label not in suite.results[net]:
        return None
    result = suite.results[net][label]
    if result.record["num_diverged"]:
        return math.inf
    ratio = suite.ratio(net, label, best)
    return None if ratio is None else ratio.mean
