"""Accuracy of meta-gradients against inner steps: MAML, and iMAML with few, many and exact linear solves.

The experiment of Rajeswaran et al. (2019), figure 2a: ill-conditioned linear regressions, gradient descent inside, the
same regularised inner problem and rate for both methods; conjugate gradient (CG) with as many steps as dimensions is
exact but for round-off. Run ``python benchmarks/results_implicit_accuracy.py``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from learnedopt import (
    Carry,
    ConjugateGradient,
    ConvergenceWarning,
    FinalLoss,
    GradientEstimator,
    Implicit,
    InnerLoop,
    LinearSolver,
    Proximal,
    Solution,
    Tape,
    TaskFamily,
    Unrolled,
    optimizers,
)
from learnedopt.core import tree

DIM, NUM_POINTS, NUM_PROBLEMS = 10, 50, 200
STRENGTH, RATE = 0.1, 0.5
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 300, 400, 500)
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


def methods(num_steps: int, end: Carry) -> dict[str, GradientEstimator]:
    """Return the estimators that are compared, by their label; the implicit ones share the solution ``end``."""
    solvers: dict[str, LinearSolver] = {f"{n} CG": ConjugateGradient(n) for n in (2, 5, DIM)}
    solvers["exact solve"] = Direct()
    implicit = {f"iMAML, {label}": Implicit(num_steps, s, inner=lambda *_: end) for label, s in solvers.items()}
    return {"MAML": Unrolled(num_steps), **implicit}


def measure(steps: tuple[int, ...] = STEPS, num_problems: int = NUM_PROBLEMS) -> dict[str, list[float]]:
    """Return each method's mean relative error of the meta-gradient over problems, for each number of inner steps."""
    family, start = Regressions(), torch.ones(DIM, dtype=torch.float64)
    template = {"x": start}
    rule = optimizers.make("maml", template=template, lr=RATE)
    loop = InnerLoop(family, rule, inner_objective=Proximal(template, STRENGTH))
    tasks = family.sample(num_problems, torch.Generator().manual_seed(0))
    exact = closed_form(tasks, start)
    sums: dict[str, list[float]] = {}
    for i in range(num_problems):
        found = estimates(loop, {"init/x": start}, tree.narrow(tasks, i, i + 1), steps)
        for label, grads in found.items():
            errors = [float((grad - exact[i]).norm() / exact[i].norm()) for grad in grads]
            sums[label] = [a + b for a, b in zip(sums.get(label, [0.0] * len(steps)), errors, strict=True)]
    return {label: [total / num_problems for total in row] for label, row in sums.items()}


def estimates(
    loop: InnerLoop, theta: dict[str, Tensor], problem: dict[str, Tensor], steps: tuple[int, ...]
) -> dict[str, list[Tensor]]:
    """Return one problem's meta-gradients (DIM,), by label and then for each of the rising ``steps``."""
    fresh = loop.start(problem)
    found: dict[str, list[Tensor]] = {}
    end = loop.begin(theta, fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what happens before convergence is the question here
        for num_steps in steps:
            end = loop.run(theta, end, num_steps - end.step, Tape.NONE).end
            for label, estimator in methods(num_steps, end).items():
                grads = estimator.estimate(loop, theta, FinalLoss(), fresh).grads
                found.setdefault(label, []).append(grads["init/x"])
    return found


def closed_form(tasks: dict[str, Tensor], start: Tensor) -> Tensor:
    """Return the exact meta-gradients ``strength P^-1 grad L_test(x*)`` with ``P = A + strength I``."""
    inputs, targets = tasks["inputs"], tasks["targets"][..., None]
    a, b = inputs.mT @ inputs / NUM_POINTS, (inputs.mT @ targets / NUM_POINTS).squeeze(3)
    p = a[:, 0] + STRENGTH * torch.eye(DIM, dtype=torch.float64)
    x = torch.linalg.solve(p, b[:, 0] + STRENGTH * start)
    return STRENGTH * torch.linalg.solve(p, (a[:, 1] @ x[:, :, None]).squeeze(2) - b[:, 1])


def main() -> None:
    """Print the table and draw the figure."""
    from learnedopt.evaluation.plots import plot_lines

    errors = measure()
    print("inner steps".ljust(20) + "".join(f"{n:>10}" for n in STEPS))
    for label, row in errors.items():
        print(label.ljust(20) + "".join(f"{e:10.1e}" for e in row))
    plot_lines(
        FIGURE,
        {label: (STEPS, row) for label, row in errors.items()},
        xlabel="inner steps",
        ylabel="mean relative error of the meta-gradient",
        logx=True,
        logy=True,
    )
    print(f"drew {FIGURE}")


if __name__ == "__main__":
    main()
