"""Meta-gradients of theta in the inner loss, in float64, against closed forms and finite differences.

Run ``python benchmarks/results_inner_objectives.py`` (a minute). Three inner problems are quadratic in the parameters,
``x' H(theta) x / 2 - b(theta)' x``, so that gradient descent and the solution are known in closed form; the fourth is a
tanh MLP, against finite differences of its outer loss. Theta is in the outer loss too, where the last column says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt import (
    ConjugateGradient,
    FinalLoss,
    GradientEstimator,
    HessianFree,
    Implicit,
    InnerLoop,
    InnerObjective,
    Tape,
    TaskFamily,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
)
from learnedopt import optimizers as rules
from learnedopt.core.inner import InnerSolver, solve_inner

RATE, STEPS, WINDOW, LONG = 0.3, 12, 4, 1000
NEWTON, SOLVER = 40, HessianFree(60)
"""Steps and solver of the tanh MLP's solution, which descent would reach in many thousand steps."""
DIM, POINTS = 5, 12


class LeastSquares(TaskFamily):
    """Half the mean squared error of a linear model; each split has its own points."""

    def sample(self, num_tasks, generator):
        shapes = {"a": (2, POINTS, DIM), "t": (2, POINTS), "x": (DIM,)}
        return {k: torch.randn(num_tasks, *s, generator=generator) for k, s in shapes.items()}

    def init_params(self, tasks):
        return {"x": tasks["x"]}

    def batch(self, tasks, step, split):
        which = int(split == "valid")
        return {"a": tasks["a"][:, which], "t": tasks["t"][:, which]}

    def errors(self, params, batch):
        """Return half the squared error of each point."""
        return 0.5 * (batch["a"] @ params["x"] - batch["t"]).square()

    def loss(self, params, batch):
        return self.errors(params, batch).mean()


class TanhMLP(TaskFamily):
    """Cross-entropy of a tanh network with 4 units on 12 points with 3 features and 3 classes, and a little decay."""

    def sample(self, num_tasks, generator):
        shapes = {"x": (2, POINTS, 3), "w1": (3, 4), "w2": (4, 3)}
        tasks = {k: torch.randn(num_tasks, *s, generator=generator) for k, s in shapes.items()}
        return {**tasks, "y": torch.randint(3, (num_tasks, 2, POINTS), generator=generator)}

    def init_params(self, tasks):
        return {"w1": tasks["w1"], "w2": tasks["w2"]}

    def batch(self, tasks, step, split):
        which = int(split == "valid")
        return {"x": tasks["x"][:, which], "y": tasks["y"][:, which]}

    def errors(self, params, batch):
        """Return each point's cross-entropy, with the decay."""
        logits = (batch["x"] @ params["w1"]).tanh() @ params["w2"]
        decay = 0.02 * sum(p.square().sum() for p in params.values())
        return functional.cross_entropy(logits, batch["y"], reduction="none") + decay

    def loss(self, params, batch):
        return self.errors(params, batch).mean()


@dataclass(frozen=True)
class Inside(InnerObjective):
    """The family's loss with theta inside, as ``kind`` says; with ``direct``, in the outer loss as well."""

    kind: str
    direct: bool

    def init_theta(self, generator):
        size = POINTS if self.kind == "weights per example" else DIM
        return {"theta": 0.3 * torch.randn(size, generator=generator)}

    def loss(self, theta, family: Any, params, batch):
        value, inside = family.errors(params, batch), theta["theta"]
        if self.kind == "weights per example":
            return (inside.sigmoid() * value).mean()
        flat = torch.cat([p.reshape(-1) for p in params.values()])[:DIM]
        term = 0.5 * inside.exp() * flat.square() if self.kind == "L2 per coordinate" else inside * flat
        return value.mean() + term.sum()

    def outer_loss(self, theta, family, params, batch):
        value = family.loss(params, batch)
        return value * (1 + 0.1 * theta["theta"].square().sum()) if self.direct else value


KINDS = ("L2 per coordinate", "weights per example", "linear correction")
ESTIMATORS: dict[str, tuple[GradientEstimator, int]] = {
    "unrolled": (Unrolled(STEPS), 1),
    "segments of 5": (Unrolled(STEPS, segment=5), 1),
    "second window": (Truncated(WINDOW, STEPS, Tape.FULL), 2),
    "K-RMD": (TruncatedBackprop(STEPS, WINDOW), 1),
    "implicit": (Implicit(LONG, ConjugateGradient(60)), 1),
}


def descend(theta: Theta, objective: Inside, task: dict[str, Tensor], start: Tensor, steps: int) -> Tensor:
    """Return x after gradient descent on the quadratic: ``x* + M^steps (x0 - x*)``, ``M = I - rate H``; x* for None."""
    a, t, theta_ = task["a"][0], task["t"][0], theta["theta"]
    weights = theta_.sigmoid() if objective.kind == "weights per example" else torch.ones(POINTS)
    hessian, b = a.T @ (weights[:, None] * a) / POINTS, a.T @ (weights * t) / POINTS
    if objective.kind == "L2 per coordinate":
        hessian = hessian + theta_.exp().diag()
    if objective.kind == "linear correction":
        b = b - theta_
    solution = torch.linalg.solve(hessian, b)
    if steps == LONG:
        return solution
    return solution + torch.linalg.matrix_power(torch.eye(DIM) - RATE * hessian, steps) @ (start - solution)


def closed_form(name: str, objective: Inside, tasks: dict[str, Tensor], theta: Theta) -> Tensor:
    """Return the meta-gradient that an estimator must have, from the closed form of its recorded steps."""
    family = LeastSquares()
    ahead = {"second window": WINDOW, "K-RMD": STEPS - WINDOW}.get(name, 0)
    recorded = {"unrolled": STEPS, "segments of 5": STEPS, "implicit": LONG}.get(name, WINDOW)

    def outer(at: Tensor) -> Tensor:
        values = []
        for i in range(len(tasks["x"])):
            task = {k: v[i] for k, v in tasks.items()}
            start = descend(theta, objective, task, task["x"], ahead) if ahead else task["x"]
            x = descend({"theta": at}, objective, task, start, recorded)
            batch = {"a": task["a"][1], "t": task["t"][1]}
            values.append(objective.outer_loss({"theta": at}, family, {"x": x}, batch))
        return torch.stack(values).mean()

    return torch.func.grad(outer)(theta["theta"])


def differences(
    loop: InnerLoop, theta: Theta, tasks: dict[str, Tensor], steps: int, inner: InnerSolver | None = None
) -> Callable[[Tensor], float]:
    """Return the relative error of a gradient along itself, by extrapolated central differences of the outer loss.

    Solutions are followed from that at theta, as there are several.
    """
    begun = loop.begin(theta, loop.start(tasks))
    if inner is not None:
        begun = solve_inner(loop, theta, begun, steps, inner).end

    def value(at: Tensor) -> float:
        end = solve_inner(loop, {"theta": at}, begun, steps, inner).end
        return float(loop.losses({"theta": at}, end, "valid").mean())

    def error(grad: Tensor) -> float:
        way = grad / grad.norm()

        def slope(h: float) -> float:
            return (value(theta["theta"] + h * way) - value(theta["theta"] - h * way)) / (2 * h)

        return abs((4 * slope(5e-4) - slope(1e-3)) / 3 - float(grad.norm())) / float(grad.norm())

    return error


def estimate(
    loop: InnerLoop, theta: Theta, tasks: dict[str, Tensor], estimator: GradientEstimator, count: int
) -> Tensor:
    """Return the last of so many estimates in a row."""
    found = estimator.estimate(loop, theta, FinalLoss(), loop.start(tasks))
    for _ in range(count - 1):
        assert found.carry is not None
        found = estimator.estimate(loop, theta, FinalLoss(), found.carry)
    return found.grads["theta"]


def problem(family: TaskFamily, kind: str, direct: bool) -> tuple[InnerLoop, Theta, dict[str, Tensor]]:
    """Return a loop of gradient descent with theta in the inner loss alone, theta, and three tasks."""
    generator = torch.Generator().manual_seed(0)
    loop = InnerLoop(family, rules.make("sgd", lr=RATE, learn=()), inner_objective=Inside(kind, direct))
    return loop, loop.init_theta(generator), family.sample(3, generator)


def quadratics() -> list[str]:
    """Return the table's rows of the problems with a closed form."""
    rows = []
    for kind in KINDS:
        for direct in (False, True):
            loop, theta, tasks = problem(LeastSquares(), kind, direct)
            errors = []
            for name, (estimator, count) in ESTIMATORS.items():
                expected = closed_form(name, loop.inner_objective, tasks, theta)  # pyright: ignore[reportArgumentType]
                found = estimate(loop, theta, tasks, estimator, count)
                errors.append(float((found - expected).norm() / expected.norm()))
            rows.append(f"| {kind} | {' | '.join(f'{e:.1e}' for e in errors)} | {'yes' if direct else 'no'} |")
    return rows


def networks() -> list[str]:
    """Return the rows of the tanh MLP: against differences, and exact estimators among themselves."""
    rows = []
    for kind in KINDS:
        for direct in (False, True):
            loop, theta, tasks = problem(TanhMLP(), kind, direct)
            whole, pieces = (estimate(loop, theta, tasks, *ESTIMATORS[name]) for name in ("unrolled", "segments of 5"))
            solved = estimate(loop, theta, tasks, Implicit(NEWTON, ConjugateGradient(60), inner=SOLVER), 1)
            numbers = (
                differences(loop, theta, tasks, STEPS)(whole),
                float((pieces - whole).norm() / whole.norm()),
                differences(loop, theta, tasks, NEWTON, SOLVER)(solved),
            )
            rows.append(f"| {kind} | {' | '.join(f'{e:.1e}' for e in numbers)} | {'yes' if direct else 'no'} |")
    return rows


def main() -> None:
    """Print both tables."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print(f"| theta in the inner loss | {' | '.join(ESTIMATORS)} | in the outer loss too |")
    print("|---" * (len(ESTIMATORS) + 2) + "|")
    print("\n".join(quadratics()))
    print("\n| tanh MLP, theta in the inner loss | unrolled, against differences | segments, against the plain unroll "
          "| implicit, against differences | in the outer loss too |")  # fmt: skip
    print("|---|---|---|---|---|")
    print("\n".join(networks()))


if __name__ == "__main__":
    main()
