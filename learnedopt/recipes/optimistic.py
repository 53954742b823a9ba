"""Optimistic meta-gradients on one convex problem, beside the methods that they come from (Flennerhag et al. 2023)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from learnedopt.core.counts import require_count
from learnedopt.core.files import plain_json, write_json
from learnedopt.recipes.convex import METHODS, make_problem, parsed
from learnedopt.recipes.study import Parts, Study
from learnedopt.training.tracker import Tracker

_ROUND_OFF = 1e-14  # below which nothing is drawn


@dataclass(frozen=True)
class OptimisticConvex(Study):
    """Deterministic minimisation of f, convex and L-smooth, in float64; curves are ``f - min f`` after T evaluations.

    Meta-gradients of one step on ``φ(x, w) = w`` with averaged iterates, at the rates β of their bounds: plain with
    α_t = 1 and β = 1/L, which is momentum (t-1)/(t+1); plain and optimistic with α_t = t and β = 1/(4L), which are
    momentum (t-1)/(t+2), with the hint also Nesterov's correction of the gradient. Beside them gradient descent at 1/L
    and Nesterov's method at 1/L with momentum (t-1)/(t+2); momentum and AdaGrad, each tuned on the very problem for the
    least last value, which favours them.

    Args:
        problems: as ``convex.make_problem`` names them: "power:3", "geometric:4", "breast-cancer:1e-3", "digits:1e-3".
        num_steps: T of the last value.
        dim: of the quadratics.
        seed: of the quadratics' basis and solution.
    """

    problems: tuple[str, ...] = ("power:3", "power:4", "geometric:4")
    num_steps: int = 2000
    dim: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps, least=2)
        require_count("dim", self.dim, least=2)
        if not self.problems:
            raise ValueError("problems is empty: there is nothing to minimise; name one, such as 'power:3'")
        for name in self.problems:
            parsed(name)

    def small(self) -> OptimisticConvex:
        """Return it with few of everything; see ``recipes.smoke``."""
        return replace(self, num_steps=60, dim=6, problems=self.problems[:2])

    def run(self, folder: Path, tracker: Tracker) -> None:
        """Minimise every problem by every method, and draw ``f - min f`` against T, a panel a problem."""
        parts = Parts(folder, len(self.problems) * len(METHODS))
        found = {name: self._minimise(name, parts) for name in self.problems}
        for step in log_spaced(1, self.num_steps):
            lines = {f"{name}/{m}": gaps[step - 1] for name, each in found.items() for m, gaps in each.gaps.items()}
            tracker.log(lines, step)
        write_json(folder / f"{self.name}.json", plain_json({name: each._asdict() for name, each in found.items()}))
        draw(folder / f"{self.name}.png", {name: each.gaps for name, each in found.items()})

    def _minimise(self, name: str, parts: Parts) -> Curves:
        problem = make_problem(name, self.dim, self.seed)
        gaps, settings = {}, {}
        for method, minimise in METHODS.items():
            path = f"{_plain(name)}/{_plain(method)}.json"
            done = parts.remember(path, lambda minimise=minimise: minimise(problem, self.num_steps)._asdict())
            gaps[method], settings[method] = [value - problem.minimum for value in done["losses"]], done["settings"]
        return Curves(problem.smoothness, problem.squared_distance, gaps, settings)


def optimistic_convex() -> OptimisticConvex:
    """Plain and optimistic meta-gradients of one convex problem beside descent, momentum, Nesterov and AdaGrad."""
    return OptimisticConvex("optimistic-convex")


class Curves(NamedTuple):
    """Of one problem: L, ``‖x_0 - x*‖²``, and ``f - min f`` and settings by method."""

    smoothness: float
    squared_distance: float
    gaps: dict[str, list[float]]
    settings: dict[str, dict[str, float]]

    def bound(self, method: str, step: int) -> float:
        """Return what the theory promises of a method's T-th value: plain with α_t = 1, optimistic with α_t = t."""
        scale = self.smoothness * self.squared_distance
        return {"plain": scale / (2 * step), "optimistic": 4 * scale / (step * (step + 1))}[method]

    def violations(self, method: str, bound: str, slack: float = 1e-12) -> int:
        """Return at how many T a method's value exceeds a bound by more than ``slack``; what is not finite does."""
        return sum(not gap <= self.bound(bound, t) + slack for t, gap in enumerate(self.gaps[method], 1))

    def slope(self, method: str, first: int = 50) -> float:
        """Return -d log(f - min f) / d log T, by least squares over T from ``first`` on, evenly spaced in log T."""
        steps = log_spaced(first, len(self.gaps[method]))
        x, y = (torch.tensor(v).log() for v in (steps, [self.gaps[method][t - 1] for t in steps]))
        return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def _plain(name: str) -> str:
    """Return a name as files have it."""
    return re.sub(r"\W+", "-", name)


def log_spaced(first: int, last: int, count: int = 60) -> list[int]:
    """Return at most ``count`` whole numbers from ``first`` to ``last``, evenly spaced in their logarithm."""
    ratio = last / first
    return sorted({round(first * ratio ** (i / (count - 1))) for i in range(count)})


def draw(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw ``f - min f`` of every method against T, a panel a problem, down to round-off."""
    from learnedopt.evaluation import style

    figure = style.new_figure(4.2 * len(panels), 4.6)
    for i, (name, gaps) in enumerate(panels.items(), start=1):
        axes = style.add_axes(figure, (1, len(panels), i), xlabel="T, gradients", ylabel="f - min f", title=name)
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for method, gap in gaps.items():
            shown = [value if _ROUND_OFF < value <= 10 * gap[0] else math.nan for value in gap]
            lines[method] = style.floats(range(1, len(gap) + 1)), shown
        style.draw_lines(axes, lines, ["optimistic"], True, True, legend=False)
    style.legend_below(figure, style.labelled(figure.axes[0]))
    style.write_figure(figure, path)
