"""ARUBA on heterogeneous quadratics: task-averaged regret beside that of the best fixed rates in hindsight.

Run ``python benchmarks/results_aruba.py`` (a CPU minute, float64). A task is m online losses ``|x - c_i|**2 / 2``
in d dimensions, c_i around an optimum whose spread over tasks differs by coordinate. The start follows the leader of
the optima for every method, so that only the rates differ.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnedopt import (
    ARUBA,
    Carry,
    Execution,
    Found,
    InnerLoop,
    MetaTrainer,
    MomentMatching,
    RegretBound,
    Tape,
    Target,
    TaskFamily,
    Unrolled,
    optimizers,
)
from learnedopt.core.tree import Params, Theta
from learnedopt.evaluation.comparison import align
from learnedopt.optimizers import as_meta_sgd
from learnedopt.training.validation import task_generator

DIMENSIONS, NUM_STEPS, NOISE = 20, 10, 0.5
SPREADS = torch.logspace(-1.5, 0.5, DIMENSIONS, dtype=torch.float64)
EPS, ZETA = 0.1, 1.0
FIXED = torch.logspace(-2, 0.2, 23, dtype=torch.float64).tolist()


class Heterogeneous(TaskFamily):
    """``|x - c_i|**2 / 2`` at step i: c_i has the spread ``NOISE`` around the task's optimum, that has ``SPREADS``."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        """Draw the points c_i (num_tasks, m, d)."""
        shape = (num_tasks, NUM_STEPS, DIMENSIONS)
        noise, optima = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        return {"c": 1.0 + SPREADS * optima[:, :1] + NOISE * noise}

    def init_params(self, tasks: Any) -> Params:
        """Start at zero."""
        return {"x": torch.zeros_like(tasks["c"][:, 0])}

    def batch(self, tasks: Any, step: int, split: str) -> Any:
        """Return the step's point."""
        return {"c": tasks["c"][:, step % NUM_STEPS]}

    def loss(self, params: Params, batch: Any) -> Tensor:
        """Return half the squared distance."""
        return 0.5 * (params["x"] - batch["c"]).square().sum()


class Mean(Target):
    """The minimiser of a task's losses in hindsight, in closed form."""

    def find(self, loop: InnerLoop, theta: Theta, end: Carry) -> Found:
        """Return the mean of the task's points."""
        return Found(end._replace(params={"x": end.tasks["c"].mean(1)}), end)


class Course(NamedTuple):
    """What every task met: its points, and theta as that of ``meta-sgd``; stacked over tasks."""

    tasks: Any
    theta: Theta

    def at(self, rate: float) -> Course:
        """Return it with one rate for everything, always."""
        fixed = {k: torch.full_like(v, rate) if "/lr/" in k else v for k, v in self.theta.items()}
        return self._replace(theta=fixed)


def follow(rates: str, factor: float, num_tasks: int, seed: int) -> Course:
    """Meta-train on one task after the other, and return what each of them met."""
    like = {"x": torch.zeros(DIMENSIONS, dtype=torch.float64)}
    rule = optimizers.make("aruba", template=like, rates=rates, eps=EPS, zeta=ZETA)
    loop = InnerLoop(Heterogeneous(), rule)
    trainer = MetaTrainer(loop, Unrolled(0), MomentMatching(NUM_STEPS, Mean(), factor), ARUBA, None, seed=seed)
    points, met = [], []
    for t in range(num_tasks):
        points.append(loop.family.sample(1, task_generator(seed, t))["c"])  # what the trainer is about to draw
        exported = as_meta_sgd(rule, {k: v.detach().clone() for k, v in trainer.theta.items()})[1]
        met.append({k: v.expand(DIMENSIONS) for k, v in exported.items()})
        trainer.run(t + 1)
    return Course({"c": torch.cat(points)}, {k: torch.stack([theta[k] for theta in met]) for k in met[0]})


def regrets(course: Course) -> Tensor:
    """Return the task-averaged regret of each coordinate (d,)."""
    points = course.tasks["c"]
    best, total = points.mean(1), torch.zeros(DIMENSIONS, dtype=torch.float64)
    like = {"x": torch.zeros(DIMENSIONS, dtype=torch.float64)}
    loop = InnerLoop(Heterogeneous(), optimizers.make("meta-sgd", template=like), Execution(len(points)))
    carry = loop.begin(course.theta, loop.start(course.tasks), theta_per_task=True)
    for i in range(NUM_STEPS):
        point = points[:, i]
        total = total + 0.5 * ((carry.params["x"] - point) ** 2 - (best - point) ** 2).mean(0)
        carry = loop.run(course.theta, carry, 1, Tape.NONE, theta_per_task=True).end
    return total


def bound(course: Course) -> float:
    """Return the mean of the tasks' bounds."""
    like = {"x": torch.zeros(DIMENSIONS, dtype=torch.float64)}
    loop = InnerLoop(Heterogeneous(), optimizers.make("meta-sgd", template=like))
    objective, values = RegretBound(NUM_STEPS, Mean()), []
    for t, points in enumerate(course.tasks["c"]):
        theta = {k: v[t] for k, v in course.theta.items()}
        values.append(objective(loop, theta, loop.run(theta, loop.start({"c": points[None]}), 0, Tape.NONE)))
    return float(torch.stack(values).mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=300, metavar="T", help="tasks of a run (default 300)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    args = parser.parse_args()
    torch.set_num_threads(1)
    courses = {
        f"ARUBA, {name}, factor {factor:g}": follow(rates, factor, args.tasks, args.seed)
        for rates, name in (("all", "isotropic"), ("coordinate", "per coordinate"))
        for factor in (0.5, 1.0)
    }
    any_course = next(iter(courses.values()))  # the start's is the same in all
    fixed = torch.stack([regrets(any_course.at(rate)) for rate in FIXED])
    best = int(fixed.sum(1).argmin())
    one, each = float(fixed[best].sum()), float(fixed.min(0).values.sum())
    rows = [["rates", "task-averaged regret", "of the best fixed", "of the best by coordinate", "bound"]]

    def add(name: str, regret: float, course: Course | None) -> None:
        shown = "" if course is None else f"{bound(course):.2f}"
        rows.append([name, f"{regret:.2f}", f"{regret / one:.3f}", f"{regret / each:.3f}", shown])

    add(f"best fixed, {FIXED[best]:.3f}", one, any_course.at(FIXED[best]))
    add("best fixed of each coordinate", each, None)
    for name, course in courses.items():
        add(name, float(regrets(course).sum()), course)
    print(f"{args.tasks} tasks of {NUM_STEPS} losses in {DIMENSIONS} dimensions, seed {args.seed}.\n\n{align(rows)}")


if __name__ == "__main__":
    main()
