"""FMRL (Balcan, Khodak and Talwalkar 2019): regret over tasks, beside its bounds and beside learners that know less.

The start follows the leader, the radius is guessed and grows, tasks are met one by one; all of it is ``MetaTrainer``'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from learnedopt.core import tree
from learnedopt.core.counts import require_count
from learnedopt.core.files import plain_json, write_json
from learnedopt.core.task import Tasks
from learnedopt.core.weights import require_positive
from learnedopt.evaluation.regret import Regret
from learnedopt.recipes.online_convex import Follows, OnlineConvex
from learnedopt.recipes.study import Parts, Study, require_some
from learnedopt.training.tracker import Tracker


@dataclass(frozen=True)
class FmrlConvex(Study):
    """The bounds on task-averaged regret, at every number of tasks, and how they shrink with the clusters.

    Euclidean: losses ``sqrt(width² + ‖x − c‖²)`` around points of a cluster at distance 1, in a ball that holds all;
    entropic: experts, of which few are good. D starts at 0.1 and grows against the best points in hindsight.

    Args:
        num_tasks: tasks that are met one after the other.
        num_losses: m, of a task.
        dim: of the Euclidean tasks.
        radius: of the cluster in which regret is followed over all tasks.
        radii: of the clusters that regret is set against.
        num_tasks_a_radius: tasks at each of ``radii``.
        noise: about how far a task's losses have their minima from its own point.
        single_radii: D of the learners that know nothing of the tasks, of which the best in hindsight counts.
        num_experts: of the entropic tasks.
        mixing: part of the uniform distribution that all learners keep, in [0, 1).
        seeds: of the tasks; numbers are means over them.
    """

    num_tasks: int = 1000
    num_losses: int = 20
    dim: int = 5
    radius: float = 0.25
    radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
    num_tasks_a_radius: int = 200
    noise: float = 0.1
    single_radii: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    num_experts: int = 10
    mixing: float = 0.05
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        require_some(self, "radii", "single_radii", "seeds")
        for radius in self.single_radii:
            require_positive(self.name, "single_radii", radius)
        for option in ("num_tasks", "num_tasks_a_radius"):
            require_count(option, getattr(self, option), least=2)

    def small(self) -> FmrlConvex:
        """Return it with few of everything; see ``recipes.smoke``."""
        return replace(
            self, num_tasks=3, num_losses=4, radii=self.radii[:2], num_tasks_a_radius=3, seeds=self.seeds[:2],
            num_experts=3,
        )  # fmt: skip

    def run(self, folder: Path, tracker: Tracker) -> None:
        """Measure both geometries over all tasks, and the Euclidean one over the clusters' radii."""
        paths: dict[str, Any] = {"euclidean": self.clusters(self.radius), "entropic": self.experts()}
        parts = Parts(folder, len(self.seeds) * (len(paths) + len(self.radii)))
        over_tasks: dict[str, list[Any]] = {
            name: [parts.remember(f"{name}-{s}.json", partial(self.over_tasks, setting, s)) for s in self.seeds]
            for name, setting in paths.items()
        }
        over_radii = [
            mean_of([parts.remember(f"radius-{r}-{s}.json", partial(self.at_radius, r, s)) for s in self.seeds])
            for r in self.radii
        ]
        for step, row in enumerate(over_radii):
            tracker.log({"radius": self.radii[step], **row}, step)
        summary = {name: [final(run) for run in runs] for name, runs in over_tasks.items()}
        write_json(folder / "summary.json", plain_json({"over_tasks": summary, "over_radii": over_radii}))
        self.draw(folder, over_tasks, over_radii)
        for name in over_tasks:
            tracker.figure(f"{self.name}-{name}", folder / f"{self.name}-{name}.png")

    def clusters(self, radius: float) -> OnlineConvex:
        """Return the Euclidean tasks: gradients are within 1, and the ball holds all of them."""
        from learnedopt.optimizers import Ball, Euclidean
        from learnedopt.tasks import Clusters

        family = Clusters(self.dim, self.num_losses, radius=radius, noise=self.noise, dtype="float64")
        return OnlineConvex(family, self.num_losses, Euclidean(), Ball(self.domain), 1.0)

    @property
    def domain(self) -> float:
        """The radius of the ball: what a learner has to allow for that knows nothing of the tasks."""
        return 2.0

    def experts(self) -> OnlineConvex:
        """Return the entropic tasks: costs are within 1."""
        from learnedopt.optimizers import Entropic, Simplex
        from learnedopt.tasks import Experts

        family = Experts(self.num_experts, self.num_losses, dtype="float64")
        return OnlineConvex(family, self.num_losses, Entropic(), Simplex(self.mixing), 1.0)

    def over_tasks(self, setting: OnlineConvex, seed: int) -> dict[str, Any]:
        """Return task-averaged regret and bound after 1, 2, ... tasks, of descent and of the leader; and D."""
        met = setting.meta_train("fal", self.num_tasks, seed)
        alone = self.domain if setting.geometry.flat else math.sqrt(2 * math.log(self.num_experts))
        found: dict[str, Any] = {}
        for label, leads in (("descent", False), ("leader", True)):
            regrets = setting.regret(met.thetas, met.tasks, leads=leads)
            averages, bounds = regrets.averaged()
            single = setting.regret(setting.single_task(alone, met.tasks), met.tasks, leads=leads)
            best = setting.regret(setting.omniscient(met.tasks), met.tasks, leads=leads)
            found[label] = {
                "tar": tree.numbers(averages), "bound": tree.numbers(bounds), "radius": float(regrets.radius[-1]),
                "violations": regrets.violations(), "single": float(single.regret.mean()),
                "omniscient": float(best.regret.mean()),
            }  # fmt: skip
        return found

    def at_radius(self, radius: float, seed: int) -> dict[str, float]:
        """Return regret and bound averaged over the tasks, and those of learners that know less or more."""
        setting = self.clusters(radius)
        met = setting.meta_train("fal", self.num_tasks_a_radius, seed)
        found = setting.regret(met.thetas, met.tasks)
        single = setting.regret(setting.single_task(self.domain, met.tasks), met.tasks)
        alone = [setting.regret(setting.single_task(d, met.tasks), met.tasks) for d in self.single_radii]
        best = setting.regret(setting.omniscient(met.tasks), met.tasks)
        return {
            "best_single": min(float(each.regret.mean()) for each in alone),
            "tar": float(found.regret.mean()), "bound": float(found.bound.mean()), "final_D": float(found.radius[-1]),
            "single": float(single.regret.mean()), "single_bound": float(single.bound.mean()),
            "omniscient": float(best.regret.mean()), "omniscient_bound": float(best.bound.mean()),
        }  # fmt: skip

    def draw(self, folder: Path, over_tasks: dict[str, list[Any]], over_radii: list[dict[str, float]]) -> None:
        """Draw regret and bound against the number of tasks, and against the radius of the clusters."""
        from learnedopt.evaluation.plots import plot_lines

        learners = {
            "tar": "FMRL", "single": "single task, the domain's radius", "omniscient": "omniscient",
            "best_single": "single task, best radius in hindsight",
        }  # fmt: skip
        bounds = {"bound": "FMRL", "single_bound": "single task, the domain's radius", "omniscient_bound": "omniscient"}
        labels = learners | {k: f"bound of {v}" for k, v in bounds.items()}
        lines = {label: (self.radii, [row[key] for row in over_radii]) for key, label in labels.items()}
        plot_lines(
            folder / f"{self.name}.png", lines, "radius of the clusters", "task-averaged regret",
            emphasis=["FMRL"], title=f"{self.num_losses} Lipschitz losses a task",
        )  # fmt: skip
        counts = range(1, self.num_tasks + 1)
        for name, runs in over_tasks.items():
            curves = {"mirror descent": ("descent", "tar"), "regularised leader": ("leader", "tar")}
            curves["bound of both"] = ("descent", "bound")
            lines = {
                label: (counts, tree.numbers(torch.tensor([run[who][key] for run in runs]).mean(0)))
                for label, (who, key) in curves.items()
            }
            plot_lines(
                folder / f"{self.name}-{name}.png", lines, "tasks", "task-averaged regret", logx=True, logy=True,
                emphasis=["mirror descent"], title=f"{name}, {self.num_losses} losses a task",
            )  # fmt: skip


@dataclass(frozen=True)
class FmrlFashion(Study):
    """FMRL on super-classes of Fashion-MNIST: few examples a task, one after the other, logistic regression in a ball.

    Regret is stated per example. A single-task learner starts at the origin with D, the best of ``single_radii`` in
    hindsight; the omniscient one at the mean of the tasks' best points, with the radius around it.

    Args:
        shots: examples a class, each a setting of its own.
        num_tasks: tasks that are met one after the other.
        seeds: of the tasks; numbers are means over them.
        single_radii: D of the single-task learners.
        lipschitz: what the losses' gradients are taken to be within, by which the rates are set.
        ball: the radius of the ball that holds the parameters.
        num_features: principal components of the images.
        fal_radius: D at the start where the leader is of the best points in hindsight.
        fli_radius: D at the start where it is of points that the learner has come to.
        factor: by which D grows where a task's point is further away.
        meta_split: which of the family's images are drawn from.
    """

    shots: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    num_tasks: int = 200
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    single_radii: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    lipschitz: float = 2.0
    ball: float = 1.0
    num_features: int = 50
    fal_radius: float = 0.1
    fli_radius: float = 1.0
    factor: float = 1.1
    meta_split: str = "test"

    def __post_init__(self) -> None:
        require_some(self, "shots", "single_radii", "seeds")
        for radius in (*self.single_radii, self.fal_radius, self.fli_radius):
            require_positive(self.name, "a radius", radius)
        require_count("num_tasks", self.num_tasks, least=2)

    def small(self) -> FmrlFashion:
        """Return it with few of everything; see ``recipes.smoke``."""
        return replace(self, shots=self.shots[:2], num_tasks=3, seeds=self.seeds[:1], num_features=5)

    def run(self, folder: Path, tracker: Tracker) -> None:
        """Measure all methods at every number of examples."""
        parts = Parts(folder, len(self.seeds) * len(self.shots))
        found = {  # one seed after the other, so that a study that is cut short has something of all
            (shots, seed): parts.remember(f"{shots}-shot-{seed}.json", partial(self.measure, shots, seed))
            for seed in self.seeds
            for shots in self.shots
        }
        rows: list[dict[str, Any]] = []
        for step, shots in enumerate(self.shots):
            rows.append(summarised([found[shots, seed] for seed in self.seeds]))
            tracker.log({"shots": shots, **{k: v for k, v in rows[-1].items() if isinstance(v, float)}}, step)
        write_json(folder / "summary.json", plain_json({"shots": self.shots, "rows": rows}))
        self.draw(folder, rows)

    def setting(self, shots: int) -> OnlineConvex:
        """Return the tasks of so many examples a class."""
        from learnedopt.optimizers import Ball, Euclidean
        from learnedopt.tasks import make

        family: Any = make(
            "superclasses", shots=shots, num_features=self.num_features, dtype="float64", meta_split=self.meta_split
        )
        return OnlineConvex(family, family.num_losses, Euclidean(), Ball(self.ball), self.lipschitz)

    def measure(self, shots: int, seed: int) -> dict[str, Any]:
        """Return the task-averaged regret per example of every method, and how it stands to its bound."""
        setting = self.setting(shots)
        starts: dict[Follows, float] = {
            "fal": self.fal_radius, "fli-online": self.fli_radius, "fli-batch": self.fli_radius
        }  # fmt: skip
        found: dict[str, Regret] = {}
        tasks: Tasks = None
        for follows, radius in starts.items():
            met = setting.meta_train(follows, self.num_tasks, seed, radius=radius, factor=self.factor)
            found[follows], tasks = setting.regret(met.thetas, met.tasks), met.tasks
        for radius in self.single_radii:
            found[f"single {radius:g}"] = setting.regret(setting.single_task(radius, tasks), tasks)
        found["omniscient"] = setting.regret(setting.omniscient(tasks), tasks)
        rows: dict[str, Any] = {}
        for method, regrets in found.items():
            averages, bounds = regrets.averaged()
            rows[method] = {
                "tar": float(averages[-1]) / setting.num_losses, "bound": float(bounds[-1]) / setting.num_losses,
                "violations": regrets.violations(), "radius": float(regrets.radius[-1]),
            }  # fmt: skip
        return rows

    def draw(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        """Draw the regret per example against the examples a class."""
        from learnedopt.evaluation.plots import plot_lines

        labels = {
            "fal": "FAL", "fli-online": "FLI, last iterate", "fli-batch": "FLI, regularised leader",
            "best single": "best single task", "omniscient": "omniscient",
        }  # fmt: skip
        lines = {label: (self.shots, [row[key] for row in rows]) for key, label in labels.items()}
        plot_lines(
            folder / f"{self.name}.png", lines, "examples a class", "task-averaged regret per example", logx=True,
            logy=True, emphasis=["FAL"], title="super-classes of Fashion-MNIST",
        )  # fmt: skip


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the means over seeds of rows with the same keys."""
    return {key: mean(row[key] for row in rows) for key in rows[0]}


def final(run: dict[str, Any]) -> dict[str, Any]:
    """Return what a run came to, without its course."""
    return {label: {k: v[-1] if isinstance(v, list) else v for k, v in found.items()} for label, found in run.items()}


def summarised(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each method's regret per example averaged over seeds, and the ratios that the study is about.

    The best single-task learner is the best on average over seeds. Violations of bounds are summed.
    """
    row: dict[str, Any] = {name: mean(run[name]["tar"] for run in runs) for name in runs[0]}
    singles = {name: value for name, value in row.items() if name.startswith("single")}
    best = min(singles, key=lambda name: singles[name])
    row |= {"best single": singles[best], "best single name": best}
    row["violations"] = sum(run[name]["violations"] for run in runs for name in run)
    for name in ("fal", "fli-online", "fli-batch"):
        row[f"{name} / best single"] = row[name] / row["best single"]
        row[f"{name} / omniscient"] = row[name] / row["omniscient"]
    return row


def fmrl_convex() -> Study:
    """Regret over tasks beside its bounds: clusters of Lipschitz losses, experts on the simplex (FMRL)."""
    return FmrlConvex("fmrl-convex")


def fmrl_fashion() -> Study:
    """A learned start and radius for online logistic regression on super-classes of Fashion-MNIST (FMRL)."""
    return FmrlFashion("fmrl-fashion")
