"""The Hessian-free inner solver against closed forms, its own single tasks, and implicit gradients of what it finds."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles import difference_error, relative_error
from problems import Logistic, Quadratic, TanhMLP, generic_theta, imaml_loop, join, sample, template, tied_loop
from torch import Tensor, nn

from learnedopt import (
    ConjugateGradient,
    Execution,
    FinalLoss,
    HessianFree,
    Implicit,
    InnerLoop,
    ModuleFamily,
    Neumann,
    Proximal,
    SumOfLosses,
    Tape,
    TaskFamily,
    Theta,
    Unrolled,
    Validation,
    optimizers,
    tasks,
)
from learnedopt.training.validation import VALIDATION, task_generator

pytestmark = pytest.mark.usefixtures("float64")


def posed(
    family: TaskFamily, chunk_size: int = 2, num_tasks: int = 3, strength: float = 0.3
) -> tuple[InnerLoop, Theta]:
    loop = imaml_loop(family, Execution(chunk_size), lr=0.1, strength=strength)
    return loop, generic_theta(loop)


def value(loop: InnerLoop, theta: Theta, carry: object, at: object) -> Tensor:
    """Return each task's loss plus penalty at the parameters of ``at``, on the batch of ``carry``."""
    here, penalty = carry._replace(params=at.params, state=at.state), loop.inner_objective.penalty
    return loop.losses(theta, here, "train") + torch.func.vmap(lambda p: penalty.value(theta, p))(at.params)


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


def test_validation_measures_what_the_solver_finds() -> None:
    family = tasks.make("linear-regression", dim=4, num_train=6)
    loop, theta = posed(family)
    measured = {
        inner: Validation(loop, FinalLoss(), 1, 3, inner=inner).measure(theta) for inner in (None, HessianFree(4))
    }
    carry = loop.start(family.sample(3, task_generator(0, VALIDATION)))
    for inner, value in measured.items():
        end = inner(loop, theta, carry, 1) if inner else loop.run(theta, carry, 1, Tape.NONE).end
        assert value == float(loop.losses(theta, end, "valid").mean())
    assert len(set(measured.values())) == 2
    with pytest.raises(ValueError, match="SumOfLosses reads the losses along the way"):
        Validation(loop, SumOfLosses(), 1, inner=HessianFree(4)).measure(theta)
    with pytest.raises(TypeError, match="must return a begun Carry"):
        Validation(loop, FinalLoss(), 1, inner=lambda *given: None).measure(theta)


def test_implicit_gradient_of_what_it_finds_equals_differences() -> None:
    family = tasks.make("logistic")
    loop, theta = posed(family, strength=0.5)
    carry, solve = loop.start(family.sample(2, torch.Generator().manual_seed(2))), HessianFree(30)
    found = Implicit(8, ConjugateGradient(40), inner=solve).estimate(loop, theta, FinalLoss(), carry)
    assert found.info["stationarity"] < 1e-8

    def final(at: Theta) -> Tensor:
        return loop.losses(theta, solve(loop, at, carry, 8), "valid").mean()

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
    narrow = InnerLoop(TanhMLP(), loop.rule, Execution(2, dtype=torch.float32), loop.inner_objective)
    found = solve(narrow, {k: v.float() for k, v in theta.items()}, narrow.start(sample(TanhMLP(), 2)), 5)
    assert relative_error({k: p.double() for k, p in found.params.items()}, solve(loop, theta, carry, 5).params) < 1e-3


def test_published_operator_is_the_one_of_the_code() -> None:
    family = tasks.make("linear-regression", dim=4, num_train=6)
    loop = imaml_loop(family, lr=0.1, strength=0.7)
    theta = generic_theta(loop)
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
    loop = imaml_loop(Quadratic(), lr=0.1, strength=0.6, learn=True, per=strengths)
    theta = generic_theta(loop)
    theta = {k: v.abs() + 0.3 if k.startswith("strength") else v for k, v in theta.items()}
    # One batch for all steps: the problem that both solve.
    frozen = loop.start(sample(Quadratic(), 2))
    loop.family.batch = lambda tasks, step, split, batch=loop.family.batch: batch(tasks, 0, split)
    long = Unrolled(1500, tape=Tape.FULL).estimate(loop, theta, FinalLoss(), frozen)
    found = Implicit(6, ConjugateGradient(60), inner=HessianFree(60)).estimate(loop, theta, FinalLoss(), frozen)
    assert any(k.startswith("strength/") for k in theta)
    assert relative_error(found.grads, long.grads) < 1e-6


@pytest.mark.parametrize("strengths", ["tensor", "coordinate"])
def test_learned_strengths_have_their_closed_form(strengths: str) -> None:
    still = Quadratic(drift=0.0)
    loop = imaml_loop(still, strength=0.6, learn=True, per=strengths)
    theta, drawn = generic_theta(loop), sample(still, 2)
    found = Implicit(2, ConjugateGradient(10), inner=HessianFree(10)).estimate(
        loop, theta, FinalLoss(), loop.start(drawn)
    )
    weights = {k: theta[f"strength/{k}"] * torch.ones_like(theta[f"init/{k}"]) for k in ("w", "b")}
    diagonal, start = join(weights), join({k: theta[f"init/{k}"] for k in ("w", "b")})
    of_start, of_strength = torch.zeros(5), torch.zeros(5)
    for hessian, c in zip(drawn["hessian"], drawn["c"], strict=True):
        p = hessian + torch.diag(diagonal)
        x = torch.linalg.solve(p, c[0] + diagonal * start)
        v = torch.linalg.solve(p, hessian @ x - c[1])
        of_start += diagonal * v / 2
        of_strength += v * (start - x) / 2
    expected = {"init/w": of_start[:4].reshape(2, 2), "init/b": of_start[4:]}
    parts = {"w": of_strength[:4].reshape(2, 2), "b": of_strength[4:]}
    expected |= {f"strength/{k}": x.sum() if strengths == "tensor" else x for k, x in parts.items()}
    assert relative_error(found.grads, expected) < 1e-10


@pytest.mark.parametrize("strengths", ["scalar", "tensor", "coordinate"])
def test_learned_strengths_equal_differences_of_the_solution(strengths: str) -> None:
    family, solve = Logistic(), HessianFree(10)
    loop = imaml_loop(family, strength=0.6, learn=True, per=strengths)
    theta = generic_theta(loop)
    carry = loop.start(sample(family, 2))
    found = Implicit(8, ConjugateGradient(10), inner=solve).estimate(loop, theta, FinalLoss(), carry)

    def final(at: Theta) -> float:
        return float(loop.losses(theta, solve(loop, at, carry, 8), "valid").mean())

    assert len(found.grads) == 2
    assert difference_error(final, theta, found.grads) < 1e-7


def test_the_published_operator_follows_a_learned_strength_and_knows_no_other() -> None:
    still = Quadratic(drift=0.0)
    loop, drawn = imaml_loop(still, strength=0.6, learn=True), sample(still, 1)
    estimator = Implicit(2, ConjugateGradient(10), inner=HessianFree(10), operator="published")
    for strength in (0.4, 2.5):
        theta = {**generic_theta(loop), "strength": torch.tensor(strength)}
        found = estimator.estimate(loop, theta, FinalLoss(), loop.start(drawn)).grads
        hessian, c = drawn["hessian"][0], drawn["c"][0]
        start = join({k: theta[f"init/{k}"] for k in ("w", "b")})
        x = torch.linalg.solve(hessian + strength * torch.eye(5), c[0] + strength * start)
        expected = torch.linalg.solve(2 * torch.eye(5) + hessian / (strength + 10), hessian @ x - c[1])
        assert relative_error({"x": join({k: found[f"init/{k}"] for k in ("w", "b")})}, {"x": expected}) < 1e-10
    for other, message in (
        (imaml_loop(still, learn=True, per="coordinate"), "one strength, but"),
        (InnerLoop(still, optimizers.make("sgd", lr=0.1)), "TaskLoss has no penalty"),
        (tied_loop(still), "Tied has no penalty"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator.estimate(other, generic_theta(other), FinalLoss(), other.start(drawn))


def test_it_converges_quadratically_on_logistic_regression() -> None:
    loop, theta = posed(Logistic())
    carry = loop.start(sample(Logistic(), 3))
    solution = HessianFree(20)(loop, theta, carry, 12).params["w"]
    errors = [(HessianFree(20)(loop, theta, carry, n).params["w"] - solution).norm(dim=1) for n in range(4)]
    assert (errors[0] > 0.4).all()
    for before, after in itertools.pairwise(errors):
        assert (after < 0.2 * before.square() + 1e-14).all()
    here = loop.begin(theta, carry)._replace(params={"w": solution.clone().requires_grad_()})
    (pull,) = torch.autograd.grad(value(loop, theta, here, here).sum(), [here.params["w"]])
    assert pull.norm() < 1e-12


def test_conjugate_gradient_stops_before_what_does_not_curve_upwards() -> None:
    # Task by task: positive; negative from the first direction on; positive first, then not.
    matrices = torch.stack([torch.diag(torch.tensor(d)) for d in ([2.0, 3.0], [-1.0, -2.0], [4.0, -1.0])])
    rhs = torch.tensor([[1.0, 2.0], [1.0, 1.0], [2.0, 1.0]])

    def operator(rows: Tensor) -> Tensor:
        return (matrices @ rows.unsqueeze(-1)).squeeze(-1)

    found = ConjugateGradient(5, truncate=True).solve(operator, rhs)
    first = 5.0 / 15.0 * rhs[2]  # |b|^2 / b^T A b times b
    torch.testing.assert_close(found.x, torch.stack([rhs[0] / matrices[0].diagonal(), rhs[1], first]))
    assert found.iterations.tolist() == [2.0, 0.0, 1.0]


def test_float32_convolutions_with_batch_statistics_are_descended_too() -> None:
    class Net(nn.Sequential):
        def __init__(self) -> None:
            norm = nn.BatchNorm2d(4, track_running_stats=False)
            super().__init__(nn.Conv2d(1, 4, 3, stride=2), norm, nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))

    def draw(seed: int, step: int, split: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(5, 1, 8, 8, generator=generator, dtype=torch.float32), torch.arange(5)

    family = ModuleFamily(lambda: Net().float(), nn.functional.cross_entropy, draw)
    for chunk_size in (1, 2):
        loop = imaml_loop(family, Execution(chunk_size), strength=0.5)
        theta = loop.init_theta(torch.Generator())
        carry = loop.begin(theta, loop.start(sample(family, 2)))
        end = HessianFree(5)(loop, theta, carry, 3)
        assert all(p.dtype is torch.float32 and p.isfinite().all() for p in end.params.values())
        assert (value(loop, theta, carry, end) < 0.8 * value(loop, theta, carry, carry)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HessianFree(0), "num_cg_iterations=0 is not a count"),
        (lambda: HessianFree(max_backtracks=-1), "max_backtracks=-1 is not a count"),
        (lambda: HessianFree(decrease=0.5), "decrease=0.5 is a part of the promised decrease"),
        (
            lambda: Proximal(template(Quadratic()), per="tensor"),
            "all the same unless they are learned",
        ),
        (lambda: Implicit(3, operator="code"), "operator='code' is neither"),
        (lambda: Implicit(3, Neumann(3), operator="published"), "works on the step map"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_familys_loss_alone_is_refused() -> None:
    loop = InnerLoop(Quadratic(), optimizers.make("sgd", lr=0.1))
    with pytest.raises(ValueError, match="theta moves no minimum of the family's loss; pass one that theta enters"):
        HessianFree()(loop, generic_theta(loop), loop.start(sample(Quadratic(), 1)), 1)
