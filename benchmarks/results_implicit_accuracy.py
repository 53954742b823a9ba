"""Accuracy of meta-gradients against inner steps: MAML, and iMAML with few, many and exact linear solves.

The experiment of Rajeswaran et al. (2019), figure 2a: ill-conditioned linear regressions, gradient descent inside, the
same regularised inner problem and rate for both methods. Run ``python benchmarks/results_implicit_accuracy.py``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from learnedopt import (
    ConjugateGradient,
    ConvergenceWarning,
    FinalLoss,
    Implicit,
    InnerLoop,
    LinearSolver,
    MetaGradient,
    Solution,
    TaskFamily,
    Unrolled,
    optimizers,
)

DIM, NUM_POINTS, NUM_PROBLEMS = 10, 50, 200
STRENGTH, RATE = 0.1, 0.5
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 300, 500)
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "implicit_accuracy.png"


class Regressions(TaskFamily):
    """Linear regressions without noise on inputs whose covariance has condition number 1000."""

    def sample(self, num_tasks, generator):
        """Draw the true weights and, for both splits, the inputs."""
        normal = {"generator": generator, "dtype": torch.float64}
        eigenvectors, _ = torch.linalg.qr(torch.randn(num_tasks, DIM, DIM, **normal))
        scales = torch.logspace(0, -1.5, DIM, dtype=torch.float64)  # standard deviations along the eigenvectors
        whitened = torch.randn(num_tasks, 2, NUM_POINTS, DIM, **normal)
        inputs = (whitened * scales) @ eigenvectors.mT[:, None]
        weights = torch.randn(num_tasks, DIM, **normal)
        return {"inputs": inputs, "targets": (inputs @ weights[:, None, :, None]).squeeze(3)}

    def init_params(self, tasks):
        """Start at zero."""
        return {"x": torch.zeros(len(tasks["inputs"]), DIM, dtype=torch.float64)}

    def batch(self, tasks, step, split):
        """Return the split's points."""
        return {k: v[:, int(split == "valid")] for k, v in tasks.items()}

    def loss(self, params, batch):
        """Return half the mean squared error."""
        return 0.5 * (batch["inputs"] @ params["x"] - batch["targets"]).square().mean()


@dataclass(frozen=True)
class Direct(LinearSolver):
    """Builds each task's matrix column by column and factorises it."""

    def solve(self, operator, rhs: Tensor) -> Solution:
        """Return the solution to round-off."""
        columns = [operator(e.expand_as(rhs)) for e in torch.eye(rhs.shape[1], dtype=rhs.dtype)]
        x = torch.linalg.solve(torch.stack(columns, dim=2), rhs)
        zero = torch.zeros(rhs.shape[0], dtype=rhs.dtype)
        return Solution(x, (rhs - operator(x)).norm(dim=1) / rhs.norm(dim=1), zero)


def methods(num_steps: int) -> dict[str, MetaGradient]:
    """Return the estimators that are compared, by their label."""
    solvers = {f"iMAML, {n} CG steps": ConjugateGradient(n) for n in (2, 5, DIM)}
    implicit = {**solvers, "iMAML, exact solve": Direct()}
    return {"MAML": Unrolled(num_steps), **{k: Implicit(num_steps, solver) for k, solver in implicit.items()}}


def measure(steps: tuple[int, ...] = STEPS, num_problems: int = NUM_PROBLEMS) -> dict[str, list[float]]:
    """Return each method's mean relative error of the meta-gradient over problems, for each number of inner steps."""
    family, init = Regressions(), {"x": torch.ones(DIM, dtype=torch.float64)}
    rule = optimizers.make("imaml", template=init, lr=RATE, strength=STRENGTH)
    loop = InnerLoop(family, rule)
    theta = {"init/x": init["x"]}
    tasks = family.sample(num_problems, torch.Generator().manual_seed(0))
    exact = closed_form(tasks, init["x"])
    errors: dict[str, list[float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what happens before convergence is the question here
        for num_steps in steps:
            for label, estimator in methods(num_steps).items():
                found = per_problem(loop, theta, estimator, tasks)
                errors.setdefault(label, []).append(float(((found - exact).norm(dim=1) / exact.norm(dim=1)).mean()))
    return errors


def per_problem(loop: InnerLoop, theta: dict[str, Tensor], estimator: MetaGradient, tasks: dict[str, Tensor]) -> Tensor:
    """Return one meta-gradient per problem (num_problems, DIM)."""
    problems = ({k: v[i : i + 1] for k, v in tasks.items()} for i in range(len(tasks["inputs"])))
    estimates = (estimator.estimate(loop, theta, FinalLoss(), loop.start(problem)) for problem in problems)
    return torch.stack([estimate.grads["init/x"] for estimate in estimates])


def closed_form(tasks: dict[str, Tensor], start: Tensor) -> Tensor:
    """Return the exact meta-gradients ``strength P^-1 grad L_test(x*)`` with ``P = A + strength I``."""
    inputs, targets = tasks["inputs"], tasks["targets"][..., None]
    a, b = inputs.mT @ inputs / NUM_POINTS, (inputs.mT @ targets / NUM_POINTS).squeeze(3)
    p = a[:, 0] + STRENGTH * torch.eye(DIM, dtype=torch.float64)
    x = torch.linalg.solve(p, b[:, 0] + STRENGTH * start)
    return STRENGTH * torch.linalg.solve(p, (a[:, 1] @ x[:, :, None]).squeeze(2) - b[:, 1])


def main() -> None:
    """Print the table and draw the figure."""
    from learnedopt.plots import plot_lines

    errors = measure()
    print("inner steps".ljust(20) + "".join(f"{n:>10}" for n in STEPS))
    for label, row in errors.items():
        print(label.ljust(20) + "".join(f"{e:10.1e}" for e in row))
    series = {label: (STEPS, row) for label, row in errors.items()}
    plot_lines(FIGURE, series, xlabel="inner steps", ylabel="relative error of the meta-gradient", logx=True, logy=True)
    print(f"drew {FIGURE}")


if __name__ == "__main__":
    main()
