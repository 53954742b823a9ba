"""A learned L2 strength for each coordinate of linear regression, beside its closed forms; float64.

Run ``python benchmarks/results_ridge.py`` (1 CPU minute). Tasks have 20 inputs, of which the same 5 matter, and 20
noisy points. The inner problem is solved to its end, where every number has a closed form: the solution
``w = (A'A/n + diag s)^-1 A't/n``, the meta-gradient by implicit differentiation of it, and the best strengths of all,
``noise² / (n · mean w_i²)``: those of the posterior mean, infinite where the true weight is 0.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from learnedopt import FinalLoss, Implicit, InnerLoop, Tasks, Theta, Unrolled, recipes
from learnedopt.estimators.hessian_free import HessianFree
from learnedopt.estimators.linear_solvers import ConjugateGradient
from learnedopt.evaluation.style import add_axes, floats, look, new_figure, scale_axis, write_figure
from learnedopt.inner_objectives import L2
from learnedopt.optimizers import SGD
from learnedopt.tasks import LinearRegression

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "ridge.png"
RECIPE = recipes.meta_training("ridge")
FAMILY = LinearRegression(**RECIPE.family.options)
DIM, RELEVANT, NUM_POINTS, NOISE = FAMILY.dim, FAMILY.num_relevant or 0, FAMILY.num_train, FAMILY.noise
NUM_META_STEPS, NUM_TEST, START = RECIPE.num_meta_steps, 2000, 0.1
KEY = "log_l2/weight"


def ridge(tasks: Tasks, strengths: Tensor) -> Tensor:
    """Return each task's exact solution (num_tasks, dim)."""
    inputs, targets = tasks["train"]["inputs"], tasks["train"]["targets"].unsqueeze(-1)
    hessian = inputs.mT @ inputs / inputs.shape[1] + torch.diag(strengths)
    return torch.linalg.solve(hessian, inputs.mT @ targets / inputs.shape[1]).squeeze(-1)


def held_out(tasks: Tasks, strengths: Tensor) -> Tensor:
    """Return the mean loss on the tasks' other points at the exact solution."""
    inputs, targets = tasks["valid"]["inputs"], tasks["valid"]["targets"]
    predictions = (inputs @ ridge(tasks, strengths).unsqueeze(-1)).squeeze(-1)
    return 0.5 * (predictions - targets).square().mean()


def exact_gradient(tasks: Tasks, log_strengths: Tensor) -> Tensor:
    """Return the meta-gradient in closed form: ``-s_i w_i [(A'A/n + diag s)^-1 v]_i``, a mean over tasks."""
    inputs, strengths = tasks["train"]["inputs"], log_strengths.exp()
    hessian = inputs.mT @ inputs / inputs.shape[1] + torch.diag(strengths)
    solution, valid = ridge(tasks, strengths), tasks["valid"]
    errors = (valid["inputs"] @ solution.unsqueeze(-1)).squeeze(-1) - valid["targets"]
    of_solution = (valid["inputs"].mT @ errors.unsqueeze(-1) / errors.shape[1]).squeeze(-1)
    adjoint = torch.linalg.solve(hessian, of_solution.unsqueeze(-1)).squeeze(-1)
    return (-strengths * solution * adjoint).mean(0)


def compare_gradients(loop: InnerLoop, tasks: Tasks, log_strengths: Tensor) -> None:
    """Print the estimators' relative errors at one theta."""
    theta, exact = {KEY: log_strengths}, exact_gradient(tasks, log_strengths)
    newton = HessianFree(num_cg_iterations=2 * DIM)
    estimators = {
        "Implicit, Newton steps, conjugate gradient": Implicit(3, ConjugateGradient(2 * DIM), inner=newton),
        "Implicit, 1,000 descent steps, conjugate gradient": Implicit(1000, ConjugateGradient(2 * DIM)),
        **{f"Unrolled, {steps:,} descent steps": Unrolled(steps) for steps in (10, 100, 1000)},
    }
    print("| meta-gradient of 20 log-strengths, 8 tasks | relative error against the closed form |\n|---|---|")
    for label, estimator in estimators.items():
        found = estimator.estimate(loop, theta, FinalLoss(), loop.start(tasks)).grads[KEY]
        print(f"| {label} | {float((found - exact).norm() / exact.norm()):.1e} |", flush=True)
    end = newton(loop, theta, loop.start(tasks), 3).params["weight"]
    solution = ridge(tasks, log_strengths.exp())
    print(f"\nInner solution by three Newton steps: {float((end - solution).norm() / solution.norm()):.1e} relative.\n")


def meta_train(loop: InnerLoop, theta: Theta) -> list[Tensor]:
    """Return the strengths before each meta-step and at the end."""
    adam = torch.optim.Adam(theta.values(), RECIPE.meta.lr)
    generator, path = torch.Generator().manual_seed(1), [theta[KEY].exp()]
    for _ in range(NUM_META_STEPS):
        carry = loop.start(FAMILY.sample(RECIPE.num_tasks, generator))
        theta[KEY].grad = RECIPE.estimator.estimate(loop, theta, FinalLoss(), carry).grads[KEY]
        adam.step()
        path.append(theta[KEY].exp())
    return path


def main() -> None:
    """Print the tables and draw the figure."""
    torch.set_num_threads(1)
    template = {"weight": torch.zeros(DIM, dtype=torch.float64)}
    objective = L2(template, START, per="coordinate")
    loop = InnerLoop(FAMILY, SGD(0.2, learn=()), RECIPE.execution, objective)
    theta = loop.init_theta(torch.Generator())
    few = FAMILY.sample(8, torch.Generator().manual_seed(2))
    compare_gradients(loop, few, theta[KEY] + torch.linspace(-1, 1, DIM, dtype=torch.float64))
    path = meta_train(loop, theta)
    test, tuning = (FAMILY.sample(NUM_TEST, torch.Generator().manual_seed(seed)) for seed in (3, 4))
    ones = torch.ones(DIM, dtype=torch.float64)
    best = min((START * 1.1**i for i in range(-50, 51)), key=lambda s: float(held_out(tuning, s * ones)))
    posterior = torch.cat([ones[:RELEVANT] * NOISE**2 / NUM_POINTS, ones[RELEVANT:] * 1e12])
    rows = {
        f"learned, one a coordinate, after {NUM_META_STEPS} meta-steps": path[-1],
        "the posterior mean's, which none can beat": posterior,
        f"the best single strength, {best:.2g}, of as many other tasks": best * ones,
        f"the start, {START:g} for all": START * ones,
    }
    print(f"| strengths | loss on fresh points, {NUM_TEST:,} tasks |\n|---|---|")
    for label, strengths in rows.items():
        print(f"| {label} | {float(held_out(test, strengths)):.4f} |")
    print(f"\nLearned: relevant {path[-1][:RELEVANT].tolist()}, others {path[-1][RELEVANT:].tolist()}")
    curve = [float(held_out(test, strengths)) for strengths in path]
    draw(
        path,
        curve,
        {
            "posterior mean": float(held_out(test, posterior)),
            "best single strength": float(held_out(test, best * ones)),
        },
    )


def draw(path: list[Tensor], curve: list[float], levels: dict[str, float]) -> None:
    """Draw the strengths beside their closed form, and the loss beside those of other strengths."""
    figure = new_figure(10, 4.2)
    figure.get_layout_engine().set(wspace=0.06)
    left = add_axes(figure, (1, 2, 1), xlabel="meta-step", ylabel="L2 strength of a coordinate")
    steps = floats(range(len(path)))
    for i, line in enumerate(torch.stack(path).T.tolist()):
        shape, what = (look(0), "weight matters") if i < RELEVANT else (look(1, True), "weight is 0")
        left.plot(steps, line, **{**shape, "linewidth": 1}, label=what if i in (0, RELEVANT) else None)
    flat = {"color": "black", "linewidth": 1.4}
    left.axhline(NOISE**2 / NUM_POINTS, **flat, linestyle="--", label="posterior mean, where it matters")
    scale_axis(left, "y")
    right = add_axes(figure, (1, 2, 2), xlabel="meta-step", ylabel=f"loss on fresh points, {NUM_TEST:,} tasks")
    right.plot(steps, curve, **look(0), label="learned strengths")
    for (label, level), style in zip(levels.items(), ("--", ":"), strict=True):
        right.axhline(level, **flat, linestyle=style, label=label)
    for axes in (left, right):
        axes.legend(frameon=False)
    write_figure(figure, FIGURE)


if __name__ == "__main__":
    main()
