"""The one style of all figures: colours, dashes and markers, axes, legends, and the PNG file.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; every line also has a dash pattern
of its own, and a marker where it has few points, so that figures can be read in grey. Whatever is shaded or crossed is
named in the legend.

matplotlib is imported when the first figure is drawn and writes files only: no window, no global state.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from learnedopt.core.files import write_atomically

Values: TypeAlias = "Sequence[float] | Any"
"""Numbers in a row: a list, or anything that ``float`` reads element by element (an array or tensor of one axis)."""

EMPHASIS = "#D55E00"
STRONG = (EMPHASIS, "#7A0177", "#000000", "#A6761D")
"""Colours of the lines that a figure is about, where there are several: as far apart in grey as well."""
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
DASHES = ((), (6, 2), (2, 1.5), (7, 2, 1.5, 2), (4, 1.5, 1, 1.5, 1, 1.5), (10, 3), (1, 1))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DIVERGED = "{} (diverged: ×)"
"""Label of a line whose last value is not finite."""
OFF_SCALE = "{} (off the scale: ×)"
"""Label of a line whose last value is finite, and too high to be drawn."""
_DPI = 100
_PALETTE = 256  # colours of a file: it is a third as large as with all of them, and looks the same
_PLAIN_DECADES = 2.5  # of an axis, up to which 1, 2 and 5 are marked
_FEW_TICKS = 0.5  # decades, below which 1, 2 and 5 would mark one place or none
_LONG = 1e4  # from which on numbers are too long to stand side by side at 1, 2 and 5
_PLAIN = (1e-3, 5e4)  # an axis within these has plain numbers, not powers of ten
_MARKED = 30  # a line of at most so many points shows each of them


def new_figure(width: float, height: float, title: str = "") -> Any:
    """Return an empty figure of so many inches, on which nothing overlaps."""
    # Not pyplot: it would keep the figure alive and choose a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        # Its keywords have no types.
        figure.suptitle(title, wrap=True)  # pyright: ignore[reportUnknownMemberType]
    return figure


def add_axes(figure: Any, place: Any, **labels: Any) -> Any:
    """Add plain axes at ``place``, which is (rows, columns, index) or a cell of a grid; ``labels`` as matplotlib's."""
    axes = figure.add_subplot(*place, **labels) if isinstance(place, tuple) else figure.add_subplot(place, **labels)
    plain_axes(axes)
    return axes


def plain_axes(axes: Any) -> None:
    """Give axes a light grid behind what is drawn, and no frame above and to the right."""
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def whole_ticks(axes: Any) -> None:
    """Mark whole numbers alone on a linear x-axis that counts steps, however few these are."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))


def scale_axis(axes: Any, name: str) -> None:
    """Make an axis logarithmic.

    Over a few decades 1, 2 and 5 are marked as plain numbers, over less than one some more, over less than half of one
    round numbers as on a linear axis. Powers of ten are written as such only where they are very large or small.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    low, high = axis.get_view_interval()
    few, some = high / low < 10**_FEW_TICKS, high / low < 10**_PLAIN_DECADES and high < _LONG
    marks = (1, 1.5, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5)
    if few or some:
        axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)) if few else LogLocator(subs=marks))
        axis.set_minor_formatter(NullFormatter())
    if few or some or (low > _PLAIN[0] and high < _PLAIN[1]):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def look(index: int, strong: bool = False) -> dict[str, Any]:
    """Return how matplotlib draws the line of this index: a colour and dashes of its own.

    Strong lines are in front, thick, and counted for themselves: they take dashes from the other end of the list.
    """
    colours, turn = (STRONG, -index) if strong else (COLOURS, index)
    return {
        "color": colours[index % len(colours)],
        "dashes": DASHES[turn % len(DASHES)],
        "linewidth": 2.8 if strong else 1.6,
        "zorder": 3 if strong else 2.5,
    }


def draw_lines(
    axes: Any, lines: Mapping[str, tuple[list[float], list[float]]], emphasis: Collection[str], logx: bool, logy: bool,
    *, legend: bool = True,
) -> None:  # fmt: skip
    """Draw lines (label -> x and y), each told from the others by colour, dashes and marker, and scale the axes."""
    counts = {True: 0, False: 0}
    for label, (x, y) in lines.items():
        strong = label in emphasis
        index, counts[strong] = counts[strong], counts[strong] + 1
        shown = drawable(x, y, logx, logy)
        turn = -index if strong else index
        marker = MARKERS[turn % len(MARKERS)] if len(x) <= _MARKED else None
        axes.plot(*shown, label=label, marker=marker, markersize=4, **look(index, strong))
    for name, logarithmic in (("x", logx), ("y", logy)):
        if logarithmic:
            scale_axis(axes, name)
    if legend:
        legend_beside(axes)


def mark_end(axes: Any, line: Any) -> None:
    """Put a cross, in the line's colour, on the last point drawn of a line whose last value is not finite."""
    points = [(x, y) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if math.isfinite(y)]
    if points and not math.isfinite(line.get_ydata()[-1]):
        x, y = points[-1]
        axes.plot([x], [y], "x", color=line.get_color(), markersize=9, markeredgewidth=2.5, zorder=4)


def draw_band(axes: Any, line: Any, low: Values, high: Values) -> None:
    """Shade what lies between two rows of numbers, in a line's colour and where the line is drawn.

    On a logarithmic axis it ends at half of the axis' lower end, lest it squeeze the lines. One point has a bar.
    """
    x, shown = line.get_xdata(), [math.isfinite(y) for y in line.get_ydata()]
    floor = axes.get_ylim()[0] / 2 if axes.get_yscale() == "log" else -math.inf
    lower, upper = [max(v, floor) for v in floats(low)], floats(high)
    axes.fill_between(x, lower, upper, where=shown, color=line.get_color(), alpha=0.18, linewidth=0)
    if sum(shown) == 1:
        axes.vlines(x, lower, upper, color=line.get_color(), linewidth=1.2)
    elif len(x) <= _MARKED:  # where bands lie on one another, their edges tell them apart
        edge = {**look(0), "color": line.get_color(), "linewidth": 0.6, "alpha": 0.7}
        for values in (lower, upper):
            (found,) = axes.plot(x, values, **edge)
            found.set_linestyle(line.get_linestyle())


def labelled(*panels: Any) -> dict[str, Any]:
    """Return what is drawn on these axes by its label, each label once."""
    return {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}


def legend_beside(axes: Any, shaded: str = "") -> None:
    """Put the legend to the right of the axes, where it hides no line; ``shaded`` says what bands are."""
    shown = _with_band(labelled(axes), shaded)
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    axes.legend(shown.values(), shown.keys(), **place, frameon=False, handlelength=3.5)


def legend_below(figure: Any, shown: Mapping[str, Any], ncols: int = 4, shaded: str = "") -> None:
    """Put a legend (label -> what is drawn) below all of a figure's axes; ``shaded`` says what bands are."""
    shown = _with_band(shown, shaded)
    place = {"loc": "outside lower center", "ncols": ncols}
    figure.legend(shown.values(), shown.keys(), **place, frameon=False, handlelength=3.5)


def _with_band(shown: Mapping[str, Any], shaded: str) -> dict[str, Any]:
    from matplotlib.patches import Patch

    return {**shown, **({shaded: Patch(color="#999999", alpha=0.4)} if shaded else {})}


def drawable(x: list[float], y: list[float], logx: bool, logy: bool) -> tuple[list[float], list[float]]:
    """Replace what the axes cannot show by NaN, which matplotlib leaves out."""
    keep = [
        math.isfinite(a) and math.isfinite(b) and (a > 0 or not logx) and (b > 0 or not logy)
        for a, b in zip(x, y, strict=True)
    ]
    return x, [b if ok else math.nan for b, ok in zip(y, keep, strict=True)]


def require_lines(path: str | Path, *panels: Any) -> None:
    """Raise ValueError where not one line of these axes has a point."""
    if not any(math.isfinite(float(v)) for axes in panels for line in axes.lines for v in line.get_ydata()):
        raise ValueError(
            f"{path}: nothing to draw, not one value is finite (and positive where the axis is logarithmic)"
        )


def write_figure(figure: Any, path: str | Path, dpi: int = _DPI) -> Path:
    """Write a figure as a PNG file of so many dots an inch, atomically and with a palette, and return the path."""
    from PIL import Image

    path, drawn = Path(path), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    few = Image.open(drawn).convert("RGB").quantize(_PALETTE, kmeans=1, dither=Image.Dither.NONE)
    write_atomically(path, lambda partial: few.save(partial, format="png", optimize=True))
    return path


def floats(values: Values) -> list[float]:
    """Return the values as a list."""
    return [float(v) for v in values]
