"""ARUBA on heterogeneous quadratics: task-averaged regret beside that of the best fixed rates in hindsight.

Run ``python benchmarks/results_aruba.py`` (a few CPU minutes, float64). A task is m online losses ``|x - c_i|**2 / 2``
in d dimensions, c_i around an optimum whose spread over tasks differs by coordinate. The start follows the leader of
the optima for every method, so that only the rates differ.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from learnedopt import (
    ARUBA,
    Carry,
    FollowTheLeader,
    Found,
    InnerLoop,
    MetaTrainer,
    MomentMatching,
    PerName,
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


def regret_of(loop: InnerLoop, theta: Theta, tasks: Any) -> Tensor:
    """Return each coordinate's regret (d,) in one task."""
    total = torch.zeros(DIMENSIONS, dtype=torch.float64)
    rule, exported = as_meta_sgd(loop.rule, theta)
    best = tasks["c"][0].mean(0)
    descent = InnerLoop(loop.family, rule)
    carry = descent.begin(exported, descent.start(tasks))
    for i in range(NUM_STEPS):
        x, point = carry.params["x"][0], tasks["c"][0, i]
        total = total + 0.5 * ((x - point) ** 2 - (best - point) ** 2)
        carry = descent.run(exported, carry, 1, Tape.NONE).end
    return total


def averaged(rates: str, factor: float, rate: float | None, num_tasks: int, seed: int) -> tuple[Tensor, float]:
    """Return the task-averaged regret by coordinate, and the mean bound; with ``rate`` it stays where it is."""
    like = {"x": torch.zeros(DIMENSIONS, dtype=torch.float64)}
    eps = EPS if rate is None else rate * ZETA
    loop = InnerLoop(Heterogeneous(), optimizers.make("aruba", template=like, rates=rates, eps=eps, zeta=ZETA))
    own = ARUBA if rate is None else lambda params: torch.optim.SGD(params, 0.0)
    meta_optimizer = PerName({"init/*": FollowTheLeader, "rule/*": own})
    trainer = MetaTrainer(
        loop, Unrolled(0), MomentMatching(NUM_STEPS, Mean(), factor), meta_optimizer, None, seed=seed
    )  # fmt: skip
    total, bound = torch.zeros(DIMENSIONS, dtype=torch.float64), 0.0
    for t in range(num_tasks):
        theta = {k: v.detach().clone() for k, v in trainer.theta.items()}
        tasks = loop.family.sample(1, task_generator(seed, t))
        rule, exported = as_meta_sgd(loop.rule, theta)
        total = total + regret_of(loop, theta, tasks)
        descent = InnerLoop(loop.family, rule)
        at_start = descent.run(exported, descent.start(tasks), 0, Tape.NONE)
        bound += float(RegretBound(NUM_STEPS, Mean())(descent, exported, at_start))
        trainer.run(t + 1)
    return total / num_tasks, bound / num_tasks


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=200, metavar="T", help="tasks of a run (default 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    args = parser.parse_args()
    torch.set_num_threads(1)
    fixed = []
    for rate in FIXED:
        fixed.append(averaged("all", 0.5, rate, args.tasks, args.seed))
        print(f"fixed {rate:.4f}: TAR {float(fixed[-1][0].sum()):.4f}, bound {fixed[-1][1]:.4f}", flush=True)
    regrets = torch.stack([regret for regret, _ in fixed])
    best = int(regrets.sum(1).argmin())
    one, each = float(regrets[best].sum()), float(regrets.min(0).values.sum())
    rows = [["rates", "TAR", "of best fixed", "of best fixed by coordinate", "bound"]]
    rows.append(
        [f"best fixed rate, {FIXED[best]:.3f}", f"{one:.3f}", "1", f"{one / each:.3f}", f"{fixed[best][1]:.3f}"]
    )
    rows.append(["best fixed rate of each coordinate", f"{each:.3f}", f"{each / one:.3f}", "1", ""])
    for rates in ("all", "coordinate"):
        for factor in (0.5, 1.0):
            regret, bound = averaged(rates, factor, None, args.tasks, args.seed)
            tar, name = float(regret.sum()), "isotropic" if rates == "all" else "per coordinate"
            half = "one half" if factor == 0.5 else "1"
            rows.append(
                [f"ARUBA, {name}, factor {half}", f"{tar:.3f}", f"{tar / one:.3f}", f"{tar / each:.3f}", f"{bound:.3f}"]
            )  # fmt: skip
    print(f"\n{args.tasks} tasks of {NUM_STEPS} losses, seed {args.seed}.\n\n{align(rows)}")


if __name__ == "__main__":
    main()
