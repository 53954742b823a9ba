"""Rates that one run learns while it trains, from starts that are far off (Baydin et al. 2018; Gao et al. 2024)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from learnedopt.core.counts import require_count
from learnedopt.core.rule import UpdateRule
from learnedopt.core.task import TaskFamily
from learnedopt.core.tree import Params
from learnedopt.meta_optimizers.dual_averaging import DualAveraging
from learnedopt.objectives.feedback import HypergradientFeedback
from learnedopt.plug_in.guard import AcceptIfBetter, PresentGradient
from learnedopt.plug_in.hyper import HyperOptimizer
from learnedopt.recipes import one_run
from learnedopt.recipes.study import Parts, Study, require_some
from learnedopt.training.tracker import Tracker


@dataclass(frozen=True)
class HyperFashion(Study):
    """An MLP on scaled-down Fashion-MNIST: rates learned from far too small and far too large, beside tuned ones.

    "plain" and "optimistic" move along Adam's direction, "OSGM" along the gradient with null steps; all at a learned
    rate for each tensor, kept as its logarithm, by one-step windows. Each has ONE setting for both starts, which are
    multiples of the tuned rate of Adam (of SGD for OSGM). Baselines are tuned on ``tuning_seeds``, as the settings of
    "plain" were, and shown on ``seeds``.

    Args:
        seeds: of the runs that are shown.
        tuning_seeds: other ones, on which the baselines' rates are chosen.
        num_steps: of a run.
        last: steps at the end whose mean loss counts.
        starts: of the learned rates, as multiples of the tuned one.
        adam_rates: tried for Adam.
        sgd_rates: tried for SGD.
        hidden: units of each hidden layer.
        batch_size: images a step.
        meta_lr: of "plain": Adam(betas=(0.5, 0.99)) on the logarithms, at ``meta_lr (1 + step / 10)^-0.7``.
        optimistic_lr: of "optimistic": dual averaging in its AdaGrad form.
        osgm_lr: of "OSGM": AdaGrad on the logarithms.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (100, 101, 102)
    num_steps: int = 1000
    last: int = 200
    starts: tuple[float, ...] = (0.01, 30.0)
    adam_rates: tuple[float, ...] = (1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 2e-2)
    sgd_rates: tuple[float, ...] = (0.03, 0.05, 0.1, 0.2, 0.3, 0.5)
    hidden: tuple[int, ...] = (32,)
    batch_size: int = 32
    meta_lr: float = 2.0
    optimistic_lr: float = 1.0
    osgm_lr: float = 0.3

    def __post_init__(self) -> None:
        require_some(self, "seeds", "tuning_seeds", "starts", "adam_rates", "sgd_rates")
        require_count("num_steps", self.num_steps, least=1)
        require_count("last", self.last, least=1)
        if self.last > self.num_steps:
            raise ValueError(f"last={self.last} exceeds num_steps={self.num_steps}: there are not so many losses")
        if set(self.seeds) & set(self.tuning_seeds):
            raise ValueError(f"seeds={self.seeds} and tuning_seeds={self.tuning_seeds} overlap: tune on other runs")

    def small(self) -> HyperFashion:
        """Return it with few of everything; see ``recipes.smoke``."""
        return replace(
            self, num_steps=40, last=20, seeds=self.seeds[:2], tuning_seeds=self.tuning_seeds[:1],
            adam_rates=self.adam_rates[:2], sgd_rates=self.sgd_rates[:2], starts=self.starts[:1],
        )  # fmt: skip

    def run(self, folder: Path, tracker: Tracker) -> None:
        """Tune the baselines, run every method from every start, and draw the losses."""
        num_tuned = len(self.tuning_seeds) * (len(self.adam_rates) + len(self.sgd_rates))
        parts = Parts(folder, num_tuned + len(self.seeds) * (2 + 3 * len(self.starts)))
        adam, sgd = (self._tuned(name, parts) for name in ("adam", "sgd"))
        curves = {
            f"Adam, tuned ({adam:g})": self._baseline("adam", adam, parts),
            f"SGD, tuned ({sgd:g})": self._baseline("sgd", sgd, parts),
        }
        for start in self.starts:
            for name, rate in (("plain", adam), ("optimistic", adam), ("OSGM", sgd)):
                curves[f"{name}, from {start:g} x"] = self._learned(name, start, start * rate, parts)
        ours = [label for label in curves if label.startswith("plain")]
        one_run.report(folder / self.name, curves, self.last, ours, "Rates learned in one run", tracker)

    @cached_property
    def _family(self) -> TaskFamily:
        from learnedopt import tasks

        options: dict[str, Any] = {"hidden": self.hidden, "activation": "relu", "batch_size": self.batch_size}
        return tasks.make("image-mlp", dataset="fashion-mnist", size=14, standardize=True, **options)

    def _tuned(self, name: str, parts: Parts) -> float:
        rates: tuple[float, ...] = getattr(self, f"{name}_rates")
        scores: dict[str, float] = {}
        for rate in rates:
            run = functools.partial(self._fixed, name, rate, self.tuning_seeds)
            runs = parts.remember(f"tuning/{name}-{rate:g}.json", run, len(self.tuning_seeds))
            scores[f"{rate:g}"] = one_run.score(runs, self.last)
        return float(one_run.best(scores))

    def _baseline(self, name: str, rate: float, parts: Parts) -> list[list[float]]:
        run = functools.partial(self._fixed, name, rate, self.seeds)
        return [one_run.floats(each) for each in parts.remember(f"runs/{name}-{rate:g}.json", run, len(self.seeds))]

    def _fixed(self, name: str, rate: float, seeds: Sequence[int]) -> Any:
        return one_run.fixed(self._family, name, {"lr": rate}, seeds, self.num_steps)

    def _learned(self, name: str, start: float, rate: float, parts: Parts) -> list[list[float]]:
        make = functools.partial(self._optimizer, name, rate)
        found: list[list[float]] = []
        for seed in self.seeds:
            run = functools.partial(one_run.learning, self._family, make, seed, self.num_steps)
            done = parts.remember(f"runs/{name}-from-{start:g}-{seed}.json", run)
            found.append(one_run.floats(done["losses"]))
        return found

    def _optimizer(self, name: str, rate: float, params: Params) -> HyperOptimizer:
        named = [*params.items()]
        if name == "OSGM":
            return HyperOptimizer(
                named, _descent(params, rate), objective=HypergradientFeedback(), guard=AcceptIfBetter(),
                meta_optimizer=lambda p: torch.optim.Adagrad(p, self.osgm_lr, eps=1e-30),
            )  # fmt: skip
        rule = _log_rates(params, rate)
        if name == "plain":
            return HyperOptimizer(
                named, rule, meta_optimizer=lambda p: torch.optim.Adam(p, self.meta_lr, betas=(0.5, 0.99)),
                meta_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: (1 + step / 10) ** -0.7),
            )  # fmt: skip
        hint = PresentGradient()
        return HyperOptimizer(
            named, rule, hint=hint, meta_optimizer=lambda p: DualAveraging(
                p, self.optimistic_lr, hint=hint, form="adagrad", averaged=False
            ),
        )  # fmt: skip


def hyper_fashion() -> HyperFashion:
    """Rates learned in one run of an MLP, from 100 times too small and 30 times too large, beside tuned Adam."""
    return HyperFashion("hyper-fashion")


def _log_rates(params: Params, rate: float) -> UpdateRule:
    """Return Adam's direction with the logarithm of a rate for each tensor in theta."""
    from learnedopt.optimizers import Adam, Reparametrized, per_tensor

    template = {k: p.detach() for k, p in params.items()}
    return Reparametrized(per_tensor(Adam(rate, learn=("lr",)), template), {"*/lr": "log"})


def _descent(params: Params, rate: float) -> UpdateRule:
    """Return the gradient's direction with the logarithm of a rate for each tensor in theta."""
    from learnedopt.optimizers import LearnedRates, Reparametrized

    return Reparametrized(LearnedRates({k: p.detach() for k, p in params.items()}, "tensor", lr=rate), {"*": "log"})
