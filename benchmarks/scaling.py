"""How time and memory of a meta-gradient grow with inner steps, tasks and parameters."""

from __future__ import annotations

import dataclasses
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measure, report
from benchmarks.measure import MB
from benchmarks.networks import IMAGE
from benchmarks.suite import Competitor, Size, Workload
from benchmarks.workloads_evolution import LARGE
from benchmarks.workloads_evolution import ours as persistent
from benchmarks.workloads_lstm import ours_quadratics
from benchmarks.workloads_maml import WIDTHS, higher, narrow_problem, ours
from learnedopt import Execution, Unrolled
from learnedopt.evaluation.style import (
    MARKERS,
    add_axes,
    drawable,
    floats,
    labelled,
    legend_below,
    look,
    new_figure,
    scale_axis,
    write_figure,
)

FIGURE = report.FIGURE.with_name("scaling.png")
LARGEST = 4  # points through which exponents are fitted: the smallest sizes are overhead
SECONDS = 0.5


def _in_segments(steps: int) -> Unrolled:
    return Unrolled(steps, segment=max(1, round(math.sqrt(steps))))


def _parameters(units: int) -> int:
    return units * (IMAGE**2 + 1 + WIDTHS[-1]) + WIDTHS[-1]


_UNROLLED = Competitor(ours(narrow_problem))
_HIGHER = Competitor(higher(narrow_problem), "higher")
WORKLOADS = {
    "scaling": Workload(
        "Scaling",
        "",
        Size(steps=4, tasks=1, units=32),
        Size(steps=2, tasks=2, units=3),
        {
            "unrolled": _UNROLLED,
            "unrolled, segments of √steps": Competitor(ours(narrow_problem, _in_segments)),
            "unrolled, tasks together (vmap)": Competitor(
                ours(narrow_problem, execution=Execution(chunk_size=1_000_000))
            ),
            "LSTM, coordinatewise adjoint": Competitor(ours_quadratics),
            "PersistentES": Competitor(persistent(LARGE)),
            "higher": _HIGHER,
        },
        "unrolled",
    )
}


@dataclass(frozen=True)
class Sweep:
    """One size that grows: its values, the sizes and what to call them, and who takes part."""

    label: str
    values: Sequence[int]
    size: Callable[[int], Size]
    competitors: Sequence[str]
    shown: Callable[[int], float] = float


_BASE = WORKLOADS["scaling"].size
SWEEPS = (
    Sweep(
        "inner steps",
        (1, 4, 16, 64, 256),
        lambda n: dataclasses.replace(_BASE, steps=n),
        ("unrolled", "unrolled, segments of √steps", "higher"),
    ),
    Sweep(
        "tasks",
        (1, 4, 16, 64, 256),
        lambda n: dataclasses.replace(_BASE, tasks=n),
        ("unrolled", "unrolled, tasks together (vmap)", "higher"),
    ),
    # A hidden unit has 790 parameters: 1e3 to 1e7 of them.
    Sweep(
        "parameters",
        (1, 13, 127, 1266, 12658),
        lambda n: dataclasses.replace(_BASE, units=n),
        ("unrolled", "unrolled, segments of √steps", "higher"),
        _parameters,
    ),
    # Ten coordinates a task.
    Sweep(
        "coordinates of an LSTM optimizer's optimizees",
        (100, 1_000, 10_000),
        lambda n: dataclasses.replace(_BASE, tasks=n),
        ("LSTM, coordinatewise adjoint",),
        lambda n: 10.0 * n,
    ),
    Sweep(
        "pairs of persistent evolution strategies, MLP 784-20-10, 20 steps",
        (4, 8, 16, 32),
        lambda n: Size(steps=20, units=n),
        ("PersistentES",),
    ),
)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the straight line through the logarithms of the last points."""
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if b > 0][-LARGEST:]
    if len(points) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def main(*, quick: bool = False) -> None:
    """Measure all sweeps; print the tables, and write them into the page with their figure."""
    tables: list[str] = []
    lines: list[tuple[Sweep, dict[str, Any]]] = []
    for sweep in SWEEPS:
        found = _measure(sweep, sweep.values[:2] if quick else sweep.values)
        tables.append(_table(sweep, found))
        print(tables[-1], flush=True)
        lines.append((sweep, found))
    if not quick:
        report.write_part("scaling", _page(tables))
        print(f"wrote {report.PAGE} and {_draw(lines)}")


def _measure(sweep: Sweep, values: Sequence[int]) -> dict[str, Any]:
    """Return for each competitor the sizes, its CPU milliseconds and its peak bytes; competitors take turns."""
    found: dict[str, Any] = {name: ([], [], []) for name in sweep.competitors}
    for value in values:
        for name in sweep.competitors:
            size = sweep.size(value)
            taken = measure.worker("scaling", name, "times", size, SECONDS)["cpu_ms"]
            row = (sweep.shown(value), statistics.median(taken), measure.worker("scaling", name, "peak", size))
            for column, number in zip(found[name], row, strict=True):
                column.append(number)
    return found


def _table(sweep: Sweep, found: dict[str, Any]) -> str:
    sizes = next(iter(found.values()))[0]
    heads = [f"{x:,.0f}" for x in sizes]
    lines = [f"| {sweep.label} | {' | '.join(heads)} | exponent |", f"|---|{'---:|' * (len(heads) + 1)}"]
    for which, unit, scale in ((1, "CPU ms", 1.0), (2, "peak MB", MB)):
        for name, columns in found.items():
            cells = " | ".join(report.number(value / scale) for value in columns[which])
            lines.append(f"| {name}: {unit} | {cells} | {exponent(columns[0], columns[which]):.2f} |")
    return "\n".join(lines) + "\n"


def _page(tables: Sequence[str]) -> str:
    head = f"""# Scaling

{report.machine()} One thread, a process for every number. An MLP with one hidden layer of {_BASE.units} units
({_parameters(_BASE.units):,} parameters) on 10 + 10 images a task, {_BASE.steps} inner steps and {_BASE.tasks} task
where nothing else is said; the meta-gradient is MAML's, but for the last two tables. Exponents are slopes of straight
lines through the logarithms of the last {LARGEST} points: 1 is linear growth, 0 is none.

![Time and memory against size](figures/scaling.png)
"""
    return "\n".join([head, *tables])


def _draw(lines: Sequence[tuple[Sweep, dict[str, Any]]]) -> Path:
    figure = new_figure(3.4 * len(lines), 7)
    seen = [name for _, found in lines for name in found]
    order = [*dict.fromkeys(seen)]  # one look a competitor, in all panels
    for column, (sweep, found) in enumerate(lines):
        for row, (which, unit, scale) in enumerate(((1, "CPU ms", 1.0), (2, "peak MB", MB))):
            axes = add_axes(figure, (2, len(lines), row * len(lines) + column + 1), ylabel=unit)
            axes.set_xlabel(textwrap.fill(sweep.label, 34))
            for name, columns in found.items():
                index = order.index(name)
                x, y = drawable(floats(columns[0]), [value / scale for value in columns[which]], True, True)
                axes.plot(x, y, label=name, marker=MARKERS[index], markersize=4, **look(index))
            for axis in ("x", "y"):
                scale_axis(axes, axis)
    legend_below(figure, labelled(*figure.axes), ncols=3)
    return write_figure(figure, FIGURE, dpi=80)
