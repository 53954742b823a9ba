"""Implicit meta-gradients against closed forms, long unrolls, and differences of converged solutions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import product

import pytest
import torch
from implicit_oracle import implicit_gradient
from oracles import difference_error, relative_error
from problems import (
    FLOAT,
    FromStart,
    LayerNormMLP,
    Logistic,
    Quadratic,
    Skewed,
    TanhMLP,
    Tied,
    generic_theta,
    imaml_loop,
    join,
    sample,
    template,
    tied_loop,
)
from torch import Tensor
from turns import by_turns

from learnedopt import (
    GMRES,
    BootstrappedTarget,
    Carry,
    ConjugateGradient,
    ConvergenceWarning,
    Execution,
    FinalLoss,
    Implicit,
    InnerLoop,
    InnerObjective,
    LinearSolver,
    Neumann,
    Penalty,
    Tape,
    TaskFamily,
    TaskLoss,
    Theta,
    TruncatedBackprop,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.inner import InnerSolver

pytestmark = pytest.mark.usefixtures("float64")

STILL = Quadratic(drift=0.0)
"""Quadratics with one batch, so that there is a solution."""


def closed_form(theta: Theta, tasks: dict[str, Tensor], damping: float = 0.0) -> Theta:
    """Return the meta-gradient of iMAML on quadratics: J = lambda P^-1 with P = H + lambda I."""
    eye = torch.eye(5, dtype=FLOAT)
    start = join({"w": theta["init/w"], "b": theta["init/b"]})
    strength = theta["strength"]
    total = {"start": torch.zeros(5, dtype=FLOAT), "strength": torch.zeros((), dtype=FLOAT)}
    for hessian, c in zip(tasks["hessian"], tasks["c"], strict=True):
        p = hessian + strength * eye
        x = torch.linalg.solve(p, c[0] + strength * start)
        v = torch.linalg.solve(p + damping * eye, hessian @ x - c[1])
        total["start"] += strength * v / len(tasks["c"])
        total["strength"] += v @ (start - x) / len(tasks["c"])
    return {
        "init/w": total["start"][:4].reshape(2, 2),
        "init/b": total["start"][4:],
        "strength": total["strength"],
    }


SOLVERS = [ConjugateGradient(5), GMRES(), Neumann(120), Neumann(120, step_size=0.3), ConjugateGradient(5, damping=0.6)]


@pytest.mark.parametrize(("solver", "chunk_size"), by_turns(product(SOLVERS), [(1,), (2,), (3,)]), ids=str)
def test_quadratics_match_the_closed_form(solver: LinearSolver, chunk_size: int) -> None:
    tasks = sample(STILL, 3)
    loop = imaml_loop(STILL, Execution(chunk_size), learn=True, lr=0.3)
    theta = generic_theta(loop)
    found = Implicit(120, solver).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    expected = closed_form(theta, tasks, damping=getattr(solver, "damping", 0.0))
    assert relative_error(found.grads, expected) < 1e-10
    assert found.info["residual"] < 1e-12 and found.info["stationarity"] < 1e-12
    assert found.carry is None


@pytest.mark.parametrize("eigenvalues", [(0.5, 0.8, 1.2, 1.7, 2.5), (0.5, 0.5, 2.0, 2.0, 2.0), (1.3,) * 5])
def test_conjugate_gradient_needs_as_many_iterations_as_there_are_distinct_eigenvalues(
    eigenvalues: tuple[float, ...],
) -> None:
    family, distinct = Quadratic(0.0, eigenvalues), len(set(eigenvalues))
    tasks = sample(family, 3)
    loop = imaml_loop(family, learn=True, lr=0.3)
    theta = generic_theta(loop)
    expected = closed_form(theta, tasks)

    def estimate(num_iterations: int):
        return Implicit(120, ConjugateGradient(num_iterations)).estimate(loop, theta, FinalLoss(), loop.start(tasks))

    enough = estimate(distinct)
    assert relative_error(enough.grads, expected) < 1e-10
    assert enough.info["iterations"] == distinct and enough.info["residual"] < 1e-13
    if distinct > 1:
        fewer = estimate(distinct - 1)
        assert relative_error(fewer.grads, expected) > 1e-4
        assert fewer.info["iterations"] == distinct - 1 and fewer.info["residual"] > 1e-4


@pytest.mark.parametrize("num_terms", [1, 3, 8])
def test_truncated_backprop_is_the_truncated_neumann_series_on_a_quadratic(num_terms: int) -> None:
    loop = imaml_loop(STILL, lr=0.2)
    theta, carry = generic_theta(loop), loop.start(sample(STILL, 3))
    path = TruncatedBackprop(30, num_terms).estimate(loop, theta, FinalLoss(), carry)
    series = Implicit(30, Neumann(num_terms)).estimate(loop, theta, FinalLoss(), carry)
    assert relative_error(series.grads, path.grads) < 1e-12
    exact = Implicit(30, ConjugateGradient(5)).estimate(loop, theta, FinalLoss(), carry)
    assert relative_error(series.grads, exact.grads) > 1e-3  # the series is cut


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_regularised_logistic_regression_matches_differences_of_converged_solutions(chunk_size: int) -> None:
    family = Logistic()
    tasks = sample(family, 3)
    loop = imaml_loop(family, Execution(chunk_size), learn=True)
    theta = generic_theta(loop)

    def value(theta: Theta) -> float:
        losses = []
        for x, y in zip(tasks["x"], tasks["y"], strict=True):
            w = newton(x[0], y[0], theta["init/w"], theta["strength"])
            losses.append(family.loss({"w": w}, {"x": x[1], "y": y[1]}))
        return float(torch.stack(losses).mean())

    found = Implicit(200, ConjugateGradient(3)).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    assert abs(float(found.loss) - value(theta)) < 1e-12
    assert difference_error(value, theta, found.grads) < 1e-6


def newton(x: Tensor, y: Tensor, start: Tensor, strength: Tensor) -> Tensor:
    """Solve one regularised logistic regression to round-off."""
    w = start
    for _ in range(30):
        p = (x @ w).sigmoid()
        gradient = x.mT @ (p - y) / len(y) + strength * (w - start)
        hessian = x.mT @ torch.diag(p * (1 - p)) @ x / len(y) + strength * torch.eye(len(w), dtype=FLOAT)
        w = w - torch.linalg.solve(hessian, gradient)
    return w


def newton_in_numpy(loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> Carry:
    """Solve outside torch: nothing here could be differentiated."""
    found = []
    for x, y in zip(carry.tasks["x"], carry.tasks["y"], strict=True):
        matrix, labels, start = x[0].numpy(), y[0].numpy(), theta["init/w"].numpy()
        strength, w = float(theta["strength"]), theta["init/w"].numpy()
        for _ in range(num_steps):
            p = 1 / (1 + 2.718281828459045 ** -(matrix @ w))
            gradient = matrix.T @ (p - labels) / len(labels) + strength * (w - start)
            hessian = (matrix.T * (p * (1 - p))) @ matrix / len(labels)
            hessian[range(3), range(3)] += strength
            w = w - torch.linalg.solve(torch.from_numpy(hessian), torch.from_numpy(gradient)).numpy()
        found.append(torch.from_numpy(w))
    return carry._replace(params={"w": torch.stack(found)}, step=carry.step + num_steps)


def lbfgs(loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> Carry:
    """Solve with a quasi-Newton method and its line search, all tasks at once."""
    params = {k: p.clone().requires_grad_() for k, p in carry.params.items()}
    solver = torch.optim.LBFGS(
        params.values(),
        max_iter=num_steps,
        tolerance_grad=1e-14,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        each = [{k: p[i] for k, p in params.items()} for i in range(len(carry.tasks["y"]))]
        total = loop.losses(theta, carry._replace(params=params), "train").sum()
        total = total + torch.stack([loop.inner_objective.penalty.value(theta, x) for x in each]).sum()
        total.backward()
        return total

    solver.step(closure)
    return carry._replace(params=params)


@pytest.mark.parametrize("inner", [newton_in_numpy, lbfgs])
@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_any_inner_solver_will_do(inner: InnerSolver, chunk_size: int) -> None:
    family = Logistic()
    loop = imaml_loop(family, Execution(chunk_size), learn=True, lr=0.3)
    theta, carry = generic_theta(loop), loop.start(sample(family, 3))
    own = Implicit(200, ConjugateGradient(3)).estimate(loop, theta, FinalLoss(), carry)
    other = Implicit(60, ConjugateGradient(3), inner=inner).estimate(loop, theta, FinalLoss(), carry)
    assert relative_error(other.grads, own.grads) < 1e-7
    assert other.info["losses"].shape == (2,)


class DecoupledMomentum(UpdateRule):
    """Momentum with decoupled decay: its fixed points, and not only its speed, depend on the momentum."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"momentum": torch.tensor(0.6, dtype=FLOAT), "decay": torch.tensor(0.4, dtype=FLOAT)}

    def init(self, theta, params):
        return params, {"buffer": {k: torch.zeros_like(p) for k, p in params.items()}}

    def update(self, theta, grads, state, params, loss):
        buffer = {k: theta["momentum"] * state["buffer"][k] + g for k, g in grads.items()}
        return {k: -0.1 * (buffer[k] + theta["decay"] * p) for k, p in params.items()}, {"buffer": buffer}


def momentum_with_decay(**options: float) -> UpdateRule:
    return optimizers.make("momentum", lr=0.1, momentum=0.7, weight_decay=0.3, learn=("weight_decay",), **options)


MAPS = {
    "skewed": lambda family: Skewed(),
    "momentum with weight decay": lambda family: momentum_with_decay(),
    "dampened momentum with weight decay": lambda family: momentum_with_decay(dampening=0.2),
    "momentum with decoupled decay": lambda family: DecoupledMomentum(),
    "tied": lambda family: FromStart(template(family), lr=0.2),
    "clipped": lambda family: optimizers.make(
        "clip", rule=optimizers.make("sgd", lr=0.2, weight_decay=0.3, learn=("weight_decay",)), max_norm=50.0
    ),
    "partition": lambda family: optimizers.make(
        "partition", groups={"w": ("w", momentum_with_decay()), "b": ("b", DecoupledMomentum())}
    ),
}


@pytest.mark.parametrize(("name", "chunk_size"), by_turns(product(MAPS), [(1,), (2,)]))
def test_fixed_points_match_a_long_unroll(name: str, chunk_size: int) -> None:
    objective = Tied() if name == "tied" else TaskLoss()
    loop = InnerLoop(STILL, MAPS[name](STILL), Execution(chunk_size), objective)
    theta, carry = generic_theta(loop), loop.start(sample(STILL, 2))
    path = Unrolled(200).estimate(loop, theta, FinalLoss(), carry)
    for solver in (GMRES(), Neumann(200)):
        found = Implicit(200, solver).estimate(loop, theta, FinalLoss(), carry)
        assert relative_error(found.grads, path.grads) < 1e-9
        assert found.info["residual"] < 1e-11 and found.info["stationarity"] < 1e-11


class PullOfB(Penalty):
    """``|b - start of b|^2 / 2``: a penalty without a gradient in closed form, on one parameter of two."""

    def value(self, theta: Theta, params) -> Tensor:
        return 0.5 * (params["b"] - theta["b/init/b"]).square().sum()


class PullsB(InnerObjective):
    penalty = PullOfB()


def test_a_pull_outside_the_inner_objective_is_a_fixed_point_of_the_step_map() -> None:
    """Weight decay in the update alone solves another problem than the inner objective's optimality condition."""
    decayed = optimizers.make("sgd", lr=0.2, weight_decay=0.5, learn=())
    started = optimizers.make("maml", template={"b": template(STILL)["b"]}, lr=0.2)
    groups = {"w": ("w", decayed), "b": ("b", started)}
    loop = InnerLoop(STILL, optimizers.make("partition", groups=groups), inner_objective=PullsB())
    theta, carry = generic_theta(loop), loop.start(sample(STILL, 2))
    path = Unrolled(200).estimate(loop, theta, FinalLoss(), carry)
    for solver in (ConjugateGradient(5), GMRES(), Neumann(200)):
        found = Implicit(200, solver).estimate(loop, theta, FinalLoss(), carry)
        assert relative_error(found.grads, path.grads) < 1e-9


def test_a_point_that_does_not_solve_the_optimality_condition_is_a_warning() -> None:
    """Such as one that an inner solver finds of another problem."""
    loop = tied_loop(STILL)

    def halfway(loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> Carry:
        return loop.run({**theta, "strength": 2 * theta["strength"]}, carry, num_steps, Tape.NONE).end

    theta, carry = generic_theta(loop), loop.start(sample(STILL, 2))
    with pytest.warns(ConvergenceWarning, match="not converged"):
        Implicit(200, ConjugateGradient(5), inner=halfway).estimate(loop, theta, FinalLoss(), carry)


def test_the_bootstrapped_target_is_an_objective_of_the_end() -> None:
    loop = imaml_loop(STILL, learn=True, lr=0.3)
    theta, carry = generic_theta(loop), loop.start(sample(STILL, 3))
    objective = BootstrappedTarget(1, 0.25)
    found = Implicit(200, ConjugateGradient(5)).estimate(loop, theta, objective, carry)
    plain = Implicit(200, ConjugateGradient(5)).estimate(loop, theta, FinalLoss(), carry)
    assert relative_error(found.grads, {k: 0.25 * g for k, g in plain.grads.items()}) < 1e-12


def test_what_an_objective_takes_from_theta_directly_is_added() -> None:
    loop = imaml_loop(STILL, learn=True, lr=0.3)
    theta, carry = generic_theta(loop), loop.start(sample(STILL, 3))

    def penalised(loop: InnerLoop, theta: Theta, rollout) -> Tensor:
        return loop.losses(theta, rollout.end, "valid").mean() + theta["strength"] ** 2

    plain = Implicit(200).estimate(loop, theta, FinalLoss(), carry)
    found = Implicit(200).estimate(loop, theta, penalised, carry)
    expected = {**plain.grads, "strength": plain.grads["strength"] + 2 * theta["strength"]}
    assert relative_error(found.grads, expected) < 1e-12


def hessian_products(family: TaskFamily, kind: str) -> tuple[Tensor, Tensor]:
    """Return a Hessian-vector product through the family's loss by ``kind``, and by differences of gradients."""
    tasks = sample(family, 1)
    params = {k: p[0] for k, p in family.init_params(tasks).items()}
    batch = {k: v[0] for k, v in family.batch(tasks, 0, "train").items()}
    direction = {k: torch.cos(torch.arange(p.numel(), dtype=FLOAT)).reshape(p.shape) for k, p in params.items()}
    gradient = torch.func.grad(lambda p: family.loss(p, batch))

    def flat(tree: dict[str, Tensor]) -> Tensor:
        return torch.cat([x.reshape(-1) for x in tree.values()])

    def moved(h: float) -> Tensor:
        return flat(gradient({k: p + h * direction[k] for k, p in params.items()}))

    slopes = [(moved(h) - moved(-h)) / (2 * h) for h in (1e-3, 5e-4)]
    if kind == "forward over reverse":
        product = torch.func.jvp(gradient, (params,), (direction,))[1]
    else:
        product = torch.func.vjp(gradient, params)[1](direction)[0]
    return flat(product), (4 * slopes[1] - slopes[0]) / 3


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
@pytest.mark.parametrize("kind", ["forward over reverse", "reverse over reverse"])
def test_second_derivatives_of_layer_normalisation_are_right_in_the_modes_that_may_be_used(kind: str) -> None:
    product, expected = hessian_products(LayerNormMLP(), kind)
    assert (product - expected).norm() / expected.norm() < 1e-9


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_network_with_layer_normalisation_matches_the_dense_solve_and_a_long_unroll(chunk_size: int) -> None:
    family = LayerNormMLP()
    loop = tied_loop(family, Execution(chunk_size), lr=0.15)
    theta, tasks = generic_theta(loop), sample(family)
    path = Unrolled(150).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    expected = implicit_gradient(loop, theta, FinalLoss(), tasks, 150, step_map=False)
    for solver in (ConjugateGradient(20), GMRES(), Neumann(200)):
        found = Implicit(150, solver).estimate(loop, theta, FinalLoss(), loop.start(tasks))
        assert relative_error(found.grads, expected) < 1e-10
        assert relative_error(found.grads, path.grads) < 1e-8


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_mini_batches_differentiate_the_last_one_met(chunk_size: int) -> None:
    family = TanhMLP()
    loop = tied_loop(family, Execution(chunk_size))
    theta, tasks = generic_theta(loop), sample(family)
    for solver, step_map in ((ConjugateGradient(60), False), (GMRES(), False), (Neumann(250), True)):
        with pytest.warns(ConvergenceWarning):  # each batch has a solution of its own
            found = Implicit(20, solver).estimate(loop, theta, FinalLoss(), loop.start(tasks))
        expected = implicit_gradient(loop, theta, FinalLoss(), tasks, 20, step_map=step_map)
        assert relative_error(found.grads, expected) < 1e-10


def test_an_unsolved_inner_problem_is_a_warning_with_the_residual() -> None:
    loop = imaml_loop(STILL, lr=0.05)
    theta, carry = generic_theta(loop), loop.start(sample(STILL))
    with pytest.warns(ConvergenceWarning, match=r"not converged after 3 steps: stationarity \d.*residual \d") as seen:
        found = Implicit(3, ConjugateGradient(2)).estimate(loop, theta, FinalLoss(), carry)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert f"{found.info['residual']:.1e}" in str(seen[0].message)
    assert found.info["stationarity"] > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Implicit(3, ConjugateGradient(2), tolerance=1.0).estimate(loop, theta, FinalLoss(), carry)


@pytest.mark.parametrize("solver", [ConjugateGradient(5), Neumann(5), Neumann(5, step_size=0.1), GMRES()], ids=str)
def test_a_diverged_inner_problem_is_a_warning_and_no_zero(solver: LinearSolver) -> None:
    loop = imaml_loop(STILL, lr=50.0)
    theta, carry = generic_theta(loop), loop.start(sample(STILL))
    with pytest.warns(ConvergenceWarning, match="stationarity nan"):
        found = Implicit(400, solver).estimate(loop, theta, FinalLoss(), carry)
    assert not any(g.isfinite().any() for g in found.grads.values())
    assert not found.info["residual"] <= 1


@pytest.mark.parametrize("num_steps", [80, 400])
@pytest.mark.parametrize(
    "make",
    [
        lambda: optimizers.make("sgd", lr=0.3, weight_decay=0.5),
        lambda: optimizers.make("sgd", lr=0.3, weight_decay=1e-6),
        lambda: optimizers.make("momentum", lr=0.1, momentum=0.5, weight_decay=0.3, learn=("lr", "weight_decay")),
    ],
)
def test_a_rate_with_weight_decay_is_refused_at_the_solution(make: Callable[[], UpdateRule], num_steps: int) -> None:
    loop = InnerLoop(STILL, make())
    theta = {k: v.to(FLOAT) for k, v in loop.rule.init_theta(torch.Generator()).items()}
    with pytest.raises(ValueError, match=r"\['lr'\] do not move the solution.*vanishes with the step"):
        Implicit(num_steps, GMRES()).estimate(loop, theta, FinalLoss(), loop.start(sample(STILL)))


def test_nothing_is_refused_for_a_problem_that_has_not_been_solved() -> None:
    """Far from the solution every effect is of the order of a step: that is a warning, and no reason to stop."""
    loop = InnerLoop(STILL, optimizers.make("sgd", lr=0.3, weight_decay=0.5))
    theta, carry = generic_theta(loop), loop.start(sample(STILL))
    with pytest.warns(ConvergenceWarning, match="not converged after 6 steps"):
        Implicit(6, GMRES()).estimate(loop, theta, FinalLoss(), carry)


def test_a_momentum_is_refused_at_the_solution_only_where_it_does_not_move_it() -> None:
    coupled = optimizers.make("momentum", lr=0.1, momentum=0.5, weight_decay=0.3, learn=("momentum", "weight_decay"))
    for rule, refused in ((coupled, True), (DecoupledMomentum(), False)):
        loop = InnerLoop(STILL, rule)
        theta, carry = generic_theta(rule), loop.start(sample(STILL))
        if refused:
            with pytest.raises(ValueError, match=r"\['momentum'\] do not move the solution"):
                Implicit(200, GMRES()).estimate(loop, theta, FinalLoss(), carry)
        else:
            Implicit(200, GMRES()).estimate(loop, theta, FinalLoss(), carry)


def test_a_small_weight_decay_is_not_taken_for_noise() -> None:
    rule = optimizers.make("sgd", lr=0.3, weight_decay=1e-5, learn=("weight_decay",))
    loop = InnerLoop(STILL, rule)
    theta, carry = {"weight_decay": torch.tensor(1e-5, dtype=FLOAT)}, loop.start(sample(STILL))
    path = Unrolled(300).estimate(loop, theta, FinalLoss(), carry)
    for num_steps, tolerance in ((45, 1e-1), (300, 1e-10)):
        found = Implicit(num_steps, GMRES()).estimate(loop, theta, FinalLoss(), carry)
        assert relative_error(found.grads, path.grads) < tolerance
