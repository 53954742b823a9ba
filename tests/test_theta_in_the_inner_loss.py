"""Theta in what the inner steps descend, on least squares with a closed form and on a network; and in the outer loss.

Oracles: the normal equations, differentiated; plain loops; differences; dense matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from implicit_oracle import implicit_gradient
from oracles import Reference, data, difference_error, gradient_of, relative_error
from problems import FLOAT, TanhMLP, generic_theta, one_by_one, sample, template
from torch import Tensor
from turns import by_turns

from learnedopt import (
    GMRES,
    L2,
    ConjugateGradient,
    Execution,
    FinalLoss,
    FirstOrder,
    GradientEstimator,
    HessianFree,
    Implicit,
    InnerLoop,
    InnerObjective,
    LinearSolver,
    MetaObjective,
    Neumann,
    SumOfLosses,
    Tape,
    TaskFamily,
    Tasks,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    UpdateRule,
    WeightedExamples,
    optimizers,
)
from learnedopt.core.tree import Params

pytestmark = pytest.mark.usefixtures("float64")

NUM_POINTS = 7


class LeastSquares(TaskFamily):
    """``|X w - y|^2 / (2 n)`` on 7 points with 3 features; the batches are the same at every step."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        shapes = {"x": (2, NUM_POINTS, 3), "y": (2, NUM_POINTS), "start": (3,)}
        return {k: torch.randn(num_tasks, *s, generator=generator, dtype=FLOAT) for k, s in shapes.items()}

    def init_params(self, tasks: Tasks) -> Params:
        return {"w": tasks["start"]}

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        which, order = int(split == "valid"), torch.tensor([3, 0, 6, 1, 4, 2, 5])
        return {
            "x": tasks["x"][:, which], "targets": tasks["y"][:, which], "index": order.expand(len(tasks["y"]), -1),
        }  # fmt: skip

    def outputs(self, params: Params, batch: Any) -> Tensor:
        return batch["x"] @ params["w"]

    def loss(self, params: Params, batch: Any) -> Tensor:
        return 0.5 * (self.outputs(params, batch) - batch["targets"]).square().mean()


class Tilted(InnerObjective):
    """``loss + tilt . w``: a linear correction of the loss."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"tilt": torch.tensor([0.3, -0.2, 0.1], dtype=FLOAT)}

    def loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Tensor:
        return family.loss(params, batch) + theta["tilt"] @ params["w"]


def price(theta: Theta, params: Params) -> Tensor:
    """Return what ``Priced`` and ``PricedPenalty`` add to the outer loss."""
    own = torch.cat([theta[k].reshape(-1) for k in sorted(theta) if k != "unused"])
    size = torch.stack([p.square().sum() for p in params.values()]).sum()
    return 0.3 * own.sin().sum() * (1 + 0.5 * size)


class Priced(InnerObjective):
    """Another inner objective whose theta enters the outer loss too, on its own and with the parameters."""

    def __init__(self, inner: InnerObjective) -> None:
        self.inner = inner

    def init_theta(self, generator: torch.Generator) -> Theta:
        return self.inner.init_theta(generator)

    def loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Tensor:
        return self.inner.loss(theta, family, params, batch)

    def outer_loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Tensor:
        return family.loss(params, batch) + price(theta, params)


class PricedPenalty(InnerObjective):
    """The same of a penalty, whose closed form stays."""

    def __init__(self, inner: InnerObjective) -> None:
        self.inner, self.penalty = inner, inner.penalty

    def init_theta(self, generator: torch.Generator) -> Theta:
        return self.inner.init_theta(generator)

    def outer_loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Tensor:
        return family.loss(params, batch) + price(theta, params)


RIDGE = L2({"w": torch.zeros(3, dtype=FLOAT)}, 0.4, per="coordinate")
WEIGHTED = WeightedExamples(NUM_POINTS, "squared")
OBJECTIVES: dict[str, InnerObjective] = {
    "ridge": RIDGE,
    "ridge, priced": Priced(RIDGE),
    "ridge, a priced penalty": PricedPenalty(RIDGE),
    "weights": WEIGHTED,
    "weights, priced": Priced(WEIGHTED),
    "tilt": Tilted(),
    "tilt, priced": Priced(Tilted()),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def posed(name: str, chunk_size: int = 1, rule: UpdateRule | None = None) -> tuple[InnerLoop, Theta, Tasks]:
    """Return a loop on an inner objective, a theta that is not where it starts, and three tasks."""
    rule = rule or optimizers.make("sgd", lr=0.4, learn=())
    loop = InnerLoop(LeastSquares(), rule, Execution(chunk_size), OBJECTIVES[name])
    theta = generic_theta(loop)
    ramp = {k: v + torch.linspace(-0.5, 0.6, v.numel()).reshape(v.shape) for k, v in theta.items()}
    return loop, ramp, sample(loop.family, 3)


def normal_equations(name: str, theta: Theta, batch: Any) -> Tensor:
    """Return the minimum of the inner objective of one task."""
    x, y = batch["x"], batch["targets"]
    weights = theta["example_weights"].sigmoid()[batch["index"]] if "weights" in name else torch.ones_like(y)
    matrix, right = x.mT @ (weights[:, None] * x) / len(y), x.mT @ (weights * y) / len(y)
    if "ridge" in name:
        matrix = matrix + torch.diag(theta["log_l2/w"].exp())
    if "tilt" in name:
        right = right - theta["tilt"]
    return torch.linalg.solve(matrix, right)


def closed_form(name: str, loop: InnerLoop, theta: Theta, tasks: Tasks) -> tuple[Tensor, Theta]:
    """Return the final loss at the solutions, and its derivative through the normal equations."""

    def value(theta: Theta) -> Tensor:
        values = []
        for task in one_by_one(tasks):
            params = {"w": normal_equations(name, theta, data(loop.family, task, 0, "train"))}
            values.append(loop.family.loss(params, data(loop.family, task, 0, "valid")))
            if "priced" in name:
                values[-1] = values[-1] + price(theta, params)
        return torch.stack(values).mean()

    return value(theta), gradient_of(value, theta)


@every_objective
@pytest.mark.parametrize("chunk_size", [1, 2, 3])
@pytest.mark.parametrize("objective", [FinalLoss(), SumOfLosses()], ids=lambda x: type(x).__name__)
def test_exact_estimators_agree_with_each_other_a_plain_loop_and_differences(
    name: str, chunk_size: int, objective: MetaObjective
) -> None:
    loop, theta, tasks = posed(name, chunk_size)
    reference = Reference(loop, theta, objective, tasks, 6)
    plain = reference.gradient()
    exact = (
        Unrolled(6), Unrolled(6, segment=1), Unrolled(6, segment=4, offload=True), Truncated(6, 6, Tape.FULL),
        TruncatedBackprop(6, 6),
    )  # fmt: skip
    for estimator in exact:
        found = estimator.estimate(loop, theta, objective, loop.start(tasks))
        assert abs(float(found.loss) - float(reference.value(theta).detach())) < 1e-12
        assert relative_error(found.grads, plain) < 1e-12
    assert reference.difference_error(plain) < 1e-7


@every_objective
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_windows_and_the_last_steps_are_loops_cut_by_hand(name: str, chunk_size: int) -> None:
    loop, theta, tasks = posed(name, chunk_size)
    carry = loop.start(tasks)
    for window in range(3):
        found = Truncated(2, 6, Tape.FULL).estimate(loop, theta, SumOfLosses(), carry)
        expected = Reference(loop, theta, SumOfLosses(), tasks, 2, skip=2 * window).gradient()
        assert relative_error(found.grads, expected) < 1e-12
        carry = found.carry
    for objective in (FinalLoss(), SumOfLosses()):
        found = TruncatedBackprop(6, 2).estimate(loop, theta, objective, loop.start(tasks))
        expected = Reference(loop, theta, objective, tasks, 2, skip=4, whole=True).gradient()
        assert relative_error(found.grads, expected) < 1e-12


SOLVERS: list[LinearSolver] = [ConjugateGradient(3), GMRES(), Neumann(600), Neumann(600, step_size=0.4)]


@pytest.mark.parametrize(
    ("solver", "name", "chunk_size"),
    by_turns(product(SOLVERS, OBJECTIVES), [(1,), (2,), (3,)]),
    ids=lambda x: str(x)[:24],
)
def test_at_the_solution_the_implicit_gradient_is_the_closed_form(
    name: str, chunk_size: int, solver: LinearSolver
) -> None:
    loop, theta, tasks = posed(name, chunk_size)
    value, expected = closed_form(name, loop, theta, tasks)
    estimator = Implicit(3, solver, inner=HessianFree(6))
    found = estimator.estimate(loop, theta, FinalLoss(), loop.start(tasks))
    assert abs(float(found.loss - value)) < 1e-12
    assert relative_error(found.grads, expected) < 1e-8
    assert found.info["stationarity"] < 1e-10 and found.info["residual"] < 1e-8


@every_objective
def test_a_long_unroll_and_the_rules_own_solution_have_the_closed_form_too(name: str) -> None:
    loop, theta, tasks = posed(name, 3, optimizers.make("sgd", lr=0.6, learn=()))
    _, expected = closed_form(name, loop, theta, tasks)
    estimators: tuple[GradientEstimator, ...] = (
        Unrolled(400, segment=20), TruncatedBackprop(500, 400), Implicit(400, ConjugateGradient(3)),
    )  # fmt: skip
    for estimator in estimators:
        found = estimator.estimate(loop, theta, FinalLoss(), loop.start(tasks))
        assert relative_error(found.grads, expected) < 1e-8


@pytest.mark.parametrize("name", ["ridge", "weights", "tilt"])
@pytest.mark.parametrize("estimator", [FirstOrder(6), Truncated(2, 6)], ids=str)
def test_a_first_order_tape_has_no_path_for_what_enters_the_inner_loss_alone(
    name: str, estimator: GradientEstimator
) -> None:
    loop, theta, tasks = posed(name)
    with pytest.raises(ValueError, match=r"no path to the objective through \d recorded inner steps with the first-o"):
        estimator.estimate(loop, theta, FinalLoss(), loop.start(tasks))


@pytest.mark.parametrize("name", ["ridge, priced", "ridge, a priced penalty", "weights, priced", "tilt, priced"])
@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("objective", [FinalLoss(), SumOfLosses()], ids=lambda x: type(x).__name__)
def test_what_enters_the_outer_loss_too_is_right_by_the_tapes_definition(
    name: str, chunk_size: int, objective: MetaObjective
) -> None:
    """With a rule that has a path of its own: the recorded gradients are held, and theta moves the rest."""
    loop, theta, tasks = posed(name, chunk_size, optimizers.make("momentum", lr=0.2, momentum=0.5))
    found = FirstOrder(6).estimate(loop, theta, objective, loop.start(tasks))
    reference = Reference(loop, theta, objective, tasks, 6, full=False)
    assert relative_error(found.grads, reference.gradient()) < 1e-12
    assert reference.difference_error(found.grads) < 1e-7
    segments = Unrolled(6, Tape.FIRST_ORDER, segment=4).estimate(loop, theta, objective, loop.start(tasks))
    assert relative_error(segments.grads, found.grads) < 1e-12


class StillMLP(TanhMLP):
    """A tanh network with one batch, so that there is a solution."""

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        return super().batch(tasks, 0, split)


ON_NETWORKS: dict[str, Callable[[InnerObjective], InnerObjective]] = {
    "inside": lambda inner: inner, "priced": Priced, "a priced penalty": PricedPenalty,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "chunk_size"), by_turns(product(ON_NETWORKS), [(1,), (2,)]))
def test_a_network_with_an_l2_per_coordinate(kind: str, chunk_size: int) -> None:
    family = StillMLP()
    objective = ON_NETWORKS[kind](L2(template(family), 0.3, per="coordinate"))
    rule = optimizers.make("sgd", lr=0.5, learn=())
    loop, tasks = InnerLoop(family, rule, Execution(chunk_size), objective), sample(family)
    theta = generic_theta(loop)
    reference = Reference(loop, theta, FinalLoss(), tasks, 5)
    for estimator in (Unrolled(5), Unrolled(5, segment=2), Truncated(5, 5, Tape.FULL), TruncatedBackprop(5, 5)):
        found = estimator.estimate(loop, theta, FinalLoss(), loop.start(tasks))
        assert relative_error(found.grads, reference.gradient()) < 1e-12
    assert reference.difference_error(reference.gradient()) < 1e-7
    solve = HessianFree(30)
    implicit = Implicit(12, ConjugateGradient(60), inner=solve)
    found = implicit.estimate(loop, theta, FinalLoss(), loop.start(tasks))
    expected = implicit_gradient(loop, theta, FinalLoss(), tasks, 600, step_map=False)
    assert relative_error(found.grads, expected) < 1e-8

    def solved(theta: Theta) -> float:
        return float(loop.losses(theta, solve(loop, theta, loop.start(tasks), 12), "valid").mean())

    assert difference_error(solved, theta, found.grads) < 1e-7
