"""Best points in hindsight and regularised leaders against closed forms, other solvers and their optimality."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from learnedopt import Carry, Execution, InnerLoop, Params, Tape, TaskFamily, Tasks
from learnedopt.core.task import Batch, Split
from learnedopt.evaluation.regret import regret
from learnedopt.objectives.convex import ProjectedGradient, sum_of_losses
from learnedopt.objectives.regularized_leader import FollowTheRegularizedLeader
from learnedopt.optimizers import Ball, Box, ConvexSet, Entropic, LearnedInit, MirrorDescent, Projected, Simplex
from learnedopt.tasks import Clusters, Experts, LogisticRegression

pytestmark = pytest.mark.usefixtures("float64")

ALL = Execution(chunk_size=100)
M = 6


class Portfolio(TaskFamily):
    """Smooth convex losses on the simplex that are not linear: ``-log(r_i · x)``."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        return {"returns": 0.5 + torch.rand(num_tasks, M, 4, generator=generator)}

    def init_params(self, tasks: Tasks) -> Params:
        return {"x": torch.full((len(tasks["returns"]), 4), 0.25)}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        return tasks["returns"][:, step % M]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return -(batch @ params["x"]).log()


def begun(loop: InnerLoop, num_tasks: int = 4, seed: int = 0) -> Carry:
    tasks = loop.family.sample(num_tasks, torch.Generator().manual_seed(seed))
    return loop.begin(loop.init_theta(torch.Generator()), loop.start(tasks))


def assert_close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def quadratics(rule: Any = None, noise: float = 0.4, execution: Execution = ALL) -> InnerLoop:
    family = Clusters(dim=3, num_losses=M, shape="quadratic", distance=1.2, noise=noise)
    return InnerLoop(family, rule or MirrorDescent(num_steps=M), execution)


# Best in hindsight.


@pytest.mark.parametrize("chunk", [1, 100])
def test_the_best_point_of_quadratics_is_their_mean_and_its_projection(chunk: int) -> None:
    loop = quadratics(execution=Execution(chunk))
    carry = begun(loop)
    mean = carry.tasks["points"][:, 0].mean(1)
    found = ProjectedGradient()(loop, {}, carry, M)
    assert found.step == M and not found.params["x"].requires_grad
    assert_close(found.params["x"], mean)
    part = ProjectedGradient()(loop, {}, carry._replace(step=2), 3)
    assert_close(part.params["x"], carry.tasks["points"][:, 0, 2:5].mean(1))
    for onto in (Ball(0.8), Box(-0.1, 0.6), Simplex()):
        inside = ProjectedGradient(onto)(loop, {}, carry, M).params["x"]
        assert_close(inside, torch.func.vmap(onto)({"x": mean})["x"])  # the sum is a multiple of the distance to it


def test_strength_and_center_draw_the_best_point() -> None:
    loop = quadratics()
    carry, center = begun(loop), {"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(5))}
    total = carry.tasks["points"][:, 0].sum(1)
    strength = torch.tensor([0.5, 1.0, 2.0, 40.0])
    found = ProjectedGradient()(loop, {}, carry, M, strength=strength, center=center).params["x"]
    assert_close(found, (total + strength[:, None] * center["x"]) / (M + strength[:, None]))
    at_start = ProjectedGradient()(loop, {}, carry, M, strength=2.0).params["x"]
    assert_close(at_start, (total + 2 * carry.params["x"]) / (M + 2))


@pytest.mark.parametrize("onto", [None, Ball(0.7), Box(-0.1, 0.5), Simplex(), Simplex(0.2)], ids=str)
def test_the_best_point_of_any_convex_losses_is_optimal(onto: ConvexSet | None) -> None:
    loop = InnerLoop(Clusters(dim=3, num_losses=M, noise=0.5, width=0.05), MirrorDescent(), ALL)
    carry = begun(loop)
    total = sum_of_losses(loop, {}, carry, M)
    x = ProjectedGradient(onto)(loop, {}, carry, M).params["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(total({"x": x}).sum(), x)
    moved = x - 0.01 * gradient
    again = moved if onto is None else torch.func.vmap(onto)({"x": moved})["x"]
    assert float((again - x).detach().abs().max()) <= 1e-11
    by_step = sum(loop.losses({}, carry._replace(params={"x": x}, step=i), "train") for i in range(M))
    assert_close(total({"x": x}), by_step)


def test_linear_losses_are_least_at_a_vertex() -> None:
    loop = InnerLoop(Experts(num_experts=5, num_losses=M), MirrorDescent(Entropic()), ALL)
    carry = begun(loop, 20)
    best = carry.tasks["costs"][:, 0].sum(1).argmin(1)
    for mixing in (0.0, 0.25):
        found = ProjectedGradient(Simplex(mixing))(loop, {}, carry, M).params["x"]
        expected = (1 - mixing) * torch.nn.functional.one_hot(best, 5) + mixing / 5
        assert_close(found, expected)


def test_tasks_are_solved_each_for_itself() -> None:
    loop = InnerLoop(Clusters(dim=3, num_losses=M, noise=0.5, width=0.05), MirrorDescent(), ALL)
    carry = begun(loop, 5)
    together = ProjectedGradient(Ball(1.0))(loop, {}, carry, M).params["x"]
    for i in range(5):
        one = Carry({"points": carry.tasks["points"][i : i + 1]}, {"x": carry.params["x"][i : i + 1]}, (), 0)
        assert_close(ProjectedGradient(Ball(1.0))(loop, {}, one, M).params["x"][0], together[i], 1e-13)


def test_separable_logistic_losses_have_no_best_point_but_in_a_ball() -> None:
    loop = InnerLoop(LogisticRegression(dim=5, num_train=4), MirrorDescent(), ALL)
    carry = begun(loop)
    with pytest.raises(ValueError, match=r"no minimum of the losses of 4 of 4 tasks .*separable data do: .*onto=Ball"):
        ProjectedGradient(max_iterations=300)(loop, {}, carry, 1)
    found = ProjectedGradient(Ball(2.0))(loop, {}, carry, 1).params["weight"]
    assert_close(found.norm(dim=1), torch.full((4,), 2.0))


# The regularised leader.


@pytest.mark.parametrize("learned", [False, True], ids=["constant", "of theta"])
def test_the_euclidean_leader_of_quadratics_in_closed_form(learned: bool) -> None:
    radius = torch.tensor([0.2, 0.5, 1.0, 3.0] if learned else [0.3])
    learner = MirrorDescent(radius=0.3, lipschitz=2.0, num_steps=M, learn=("radius",) if learned else ())
    loop = quadratics(LearnedInit(learner, {"x": torch.tensor([0.1, -0.3, 0.2])}))
    carry = begun(loop)
    theta = {"rule/radius": radius} if learned else {}
    inverse = 2 * math.sqrt(M) / radius[:, None]
    for count in range(M + 1):
        leader = FollowTheRegularizedLeader(learner)(loop, theta, carry, count)
        total = carry.tasks["points"][:, 0, :count].sum(1)
        assert_close(leader.params["x"], (total + inverse * carry.params["x"]) / (count + inverse))
        assert leader.step == count


def test_the_euclidean_leader_stays_in_its_set() -> None:
    learner = MirrorDescent(radius=3.0, num_steps=M)
    loop = quadratics(Projected(learner, Ball(0.5)))
    carry = begun(loop)
    inverse = math.sqrt(M) / 3
    free = carry.tasks["points"][:, 0].sum(1) / (M + inverse)
    leader = FollowTheRegularizedLeader(learner, Ball(0.5))(loop, {}, carry, M).params["x"]
    assert_close(leader, 0.5 * free / free.norm(dim=1, keepdim=True))  # level sets are balls around the free one


def test_the_entropic_leader_of_linear_losses_is_exponentiated_gradient() -> None:
    learner = MirrorDescent(Entropic(), radius=0.7, num_steps=M)
    loop = InnerLoop(Experts(num_experts=5, num_losses=M), learner, ALL)
    carry = begun(loop)
    for count in range(M + 1):
        leader = FollowTheRegularizedLeader(learner)(loop, {}, carry, count).params["x"]
        by_rule = loop.run({}, carry, count, Tape.NONE).end.params["x"]
        softmax = (-0.7 / math.sqrt(M) * carry.tasks["costs"][:, 0, :count].sum(1)).softmax(1)
        assert_close(leader, softmax)
        assert_close(by_rule, softmax)


def test_the_entropic_leader_of_other_losses_is_optimal() -> None:
    """On the simplex's inside the gradient of the whole is the same for all entries."""
    learner = MirrorDescent(Entropic(), radius=2.0, num_steps=M)
    loop = InnerLoop(Portfolio(), learner, ALL)
    carry = begun(loop)
    x = FollowTheRegularizedLeader(learner)(loop, {}, carry, M).params["x"]
    eta, returns = 2 / math.sqrt(M), carry.tasks["returns"]
    slope = -(returns / (returns @ x[:, :, None])).sum(1)
    whole = slope + (x / carry.params["x"]).log() / eta
    assert_close(whole, whole.mean(1, keepdim=True).expand_as(whole), 1e-9)
    assert_close(x.sum(1), torch.ones(4))
    assert float((x - 0.25).abs().max()) > 0.05


# Regret.


@pytest.mark.parametrize("leads", [False, True], ids=["descent", "leader"])
def test_regret_of_repeated_quadratics_in_closed_form(leads: bool) -> None:
    """``½‖phi − c‖² (1 − q^m)/(1 − q)`` with q = (1 − eta)², and ``½‖phi − c‖² Σ_i (1 + eta i)^−2``."""
    learner = MirrorDescent(lipschitz=1.5, num_steps=M, learn=("radius",))
    loop = quadratics(LearnedInit(learner, {"x": torch.zeros(3)}), noise=0.0)
    tasks = loop.family.sample(5, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    thetas = {
        "init/x": torch.randn(5, 3, generator=generator),
        "rule/radius": 0.2 + torch.rand(5, generator=generator),
    }
    leader = FollowTheRegularizedLeader(learner) if leads else None
    found = regret(loop, learner, thetas, tasks, M, ProjectedGradient(), leader)
    eta = thetas["rule/radius"] / (1.5 * math.sqrt(M))
    squared = (thetas["init/x"] - tasks["points"][:, 0, 0]).square().sum(1)
    q = (1 - eta) ** 2
    if leads:
        expected = 0.5 * squared * sum((1 + eta * i) ** -2 for i in range(M))
    else:
        expected = 0.5 * squared * (1 - q**M) / (1 - q)
    assert_close(found.regret, expected)
    assert_close(found.losses, expected)  # the best point has losses of 0
    d = thetas["rule/radius"]
    assert_close(found.bound, (squared / (2 * d) + d / 2) * 1.5 * math.sqrt(M))
    regrets, bounds = found.averaged()
    assert_close(regrets[2], expected[:3].mean())
    assert_close(bounds[-1], found.bound.mean())


@pytest.mark.parametrize("leads", [False, True], ids=["descent", "leader"])
@pytest.mark.parametrize("geometry", ["euclidean", "entropic"])
def test_regret_is_within_its_bound(geometry: str, leads: bool) -> None:
    """From any start and radius, with gradients within G; it is positive, or the bound would say nothing."""
    generator, n = torch.Generator().manual_seed(2), 300
    if geometry == "euclidean":
        family, onto = Clusters(dim=3, num_losses=M, noise=1.0, radius=1.0), Ball(1.0)
        learner = MirrorDescent(num_steps=M, learn=("radius",))
        rule: Any = Projected(learner, onto)
        start = torch.randn(n, 3, generator=generator)
        start = start / start.norm(dim=1, keepdim=True) * torch.rand(n, 1, generator=generator)
    else:
        family, onto = Experts(num_experts=3, num_losses=M), Simplex(0.05)
        rule = learner = MirrorDescent(Entropic(), num_steps=M, learn=("radius",))
        start = torch.randn(n, 3, generator=generator).softmax(1)
    loop = InnerLoop(family, LearnedInit(rule, {"x": start[0]}), ALL)
    names = [k for k in loop.init_theta(torch.Generator()) if k.endswith("radius")]
    radius = 10 ** (2 * torch.rand(n, generator=generator) - 1)
    thetas = {"init/x": start, names[0]: radius}
    leader = FollowTheRegularizedLeader(learner, onto if geometry == "euclidean" else None) if leads else None
    found = regret(loop, learner, thetas, family.sample(n, generator), M, ProjectedGradient(onto), leader)
    assert bool((found.regret <= found.bound).all())
    assert float(found.regret.max()) > 0.5 and float((found.regret / found.bound).max()) > 0.3


# What cannot work is said.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ProjectedGradient(1.0), TypeError, r"onto=1\.0 is no projection"),  # type: ignore[arg-type]
        (lambda: ProjectedGradient(max_iterations=0), ValueError, "max_iterations=0 is not a count"),
        (lambda: ProjectedGradient(tolerance=0.0), ValueError, r"tolerance=0\.0 must be positive"),
        (lambda: FollowTheRegularizedLeader(0.1), TypeError, r"learner=0\.1 has no geometry"),  # type: ignore[arg-type]
        (
            lambda: FollowTheRegularizedLeader(MirrorDescent(Entropic()), Simplex()),
            ValueError,
            "that leader stays in its domain; pass no set",
        ),
    ],
)
def test_what_cannot_work_is_said(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_radius_of_theta_must_be_there_and_positive() -> None:
    learner = MirrorDescent(num_steps=M, learn=("radius",))
    loop = quadratics(learner)
    solve, carry = FollowTheRegularizedLeader(learner), begun(loop)
    with pytest.raises(ValueError, match=r"nothing where one radius is wanted"):
        solve(quadratics(), {}, carry, M)
    with pytest.raises(ValueError, match=r"the radius 'radius' is -0\.1 and must be positive"):
        solve(loop, {"radius": torch.tensor(-0.1)}, carry, M)
    with pytest.raises(ValueError, match=r"num_steps=3, but the learner's step size is one for num_steps=6"):
        regret(loop, learner, {"radius": torch.ones(4)}, carry.tasks, 3, ProjectedGradient())
