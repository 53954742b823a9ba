"""What meta-gradients of one convex problem are, to round-off: momentum, heavy ball, bootstrapped targets; float64.

Run ``python benchmarks/results_optimistic_identities.py`` (10 CPU seconds). Each row compares every iterate of 60
meta-steps in the engine (``MetaTrainer``, ``Truncated(1)``, ``FinalLoss``) with a recursion written out below, on a
quadratic with a condition number of 100; the tests do the same on a function that is no quadratic, with more weights,
hints and rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from learnedopt import DualAveraging, FinalLoss, InnerLoop, LastGradient, MetaTrainer, Theta, Truncated, UpdateRule
from learnedopt.core.carry import Rollout
from learnedopt.core.objective import MetaObjective, TaskMean
from learnedopt.core.tree import Params
from learnedopt.optimizers import Averaged, Iterate, LearnedRates
from learnedopt.tasks import SpectralQuadratic
from learnedopt.training.validation import task_generator

DIM, STEPS, BETA = 20, 60, 0.1
FAMILY = SpectralQuadratic(DIM, "geometric", 2.0, rotated=True, dtype="float64")
TASK = {k: v[0] for k, v in FAMILY.sample(1, task_generator(0, 0)).items()}
START = TASK["start"]
LIKE = {"x": START}
Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def gradient(x: Tensor) -> Tensor:
    """Return ∇f."""
    return TASK["basis"] @ (FAMILY.eigenvalues() * (TASK["basis"].T @ (x - TASK["solution"])))


def engine(rule: UpdateRule, make: Make, objective: MetaObjective | None = None) -> Tensor:
    """Return x̄_1 to x̄_T."""
    trainer, means = MetaTrainer(InnerLoop(FAMILY, rule), Truncated(1), objective or FinalLoss(), make, None), []
    for step in range(1, STEPS + 1):
        trainer.run(step)
        means.append(trainer.progress.carry.params["x"][0])
    return torch.stack(means)


def recursion(next_point: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Return x_1 = x_0 to x_T, each made of t, x_t, x_{t-1} and ∇f(x_{t-1}), which is 0 for t = 1."""
    points, before = [START, START], torch.zeros(DIM, dtype=torch.float64)
    for t in range(1, STEPS):
        points.append(next_point(t, points[-1], points[-2], before))
        before = gradient(points[-2])
    return torch.stack(points[1:])


def momentum(share: Callable[[int], float], decay: Callable[[int], float]) -> Tensor:
    """Return the points of momentum with these rates, in units of β, and decays."""
    return recursion(lambda t, x, last, _: x - share(t) * BETA * gradient(x) + decay(t) * (x - last))


def corrected(t: int, x: Tensor, last: Tensor, before: Tensor) -> Tensor:
    """Return the next point of momentum (t-1)/(t+2) whose gradient has Nesterov's correction."""
    g = gradient(x)
    return x + (t - 1) / (t + 2) * (x - last) - 2 * BETA * ((t + 1) * g + t * (g - before)) / (t + 2)


class Shift(UpdateRule):
    """φ(x, w) = x + w."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Start without a velocity."""
        return {"x": torch.zeros_like(START)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        """Start where the parameters are."""
        return params, ()

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        """Return the velocity."""
        return {"x": theta["x"].clone()}, state


class OptimisticTarget(TaskMean):
    """½|z_t - x_t(w)|² with ``z_t = x_t - [α_{t+1}∇f(x̄_t) + α_t(∇f(x̄_t) - ∇f(x̄_{t-1}))]``, α_t = t."""

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        """Return the distance; x_t = x̄_{t-1} + (x̄_t - x̄_{t-1})/ρ_t is the newest part of the average."""
        t, start, end = rollout.end.step, rollout.start.params["x"][0], rollout.end.params["x"][0]
        newest = start + (end - start) * (t + 1) / 2
        here = gradient(end.detach())
        before = gradient(start) if t > 1 else torch.zeros_like(here)
        target = newest.detach() - ((t + 1) * here + t * (here - before))
        return 0.5 * (target - newest).square().sum()


def element_wise() -> Tensor:
    """Return x̄_1 to x̄_T of φ = x - w ∇f(x) by dual averaging of ``-∇f(x̄_{t-1}) ∇f(x̄_t)``, α_t = 1."""
    mean, rates, total = START, torch.full((DIM,), 0.2, dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64)
    points = []
    for t in range(1, STEPS + 1):
        here = gradient(mean)
        mean = mean - (rates - BETA * total) * here / t
        total = total - here * gradient(mean)
        points.append(mean)
    return torch.stack(points)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    constant, linear = (Averaged(Iterate(LIKE), name) for name in ("constant", "linear"))
    optimistic = engine(linear, lambda p: DualAveraging(p, BETA, "linear", LastGradient()))
    rows = {
        "plain, α = 1, is momentum (t-1)/(t+1)": (
            engine(constant, lambda p: DualAveraging(p, BETA)),
            momentum(lambda t: 1 / (t + 1), lambda t: (t - 1) / (t + 1)),
        ),
        "plain, α = t, is momentum (t-1)/(t+2)": (
            engine(linear, lambda p: DualAveraging(p, BETA, "linear")),
            momentum(lambda t: 2 * t / (t + 2), lambda t: (t - 1) / (t + 2)),
        ),
        "optimistic, α = t, is that momentum with Nesterov's correction": (optimistic, recursion(corrected)),
        "optimistic, α = t, is a bootstrapped target": (
            engine(linear, lambda p: torch.optim.SGD(p, BETA), OptimisticTarget()),
            optimistic,
        ),
        "φ = w, not averaged, is gradient descent": (
            engine(Iterate(LIKE), lambda p: DualAveraging(p, BETA, averaged=False)),
            momentum(lambda t: 1.0, lambda t: 0.0),
        ),
        "φ = x + w under decay is the heavy ball": (
            engine(Shift(), lambda p: torch.optim.SGD(p, BETA, weight_decay=0.2 / BETA)),
            momentum(lambda t: 1.0, lambda t: 0.8),
        ),
        "element-wise rates, plain, α = 1, are their recursion": (
            engine(Averaged(LearnedRates(LIKE, lr=0.2)), lambda p: DualAveraging(p, BETA)),
            element_wise(),
        ),
    }
    print("| identity, 60 steps | goal | largest error over the largest entry |\n|---|---|---|")
    for name, (found, expected) in rows.items():
        print(f"| {name} | 1e-12 | {float((found - expected).abs().max() / expected.abs().max()):.1e} |")


if __name__ == "__main__":
    main()
