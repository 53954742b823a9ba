"""The figure of few-shot learners: what they reach after each number of steps, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from learnedopt.evaluation.style import (
    add_axes,
    draw_band,
    draw_lines,
    floats,
    legend_beside,
    new_figure,
    require_lines,
    scale_axis,
    whole_ticks,
    write_figure,
)

Curve: TypeAlias = tuple[Sequence[int], Sequence[tuple[float, float, float]]]
_SQUEEZED = 0.5  # of the axis, below which what follows the first step has a panel of its own
_LONGER = 3  # times the shortest curve, from which on steps are drawn by logarithm


def plot_adaptation(
    path: str | Path, curves: Mapping[str, Curve], *, ylabel: str, shaded: str = "95 % interval", logy: bool = False,
    title: str = "",
) -> Path:  # fmt: skip
    """Draw what methods reach after each number of adaptation steps, with bands, and return the path written.

    Where the first step does most, as from chance to 95 %, a second panel shows the steps from 1 on, on an axis of
    their own; there steps are logarithmic where one method takes three times as many as another.

    Args:
        path: of the PNG file.
        curves: label -> the numbers of steps, and for each of them (value, low, high).
        ylabel: what the values are.
        shaded: what the bands are, for the legend.
        logy: logarithmic y-axis; a band ends where it is not positive.
        title: of the figure.

    Raises:
        ValueError: there is nothing finite to draw.
    """
    later = {label: _from_first(curve) for label, curve in curves.items()}
    zoomed = _span(later, logy) < _SQUEEZED * _span(curves, logy) and all(steps for steps, _ in later.values())
    figure = new_figure(10 if zoomed else 8, 4.5, title)
    grid = figure.add_gridspec(1, 2 if zoomed else 1, width_ratios=(1, 2) if zoomed else None)
    axes = add_axes(figure, grid[0], xlabel="adaptation steps", ylabel=ylabel)
    _draw(axes, curves, logy, logx=False)
    if zoomed:
        axes.set_title("all", fontsize=9)
        axes = add_axes(figure, grid[1], xlabel="adaptation steps", title="from the first step on")
        axes.title.set_fontsize(9)
        ends = [steps[-1] for steps, _ in later.values()]
        _draw(axes, later, logy, logx=max(ends) >= _LONGER * min(ends))
    legend_beside(axes, shaded)
    require_lines(path, figure.axes[0])
    return write_figure(figure, path)


def _from_first(curve: Curve) -> Curve:
    kept = [(step, point) for step, point in zip(*curve, strict=True) if step > 0]
    return [step for step, _ in kept], [point for _, point in kept]


def _span(curves: Mapping[str, Curve], logy: bool) -> float:
    """Return how much of the axis the values take, 0 where there are none."""
    values = [point[0] for _, points in curves.values() for point in points if math.isfinite(point[0])]
    if logy:
        values = [math.log(value) for value in values if value > 0]
    return max(values) - min(values) if values else 0.0


def _draw(axes: Any, curves: Mapping[str, Curve], logy: bool, logx: bool) -> None:
    lines = {label: (floats(steps), [value for value, _, _ in points]) for label, (steps, points) in curves.items()}
    draw_lines(axes, lines, (), logx, logy, legend=False)
    for line, (_, points) in zip(axes.get_lines(), curves.values(), strict=True):
        draw_band(axes, line, *([point[i] for point in points] for i in (1, 2)))
    if logx:
        scale_axis(axes, "x")
    else:
        whole_ticks(axes)
