"""The study of optimistic meta-gradients: its problems, its methods, and the bounds and slopes that it shows."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from learnedopt import recipes, tasks
from learnedopt.core import tree
from learnedopt.recipes import convex
from learnedopt.recipes.convex import METHODS, Problem, make_problem
from learnedopt.recipes.optimistic import Curves, OptimisticConvex, log_spaced
from learnedopt.tasks import RegularizedLogistic, SpectralQuadratic

QUADRATICS = ["power:2", "power:3", "geometric:4"]
DATA = ["breast-cancer:1e-4", "breast-cancer:1e-2", "digits:1e-3"]


def problem_of(name: str, dim: int = 30) -> Problem:
    if name in DATA:
        pytest.importorskip("sklearn", reason="needs scikit-learn, for its small data sets")
    return make_problem(name, dim, seed=1)


def curves_of(problem: Problem, num_steps: int, *methods: str) -> Curves:
    gaps = {m: [x - problem.minimum for x in METHODS[m](problem, num_steps).losses] for m in methods}
    return Curves(problem.smoothness, problem.squared_distance, gaps, {})


def function_of(problem: Problem) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return f of a vector, and x_0."""
    (name, start), *_ = problem.family.init_params(problem.tasks()).items()
    batch = tree.squeeze(problem.family.batch(problem.tasks(), 0, "valid"))
    return lambda x: problem.family.loss({name: x}, batch), start[0]


def hessian_of(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return torch.func.jacrev(torch.func.grad(loss))(at)  # pyright: ignore[reportReturnType]


# What the bounds and slopes show


@pytest.mark.parametrize("name", [*QUADRATICS, *DATA])
def test_bounds_hold_at_every_step(name: str) -> None:
    curves = curves_of(problem_of(name), 200, "plain", "optimistic", "plain, linear weights")
    assert curves.violations("plain", "plain") == curves.violations("optimistic", "optimistic") == 0
    # No bound is known of it; that it meets the optimistic one shows that the weights give most of the speed.
    assert curves.violations("plain, linear weights", "optimistic") == 0
    assert all(gaps[0] == curves.gaps["plain"][0] for gaps in curves.gaps.values())


def test_the_bounds_are_tight_at_the_first_step_of_an_isotropic_problem() -> None:
    problem = Problem(SpectralQuadratic(5, "geometric", 0.0, dtype="float64"), 0, 1.0, 0.0, 5.0)
    curves = curves_of(problem, 2, "plain", "optimistic")
    assert curves.gaps["plain"][0] == pytest.approx(curves.bound("plain", 1), rel=1e-14)
    assert 4 * curves.gaps["optimistic"][0] == pytest.approx(curves.bound("optimistic", 1), rel=1e-14)


def test_gradient_descent_breaks_the_optimistic_bound() -> None:
    # Descent is slowest along eigenvalues of about 1/T, where it keeps a part of f that is proportional to 1/T.
    problem = Problem(SpectralQuadratic(40, "geometric", 4.0, dtype="float64"), 0, 1.0, 0.0, 40.0)
    curves = curves_of(problem, 2000, "gradient descent")
    assert curves.violations("gradient descent", "plain") == 0
    assert curves.violations("gradient descent", "optimistic") > 500


def test_violations_and_slopes_count_what_they_say() -> None:
    steps = range(1, 2001)
    curves = Curves(2.0, 3.0, {"plain": [3.0 / t for t in steps], "x": [5 * t**-1.3 for t in steps]}, {})
    assert curves.violations("plain", "plain") == 0
    assert curves._replace(smoothness=1.999).violations("plain", "plain") == 2000
    assert curves.violations("plain", "optimistic") == sum(3.0 / t > 24 / (t * (t + 1)) + 1e-12 for t in steps) > 1900
    assert curves.slope("x") == pytest.approx(1.3, rel=1e-6) and curves.slope("plain", 10) == pytest.approx(1.0)
    assert Curves(1.0, 1.0, {"plain": [float("nan")] * 5}, {}).violations("plain", "plain") == 5
    assert log_spaced(50, 2000)[0] == 50 and log_spaced(50, 2000)[-1] == 2000 and log_spaced(1, 3) == [1, 2, 3]


@pytest.mark.long
@pytest.mark.parametrize("decay", [3, 4])
def test_the_optimistic_slope_is_twice_that_of_descent(decay: int) -> None:
    problem = make_problem(f"power:{decay}", 400, seed=0)
    curves = curves_of(problem, 2000, "gradient descent", "optimistic")
    descent, optimistic = curves.slope("gradient descent"), curves.slope("optimistic")
    assert descent == pytest.approx(1 - 1 / decay, abs=0.015)
    assert optimistic == pytest.approx(2 * (1 - 1 / decay), abs=0.03) and optimistic / descent >= 1.9


# Problems


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("spectrum", "decay"), [("power", 1.5), ("geometric", 3.0)])
def test_a_quadratic_has_the_spectrum_and_the_solution_that_it_names(
    spectrum: Any, decay: float, rotated: bool
) -> None:
    family = SpectralQuadratic(6, spectrum, decay, rotated)
    task = family.sample(2, torch.Generator().manual_seed(0))
    other, batch = (tree.squeeze(tree.narrow(family.batch(task, 0, "train"), i, i + 1)) for i in (0, 1))
    hessian = hessian_of(lambda x: family.loss({"x": x}, batch), torch.ones(6))
    values, vectors = torch.linalg.eigh(hessian)
    expected = (
        [i**-1.5 for i in range(6, 0, -1)] if spectrum == "power" else [10 ** (-0.6 * i) for i in range(5, -1, -1)]
    )
    torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close((vectors.T @ batch["solution"]).abs(), torch.ones(6), rtol=1e-9, atol=0)
    assert float(family.loss({"x": batch["solution"]}, batch)) == 0.0
    assert not torch.equal(batch["solution"], other["solution"])


@pytest.mark.parametrize("name", DATA)
def test_a_logistic_problem_is_solved_and_as_smooth_as_it_says(name: str) -> None:
    problem = problem_of(name)
    loss, start = function_of(problem)
    x = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([x], max_iter=5000, history_size=50, tolerance_grad=1e-10, tolerance_change=0.0)

    def closure() -> float:
        solver.zero_grad()
        value = loss(x)
        value.backward()
        return float(value.detach())

    solver.step(closure)
    assert problem.minimum <= float(loss(x.detach())) <= problem.minimum + 1e-9
    assert problem.squared_distance == pytest.approx(float(x.detach().square().sum()), rel=1e-3)
    at_start, at_end = (torch.linalg.eigvalsh(hessian_of(loss, p))[-1] for p in (start, x.detach()))
    assert float(at_start) == pytest.approx(problem.smoothness, rel=1e-12)  # where every curvature is 1/4
    assert float(at_end) < 0.9 * problem.smoothness


@pytest.mark.usefixtures("float64")
def test_logistic_regression_on_given_points() -> None:
    inputs, targets = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1, 0, 1])
    family, w = RegularizedLogistic(inputs, targets, 0.3), torch.tensor([0.5, -1.0, 2.0])
    batch = {k: v[1] for k, v in family.batch(family.sample(2, torch.Generator()), 3, "valid").items()}
    p = torch.sigmoid(inputs @ w)
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean() + 0.15 * w.square().sum()
    torch.testing.assert_close(family.loss({"weight": w}, batch), expected, rtol=1e-14, atol=0)
    assert torch.equal(family.init_params(family.sample(2, torch.Generator()))["weight"], torch.zeros(2, 3))


# Methods


def test_methods_are_what_they_are_called() -> None:
    problem = problem_of("geometric:2", 6)
    loss, start = function_of(problem)
    gradient, num_steps = torch.func.grad(loss), 30
    x, y, values = start, start, []
    for t in range(1, num_steps + 1):
        values.append(float(loss(y)))
        before, x = x, y - gradient(y)
        y = x + (t - 1) / (t + 2) * (x - before)
    assert METHODS["Nesterov"](problem, num_steps).losses == pytest.approx(values, rel=1e-12)

    def by_torch(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> list[float]:
        p, found = start.clone().requires_grad_(), []
        optimizer = make([p])
        for _ in range(num_steps):
            optimizer.zero_grad()
            value = loss(p)
            value.backward()
            optimizer.step()
            found.append(float(value.detach()))
        return found

    found = METHODS["AdaGrad"](problem, num_steps)
    expected = [by_torch(lambda p, lr=lr: torch.optim.Adagrad(p, lr, eps=1e-300)) for lr in convex.ADAGRAD_RATES]
    best = min(expected, key=lambda values: values[-1])
    assert found.losses == pytest.approx(best, rel=1e-10)
    assert found.settings == {"lr": convex.ADAGRAD_RATES[expected.index(best)]}
    found = METHODS["momentum"](problem, num_steps)
    grid = [(lr, m) for lr in convex.RATES for m in convex.MOMENTA]
    expected = [by_torch(lambda p, s=s: torch.optim.SGD(p, s[0], momentum=s[1])) for s in grid]
    best = min(expected, key=lambda values: values[-1])
    assert found.losses == pytest.approx(best, rel=1e-10)
    assert (found.settings["lr"], found.settings["momentum"]) == grid[expected.index(best)]
    found = METHODS["gradient descent"](problem, num_steps)
    assert found.losses == pytest.approx(by_torch(lambda p: torch.optim.SGD(p, 1.0)), rel=1e-12)


# Bad input


STUDY = OptimisticConvex("optimistic-convex")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problems": ("powr:3",)}, "problem 'powr:3' is not of the form kind:number .* power, geometric, breast-can"),
        ({"problems": ("power",)}, "'power' is not of the form"),
        ({"problems": ("power:-3",)}, "a positive number"),
        ({"problems": ()}, "nothing to minimise"),
        ({"num_steps": 1}, "num_steps=1 is not a count"),
        ({"dim": 1}, "dim=1 is not a count"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STUDY, **changes)
    assert recipes.make("optimistic-convex") == STUDY


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tasks.make("spectral-quadratic", decay=-1.0), "decay=-1.0 cannot be used"),
        (lambda: tasks.make("spectral-quadratic", spectrum="flat"), "'flat' is none of 'power', 'geometric'"),
        (lambda: RegularizedLogistic(torch.ones(3, 2), torch.ones(2), 0.1), r"\(3, 2\) and \(2,\); pass"),
        (lambda: RegularizedLogistic(torch.ones(3, 2), 2 * torch.ones(3), 0.1), "must be 0 or 1 each"),
        (lambda: RegularizedLogistic(torch.ones(3, 2), torch.ones(3), 0.0), "without a minimum; pass a positive"),
    ],
)
def test_bad_problems_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="'digits' takes its points from scikit-learn, which is not installed"):
        make_problem("digits:1e-3", 5, 0)
