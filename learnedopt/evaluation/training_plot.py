"""The figure of a meta-training: validation above, the meta-loss of its steps below, never on one axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from learnedopt.evaluation.style import (
    COLOURS,
    add_axes,
    draw_lines,
    drawable,
    new_figure,
    require_lines,
    whole_ticks,
    write_figure,
)

_PLACES = 500  # of the running mean, at most
_AVERAGES = 50  # in the length of a training that do not overlap


def windows_of(estimator: Mapping[str, Any]) -> int | None:
    """Return how many meta-steps take turns in an episode, of an estimator's configuration (``config.as_config``).

    1: each takes a whole episode. None: it is not told, as where episodes have no end, or differ in length.
    """
    told = estimator.get("back_propagated") or estimator.get("estimator") or estimator
    if estimator.get("horizons") or told.get("horizons"):
        return 1 if estimator.get("type") == "TaskByTask" else None
    if "horizon" not in told:
        return 1
    horizon, num_steps = told["horizon"], told.get("num_steps")
    if horizon is None:
        return 1 if told.get("type") in ("ForwardMode", "EvolutionStrategies") else None
    return max(1, math.ceil(horizon / num_steps)) if num_steps else None


def plot_training(
    path: str | Path, rows: Iterable[Mapping[str, Any]], *, windows: int | None = 1, title: str = ""
) -> Path:
    """Draw validation and meta-loss against the meta-step, in a panel each, and return the path written.

    They are losses of other tasks, and often of other lengths: on one axis a window beside an episode looks like
    overfitting. Single meta-steps are drawn faint, and their running mean strong.

    Args:
        path: of the PNG file.
        rows: metrics as ``learnedopt.training.json_tracker.read_metrics`` gives them: ``step``, and ``meta_loss`` or
            ``validation`` or both; numbers may be the strings "NaN" and "Infinity".
        windows: meta-steps an episode, see ``windows_of``. The mean is over whole episodes, so that no window of them
            counts more than another; with None over a fiftieth of the training.
        title: of the figure.

    Raises:
        ValueError: there is nothing finite to draw, or one of both is no number.
    """
    rows = [*rows]
    losses, validation = points(rows, "meta_loss"), points(rows, "validation")
    panels = [found for found in (validation, losses) if found[0]] or [losses]
    figure = new_figure(8, 2.6 * len(panels) + 0.6, title)
    shared: Any = None
    for i, found in enumerate(panels, start=1):
        axes = shared = add_axes(figure, (len(panels), 1, i), sharex=shared)
        logy = all(v > 0 for v in found[1] if math.isfinite(v))
        if found is losses:
            axes.set(xlabel="meta-step", ylabel=f"meta-loss,\n{what_is_a_step(windows)}")
            x, y = drawable(*losses, False, logy)
            dot = "." if len(x) == 1 else None
            axes.plot(x, y, color=COLOURS[0], linewidth=0.8, alpha=0.35, marker=dot, label="each meta-step")
            draw_lines(axes, {"running mean": running_mean(*losses, windows)}, (), False, logy, legend=False)
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, ncols=2, fontsize="small")
        else:
            axes.set(ylabel="validation loss,\nwhole episodes")
            draw_lines(axes, {"validation": validation}, ("validation",), False, logy, legend=False)
        whole_ticks(axes)
    require_lines(path, *figure.axes)
    return write_figure(figure, path)


def what_is_a_step(windows: int | None) -> str:
    """Say of what a meta-step's loss is."""
    if windows == 1:
        return "whole episodes"
    return "windows" if windows is None else f"windows, {windows} an episode"


def points(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Return the steps of the rows that have this metric, and its values.

    Raises:
        ValueError: one of them, whose step is named, is no number.
    """
    steps: list[float] = []
    values: list[float] = []
    for row in rows:
        if name in row:
            try:
                steps.append(float(row["step"]))
                values.append(float(row[name]))
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"at the step {row['step']!r:.40} the metric {name} is {row[name]!r:.40}, which is no number; mend "
                    "that line of the record (metrics.jsonl), or delete it"
                ) from error
    return steps, values


def running_mean(x: Sequence[float], y: Sequence[float], windows: int | None) -> tuple[list[float], list[float]]:
    """Return, at no more than 500 places, the mean of the finite values among those that end there.

    It is over a whole number of times ``windows`` values, about a fiftieth of all, and begins where there are so many
    (or the windows of an episode are not all there: where there are any).
    """
    period = windows or 1
    width = period * max(1, len(y) // (_AVERAGES * period))
    first, stride = (width - 1 if len(y) >= width else 0), max(1, math.ceil(len(y) / _PLACES))
    means: list[float] = []
    for i in range(first, len(y), stride):
        finite = [v for v in y[max(0, i + 1 - width) : i + 1] if math.isfinite(v)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return [*x[first::stride]], means
