"""The Hessian-free inner solver against closed forms, its own single tasks, and implicit gradients of what it finds."""

from __future__ import annotations

import pytest
import torch
from oracles import relative_error
from problems import Quadratic, TanhMLP, generic_theta, sample, template
from torch import Tensor

from learnedopt import (
    ConjugateGradient,
    Execution,
    FinalLoss,
    HessianFree,
    Implicit,
    InnerLoop,
    Neumann,
    Tape,
    TaskFamily,
    Theta,
    Unrolled,
    optimizers,
    tasks,
)

pytestmark = pytest.mark.usefixtures("float64")


def posed(
    family: TaskFamily, chunk_size: int = 2, num_tasks: int = 3, strength: float = 0.3
) -> tuple[InnerLoop, Theta]:
    rule = optimizers.make("imaml", template=template(family), lr=0.1, strength=strength)
    return InnerLoop(family, rule, Execution(chunk_size)), generic_theta(rule)


def value(loop: InnerLoop, theta: Theta, carry: object, at: object) -> Tensor:
    """Return each task's loss plus regularizer at the parameters of ``at``, on the batch of ``carry``."""
    here = carry._replace(params=at.params, state=at.state)
    return loop.losses(here, "train") + torch.func.vmap(lambda p: loop.rule.regularizer(theta, p))(at.params)


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_one_newton_step_solves_a_quadratic(chunk_size: int) -> None:
    family = tasks.make("linear-regression", dim=4, num_train=6)
    loop, theta = posed(family, chunk_size)
    drawn = family.sample(3, torch.Generator().manual_seed(1))
    end = HessianFree(num_cg_iterations=4)(loop, theta, loop.start(drawn), 1)
    inputs, targets = drawn["train"]["inputs"], drawn["train"]["targets"]
    moment = inputs.mT @ inputs / 6 + 0.3 * torch.eye(4)
    right = (inputs.mT @ targets.unsqueeze(-1)).squeeze(-1) / 6 + 0.3 * theta["init/weight"]
    expected = torch.linalg.solve(moment, right)
    assert end.step == 1
    assert relative_error(end.params, {"weight": expected}) < 1e-10


def test_implicit_gradient_of_what_it_finds_equals_differences() -> None:
    family = tasks.make("logistic")
    loop, theta = posed(family, strength=0.5)
    carry, solve = loop.start(family.sample(2, torch.Generator().manual_seed(2))), HessianFree(30)
    found = Implicit(8, ConjugateGradient(40), inner=solve).estimate(loop, theta, FinalLoss(), carry)
    assert found.info["stationarity"] < 1e-8

    def final(at: Theta) -> Tensor:
        return loop.losses(solve(loop, at, carry, 8), "valid").mean()

    for name, grad in found.grads.items():
        direction = torch.randn(grad.shape, generator=torch.Generator().manual_seed(3))
        ahead, behind = (final({**theta, name: theta[name] + s * 1e-5 * direction}) for s in (1, -1))
        expected = (ahead - behind) / 2e-5
        assert abs(float((grad * direction).sum() - expected)) < 1e-6 * abs(float(expected))


def test_tasks_do_not_touch_each_other() -> None:
    loop, theta = posed(TanhMLP(), chunk_size=3)
    drawn = sample(TanhMLP(), 3)
    together = HessianFree(6)(loop, theta, loop.start(drawn), 3)
    for i in range(3):
        alone = HessianFree(6)(loop, theta, loop.start({k: x[i : i + 1] for k, x in drawn.items()}), 3)
        assert relative_error(alone.params, {k: p[i : i + 1] for k, p in together.params.items()}) < 1e-9


def test_no_step_goes_up_where_the_curvature_is_negative() -> None:
    loop, theta = posed(TanhMLP(), strength=1e-3)
    theta = {k: 2 * v for k, v in theta.items()}
    carry = loop.begin(theta, loop.start(sample(TanhMLP(), 3)))
    batch_of = carry._replace(step=2)  # of the last of three steps
    at, before = carry, value(loop, theta, batch_of, carry)
    first = before
    for _ in range(6):
        # Each call starts where the last one ended, on the same batch.
        moved = HessianFree(6)(loop, theta, at._replace(step=2), 1)
        at = moved._replace(step=2)
        after = value(loop, theta, batch_of, at)
        assert (after <= before * (1 + 1e-14)).all()
        before = after
    assert (before < 0.9 * first).all()


def test_a_task_that_cannot_improve_stays() -> None:
    loop, theta = posed(Quadratic())
    carry = loop.start(sample(Quadratic(), 3))
    solved = HessianFree(20)(loop, theta, carry, 3)
    again = HessianFree(20)(loop, theta, solved._replace(step=2), 1)
    assert relative_error(again.params, solved.params) < 1e-12


def test_float32_reaches_what_float64_does() -> None:
    loop, theta = posed(TanhMLP())
    carry, solve = loop.start(sample(TanhMLP(), 2)), HessianFree(10)
    narrow = InnerLoop(TanhMLP(), loop.rule, Execution(2, dtype=torch.float32))
    found = solve(narrow, {k: v.float() for k, v in theta.items()}, narrow.start(sample(TanhMLP(), 2)), 5)
    assert relative_error({k: p.double() for k, p in found.params.items()}, solve(loop, theta, carry, 5).params) < 1e-3


def test_published_operator_is_the_one_of_the_code() -> None:
    family = tasks.make("linear-regression", dim=4, num_train=6)
    rule = optimizers.make("imaml", template=template(family), lr=0.1, strength=0.7)
    loop, theta = InnerLoop(family, rule), generic_theta(rule)
    drawn = family.sample(1, torch.Generator().manual_seed(1))
    carry = loop.start(drawn)
    estimator = Implicit(3, ConjugateGradient(4), inner=HessianFree(4), operator="published")
    found = estimator.estimate(loop, theta, FinalLoss(), carry)
    hessian = (drawn["train"]["inputs"].mT @ drawn["train"]["inputs"])[0] / 6
    end = HessianFree(4)(loop, theta, carry, 3).params["weight"][0].requires_grad_()
    valid = {k: x[0] for k, x in drawn["valid"].items()}
    (pull,) = torch.autograd.grad(family.loss({"weight": end}, valid), end)
    expected = torch.linalg.solve(2 * torch.eye(4) + hessian / 10.7, pull)
    assert relative_error(found.grads, {"init/weight": expected}) < 1e-9


@pytest.mark.parametrize("strengths", ["tensor", "coordinate"])
def test_learned_strengths_equal_a_long_unroll(strengths: str) -> None:
    rule = optimizers.make(
        "imaml", template=template(Quadratic()), lr=0.1, strength=0.6, learn_strength=True, strengths=strengths
    )
    loop, theta = InnerLoop(Quadratic(), rule), generic_theta(rule)
    theta = {k: v.abs() + 0.3 if k.startswith("strength") else v for k, v in theta.items()}
    # One batch for all steps: the problem that both solve.
    frozen = loop.start(sample(Quadratic(), 2))
    loop.family.batch = lambda tasks, step, split, batch=loop.family.batch: batch(tasks, 0, split)
    long = Unrolled(1500, tape=Tape.FULL).estimate(loop, theta, FinalLoss(), frozen)
    found = Implicit(6, ConjugateGradient(60), inner=HessianFree(60)).estimate(loop, theta, FinalLoss(), frozen)
    assert any(k.startswith("strength/") for k in theta)
    assert relative_error(found.grads, long.grads) < 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HessianFree(0), "num_cg_iterations=0 is not a count"),
        (lambda: HessianFree(max_backtracks=-1), "max_backtracks=-1 is not a count"),
        (lambda: HessianFree(decrease=0.5), "decrease=0.5 is a part of the promised decrease"),
        (lambda: Implicit(3, operator="code"), "operator='code' is neither"),
        (lambda: Implicit(3, Neumann(3), operator="published"), "works on the step map"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_without_a_regularizer_is_refused() -> None:
    loop = InnerLoop(Quadratic(), optimizers.make("sgd", lr=0.1))
    with pytest.raises(ValueError, match="SGD has no regularizer; use a rule that has one"):
        HessianFree()(loop, generic_theta(loop.rule), loop.start(sample(Quadratic(), 1)), 1)
