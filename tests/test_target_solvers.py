"""The solver of the sum of losses, and tasks that have no minimiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import FLOAT, Logistic, Quadratic, TanhMLP, generic_theta, sample
from torch import Tensor

from learnedopt import (
    BestInHindsight,
    Carry,
    Execution,
    InnerLoop,
    InnerObjective,
    RegularizedSolution,
    SumOfLossesSolver,
    TargetMatching,
    TaskFamily,
    Tasks,
    Theta,
    Unrolled,
    optimizers,
)
from learnedopt.core.tree import Params

pytestmark = pytest.mark.usefixtures("float64")

SOLVER = SumOfLossesSolver()


class Line(TaskFamily):
    """A function of two numbers, named by the tests; ``tasks["shift"]`` moves its argument."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        return {"shift": torch.randn(num_tasks, 2, generator=generator, dtype=FLOAT)}

    def init_params(self, tasks: Tasks) -> Params:
        return {"x": torch.full_like(tasks["shift"], 0.4)}

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        return tasks

    def loss(self, params: Params, batch: Any) -> Tensor:
        return self.function(params["x"] - batch["shift"])


class Penalised(InnerObjective):
    """A ridge in what is read outside."""

    def outer_loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Tensor:
        return family.loss(params, batch) + 0.05 * sum(p.square().sum() for p in params.values())


def begun(family: TaskFamily, seed: int = 5, num_tasks: int = 4, **options: Any) -> tuple[InnerLoop, Theta, Carry]:
    loop = InnerLoop(family, optimizers.make("sgd"), **options)
    theta = generic_theta(loop)
    return loop, theta, loop.begin(theta, loop.start(sample(family, num_tasks, seed)))


def total(loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> Tensor:
    """Return each task's sum of train losses (num_tasks,) at the carry."""
    return torch.stack(
        [loop.losses(theta, carry._replace(step=carry.step + i), "train") for i in range(num_steps)]
    ).sum(0)


# The solver


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_the_solution_is_stationary_and_the_least(chunk_size: int) -> None:
    loop, theta, carry = begun(Logistic(), execution=Execution(chunk_size), inner_objective=Penalised())
    found = SOLVER(loop, theta, carry, 3)
    params = {k: p.clone().requires_grad_() for k, p in found.params.items()}
    value = total(loop, theta, found._replace(params=params), 3)
    slopes = torch.autograd.grad(value.sum(), list(params.values()))
    assert max(float(g.abs().max()) for g in slopes) < 1e-12
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        other = {k: p + 0.01 * torch.randn(p.shape, generator=generator, dtype=FLOAT) for k, p in params.items()}
        assert (total(loop, theta, found._replace(params=other), 3) > value).all()
    assert found.step == carry.step and found.state == carry.state


def test_it_does_not_depend_on_where_it_starts_nor_on_the_other_tasks() -> None:
    loop, theta, carry = begun(Logistic(), inner_objective=Penalised())
    found = SOLVER(loop, theta, carry, 2).params["w"]
    far = carry._replace(params={"w": carry.params["w"] + 4.0})
    torch.testing.assert_close(SOLVER(loop, theta, far, 2).params["w"], found, rtol=1e-12, atol=1e-13)
    one = Carry({k: v[2:3] for k, v in carry.tasks.items()}, {"w": carry.params["w"][2:3]}, carry.state, carry.step)
    torch.testing.assert_close(SOLVER(loop, theta, one, 2).params["w"], found[2:3], rtol=1e-13, atol=1e-14)


def test_a_network_drawn_to_its_start_has_a_solution_of_second_order() -> None:
    loop, theta, carry = begun(TanhMLP())
    found = SOLVER(loop, theta, carry, 3, strength=0.5, center=carry.params)
    params = {k: p.clone().requires_grad_() for k, p in found.params.items()}
    gaps = [(p - carry.params[k]).square().flatten(1).sum(1) for k, p in params.items()]
    value = total(loop, theta, found._replace(params=params), 3) + 0.25 * torch.stack(gaps).sum(0)
    slopes = torch.autograd.grad(value.sum(), list(params.values()))
    assert max(float(g.abs().max()) for g in slopes) < 1e-12


def test_of_many_minimisers_it_takes_the_one_straight_ahead() -> None:
    loop, theta, carry = begun(Line(lambda x: (x[0] + 2 * x[1] - 3).square()))
    found, start = SOLVER(loop, theta, carry, 2).params["x"], carry.params["x"]
    way = torch.tensor([1.0, 2.0])
    gap = 3 - (start - carry.tasks["shift"]) @ way
    torch.testing.assert_close(found, start + gap[:, None] * way / 5, rtol=1e-13, atol=1e-13)


def test_a_minimum_without_curvature_is_found_though_slowly() -> None:
    loop, theta, carry = begun(Line(lambda x: x.pow(4).sum()))
    found = SOLVER(loop, theta, carry, 1).params["x"]
    torch.testing.assert_close(found, carry.tasks["shift"], rtol=0, atol=1e-6)


def test_a_bowl_that_flattens_is_solved_from_where_its_curvature_is_negative() -> None:
    loop, theta, carry = begun(Line(lambda x: (1 + x.square().sum()).log()))
    far = carry._replace(params={"x": carry.tasks["shift"] + torch.tensor([3.0, -2.0])})
    found = SOLVER(loop, theta, far, 1).params["x"]
    torch.testing.assert_close(found, carry.tasks["shift"], rtol=0, atol=1e-12)


def test_float32_is_solved_to_its_own_precision() -> None:
    family = Quadratic()
    loop = InnerLoop(family, optimizers.make("sgd"), Execution(dtype=torch.float32))
    theta = {k: v.float() for k, v in generic_theta(loop).items()}
    carry = loop.begin(theta, loop.start(sample(family, 3)))
    found = SOLVER(loop, theta, carry, 2)
    assert {p.dtype for p in found.params.values()} == {torch.float32}
    exact = SOLVER(*begun(family, num_tasks=3), 2)
    for k, p in exact.params.items():
        torch.testing.assert_close(found.params[k].double(), p, rtol=0, atol=2e-5)


# Tasks without a minimiser


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x: (-x).exp().sum(), "x runs away to where nothing curves"),
        (lambda x: torch.nn.functional.softplus(-x).sum(), "x runs away"),
        (lambda x: x.sum(), "falling along a direction without curvature"),
        (lambda x: x[0].square() + x[1], "falling along a direction without curvature"),
    ],
    ids=["exponential", "separable", "slope", "slope beside a bowl"],
)
def test_what_has_no_minimiser_in_reach_is_refused(function: Any, told: str) -> None:
    family = Line(function)
    loop, theta, carry = begun(family)
    with pytest.raises(ValueError, match=rf"no minimiser that can be found in the tasks \[\d.*{told}.*Add a penalty"):
        SOLVER(loop, theta, carry, 2)


def test_separable_classes_are_named_and_a_penalty_mends_them() -> None:
    loop, theta, carry = begun(Logistic(), seed=0)  # of these four, task 2 can be separated
    with pytest.raises(ValueError, match=r"in the tasks \[2\] of these 4: x runs away"):
        BestInHindsight(SOLVER, 3).find(loop, theta, carry)
    found = RegularizedSolution(SOLVER, 3, 0.1).find(loop, theta, carry).target
    assert found.params["w"].isfinite().all() and (found.params["w"].norm(dim=1) < 10).all()


def test_a_saddle_is_no_solution() -> None:
    # x^2 - y^2 + y^4 is stationary at y = 0, where it starts
    loop, theta, carry = begun(Line(lambda x: x[0].square() - x[1].square() + x[1].pow(4)))
    start = carry._replace(params={"x": carry.tasks["shift"] + torch.tensor([0.3, 0.0])})
    with pytest.raises(ValueError, match="came to rest at a saddle"):
        SOLVER(loop, theta, start, 1)


def test_no_minimiser_is_found_out_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, theta, carry = begun(Line(lambda x: (-x).exp().sum()))
    monkeypatch.setattr(InnerLoop, "run", lambda *args, **kwargs: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match="x runs away"):
        Unrolled(3).estimate(loop, theta, TargetMatching(BestInHindsight(SOLVER, 2)), carry)


def test_a_task_too_large_for_its_hessian_says_so() -> None:
    class Wide(Line):
        def init_params(self, tasks: Tasks) -> Params:
            return {"x": torch.zeros(len(tasks["shift"]), 5000)}

        def loss(self, params: Params, batch: Any) -> Tensor:
            return params["x"].square().sum()

    loop, theta, carry = begun(Wide(None), num_tasks=1)
    with pytest.raises(ValueError, match="have 5000 parameters, more than 4096"):
        SOLVER(loop, theta, carry, 1)


def test_batches_of_different_shapes_say_so() -> None:
    class Ragged(Line):
        def batch(self, tasks: Tasks, step: int, split: str) -> Any:
            return {**tasks, "more": torch.zeros(len(tasks["shift"]), step + 1)}

    with pytest.raises(ValueError, match="the batches of 2 steps differ in shape"):
        SOLVER(*begun(Ragged(lambda x: x.square().sum())), 2)
