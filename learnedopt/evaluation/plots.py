"""Figures as PNG files: loss curves, lines in general, and panels of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from learnedopt.evaluation.style import (
    DIVERGED,
    OFF_SCALE,
    Values,
    add_axes,
    draw_band,
    draw_lines,
    floats,
    labelled,
    legend_below,
    legend_beside,
    mark_end,
    new_figure,
    require_lines,
    whole_ticks,
    write_figure,
)

_CEILING = 10  # times the highest first value, above which a curve would flatten the others


def plot_curves(
    path: str | Path,
    curves: Mapping[str, Values],
    *,
    bands: Mapping[str, tuple[Values, Values]] | None = None,
    shaded: str = "95 % interval",
    emphasis: Collection[str] = (),
    xlabel: str = "inner step",
    ylabel: str = "loss",
    title: str = "",
    logy: bool | None = None,
) -> Path:
    """Draw each curve against 0, 1, 2, ... and return the path written.

    Args:
        path: of the PNG file.
        curves: label -> values. Left out are non-finite ones, and those over 10 times the highest first value: a
            curve that explodes would flatten the others. One whose last value is left out ends with a cross: the
            legend calls it diverged where that value is not finite, else off the scale.
        bands: label -> lowest and highest values of the curve's interval, drawn where the curve is; not drawn of one
            that ends with a cross.
        shaded: what the bands are, for the legend.
        emphasis: labels drawn thick, in front, in the signal colour; of several, each in one of its own.
        logy: logarithmic y-axis; None means where every finite value is positive.

    Raises:
        ValueError: there is nothing finite to draw.
    """
    lines = {label: floats(values) for label, values in curves.items()}
    ceiling = _CEILING * max((y[0] for y in lines.values() if y and math.isfinite(y[0])), default=0)
    if ceiling > 0:
        lines = {label: [v if v <= ceiling else math.nan for v in y] for label, y in lines.items()}
    ended = [label for label, y in lines.items() if y and not math.isfinite(y[-1])]
    named = {label: _named(label, floats(curves[label]), label in ended) for label in lines}
    lines = {named[label]: y for label, y in lines.items()}
    strong = [named.get(label, label) for label in emphasis]
    bands = {label: band for label, band in (bands or {}).items() if label in curves and label not in ended}
    if logy is None:
        logy = all(v > 0 for y in lines.values() for v in y if math.isfinite(v))
    figure, axes = _one_axes(xlabel, ylabel, title)
    steps = {label: (floats(range(len(y))), y) for label, y in lines.items()}
    draw_lines(axes, steps, strong, False, logy, legend=False)
    for label, line in zip(curves, axes.get_lines(), strict=True):
        mark_end(axes, line)
        if label in bands:
            draw_band(axes, line, *bands[label])
    legend_beside(axes, shaded if bands else "")
    whole_ticks(axes)
    require_lines(path, axes)
    return write_figure(figure, path)


def plot_lines(
    path: str | Path,
    series: Mapping[str, tuple[Values, Values]],
    xlabel: str,
    ylabel: str,
    *,
    logx: bool = False,
    logy: bool | None = False,
    title: str = "",
    emphasis: Collection[str] = (),
) -> Path:
    """Draw each of ``series`` (label -> x and y values of one length) and return the path written.

    Points that an axis cannot show (not finite, or not positive on a logarithmic axis) are gaps in the line. With
    ``logy=None`` the y-axis is logarithmic where every finite value is positive. Labels in ``emphasis`` are drawn thick
    and in front.

    Raises:
        ValueError: x and y differ in length, or there is nothing to draw.
    """
    lines = {label: (floats(x), floats(y)) for label, (x, y) in series.items()}
    for label, (x, y) in lines.items():
        if len(x) != len(y):
            raise ValueError(f"line {label!r} has {len(x)} x values but {len(y)} y values; give as many of both")
    if logy is None:
        logy = all(v > 0 for _, y in lines.values() for v in y if math.isfinite(v))
    figure, axes = _one_axes(xlabel, ylabel, title)
    draw_lines(axes, lines, emphasis, logx, logy)
    require_lines(path, axes)
    return write_figure(figure, path)


def plot_panels(
    path: str | Path,
    panels: Mapping[str, Mapping[str, tuple[Values, Values]]],
    xlabel: str,
    *,
    bands: Mapping[str, Mapping[str, tuple[Values, Values]]] | None = None,
    shaded: str = "95 % interval",
    logx: bool = False,
    logy: Collection[str] = (),
    title: str = "",
    emphasis: Collection[str] = (),
) -> Path:
    """Draw several panels side by side, of lines with the same labels, and return the path written.

    Args:
        path: of the PNG file.
        panels: what the y-axis shows -> label -> x and y values, as for ``plot_lines``; the labels of the first panel
            are the legend.
        xlabel: of all panels.
        bands: panel -> label -> lowest and highest values, at the x values of the line.
        shaded: what the bands are, for the legend.
        logx: logarithmic x-axes.
        logy: the panels with a logarithmic y-axis.
        title: of the figure.
        emphasis: labels drawn thick, in front, in the signal colour.

    Raises:
        ValueError: there is nothing finite to draw in one of them.
    """
    figure = new_figure(4.2 * len(panels), 4.6, title)
    for i, (ylabel, series) in enumerate(panels.items(), start=1):
        axes = add_axes(figure, (1, len(panels), i), xlabel=xlabel, ylabel=ylabel)
        lines = {label: (floats(x), floats(y)) for label, (x, y) in series.items()}
        draw_lines(axes, lines, emphasis, logx, ylabel in logy, legend=False)
        shades = (bands or {}).get(ylabel, {})
        for label, line in zip(lines, axes.get_lines(), strict=True):
            if label in shades:
                draw_band(axes, line, *shades[label])
        require_lines(path, axes)
    legend_below(figure, labelled(figure.axes[0]), ncols=2, shaded=shaded if any((bands or {}).values()) else "")
    return write_figure(figure, path)


def _named(label: str, curve: list[float], ended: bool) -> str:
    """Return a curve's label in the legend, which says why it ends before its last value."""
    if not ended:
        return label
    return (OFF_SCALE if math.isfinite(curve[-1]) else DIVERGED).format(label)


def _one_axes(xlabel: str, ylabel: str, title: str) -> tuple[Any, Any]:
    """Return a figure of the common size and its axes."""
    figure = new_figure(8, 4.5, title)  # the axes are narrower than it by the legend: a title may be too long for them
    return figure, add_axes(figure, (1, 1, 1), xlabel=xlabel, ylabel=ylabel)
