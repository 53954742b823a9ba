"""ARUBA beside Reptile on few-shot classification of characters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.execution import Execution
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import TaskMean
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.estimators.unrolled import Unrolled
from learnedopt.evaluation.comparison import align, summarise
from learnedopt.evaluation.few_shot import ACCURACY, Adaptation, FewShot, adapt, show
from learnedopt.meta_optimizers.aruba import ARUBA
from learnedopt.meta_optimizers.per_name import Members, PerName
from learnedopt.objectives.error_rate import ErrorRate
from learnedopt.objectives.regret_bound import MomentMatching
from learnedopt.objectives.target_matching import TargetMatching
from learnedopt.objectives.targets import LastIterate
from learnedopt.recipes.recipe import ALL_TASKS
from learnedopt.recipes.study import Parts, Study, require_some
from learnedopt.training.json_tracker import JsonLinesTracker, read_metrics
from learnedopt.training.tracker import Tracker
from learnedopt.training.trainer import MetaTrainer, TrainingResult
from learnedopt.training.validation import Validation

METHODS = {"reptile": "Reptile, fixed rate", "coordinate": "ARUBA, per coordinate", "all": "ARUBA, isotropic"}
"""How rates come about -> what that is called."""


class Setting(NamedTuple):
    """A rate, where it starts or stays, and ARUBA's zeta: how much the start weighs."""

    lr: float
    zeta: float | None = None


@dataclass(frozen=True)
class ArubaOmniglot(Study):
    """Reptile's protocol with a fixed rate and with ARUBA's, from one start, on the same tasks.

    The start moves by Adam in all of them, as in ``reptile-omniglot``. Each method takes its best setting of as many,
    by the validation error after short runs, and is then meta-trained once. What is tested is the theta of the least
    validation error.

    Args:
        num_meta_steps: of the runs that are tested.
        num_tuning_steps: meta-steps of each run that a setting is chosen by.
        num_tasks: a meta-step's.
        num_steps: inner steps of a task.
        meta_lr: Adam's for the start, annealed to a hundredth.
        lrs: Reptile's settings.
        aruba_lrs: where ARUBA's rates start; with each of ``zetas`` these are its settings.
        zetas: of ARUBA; the least leaves the rates to the first tasks, the largest keeps them near their start.
        factor: of ``MomentMatching``.
        num_valid_tasks: tasks to validate on.
        num_test_tasks: tasks to test on.
        num_test_steps: inner steps in validation and test.
        width: filters of the network.
        seed: of the start and of the tasks.
    """

    num_meta_steps: int = 1000
    num_tuning_steps: int = 200
    num_tasks: int = 8
    num_steps: int = 5
    meta_lr: float = 3e-3
    lrs: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    aruba_lrs: tuple[float, ...] = (0.1, 0.4)
    zetas: tuple[float, ...] = (0.03, 1.0)
    factor: float = 0.5
    num_valid_tasks: int = 200
    num_test_tasks: int = 600
    num_test_steps: int = 10
    width: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        require_some(self, "lrs", "aruba_lrs", "zetas")

    def small(self) -> ArubaOmniglot:
        """Return it with few of everything; see ``recipes.smoke``."""
        return replace(
            self, num_meta_steps=2, num_tuning_steps=1, num_tasks=2, lrs=self.lrs[:1], aruba_lrs=self.aruba_lrs[:1],
            zetas=self.zetas[:1], num_valid_tasks=2, num_test_tasks=4, num_test_steps=2,
        )  # fmt: skip

    def run(self, folder: Path, tracker: Tracker) -> None:
        """Choose settings, meta-train and test; go on with what ``folder`` has of it."""
        num_tuned = self.num_tuning_steps * sum(len(self.settings(method)) for method in METHODS)
        parts = Parts(folder, num_tuned + self.num_meta_steps * len(METHODS))
        found = {m: self._tested(m, self._chosen(m, parts), folder, parts) for m in METHODS}
        adaptations = {METHODS[m]: Adaptation(tuple(x["steps"]), _tensors(x["values"])) for m, x in found.items()}
        for step, values in sorted(self._courses(folder).items()):
            tracker.log(values, step)
        numbers = {f"{m}/{k}": float(x[k]) for m, x in found.items() for k in ("validation", "lr") if k in x}
        for method, label in METHODS.items():
            summary = adaptations[label].summaries(ACCURACY)[-1]
            numbers |= {f"{method}/accuracy/{k}": v for k, v in vars(summary).items()}
        tracker.log(numbers, self.num_meta_steps)
        print(self._table(found, adaptations), flush=True)
        title = f"Omniglot, 5-way 1-shot, {self.num_test_tasks} test tasks, {self.num_meta_steps} meta-steps"
        FewShot({}, adaptations).plot(folder / f"{self.name}.png", title)

    def settings(self, method: str) -> list[Setting]:
        """Return what is tried of a method."""
        if method == "reptile":
            return [Setting(lr) for lr in self.lrs]
        return [Setting(lr, zeta) for lr in self.aruba_lrs for zeta in self.zetas]

    def _chosen(self, method: str, parts: Parts) -> Setting:
        """Return the setting with the least validation error after a short run."""
        errors: dict[Setting, float] = {}
        for setting in self.settings(method):
            name = "-".join(f"{value:g}" for value in setting if value is not None)

            def error(setting: Setting = setting) -> dict[str, float]:
                return {"validation": self._trained(method, setting, self.num_tuning_steps)[1].best_value}

            done = parts.remember(f"tuning/{method}/{name}.json", error, self.num_tuning_steps)
            errors[setting] = done["validation"]
            print(f"{METHODS[method]}, {setting}: validation error {errors[setting]:.4f}", flush=True)
        return min(errors, key=lambda setting: errors[setting])

    def _tested(self, method: str, setting: Setting, folder: Path, parts: Parts) -> dict[str, Any]:
        """Return the test accuracies of a method at its setting, out of its file or of a run."""

        def measure() -> dict[str, Any]:
            from learnedopt.optimizers import as_meta_sgd

            own = folder / method
            own.mkdir(parents=True, exist_ok=True)
            loop, result = self._trained(method, setting, self.num_meta_steps, own)
            rule, theta = loop.rule, result.best_theta
            if method != "reptile":
                rule, theta = as_meta_sgd(rule, theta)
            tested = self._adapted(rule, theta)
            values = {name: tree.numbers(x) for name, x in tested.values.items()}
            quantiles = _quantiles(theta) if method != "reptile" else {}
            about = {"setting": setting._asdict(), "validation": result.best_value, "rates": quantiles}
            return {**about, "steps": tested.steps, "values": values}

        return parts.remember(f"{method}.json", measure, self.num_meta_steps)

    def _adapted(self, rule: UpdateRule, theta: Theta) -> Adaptation:
        family = self._family("test", shots=1, queries=15)
        return adapt(rule, theta, family, self.num_test_steps, self.num_test_tasks, seed=self.seed)

    def _trained(
        self, method: str, setting: Setting, num_meta_steps: int, folder: Path | None = None
    ) -> tuple[InnerLoop, TrainingResult]:
        """Meta-train a method; in ``folder`` are its checkpoint and its metrics."""
        family = self._family("train", shots=10, queries=1, batch_shots=2)
        tasks = family.sample(1, torch.Generator().manual_seed(self.seed))
        rule = _rule(method, setting, {name: p[0] for name, p in family.init_params(tasks).items()})
        execution = Execution(chunk_size=ALL_TASKS)
        loop = InnerLoop(family, rule, execution)
        held_out = InnerLoop(self._family("valid", shots=1, queries=15), rule, execution)
        every = max(1, num_meta_steps // 5) if folder else num_meta_steps
        objective: TaskMean = TargetMatching(LastIterate(self.num_steps))
        if method != "reptile":
            objective = MomentMatching(self.num_steps, factor=self.factor)
        trainer = MetaTrainer(
            loop, Unrolled(0), objective, self._meta_optimizer(method),
            JsonLinesTracker(folder / "metrics.jsonl") if folder else None,
            num_tasks=self.num_tasks, seed=self.seed, scheduler=self._schedule(num_meta_steps),
            validation=Validation(held_out, ErrorRate(), self.num_test_steps, self.num_valid_tasks, every, self.seed),
            checkpoint=folder / "checkpoint.pt" if folder else None,
        )  # fmt: skip
        return loop, trainer.run(num_meta_steps)

    def _family(self, meta_split: str, **options: Any) -> Any:
        from learnedopt import tasks

        return tasks.make("omniglot", ways=5, model="conv", width=self.width, meta_split=meta_split, **options)

    def _meta_optimizer(self, method: str) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
        """Return what moves theta: Adam the start, ARUBA what the rates are made of."""

        def adam(params: list[Tensor]) -> torch.optim.Optimizer:
            return torch.optim.Adam(params, self.meta_lr)

        return adam if method == "reptile" else PerName({"init/*": adam, "rule/*": ARUBA})

    def _schedule(self, num_meta_steps: int) -> Callable[[torch.optim.Optimizer], Any]:
        def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
            moves_start = optimizer.members[0] if isinstance(optimizer, Members) else optimizer
            return torch.optim.lr_scheduler.CosineAnnealingLR(moves_start, num_meta_steps, 0.01 * self.meta_lr)

        return cosine

    def _courses(self, folder: Path) -> dict[int, dict[str, float]]:
        """Return the validation errors along the runs, by meta-step."""
        courses: dict[int, dict[str, float]] = {}
        for method in METHODS:
            for row in read_metrics(folder / method / "metrics.jsonl"):
                if "validation" in row:
                    courses.setdefault(row["step"], {})[f"{method}/validation"] = row["validation"]
        return courses

    def _table(self, found: dict[str, Any], adaptations: dict[str, Adaptation]) -> str:
        """Return the test accuracies as Markdown, and what each gains over Reptile on the same tasks."""
        base = adaptations[METHODS["reptile"]].values[ACCURACY][-1]
        rows = [["method", "setting", "validation error", "accuracy", "over Reptile"]]
        for method, label in METHODS.items():
            gain = adaptations[label].values[ACCURACY][-1] - base
            over = "" if method == "reptile" else show(ACCURACY, summarise(gain))
            setting = ", ".join(f"{k} {v:g}" for k, v in found[method]["setting"].items() if v is not None)
            accuracy = show(ACCURACY, adaptations[label].summaries(ACCURACY)[-1])
            rows.append([label, setting, f"{found[method]['validation']:.4f}", accuracy, over])
        return (
            f"\n{self.num_test_tasks} test tasks, {self.num_test_steps} steps: mean ± 95 % interval.\n\n{align(rows)}"
        )


def _rule(method: str, setting: Setting, template: Params) -> UpdateRule:
    from learnedopt import optimizers

    if setting.zeta is None:
        return optimizers.make("maml", template=template, lr=setting.lr)
    return optimizers.make(
        "aruba", template=template, rates=method, eps=setting.lr * setting.zeta, zeta=setting.zeta
    )  # fmt: skip


def _quantiles(theta: Theta) -> dict[str, list[float]]:
    """Return the 10, 50 and 90 % quantiles of each tensor's rates."""
    levels = torch.tensor([0.1, 0.5, 0.9])
    return {k: tree.numbers(v.flatten().quantile(levels.to(v))) for k, v in theta.items() if k.startswith("rule/lr")}


def _tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(x, dtype=torch.float64) for name, x in values.items()}


def aruba_omniglot() -> ArubaOmniglot:
    """ARUBA's rates beside Reptile's fixed one on Omniglot, 5-way 1-shot (Khodak et al. 2019), net of 32 filters."""
    return ArubaOmniglot("aruba-omniglot")
