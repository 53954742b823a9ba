"""Few-shot evaluation: how well learned starts and rules adapt, step by step, on fixed tasks that nobody trained on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry
from learnedopt.core.counts import require_count
from learnedopt.core.execution import Execution
from learnedopt.core.files import plain_json, write_json
from learnedopt.core.inner import InnerLoop, InnerSolver, solve_inner
from learnedopt.core.inner_objective import InnerObjective, TaskLoss
from learnedopt.core.rule import UpdateRule
from learnedopt.core.task import TaskFamily, Tasks
from learnedopt.core.tree import Theta
from learnedopt.evaluation.adaptation_plot import plot_adaptation
from learnedopt.evaluation.comparison import Summary, align, summarise, write_text

LOSS, ACCURACY = "loss", "accuracy"


@dataclass(frozen=True)
class Adaptation:
    """How one method adapted.

    Args:
        steps: the numbers of inner steps after which it was measured, from 0 on.
        values: measure -> (len(steps), num_tasks), on the valid split, float64 on the CPU: "loss", and each of the
            family's metrics.
    """

    steps: tuple[int, ...]
    values: dict[str, Tensor]

    @property
    def measure(self) -> str:
        """The one to judge by: the accuracy where there is one, else the family's first metric, else the loss."""
        metrics = [name for name in self.values if name != LOSS]
        return ACCURACY if ACCURACY in metrics else [*metrics, LOSS][0]

    def summaries(self, measure: str) -> list[Summary]:
        """Return the mean over tasks and its 95 % interval, for each of ``steps``."""
        return [summarise(values) for values in self.values[measure]]


def sample_fixed(family: TaskFamily, num_tasks: int, seed: int) -> Tasks:
    """Draw the tasks that every method is measured on: they depend on the family, ``num_tasks`` and ``seed`` alone."""
    # Hashed, so that a training from a small seed does not draw the same tasks; torch reads 32 bits of a seed.
    digest = hashlib.sha256(f"learnedopt.evaluation.few_shot {seed}".encode()).digest()
    return family.sample(num_tasks, torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))


def adapt(
    rule: UpdateRule,
    theta: Theta,
    family: TaskFamily,
    num_steps: int,
    num_tasks: int = 600,
    *,
    seed: int = 0,
    inner_objective: InnerObjective = TaskLoss(),
    inner: InnerSolver | None = None,
    execution: Execution | None = None,
    chunk: int = 100,
) -> Adaptation:
    """Adapt to each of ``num_tasks`` fixed tasks, and measure after 0, 1, ..., ``num_steps`` steps.

    Args:
        rule: how a step moves, with its meta-parameters ``theta``.
        theta: see ``rule``.
        family: where the tasks come from, such as a family with ``meta_split="test"``.
        num_steps: inner steps; they may be more or fewer than in meta-training.
        num_tasks: at least 2.
        seed: of the tasks, see ``sample_fixed``.
        inner_objective: what the steps descend; its own meta-parameters are in ``theta``.
        inner: solves the inner problem in place of the rule's own steps, such as ``HessianFree``; then only the start
            and the end are measured.
        execution: how tasks are run.
        chunk: tasks held in memory at a time; it does not change the result.

    Raises:
        ValueError: bad input, such as a theta whose learned start has other shapes than the family's parameters.

    Example:
        >>> rule, theta = learnedopt.load("runs/maml-omniglot")
        >>> family = learnedopt.tasks.make("omniglot", width=32, meta_split="test")
        >>> adapt(rule, theta, family, num_steps=3).summaries("accuracy")[-1].mean
    """
    require_count("num_steps", num_steps, least=1 if inner else 0)
    require_count("num_tasks", num_tasks, least=2)  # an interval needs two
    require_count("chunk", chunk, least=1)
    loop = InnerLoop(family, rule, execution or Execution(), inner_objective, horizon=max(num_steps, 1))
    theta = tree.to(tree.detach(theta), loop.execution.device, loop.execution.dtype)
    tasks = sample_fixed(family, num_tasks, seed)
    pieces = [
        _adapt(loop, theta, tree.narrow(tasks, i, min(i + chunk, num_tasks)), num_steps, inner)
        for i in range(0, num_tasks, chunk)
    ]
    values = {name: torch.cat([piece[name] for piece in pieces], dim=1) for name in pieces[0]}
    return Adaptation((0, num_steps) if inner else tuple(range(num_steps + 1)), values)


def _adapt(loop: InnerLoop, theta: Theta, tasks: Tasks, num_steps: int, inner: InnerSolver | None) -> dict[str, Tensor]:
    carry = loop.begin(theta, loop.start(tasks))
    found = [_measure(loop, theta, carry)]
    for _ in range(1 if inner else num_steps):
        carry = solve_inner(loop, theta, carry, num_steps if inner else 1, inner).end
        found.append(_measure(loop, theta, carry))
    return {name: torch.stack([values[name] for values in found]) for name in found[0]}


@torch.no_grad()
def _measure(loop: InnerLoop, theta: Theta, carry: Carry) -> dict[str, Tensor]:
    measured = {LOSS: loop.losses(theta, carry, "valid")} | loop.metrics(carry, "valid")
    return {name: values.double().cpu() for name, values in measured.items()}


@dataclass(frozen=True)
class FewShot:
    """What ``adapt`` found for several methods on the same tasks.

    Args:
        settings: what the numbers belong to, such as the family and the seed.
        adaptations: label -> what was measured.
    """

    settings: dict[str, Any]
    adaptations: Mapping[str, Adaptation]

    def describe(self) -> dict[str, Any]:
        """Return the settings and each method's summaries as nested dicts and lists that JSON can hold."""
        methods = {
            label: {
                "steps": [*adaptation.steps],
                "measures": {name: [vars(s) for s in adaptation.summaries(name)] for name in adaptation.values},
            }
            for label, adaptation in self.adaptations.items()
        }
        return plain_json({"settings": self.settings, "methods": methods})

    def markdown(self) -> str:
        """Return a table of every measure before the first and after the last step, as Markdown."""
        rows = [["method", "steps", *self._names(), f"{self._measure()} before"]]
        for label, adaptation in self.adaptations.items():
            last = [show(name, adaptation.summaries(name)[-1]) for name in self._names()]
            first = show(self._measure(), adaptation.summaries(self._measure())[0])
            rows.append([label, str(adaptation.steps[-1]), *last, first])
        num_tasks = next(iter(self.adaptations.values())).values[LOSS].shape[1]
        return f"{num_tasks} fixed tasks, the same for every method: mean ± 95 % interval.\n\n{align(rows)}"

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write few_shot.json, .md and .png (the measure against the steps) into ``folder``; return them by suffix."""
        paths = {suffix: Path(folder) / f"few_shot.{suffix}" for suffix in ("json", "md", "png")}
        write_json(paths["json"], self.describe())
        write_text(paths["md"], self.markdown())
        self.plot(paths["png"])
        return paths

    def plot(self, path: str | Path, title: str = "") -> Path:
        """Draw each method's measure against the steps, with its 95 % interval, and return the path written."""
        name = self._measure()
        curves = {
            label: (adaptation.steps, [(s.mean, s.low, s.high) for s in adaptation.summaries(name)])
            for label, adaptation in self.adaptations.items()
        }
        logy = name == LOSS and all(mean > 0 for _, points in curves.values() for mean, _, _ in points)
        return plot_adaptation(path, curves, ylabel=f"{name}, mean over tasks", logy=logy, title=title)

    def _names(self) -> list[str]:
        names = [*next(iter(self.adaptations.values())).values]
        return sorted(names, key=lambda name: name != self._measure())  # what is judged by comes first

    def _measure(self) -> str:
        return next(iter(self.adaptations.values())).measure


def show(measure: str, summary: Summary) -> str:
    """Return "mean ± half the 95 % interval", an accuracy in per cent."""
    half = summary.high - summary.mean
    if measure == ACCURACY:
        return f"{100 * summary.mean:.2f} ± {100 * half:.2f} %"
    return f"{summary.mean:.4g} ± {half:.2g}" if math.isfinite(half) else f"{summary.mean:.4g}"
