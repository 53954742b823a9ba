"""Hyperparameters learned while one run goes on: methods side by side, by the loss that the whole run went through."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Tape
from learnedopt.core.counts import require_count
from learnedopt.core.execution import Execution
from learnedopt.core.files import plain_json, write_json
from learnedopt.core.inner import InnerLoop
from learnedopt.core.registry import Choice
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Theta
from learnedopt.estimators.unrolled import Truncated
from learnedopt.evaluation import comparison, plots
from learnedopt.meta_optimizers import registry as meta_optimizers
from learnedopt.recipes.study import Parts, Study
from learnedopt.training.tracker import Tracker
from learnedopt.training.trainer import MetaTrainer, TrainingDiverged
from learnedopt.training.validation import task_generator

POINTS = 50
"""Points of a curve in the figure: each is the mean of one such part of the run."""


@dataclass(frozen=True)
class Fixed:
    """A rule whose hyperparameters stay as they are, at the best of these learning rates."""

    rule: Choice
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Learned:
    """The study's rule with hyperparameters that follow meta-gradients, at the best of these meta-learning rates."""

    estimator: Truncated
    objective: Any
    rates: tuple[float, ...]
    meta_optimizer: Choice = field(default_factory=lambda: Choice("adam"))


Method: TypeAlias = Fixed | Learned


@dataclass(frozen=True, kw_only=True)
class OnlineLearning(Study):
    """Runs of ``num_steps`` steps, each begun from scratch, in which theta is learned on the way or not at all.

    What counts is the cumulative loss: the sum of the train losses before each step that the run has taken. Steps
    towards a bootstrapped target count where training goes on from them. A run that diverges costs infinitely much.

    Args:
        family: what is trained.
        rule: whose hyperparameters are learned, those of each tensor by themselves.
        methods: label -> method. Each is run at each of its rates on ``tuning_seeds``, and at the best on ``seeds``.
        num_steps: of a run.
        num_tasks: tasks that are trained together, by one theta.
        seeds: of the runs that are reported; each draws tasks of its own.
        tuning_seeds: of the runs that choose the rates; none of ``seeds``.
        execution: how tasks are run.
        emphasis: the label of the method that the figure puts in front.

    Raises:
        ValueError: there is no method or rate, a seed is tuned on and reported, or fewer than two are reported.
    """

    family: Choice
    rule: Choice
    methods: Mapping[str, Method]
    num_steps: int
    num_tasks: int = 1
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    execution: Execution = Execution()
    emphasis: str | None = None

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps, least=1)
        require_count("num_tasks", self.num_tasks, least=1)
        both = sorted({*self.seeds} & {*self.tuning_seeds})
        if both or len(self.seeds) < 2 or not self.tuning_seeds:
            raise ValueError(
                f"seeds={self.seeds} and tuning_seeds={self.tuning_seeds}: rates are chosen on seeds that are not "
                f"reported ({both or 'none'} are in both), and an interval needs two that are"
            )
        if not self.methods or not all(method.rates for method in self.methods.values()):
            raise ValueError(f"methods={self.methods!r}: a study needs methods, and each rates to choose from")

    def small(self) -> OnlineLearning:
        """Return it with few of everything; see ``recipes.smoke``."""
        return replace(
            self, num_steps=20, num_tasks=min(self.num_tasks, 2), seeds=self.seeds[:2],
            tuning_seeds=self.tuning_seeds[:1],
            methods={label: replace(method, rates=method.rates[:1]) for label, method in self.methods.items()},
        )  # fmt: skip

    def run(self, folder: Path, tracker: Tracker) -> None:
        """Tune and run each method, tell the tracker what it cost when it is done, and draw all of them."""
        found: dict[str, dict[str, Any]] = {}
        num_tuned = len(self.tuning_seeds) * sum(len(method.rates) for method in self.methods.values())
        parts = Parts(folder / "runs", num_tuned + len(self.seeds) * len(self.methods))
        for index, (label, method) in enumerate(self.methods.items(), start=1):
            found[label] = self._measure(method, parts)
            numbers = {name: value for name, value in found[label].items() if isinstance(value, float)}
            tracker.log({f"{label}/{name}": value for name, value in numbers.items()}, index)
        write_json(folder / f"{self.name}.json", plain_json(found))
        comparison.write_text(folder / f"{self.name}.md", table(found))
        self._draw(folder / f"{self.name}.png", {label: each["curves"] for label, each in found.items()})

    def _draw(self, path: Path, curves: Mapping[str, list[list[float]]]) -> None:
        """Draw the loss along the runs of each method, means of stretches, and what it has added up to."""
        stretch = self.num_steps / self._points
        middles = [(i + 0.5) * stretch for i in range(self._points)]
        ends = [(i + 1) * stretch for i in range(self._points)]
        loss, cumulative = f"train loss, mean of {stretch:g} steps", "cumulative loss"
        panels: dict[str, dict[str, tuple[plots.Values, plots.Values]]] = {loss: {}, cumulative: {}}
        bands: dict[str, dict[str, tuple[plots.Values, plots.Values]]] = {loss: {}, cumulative: {}}
        for label, runs in curves.items():
            losses = torch.tensor(runs, dtype=torch.float64)
            for name, x, values in ((loss, middles, losses), (cumulative, ends, stretch * losses.cumsum(1))):
                panels[name][label] = x, values.mean(0)
                bands[name][label] = values.amin(0), values.amax(0)
        emphasis = [label for label in curves if label == self.emphasis]
        title, shaded = f"{self.name}: mean over {len(self.seeds)} seeds", "lowest to highest seed"
        plots.plot_panels(
            path, panels, "inner step", bands=bands, shaded=shaded, logy=[loss], title=title, emphasis=emphasis
        )

    @property
    def _points(self) -> int:
        return min(POINTS, self.num_steps)

    def _measure(self, method: Method, parts: Parts) -> dict[str, Any]:
        """Return a method's best rate, and what the reported runs cost at it."""

        def runs(rate: float, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
            return [
                parts.remember(self._file(method, rate, seed), lambda seed=seed: self._cost(method, rate, seed))
                for seed in seeds
            ]

        tried = {rate: _mean(runs(rate, self.tuning_seeds)) for rate in method.rates}
        best = comparison.Tuning(min(tried, key=lambda rate: tried[rate]), tried)
        reported = runs(best.rate, self.seeds)
        totals = [float(run["total"]) for run in reported]
        summary = comparison.summarise(torch.tensor(totals, dtype=torch.float64))
        curves = [[float(x) for x in run["curve"]] for run in reported]
        return {
            "rate": best.rate,
            "cumulative_loss": summary.mean,
            "half_interval": summary.high - summary.mean,
            "cpu_seconds": sum(float(run["cpu_seconds"]) for run in reported) / len(reported),
            "at_edge": best.at_edge and len(tried) > 1,
            "tried": {str(rate): value for rate, value in tried.items()},
            "totals": totals,
            "curve": tree.numbers(torch.tensor(curves).mean(0)),
            "curves": curves,
        }

    def _file(self, method: Method, rate: float, seed: int) -> str:
        """Return the name of the file that keeps a run: it tells all that the run's numbers depend on."""
        if isinstance(method, Fixed):
            own: tuple[Any, ...] = (method.rule,)
        else:
            own = (self.rule, method.estimator, method.objective, method.meta_optimizer)
        told = repr((self.family, own, self.num_steps, self.num_tasks, self.execution))
        return f"{hashlib.sha256(told.encode()).hexdigest()[:12]}-{rate:g}-{seed}.json"

    def _cost(self, method: Method, rate: float, seed: int) -> dict[str, Any]:
        """Return a run's cumulative loss, its curve, where theta ended, and its CPU seconds."""
        began = time.process_time()
        if isinstance(method, Fixed):
            losses, theta = self._fixed(method, rate, seed)
        else:
            losses, theta = self._learned(method, rate, seed)
        losses = losses.double()
        return {
            "total": float(losses.sum()) if losses.isfinite().all() else math.inf,
            "curve": [float(part.mean()) for part in losses.tensor_split(self._points)],
            "theta": {name: tree.numbers(value) for name, value in theta.items()},
            "cpu_seconds": time.process_time() - began,
        }

    def _fixed(self, method: Fixed, rate: float, seed: int) -> tuple[Tensor, Theta]:
        """Return the losses (num_steps,) of one run, a mean over tasks, and theta."""
        from learnedopt import optimizers

        options: dict[str, Any] = {**method.rule.options, "lr": rate}
        loop = self._loop(optimizers.make(method.rule.name, **options))
        theta = tree.to(loop.init_theta(torch.Generator().manual_seed(seed)), self.execution.device, None)
        tasks = loop.family.sample(self.num_tasks, task_generator(seed, 0))  # those that a MetaTrainer begins with
        return loop.run(theta, loop.start(tasks), self.num_steps, Tape.NONE).losses.mean(1), theta

    def _learned(self, method: Learned, rate: float, seed: int) -> tuple[Tensor, Theta]:
        """Return the losses (num_steps,) of one run, infinite where it diverged, and theta at its end."""
        from learnedopt import optimizers, tasks

        family = tasks.make(self.family.name, **self.family.options)
        template = {k: p[0] for k, p in family.init_params(family.sample(1, task_generator(seed, 0))).items()}
        rule = optimizers.per_tensor(optimizers.make(self.rule.name, **self.rule.options), template)
        trainer = MetaTrainer(
            self._loop(optimizers.Recorded(rule, self.num_steps)),
            method.estimator,
            method.objective,
            meta_optimizers.make(method.meta_optimizer.name, lr=rate, **method.meta_optimizer.options),
            tracker=None,
            num_tasks=self.num_tasks,
            seed=seed,
            max_skips_in_a_row=1,  # a run that is begun again would hide that this one was lost
            max_failed_share=0.0,
        )
        try:
            trainer.run(1)
            # So far does a meta-step go, the steps ahead of a bootstrapped target included.
            stride = trainer.progress.carry.step
            result = trainer.run(math.ceil(self.num_steps / stride))
        except TrainingDiverged:
            return torch.full((self.num_steps,), math.inf), {k: v.detach() for k, v in trainer.theta.items()}
        return trainer.progress.carry.state["losses"].mean(0), result.theta

    def _loop(self, rule: UpdateRule) -> InnerLoop:
        from learnedopt import tasks

        return InnerLoop(tasks.make(self.family.name, **self.family.options), rule, self.execution)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what a study found as a Markdown table, with the best first."""
    rows = [["method", "rate", "cumulative loss", "CPU s a run"]]
    for label, each in sorted(found.items(), key=lambda item: item[1]["cumulative_loss"]):
        edge = " (edge of those tried)" if each["at_edge"] else ""
        loss = f"{each['cumulative_loss']:.4g} ± {each['half_interval']:.2g}"
        rows.append([label, f"{each['rate']:g}{edge}", loss, f"{each['cpu_seconds']:.2g}"])
    return comparison.align(rows)


def _mean(runs: list[dict[str, Any]]) -> float:
    return sum(float(run["total"]) for run in runs) / len(runs)
