"""A rate for each coordinate of a small conv net, learned while it trains (Flennerhag et al. 2023, section 5)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from learnedopt.core.counts import require_count
from learnedopt.core.task import Split, TaskFamily
from learnedopt.core.tree import Params
from learnedopt.meta_optimizers.dual_averaging import DualAveraging
from learnedopt.plug_in.guard import PresentGradient
from learnedopt.plug_in.hyper import HyperOptimizer
from learnedopt.recipes import one_run
from learnedopt.recipes.study import Parts, Study, require_some
from learnedopt.training.tracker import Tracker

Settings = dict[str, float]
LEARNED = ("plain", "optimistic")


@dataclass(frozen=True)
class OptimisticConv(Study):
    """A conv net on scaled-down Fashion-MNIST: ``φ(x, w) = x - w∘∇f(x)`` with w learned online, beside SGD and Adam.

    "plain" is dual averaging of the one-step meta-gradients ``-∇f(x_{t-1})∘∇f(x_t)`` in its AdaGrad form, with constant
    weights; "optimistic" adds the hint ``-∇f(x_t)²``. Every method has as many settings to choose from: the learned
    ones start and β, the others their rate; each is chosen for the least last loss on ``tuning_seeds``.

    Args:
        seeds: of the runs that are shown.
        tuning_seeds: other ones, on which settings are chosen.
        num_steps: of a run.
        last: steps at the end whose mean loss counts.
        batch_size: images a step.
        starts: of the learned rates.
        betas: of dual averaging.
        sgd_rates: for SGD, as many as starts times betas.
        momentum_rates: for heavy ball at 0.9.
        adam_rates: for Adam.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (100, 101)
    num_steps: int = 500
    last: int = 100
    batch_size: int = 64
    starts: tuple[float, ...] = (0.2, 0.3, 0.4)
    betas: tuple[float, ...] = (0.01, 0.03, 0.1)
    sgd_rates: tuple[float, ...] = (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
    momentum_rates: tuple[float, ...] = (0.002, 0.004, 0.007, 0.01, 0.02, 0.03, 0.04, 0.06, 0.1)
    adam_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 1.5e-2, 2e-2)

    def __post_init__(self) -> None:
        require_some(self, "seeds", "tuning_seeds", "starts", "betas", "sgd_rates", "momentum_rates", "adam_rates")
        require_count("num_steps", self.num_steps, least=1)
        require_count("last", self.last, least=1)
        if self.last > self.num_steps:
            raise ValueError(f"last={self.last} exceeds num_steps={self.num_steps}: there are not so many losses")
        if set(self.seeds) & set(self.tuning_seeds):
            raise ValueError(f"seeds={self.seeds} and tuning_seeds={self.tuning_seeds} overlap: tune on other runs")

    def small(self) -> OptimisticConv:
        """Return it with few of everything; see ``recipes.smoke``."""
        return replace(
            self, num_steps=40, last=20, seeds=self.seeds[:1], tuning_seeds=self.tuning_seeds[:1], batch_size=16,
            starts=self.starts[:1], betas=self.betas[:1], sgd_rates=self.sgd_rates[:2],
            momentum_rates=self.momentum_rates[:1], adam_rates=self.adam_rates[:1],
        )  # fmt: skip

    def run(self, folder: Path, tracker: Tracker) -> None:
        """Choose every method's setting, run it, and draw the losses."""
        curves: dict[str, list[list[float]]] = {}
        settings = self._choices()
        num_tuned = len(self.tuning_seeds) * sum(map(len, settings.values()))
        parts = Parts(folder, num_tuned + len(self.seeds) * len(settings))
        for method, choices in settings.items():
            scores: dict[str, float] = {}
            for name in choices:
                runs = [self._losses(method, name, choices[name], seed, parts) for seed in self.tuning_seeds]
                scores[name] = one_run.score(runs, self.last)
            name = one_run.best(scores)
            runs = [self._losses(method, name, choices[name], seed, parts) for seed in self.seeds]
            curves[f"{method}, {name}"] = runs
        ours = [label for label in curves if label.startswith(LEARNED)]
        one_run.report(folder / self.name, curves, self.last, ours, "Rates for each coordinate of a conv net", tracker)

    def _choices(self) -> dict[str, dict[str, Settings]]:
        """Return method -> the settings to choose from, by what labels say of them."""
        pairs = {f"w1={w:g} β={b:g}": {"start": w, "beta": b} for w in self.starts for b in self.betas}
        return {
            "adam": {f"lr={lr:g}": {"lr": lr} for lr in self.adam_rates},
            "sgd": {f"lr={lr:g}": {"lr": lr} for lr in self.sgd_rates},
            "momentum": {f"lr={lr:g}": {"lr": lr} for lr in self.momentum_rates},
            **dict.fromkeys(LEARNED, pairs),
        }

    def _losses(self, method: str, name: str, settings: Settings, seed: int, parts: Parts) -> list[float]:
        path = f"runs/{method}-{name.replace(' ', '-')}-{seed}.json"
        return one_run.floats(parts.remember(path, lambda: self._one_run(method, settings, seed)))

    def _one_run(self, method: str, settings: Settings, seed: int) -> list[float]:
        if method not in LEARNED:
            return one_run.fixed(self._family, method, settings, [seed], self.num_steps)[0]
        make = functools.partial(_optimizer, method == "optimistic", settings)
        return one_run.learning(self._family, make, seed, self.num_steps)["losses"]

    @cached_property
    def _family(self) -> TaskFamily:
        from learnedopt import tasks
        from learnedopt.tasks import ModuleFamily

        options: dict[str, Any] = {"batch_size": self.batch_size, "size": 14, "standardize": True}
        images = tasks.make("image-mlp", dataset="fashion-mnist", **options)

        def data(seed: int, step: int, split: Split) -> tuple[Tensor, Tensor]:
            batch = images.batch({"seed": torch.tensor([seed])}, step, split)
            return batch["inputs"].reshape(-1, 1, 14, 14), batch["targets"][0]

        return ModuleFamily(conv_net, functional.cross_entropy, data)


def optimistic_conv() -> OptimisticConv:
    """A learned rate for each coordinate of a conv net, plain and optimistic, beside tuned SGD, momentum and Adam."""
    return OptimisticConv("optimistic-conv")


def conv_net() -> nn.Module:
    """Return two convolutions with pooling and a linear layer, 2,698 parameters, for images of 14 x 14 pixels."""
    first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
    return nn.Sequential(
        first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 10)
    )


def _optimizer(optimistic: bool, settings: Settings, params: Params) -> HyperOptimizer:
    from learnedopt.optimizers import LearnedRates

    hint = PresentGradient() if optimistic else None
    rule = LearnedRates({k: p.detach() for k, p in params.items()}, "coordinate", lr=settings["start"])

    def make(theta: Sequence[Tensor]) -> DualAveraging:
        return DualAveraging(list(theta), settings["beta"], hint=hint, form="adagrad", averaged=False)

    return HyperOptimizer([*params.items()], rule, meta_optimizer=make, hint=hint)
