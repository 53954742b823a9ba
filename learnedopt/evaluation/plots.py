"""Figures as PNG files: loss curves, the course of a meta-training, lines in general.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; every line also has a dash pattern
of its own. matplotlib is imported when the first figure is drawn and writes files only: no window, no global state.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from learnedopt.core.files import write_atomically

Values: TypeAlias = "Sequence[float] | Any"
"""Numbers in a row: a list, or anything that ``float`` reads element by element (an array or tensor of one axis)."""

EMPHASIS = "#D55E00"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
DASHES = ((), (6, 2), (2, 1.5), (7, 2, 1.5, 2), (4, 1.5, 1, 1.5, 1, 1.5), (10, 3), (1, 1))
_PLAIN_DECADES = 2.5
_MARKED = 30  # a line of at most so many points shows each of them


def plot_curves(
    path: str | Path,
    curves: Mapping[str, Values],
    *,
    emphasis: Collection[str] = (),
    xlabel: str = "inner step",
    ylabel: str = "loss",
    title: str = "",
    logy: bool | None = None,
) -> Path:
    """Draw each curve against 0, 1, 2, ... and return the path written.

    Args:
        path: of the PNG file.
        curves: label -> values. Left out are non-finite ones, and those over 100 times the highest first value: a
            curve that diverges ends there, instead of flattening the others.
        emphasis: labels drawn thick, in front, in the signal colour.
        logy: logarithmic y-axis; None means where every finite value is positive.

    Raises:
        ValueError: there is nothing finite to draw.
    """
    lines = {label: _floats(values) for label, values in curves.items()}
    ceiling = 100 * max((y[0] for y in lines.values() if y and math.isfinite(y[0])), default=0)
    if ceiling > 0:
        lines = {label: [v if v <= ceiling else math.nan for v in y] for label, y in lines.items()}
    series = {label: (range(len(y)), y) for label, y in lines.items()}
    return plot_lines(path, series, xlabel, ylabel, logy=logy, title=title, emphasis=emphasis)


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
    lines = {label: (_floats(x), _floats(y)) for label, (x, y) in series.items()}
    for label, (x, y) in lines.items():
        if len(x) != len(y):
            raise ValueError(f"line {label!r} has {len(x)} x values but {len(y)} y values; give as many of both")
    if logy is None:
        logy = all(v > 0 for _, y in lines.values() for v in y if math.isfinite(v))
    figure, axes = _figure(xlabel, ylabel, title)
    _draw(axes, lines, emphasis, logx, logy)
    return _save(figure, axes, path)


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
        lines = {label: (_floats(x), _floats(y)) for label, (x, y) in series.items()}
        _draw(axes, lines, emphasis, False, ylabel in logy, legend=False)
        _require_lines(axes, path)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return write_figure(figure, path)


def plot_training(path: str | Path, rows: Iterable[Mapping[str, Any]], *, title: str = "") -> Path:
    """Draw meta-loss and validation against the meta-step and return the path written.

    Args:
        path: of the PNG file.
        rows: metrics as ``learnedopt.training.json_tracker.read_metrics`` gives them: ``step``, and ``meta_loss`` or
            ``validation`` or both; numbers may be the strings "NaN" and "Infinity".

    The meta-loss of single meta-steps is drawn faint, and its running median over a fiftieth of the training strong.

    Raises:
        ValueError: there is nothing finite to draw.
    """
    points: dict[str, tuple[list[float], list[float]]] = {"meta_loss": ([], []), "validation": ([], [])}
    for row in rows:
        for name, (steps, values) in points.items():
            if name in row:
                steps.append(float(row["step"]))
                values.append(float(row[name]))
    steps, values = points["meta_loss"]
    lines = {"meta-loss, running median": _running_median(steps, values)}
    if points["validation"][0]:
        lines["validation"] = points["validation"]
    logy = all(v > 0 for _, y in points.values() for v in y if math.isfinite(v))
    figure, axes = _figure("meta-step", "meta-loss", title)
    x, y = _drawable(steps, values, False, logy)
    axes.plot(x, y, color=COLOURS[0], linewidth=0.8, alpha=0.3)
    _draw(axes, lines, ("validation",), False, logy)
    return _save(figure, axes, path)


def plot_adaptation(
    path: str | Path,
    curves: Mapping[str, tuple[Sequence[int], Sequence[tuple[float, float, float]]]],
    *,
    ylabel: str,
    logy: bool = False,
    title: str = "",
) -> Path:
    """Draw what methods reach after each number of adaptation steps, with bands, and return the path written.

    Args:
        path: of the PNG file.
        curves: label -> the numbers of steps, and for each of them (value, low, high).
        ylabel: what the values are.
        logy: logarithmic y-axis; a band ends where it is not positive.
        title: of the figure.

    Raises:
        ValueError: there is nothing finite to draw.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure("adaptation steps", ylabel, title)
    lines = {label: (_floats(steps), [value for value, _, _ in points]) for label, (steps, points) in curves.items()}
    _draw(axes, lines, (), False, logy)
    for line, (steps, points) in zip(axes.get_lines(), curves.values(), strict=True):
        low, high = (_drawable(line.get_xdata(), [point[i] for point in points], False, logy)[1] for i in (1, 2))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _save(figure, axes, path)


def _figure(xlabel: str, ylabel: str, title: str) -> tuple[Any, Any]:
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


def _draw(
    axes: Any, lines: Mapping[str, tuple[list[float], list[float]]], emphasis: Collection[str], logx: bool, logy: bool,
    *, legend: bool = True,
) -> None:  # fmt: skip
    counts = {True: 0, False: 0}
    for label, (x, y) in lines.items():
        strong = label in emphasis
        index, counts[strong] = counts[strong], counts[strong] + 1
        colour = EMPHASIS if strong else COLOURS[index % len(COLOURS)]
        width, order = (2.8, 3) if strong else (1.6, 2.5)
        shown = _drawable(x, y, logx, logy)
        axes.plot(
            *shown, label=label, color=colour, linewidth=width, zorder=order, dashes=DASHES[index % len(DASHES)],
            marker="o" if sum(map(math.isfinite, shown[1])) <= _MARKED else None, markersize=3.5,
        )  # fmt: skip
    for name, logarithmic in (("x", logx), ("y", logy)):
        if logarithmic:
            scale_axis(axes, name)
    if legend:  # outside, so that it hides no line
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handlelength=3.5)


def scale_axis(axes: Any, name: str) -> None:
    """Make an axis logarithmic; over a few decades 1, 2 and 5 are marked as plain numbers, not as powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    low, high = axis.get_view_interval()
    if high / low < 10**_PLAIN_DECADES:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _drawable(x: list[float], y: list[float], logx: bool, logy: bool) -> tuple[list[float], list[float]]:
    """Replace what the axes cannot show by NaN, which matplotlib leaves out."""
    keep = [
        math.isfinite(a) and math.isfinite(b) and (a > 0 or not logx) and (b > 0 or not logy)
        for a, b in zip(x, y, strict=True)
    ]
    return x, [b if ok else math.nan for b, ok in zip(y, keep, strict=True)]


def _running_median(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """Return, at no more than 500 places, the median of the finite values within a hundredth of the line's length."""
    width, stride = max(1, len(y) // 100), max(1, len(y) // 500)
    medians = []
    for i in range(0, len(y), stride):
        window = sorted(v for v in y[max(0, i - width) : i + width + 1] if math.isfinite(v))
        medians.append(window[len(window) // 2] if window else math.nan)
    return x[::stride], medians


def _save(figure: Any, axes: Any, path: str | Path) -> Path:
    _require_lines(axes, path)
    return write_figure(figure, path)


def _require_lines(axes: Any, path: str | Path) -> None:
    if not any(math.isfinite(float(v)) for line in axes.lines for v in line.get_ydata()):
        raise ValueError(
            f"{path}: nothing to draw, not one value is finite (and positive where the axis is logarithmic)"
        )


def write_figure(figure: Any, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure as a PNG file of so many dots an inch, atomically, and return the path."""
    path = Path(path)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=dpi))
    return path


def _floats(values: Values) -> list[float]:
    return [float(v) for v in values]
