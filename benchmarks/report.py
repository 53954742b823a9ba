"""The page and the figure of the benchmarks."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import MB
from benchmarks.suite import Workload
from learnedopt.core.files import write_atomically
from learnedopt.evaluation.style import EMPHASIS, add_axes, new_figure, write_figure

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FIGURE = DOCS / "benchmarks.md", DOCS / "figures" / "benchmarks.png"
PACKAGES = ("torch", "higher", "torchopt", "learn2learn", "jax")
SLOW_START = 3.0  # seconds of a first call that are worth a sentence
PARTS = ("benchmarks", "scaling")


@dataclass(frozen=True)
class Measured:
    """One competitor: a median for each of its turns, its peak in bytes, and its gradient's relative difference."""

    cpu_ms: list[float]
    wall_ms: list[float]
    peak: float
    first_s: list[float]
    difference: float | None


@dataclass(frozen=True)
class Results:
    """A workload's competitors, why others did not take part, bytes a tape if asked for, and the seconds it took."""

    workload: Workload
    measured: Mapping[str, Measured]
    excluded: Mapping[str, str]
    tape: float | None
    seconds: float


def ours(name: str) -> bool:
    """Whether a competitor is this library."""
    return name.startswith("learnedopt")


def number(value: float) -> str:
    """Return three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def section(results: Results) -> str:
    """Return a workload's title, text and table."""
    peers = [k for k in results.measured if not ours(k)]
    heads = ["", "CPU ms", "wall ms", "peak MB", *(["tapes"] if results.tape else []), "gradient differs by"]
    rows = [[*heads, *(f"against {peer}" for peer in peers)]]
    for name, one in results.measured.items():
        row = [name, *(number(statistics.median(x)) for x in (one.cpu_ms, one.wall_ms)), number(one.peak / MB)]
        row += [number(one.peak / results.tape)] if results.tape else []
        row += [_difference(name, one, results.workload)]
        rows.append(row + [_against(one, results.measured[peer]) if name != peer else "–" for peer in peers])
    rows += [[name, reason, *[""] * (len(rows[0]) - 2)] for name, reason in results.excluded.items()]
    lines = [" | ".join(row) for row in rows]
    lines.insert(1, "|".join(["---"] + ["---:"] * (len(rows[0]) - 1)))
    table = "\n".join(f"| {line} |" for line in lines)
    return "\n\n".join([f"### {results.workload.title}", results.workload.text, table, *_remarks(results)])


def _difference(name: str, one: Measured, workload: Workload) -> str:
    if name == workload.reference:
        return "reference"
    return "–" if one.difference is None else f"{one.difference:.0e}" if one.difference else "0"


def _against(one: Measured, other: Measured) -> str:
    """Return how much faster, turn by turn, and the share of the memory."""
    speed = statistics.median(b / a for a, b in zip(one.cpu_ms, other.cpu_ms, strict=True))
    return f"{speed:.2f} × speed, {one.peak / other.peak if other.peak else math.nan:.2f} × memory"


def _remarks(results: Results) -> list[str]:
    slow = {k: one.first_s for k, one in results.measured.items() if one.first_s[0] > SLOW_START}
    slow = {k: s for k, s in slow.items() if s[0] > 3e-3 * statistics.median(results.measured[k].wall_ms)}
    remarks = [
        f"First calls of {k}, the first with nothing compiled on disk: {', '.join(f'{s:.1f}' for s in seconds)} s."
        for k, seconds in slow.items()
    ]
    if results.workload.per is not None:
        count, what = results.workload.per
        each = {k: 1e3 * statistics.median(one.cpu_ms) / count for k, one in results.measured.items()}
        remarks.append(f"CPU µs per {what}: {', '.join(f'{k} {number(us)}' for k, us in each.items())}.")
    return remarks + ([f"A tape: {results.tape / MB:.3g} MB."] if results.tape else [])


def page(results: Iterable[Results], rounds: int) -> str:
    """Return the page's first part."""
    head = f"""# Benchmarks

`make bench` writes this part of the page, `make bench-scaling` the second. {machine()}

Every measurement is a process of its own with one thread. The competitors of a workload take turns, {rounds} each;
times are the median over turns of a turn's median over repetitions, ratios the median over turns. Before any
measurement, all compute the meta-gradient in float64 on a smaller copy of the workload: the table says by how much it
differs, in relative norm, from the reference's. The peak is that of resident memory during one
meta-gradient, native memory and all, over what was there before. *Speed* is CPU time; 2 × is half the time. Networks,
data and arithmetic (float32) are the same for all. JAX's compiler takes more threads than the one it is told to: its
CPU time is that of all, its wall time profits.

A loop's first estimate also vets it, in float64, and that is what peaks where the estimate itself needs little: MAML on
the MLP, uncompiled, has 32 MB, and 6.4 with `Execution(vet=False)`.

Under the GNU C library this library asks malloc to keep freed memory (`learnedopt/execution/allocator.py`), the
others run as they come; *memory kept* is one of them with the same request made for it.

![CPU time and peak memory of each competitor; this library's are orange, their names bold](figures/benchmarks.png)
"""
    return "\n".join([head, *(section(one) + "\n" for one in results)])


def machine() -> str:
    """Return a sentence on when and on what this was measured."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text("utf-8").splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    return f"Measured on {datetime.date.today()}, {cpu}, Python {platform.python_version()}; {versions}."


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write_part(part: str, text: str) -> None:
    """Put one of the ``PARTS`` into the page and leave the others as they are."""
    before = PAGE.read_text("utf-8") if PAGE.exists() else ""
    pieces = []
    for name in PARTS:
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        kept = before.split(start, 1)[1].split(end, 1)[0] if start in before else ""
        pieces.append(f"{start}{text.strip()}\n{end}" if name == part else f"{start}{kept}{end}" if kept else "")
    text = "\n".join(filter(None, pieces))
    write_atomically(PAGE, lambda partial: _write(partial, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def draw(results: Mapping[str, Results]) -> Path:
    """Draw each workload's CPU time and peak memory, and return the path."""
    heights = [len(one.measured) + 1 for one in results.values()]
    figure = new_figure(11, 0.3 * sum(heights) + 1)
    grid = figure.add_gridspec(len(results), 2, height_ratios=heights)
    for i, one in enumerate(results.values()):
        cpu, peak = (add_axes(figure, grid[i, column]) for column in (0, 1))
        _bars(cpu, {k: statistics.median(m.cpu_ms) for k, m in one.measured.items()}, "CPU ms")
        _bars(peak, {k: m.peak / MB for k, m in one.measured.items()}, "peak MB")
        peak.tick_params(labelleft=False)
        cpu.set_title(one.workload.title, fontsize=8, loc="left")
        for name, tick in zip(one.measured, cpu.get_yticklabels(), strict=True):
            tick.set_fontweight("bold" if ours(name) else "normal")
    return write_figure(figure, FIGURE, dpi=75)  # tall: at more, the file is large


def _bars(axes: Any, values: Mapping[str, float], unit: str) -> None:
    colours = [EMPHASIS if ours(name) else "#bbbbbb" for name in values]
    bars = axes.barh(list(values), list(values.values()), color=colours)
    axes.grid(visible=False)
    axes.bar_label(bars, fmt=number, padding=2, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(labelsize=7)
    axes.set_xlabel(unit, fontsize=7)
