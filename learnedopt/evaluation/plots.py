"""Figures as PNG files: loss curves, lines in general, and the one style of all figures.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; every line also has a dash pattern
of its own, and a marker where it has few points, so that figures can be read in grey.

matplotlib is imported when the first figure is drawn and writes files only: no window, no global state.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from learnedopt.core.files import write_atomically

Values: TypeAlias = "Sequence[float] | Any"
"""Numbers in a row: a list, or anything that ``float`` reads element by element (an array or tensor of one axis)."""

EMPHASIS = "#D55E00"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
DASHES = ((), (6, 2), (2, 1.5), (7, 2, 1.5, 2), (4, 1.5, 1, 1.5, 1, 1.5), (10, 3), (1, 1))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PLAIN_DECADES = 2.5
_FEW_TICKS = 0.5  # decades, below which 1, 2 and 5 would mark one place or none
_MARKED = 30  # a line of at most so many points shows each of them
_DIVERGED = "{} (diverged: ×)"
_CEILING = 10  # times the highest first value, above which a curve would flatten the others


def plot_curves(
    path: str | Path,
    curves: Mapping[str, Values],
    *,
    bands: Mapping[str, tuple[Values, Values]] | None = None,
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
            curve that diverges would flatten the others. One whose last value is left out ends with a cross, and is
            called diverged in the legend.
        bands: label -> lowest and highest values of the curve's interval, drawn where the curve is.
        emphasis: labels drawn thick, in front, in the signal colour.
        logy: logarithmic y-axis; None means where every finite value is positive.

    Raises:
        ValueError: there is nothing finite to draw.
    """
    lines = {label: floats(values) for label, values in curves.items()}
    ceiling = _CEILING * max((y[0] for y in lines.values() if y and math.isfinite(y[0])), default=0)
    if ceiling > 0:
        lines = {label: [v if v <= ceiling else math.nan for v in y] for label, y in lines.items()}
    ended = [label for label, y in lines.items() if y and not math.isfinite(y[-1])]
    lines = {_DIVERGED.format(label) if label in ended else label: y for label, y in lines.items()}
    strong = [_DIVERGED.format(label) if label in ended else label for label in emphasis]
    if logy is None:
        logy = all(v > 0 for y in lines.values() for v in y if math.isfinite(v))
    figure, axes = new_axes(xlabel, ylabel, title)
    draw_lines(axes, {label: (floats(range(len(y))), y) for label, y in lines.items()}, strong, False, logy)
    for label, line in zip(curves, axes.get_lines(), strict=True):
        mark_end(axes, line)
        if label in (bands or {}):
            draw_band(axes, line, *(bands or {})[label])
    whole_ticks(axes)
    return save_axes(figure, axes, path)


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
    figure, axes = new_axes(xlabel, ylabel, title)
    draw_lines(axes, lines, emphasis, logx, logy)
    return save_axes(figure, axes, path)


def plot_panels(
    path: str | Path,
    panels: Mapping[str, Mapping[str, tuple[Values, Values]]],
    xlabel: str,
    *,
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
        logy: the panels with a logarithmic y-axis.
        title: of the figure.
        emphasis: labels drawn thick, in front, in the signal colour.

    Raises:
        ValueError: there is nothing finite to draw in one of them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 5), layout="constrained")
    figure.suptitle(title)
    for i, (ylabel, series) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), i, xlabel=xlabel, ylabel=ylabel)
        plain_axes(axes)
        lines = {label: (floats(x), floats(y)) for label, (x, y) in series.items()}
        draw_lines(axes, lines, emphasis, False, ylabel in logy, legend=False)
        require_lines(path, axes)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return write_figure(figure, path)


def new_axes(xlabel: str, ylabel: str, title: str) -> tuple[Any, Any]:
    """Return a figure of the common size and its axes."""
    # Not pyplot: it would keep the figure alive and choose a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, title=title)
    plain_axes(axes)
    return figure, axes


def plain_axes(axes: Any) -> None:
    """Give axes a light grid, and no frame above and to the right."""
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def whole_ticks(axes: Any) -> None:
    """Mark whole numbers alone on a linear x-axis that counts steps, however few these are."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))


def mark_end(axes: Any, line: Any) -> None:
    """Put a cross, in the line's colour, on the last point drawn of a line whose last value is not finite."""
    points = [(x, y) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if math.isfinite(y)]
    if points and not math.isfinite(line.get_ydata()[-1]):
        x, y = points[-1]
        axes.plot([x], [y], "x", color=line.get_color(), markersize=9, markeredgewidth=2.5, zorder=4)


def draw_band(axes: Any, line: Any, low: Values, high: Values) -> None:
    """Shade what lies between two rows of numbers, in a line's colour and where the line is drawn.

    On a logarithmic axis it ends at the axis' lower end.
    """
    shown = [math.isfinite(y) for y in line.get_ydata()]
    floor = axes.get_ylim()[0] if axes.get_yscale() == "log" else -math.inf
    lower = [max(v, floor) for v in floats(low)]
    axes.fill_between(
        line.get_xdata(), lower, floats(high), where=shown, color=line.get_color(), alpha=0.2, linewidth=0
    )


def draw_lines(
    axes: Any, lines: Mapping[str, tuple[list[float], list[float]]], emphasis: Collection[str], logx: bool, logy: bool,
    *, legend: bool = True,
) -> None:  # fmt: skip
    """Draw lines (label -> x and y), each told from the others by colour, dashes and marker, and scale the axes."""
    counts = {True: 0, False: 0}
    for label, (x, y) in lines.items():
        strong = label in emphasis
        index, counts[strong] = counts[strong], counts[strong] + 1
        colour = EMPHASIS if strong else COLOURS[index % len(COLOURS)]
        width, order = (2.8, 3) if strong else (1.6, 2.5)
        shown = drawable(x, y, logx, logy)
        axes.plot(
            *shown, label=label, color=colour, linewidth=width, zorder=order, dashes=DASHES[index % len(DASHES)],
            marker=MARKERS[index % len(MARKERS)] if sum(map(math.isfinite, shown[1])) <= _MARKED else None,
            markersize=3.5,
        )  # fmt: skip
    for name, logarithmic in (("x", logx), ("y", logy)):
        if logarithmic:
            scale_axis(axes, name)
    if legend:  # outside, so that it hides no line
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handlelength=3.5)


def scale_axis(axes: Any, name: str) -> None:
    """Make an axis logarithmic.

    Over a few decades 1, 2 and 5 are marked as plain numbers, not as powers of ten; over less than half of one, as many
    round numbers as on a linear axis.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    low, high = axis.get_view_interval()
    if high / low < 10**_PLAIN_DECADES:
        few = high / low < 10**_FEW_TICKS
        axis.set_major_locator(MaxNLocator(5) if few else LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def drawable(x: list[float], y: list[float], logx: bool, logy: bool) -> tuple[list[float], list[float]]:
    """Replace what the axes cannot show by NaN, which matplotlib leaves out."""
    keep = [
        math.isfinite(a) and math.isfinite(b) and (a > 0 or not logx) and (b > 0 or not logy)
        for a, b in zip(x, y, strict=True)
    ]
    return x, [b if ok else math.nan for b, ok in zip(y, keep, strict=True)]


def save_axes(figure: Any, axes: Any, path: str | Path) -> Path:
    """Write a figure of one axes; raise ValueError where there is nothing on it."""
    require_lines(path, axes)
    return write_figure(figure, path)


def require_lines(path: str | Path, *panels: Any) -> None:
    """Raise ValueError where not one line of these axes has a point."""
    if not any(math.isfinite(float(v)) for axes in panels for line in axes.lines for v in line.get_ydata()):
        raise ValueError(
            f"{path}: nothing to draw, not one value is finite (and positive where the axis is logarithmic)"
        )


def write_figure(figure: Any, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure as a PNG file of so many dots an inch, atomically, and return the path."""
    path = Path(path)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=dpi))
    return path


def floats(values: Values) -> list[float]:
    """Return the values as a list."""
    return [float(v) for v in values]
