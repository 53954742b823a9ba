"""The table and the figure of the runs on the two-colours grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from learnedopt.evaluation.style import add_axes, draw_band, labelled, legend_below, look, new_figure, write_figure

STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantiles of Student's t by degrees of freedom."""


def report(folder: Path, figure: Path) -> str:
    """Return a table of all runs in ``folder`` up to the end of the shortest, and draw them to ``figure``.

    Total rewards are means over agents with 95 % intervals of Student's t.

    Raises:
        ValueError: there are no runs.
    """
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not runs:
        raise ValueError(f"{folder} holds no runs; run a method first, such as: python benchmarks/two_colours.py bmg")
    steps = min(run["curve"][-1]["steps"] for run in runs.values())
    lines = [f"| method | total reward after {steps:,} steps | entropy weight at the end |", "|---|---|---|"]
    for name, run in runs.items():
        point = next(p for p in reversed(run["curve"]) if p["steps"] <= steps)
        mean, half = _interval(np.array(point["total"]))
        lines.append(f"| {name} | {mean:,.0f} ± {half:,.0f} | {np.mean(point['weight']):.3f} |")
    _draw(runs, figure)
    return "\n".join(lines)


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval; infinite for one value."""
    count = len(values)
    half = STUDENT.get(count - 1, 1.96) * values.std(ddof=1) / count**0.5 if count > 1 else float("inf")
    return float(values.mean()), float(half)


def _draw(runs: dict[str, Any], path: Path) -> None:
    figure, top = new_figure(9, 9), None
    names = ("total reward, thousands", "reward a step", "entropy weight")
    panels = [top := add_axes(figure, (3, 1, i + 1), sharex=top, ylabel=name) for i, name in enumerate(names)]
    above, middle, below = panels
    for index, (name, run) in enumerate(runs.items()):
        steps = np.array([point["steps"] for point in run["curve"]]) / 1e6
        total, weight = (np.array([point[k] for point in run["curve"]]) for k in ("total", "weight"))
        (line,) = above.plot(steps, total.mean(1) / 1e3, label=name, **look(index))
        draw_band(above, line, total.min(1) / 1e3, total.max(1) / 1e3)
        gained = np.diff(total, axis=0, prepend=0.0) / np.diff(steps, prepend=0.0)[:, None] / 1e6
        middle.plot(steps, gained.mean(1), **{**look(index), "linewidth": 0.8})
        below.plot(steps, weight.mean(1), **{**look(index), "linewidth": 0.8})
    below.set_xlabel("environment steps, millions")
    legend_below(figure, labelled(above), shaded="lowest to highest agent")
    write_figure(figure, path)
