"""What evolution strategies estimate, in float64: their mean against exact gradients, and their variance.

Run ``python benchmarks/results_evolution.py`` (a few CPU minutes). Means and variances are over runs with seeds of
their own: successive estimates of one run of windows are not independent. ``max |z|`` is the largest distance of a
mean from what it should be, over the entries of theta, in standard errors of that mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from results_gradients import like, tanh_mlp
from torch import Tensor

from learnedopt import (
    EvolutionStrategies,
    FinalLoss,
    GradientEstimator,
    InnerLoop,
    Params,
    PersistentES,
    SumOfLosses,
    Tape,
    TaskFamily,
    Tasks,
    Theta,
    Truncated,
    Unrolled,
    UpdateRule,
    optimizers,
    tasks,
)
from learnedopt.core.task import Batch, Split
from learnedopt.estimators import perturbations
from learnedopt.evaluation.style import add_axes, draw_lines, labelled, legend_below, new_figure, write_figure

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "evolution_variance.png"
NUM_PAIRS = 4_096
WINDOW, HORIZON, SMALL = 5, 20, 1e-4
MANY_RUNS = 200
ES, PES, REUSE = "whole episodes", "persistent", "persistent, noise reused"
STEPS, RUNS = 32, 48  # of the figure
GRID: dict[str, tuple[float, ...]] = {
    "sigma": (0.001, 0.003, 0.01, 0.03, 0.1),
    "num_pairs": (4, 8, 16, 32, 64),
    "window": (2, 4, 8, 16, 32),
}
MIDDLE = {"sigma": 0.01, "num_pairs": 32, "window": 8}
AXES = {"sigma": "sigma", "num_pairs": "pairs", "window": "steps of a window"}
Panel: TypeAlias = dict[str, tuple[list[float], list[float]]]


class Same(TaskFamily):
    """A family of which every draw is the same tasks, so that an episode that begins anew is the same problem."""

    def __init__(self, family: TaskFamily) -> None:
        self.family = family

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Return the first tasks of one seed, whatever the generator."""
        return self.family.sample(num_tasks, torch.Generator().manual_seed(3))

    def init_params(self, tasks: Tasks) -> Params:
        """Return the family's own."""
        return self.family.init_params(tasks)

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the family's own."""
        return self.family.batch(tasks, step, split)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the family's own."""
        return self.family.loss(params, batch)


class Slope(TaskFamily):
    """A linear loss ``c x``, c drawn for each task."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw c (num_tasks, 5)."""
        return {"c": torch.randn(num_tasks, 5, generator=generator)}

    def init_params(self, tasks: Tasks) -> Params:
        """Start at 0."""
        return {"x": torch.zeros_like(tasks["c"])}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return c."""
        return tasks

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return ``c x``."""
        return batch["c"] @ params["x"]


class Posed(NamedTuple):
    """What is estimated."""

    loop: InnerLoop
    theta: Theta
    tasks: Tasks
    objective: Any

    def exact(self, num_steps: int) -> Tensor:
        """Return the gradient through all steps, as one vector."""
        return flat(Unrolled(num_steps).estimate(*self[:2], self.objective, self.loop.start(self.tasks)).grads)

    def windows(self, estimator: GradientEstimator, seed: int, num_windows: int) -> Tensor:
        """Return the sum of an episode's successive estimates."""
        carry = estimator.start(self.loop, self.theta, self.tasks, torch.Generator().manual_seed(seed))
        total = torch.zeros(())
        for _ in range(num_windows):
            found = estimator.estimate(self.loop, self.theta, self.objective, carry)
            carry, total = found.carry, total + flat(found.grads)
        return total

    def runs(self, estimator: GradientEstimator, num_runs: int, num_windows: int = 1) -> Tensor:
        """Return (num_runs, entries): one sum of windows, or one estimate, for each of as many seeds."""
        return torch.stack([self.windows(estimator, seed, num_windows) for seed in range(num_runs)])


def posed(family: TaskFamily, rule: UpdateRule, objective: Any, num_tasks: int = 2) -> Posed:
    """Return the loop on a family's first tasks, and theta from one seed."""
    loop = InnerLoop(family, rule)
    theta = {k: v.double() for k, v in loop.init_theta(torch.Generator().manual_seed(2)).items()}
    return Posed(loop, theta, family.sample(num_tasks, torch.Generator().manual_seed(3)), objective)


def flat(theta: Theta) -> Tensor:
    """Return all entries as one vector."""
    return torch.cat([x.reshape(-1) for x in theta.values()])


def worst(found: Tensor, expected: Tensor) -> float:
    """Return ``max |z|`` of the mean of independent runs (num_runs, entries)."""
    error = found.std(0) / len(found) ** 0.5
    return float(((found.mean(0) - expected) / error).abs().max())


def off(found: Tensor, expected: Tensor) -> float:
    """Return the relative distance of one vector from another."""
    return float((found - expected).norm() / expected.norm())


def single_objectives() -> Iterable[tuple[str, str]]:
    """Yield what one estimate of many pairs is on objectives that are linear and quadratic in theta."""
    estimator = EvolutionStrategies(3, NUM_PAIRS, sigma=0.5)
    for label, family in (("linear", Slope()), ("quadratic", tasks.make("quadratic", dim=5))):
        rule = optimizers.make("maml", template=like(family), lr=0.02)  # theta is the start: descent keeps the degree
        where = posed(family, rule, FinalLoss())
        carry = estimator.start(where.loop, where.theta, where.tasks, torch.Generator().manual_seed(4))
        estimate = estimator.estimate(where.loop, where.theta, where.objective, carry)
        exact, found = where.exact(3), flat(estimate.grads)
        noise = perturbations.draw(where.theta, NUM_PAIRS, perturbations.generator(carry.seed, 0), [])
        n = torch.cat([x.flatten(1) for x in noise.values()], dim=1)
        error = flat(estimate.info["variance"]).sqrt()
        if label == "linear":
            expected = n.T @ (n @ exact) / len(n)
            yield f"{label}: relative distance from the mean of n (n g) over the pairs", f"{off(found, expected):.1e}"
        yield f"{label}: max |z| against the exact gradient", f"{float(((found - exact) / error).abs().max()):.2f}"
        yield f"{label}: relative distance from the exact gradient", f"{off(found, exact):.1e}"


def windows() -> Iterable[tuple[str, list[str]]]:
    """Yield what windows add up to over a horizon, for two rules: a row each, a cell for each column."""
    family, num_windows = Same(tanh_mlp()), HORIZON // WINDOW
    pairs = 16 * num_windows
    for name, options in (("learned-rates", {"rates": "tensor", "lr": 0.05}), ("momentum", {"lr": 0.02})):
        where = posed(family, optimizers.make(name, template=like(family), **options), SumOfLosses())
        exact = where.exact(HORIZON)
        truncated = where.windows(Truncated(WINDOW, HORIZON, Tape.FULL), 0, num_windows)
        found = {
            "whole episodes": where.runs(EvolutionStrategies(HORIZON, pairs, SMALL), MANY_RUNS),
            "persistent": num_windows * where.runs(PersistentES(WINDOW, HORIZON, pairs, SMALL), MANY_RUNS),
            "persistent, noise reused": num_windows
            * where.runs(PersistentES(WINDOW, HORIZON, pairs, SMALL, reuse_noise=True), MANY_RUNS),
            "evolution strategies in windows": where.runs(
                EvolutionStrategies(WINDOW, pairs, SMALL, HORIZON), MANY_RUNS, num_windows
            ),
        }
        yield f"{name}: truncated back-propagation", [f"{off(truncated, exact):.3f}", "", ""]
        for label, each in found.items():
            cells = [f"{off(each.mean(0), exact):.3f}", f"{worst(each, exact):.2f}", f"{worst(each, truncated):.2f}"]
            yield f"{name}: {label}", cells


def estimators(sigma: float, num_pairs: int, window: int) -> dict[str, tuple[GradientEstimator, int]]:
    """Return what the figure compares, by label, and how many windows make an episode for it."""
    persistent = PersistentES(window, STEPS, num_pairs, sigma)
    return {
        ES: (EvolutionStrategies(STEPS, num_pairs, sigma), 1),
        PES: (persistent, STEPS // window),
        REUSE: (replace(persistent, reuse_noise=True), STEPS // window),
    }


def variances() -> tuple[dict[str, Panel], float]:
    """Return the panels of the figure, and the squared length of the exact gradient."""
    family = Same(tanh_mlp())
    rule = optimizers.make("small-mlp", template=like(family), step_scale=0.5)
    where = posed(family, rule, SumOfLosses(), num_tasks=1)
    known: dict[Any, float] = {}  # the panels meet in one point, and whole episodes know no windows

    def trace(label: str, setting: dict[str, Any]) -> float:
        estimator, num_windows = estimators(**setting)[label]
        if estimator not in known:
            found = num_windows * where.runs(estimator, RUNS)
            known[estimator] = float(found.var(0).sum())
            print(f"{label:30} {setting} {known[estimator]:.4g}", flush=True)
        return known[estimator]

    panels: dict[str, Panel] = {}
    for name, values in GRID.items():
        panels[name] = {
            label: (list(values), [trace(label, {**MIDDLE, name: value}) for value in values])
            for label in (ES, PES, REUSE)
        }
    return panels, float(where.exact(STEPS).square().sum())


def draw(panels: dict[str, Panel], signal: float) -> None:
    """Draw a panel for each setting, all on one vertical axis."""
    from matplotlib.ticker import NullFormatter, NullLocator

    figure, first = new_figure(12, 4.4), None
    for i, (name, lines) in enumerate(panels.items(), start=1):
        axes = add_axes(figure, (1, len(panels), i), sharey=first, xlabel=AXES[name])
        first = first or axes
        draw_lines(axes, lines, (), True, True, legend=False)
        axes.axhline(signal, color="#999999", linewidth=1.4, label="squared length of the exact gradient")
        axes.set_xticks(GRID[name], [f"{x:g}" for x in GRID[name]])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelleft=axes is first)
    figure.axes[0].set_ylabel("variance of an estimate, summed over theta")
    legend_below(figure, labelled(figure.axes[0]))
    write_figure(figure, FIGURE)


def main() -> None:
    """Print everything and draw the figure."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for label, found in single_objectives():
        print(f"{label:75} {found}", flush=True)
    for label, cells in windows():
        print(f"{label:55} " + " ".join(f"{x:>8}" for x in cells), flush=True)
    panels, signal = variances()
    print(f"squared length of the exact gradient {signal:.4g}")
    draw(panels, signal)
    print(f"drew {FIGURE}")


if __name__ == "__main__":
    main()
