"""Mirror descent against its closed forms, its geometries, and projections onto convex sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plug_in_cases import bare
from torch import Tensor

from learnedopt import (
    Execution,
    HyperOptimizer,
    InnerLoop,
    Params,
    Tape,
    UpdateRule,
    optimizers,
    tasks,
)
from learnedopt.optimizers import (
    SGD,
    Ball,
    Box,
    ConvexSet,
    Entropic,
    Euclidean,
    LearnedInit,
    MirrorDescent,
    Momentum,
    Partition,
    Projected,
    Simplex,
)
from learnedopt.tasks import Clusters, Experts

pytestmark = pytest.mark.usefixtures("float64")

SETS: dict[str, ConvexSet] = {
    "ball": Ball(0.7),
    "box": Box(-0.2, 0.4),
    "simplex": Simplex(),
    "mixed simplex": Simplex(mixing=0.3),
}
every_set = pytest.mark.parametrize("kind", SETS)


def points(seed: int, scale: float = 1.0) -> Params:
    """A matrix and a vector: eight numbers that are one point."""
    generator = torch.Generator().manual_seed(seed)
    return {k: scale * torch.randn(s, generator=generator) for k, s in (("a", (2, 3)), ("b", (2,)))}


def flat(params: Params) -> Tensor:
    return torch.cat([p.reshape(-1) for p in params.values()])


def distribution(seed: int) -> Params:
    total = sum(p.exp().sum() for p in points(seed).values())
    return {k: p.exp() / total for k, p in points(seed).items()}


def run(rule: UpdateRule, start: Params, grads: list[Params]) -> list[Params]:
    """Return the start and all iterates on given gradients."""
    theta = rule.init_theta(torch.Generator())
    params, state = rule.init(theta, start)
    path = [params]
    for g in grads:
        deltas, state = rule.update(theta, g, state, params, torch.tensor(0.0))
        params = {k: p + deltas[k] for k, p in params.items()}
        path.append(params)
    return path


def assert_close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# Projections.


@every_set
@pytest.mark.parametrize("seed", range(4))
def test_a_projection_is_the_closest_point_of_the_set(kind: str, seed: int) -> None:
    """By the variational inequality: ``<x - p, z - p> <= 0`` for every z of the set."""
    convex_set, x = SETS[kind], points(seed, 1.5)
    found = convex_set(x)
    assert [(k, p.shape, p.dtype) for k, p in found.items()] == [(k, p.shape, p.dtype) for k, p in x.items()]
    assert_close(convex_set(found), found)  # a point of the set stays
    others = torch.stack([flat(convex_set(points(100 + i, 3.0))) for i in range(200)])
    assert float(((flat(x) - flat(found)) * (others - flat(found))).sum(1).max()) <= 1e-12
    assert float((flat(x) - flat(found)).norm()) > 0.1


@every_set
def test_projections_run_under_vmap_and_have_derivatives(kind: str) -> None:
    convex_set, several = SETS[kind], [points(seed, 1.5) for seed in range(3)]
    stacked = {k: torch.stack([p[k] for p in several]) for k in several[0]}
    at_once = torch.func.vmap(convex_set)(stacked)
    for i, each in enumerate(several):
        assert_close({k: p[i] for k, p in at_once.items()}, convex_set(each))

    def projected(vector: Tensor) -> Tensor:
        return flat(convex_set({"a": vector[:6].reshape(2, 3), "b": vector[6:]}))

    for at in (flat(several[0]), torch.zeros(8)):
        assert torch.autograd.gradcheck(projected, at.clone().requires_grad_())


def test_the_sets_are_what_they_say() -> None:
    x = points(0, 2.0)
    assert float(flat(Ball(0.7)(x)).norm()) == pytest.approx(0.7, rel=1e-13)
    assert_close(flat(Ball(0.7)(x)), 0.7 * flat(x) / flat(x).norm())
    inside = {k: p / 100 for k, p in x.items()}
    torch.testing.assert_close(Ball(0.7)(inside), inside, rtol=0, atol=0)
    for mixing in (0.0, 0.3):
        p = flat(Simplex(mixing)(x))
        assert float(p.sum()) == pytest.approx(1, rel=1e-13) and float(p.min()) >= mixing / 8 - 1e-15
    assert_close(Simplex()({"x": torch.tensor([0.9, 0.3, -5.0])})["x"], torch.tensor([0.8, 0.2, 0.0]))
    corner = Simplex(0.3)({"x": torch.tensor([7.0, 0.0, 0.0])})["x"]
    assert_close(corner, torch.tensor([0.8, 0.1, 0.1]))


# Geometries.


@pytest.mark.parametrize("geometry", [Euclidean(), Entropic()])
def test_a_geometry_is_the_one_of_its_potential(geometry: Any) -> None:
    """``B(x, y) = psi(x) - psi(y) - <grad psi(y), x - y>`` and the map there and back, by automatic derivatives."""

    def psi(p: Tensor) -> Tensor:
        return 0.5 * p.square().sum() if isinstance(geometry, Euclidean) else torch.xlogy(p, p).sum()

    x, y = distribution(1), distribution(2)
    slope = torch.func.grad(psi)(flat(y))
    expected = psi(flat(x)) - psi(flat(y)) - slope @ (flat(x) - flat(y))
    assert float(geometry.divergence(x, y)) == pytest.approx(float(expected), rel=1e-12)
    assert float(geometry.divergence(x, x)) == pytest.approx(0, abs=1e-15)
    difference = slope - flat(geometry.to_dual(y))  # the same up to a constant, which the simplex does not see
    assert_close(difference, difference[0].expand(8))
    assert_close(geometry.from_dual(geometry.to_dual(x)), x)


def test_the_relative_entropy_at_the_simplexs_edge() -> None:
    edge, inside = {"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.5, 0.5])}
    assert float(Entropic().divergence(edge, inside)) == pytest.approx(math.log(2))
    assert float(Entropic().divergence(inside, edge)) == math.inf


# The rule.


def test_the_euclidean_rule_is_gradient_descent_at_the_step_size_of_its_radius() -> None:
    grads = [points(seed) for seed in (1, 2, 3)]
    rule = MirrorDescent(radius=0.6, lipschitz=1.5, num_steps=16)
    assert rule.init_theta(torch.Generator()) == {}
    by_hand = run(SGD(0.6 / (1.5 * 4), learn=()), points(0), grads)
    torch.testing.assert_close(run(rule, points(0), grads), by_hand, rtol=0, atol=1e-16)
    learned = MirrorDescent(radius=0.6, lipschitz=1.5, num_steps=16, learn=("radius",))
    theta = learned.init_theta(torch.Generator())
    assert list(theta) == ["radius"] and float(theta["radius"]) == pytest.approx(0.6)
    radius = theta["radius"].requires_grad_()
    deltas, _ = learned.update({"radius": radius}, grads[0], (), points(0), torch.tensor(0.0))
    (slope,) = torch.autograd.grad(flat(deltas).sum(), radius)
    assert float(slope) == pytest.approx(-float(flat(grads[0]).sum()) / 6, rel=1e-12)


def test_the_entropic_rule_is_a_softmax_of_the_summed_gradients() -> None:
    grads, start = [points(seed) for seed in (1, 2, 3)], distribution(0)
    eta = 0.6 / (1.5 * 4)
    for lazy in (False, True):
        path = run(MirrorDescent(Entropic(), 0.6, 1.5, 16, lazy), start, grads)
        for i in range(4):
            total = sum((flat(g) for g in grads[:i]), torch.zeros(8))
            assert_close(flat(path[i]), (flat(start).log() - eta * total).softmax(0))
            assert float(flat(path[i]).sum()) == pytest.approx(1, rel=1e-13)


def test_lazy_steps_go_on_from_where_they_would_be_without_the_projection() -> None:
    grads, start, eta = [points(seed, 2.0) for seed in (1, 2, 3)], points(0, 0.1), 0.3
    greedy, lazy = (Projected(MirrorDescent(radius=eta, lazy=each), Ball(0.7)) for each in (False, True))
    assert_close(run(MirrorDescent(radius=eta, lazy=True), start, grads), run(SGD(eta), start, grads))
    x, z = flat(start), flat(start)
    for g, of_greedy, of_lazy in zip(grads, run(greedy, start, grads)[1:], run(lazy, start, grads)[1:], strict=True):
        x, z = x - eta * flat(g), z - eta * flat(g)
        x = x * min(1, 0.7 / float(x.norm()))
        assert_close(flat(of_greedy), x)
        assert_close(flat(of_lazy), z * min(1, 0.7 / float(z.norm())))
    assert float((flat(of_greedy) - flat(of_lazy)).norm()) > 0.05  # they do differ


def test_any_rule_can_be_projected() -> None:
    grads, start = [points(seed, 2.0) for seed in (1, 2, 3)], points(0, 0.1)
    free, kept = Momentum(0.3), Projected(Momentum(0.3), Box(-0.2, 0.4))
    path = run(kept, {k: p.clamp(-0.2, 0.4) for k, p in start.items()}, grads)
    assert all(float(flat(p).min()) >= -0.2 and float(flat(p).max()) <= 0.4 for p in path)
    assert float(flat(run(free, start, grads)[-1]).abs().max()) > 0.5
    first = {k: (p.clamp(-0.2, 0.4) - 0.3 * grads[0][k]).clamp(-0.2, 0.4) for k, p in start.items()}
    assert_close(path[1], first)


@pytest.mark.parametrize("chunk", [1, 3])
def test_in_the_loop_iterates_stay_in_the_set(chunk: int) -> None:
    family = Clusters(dim=3, distance=2.0)
    loop = InnerLoop(family, Projected(MirrorDescent(radius=2.0, num_steps=10), Ball(1.0)), Execution(chunk))
    carry = loop.start(family.sample(3, torch.Generator().manual_seed(0)))
    for steps in range(1, 10):
        x = loop.run({}, carry, steps, Tape.NONE).end.params["x"]
        assert float(x.norm(dim=1).max()) <= 1 + 1e-12
    assert_close(x.norm(dim=1), torch.ones(3))  # the optima lie outside


# Descriptions.


def test_a_projected_rule_is_made_again_from_its_description() -> None:
    rule = Projected(MirrorDescent(Entropic(), radius=0.5, num_steps=3, learn=("radius",)), Simplex(mixing=0.1))
    config = optimizers.describe(rule)
    assert config["options"]["onto"] == {"name": "simplex", "options": {"mixing": 0.1}}
    again = optimizers.build(config)
    assert isinstance(again, Projected) and again.onto == rule.onto and again.rule == rule.rule
    made = optimizers.make("mirror-descent", geometry={"name": "entropic", "options": {}}, radius=2.0)
    assert made == MirrorDescent(Entropic(), 2.0)
    with pytest.raises(ValueError, match=r"'ball' has no option 'radus'.*did you mean 'radius'"):
        optimizers.make("projected", rule=rule, onto={"name": "ball", "options": {"radus": 1.0}})


# What cannot work is said.


def experts_from(start: list[float]) -> Callable[[], Any]:
    def begin() -> Any:
        family = Experts(num_experts=3)
        rule = LearnedInit(MirrorDescent(Entropic()), {"x": torch.tensor(start)})
        loop = InnerLoop(family, rule, Execution(2))
        carry = loop.start(family.sample(2, torch.Generator().manual_seed(0)))
        return loop.run(rule.init_theta(torch.Generator()), carry, 1)

    return begin


def begun(rule: UpdateRule, **options: Any) -> Callable[[], Any]:
    def begin() -> Any:
        family = tasks.make("clusters", **options)
        loop = InnerLoop(family, rule)
        return loop.run({}, loop.start(family.sample(2, torch.Generator().manual_seed(0))), 1)

    return begin


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MirrorDescent(radius=0.0), ValueError, "radius=0 gives no step size; pass a positive"),
        (lambda: MirrorDescent(radius=-1.0), ValueError, "radius=-1.0 is out of range"),
        (lambda: MirrorDescent(radius=math.nan), ValueError, "radius=nan is out of range"),
        (lambda: MirrorDescent(lipschitz=0.0), ValueError, "lipschitz=0 gives no step size"),
        (lambda: MirrorDescent(num_steps=0), ValueError, "num_steps=0 is not a count"),
        (lambda: MirrorDescent("entropic"), TypeError, "is no Geometry; pass an instance, Euclidean"),  # type: ignore[arg-type]
        (lambda: MirrorDescent(Entropic), TypeError, "is no Geometry"),  # type: ignore[arg-type]
        (lambda: MirrorDescent(learn=("lipschitz",)), ValueError, "no hyperparameter .'lipschitz'. to learn"),
        (lambda: Projected(SGD(0.1), 1.0), TypeError, "onto=1.0 is no set; pass Ball"),  # type: ignore[arg-type]
        (lambda: Projected(0.1, Ball(1.0)), TypeError, "rule=0.1 is a float, not an update rule"),  # type: ignore[arg-type]
        (lambda: Ball(0.0), ValueError, "radius=0 leaves one point"),
        (lambda: Ball(-1.0), ValueError, "radius=-1.0 is out of range"),
        (lambda: Box(1.0, 1.0), ValueError, "low=1.0 is not below high=1.0"),
        (lambda: Simplex(1.0), ValueError, "mixing=1.0 is out of range"),
        (experts_from([0.5, 0.5, 0.0]), ValueError, "smallest entry is 0.*mix the start.*uniform distribution"),
        (experts_from([0.5, 0.7, -0.2]), ValueError, "smallest entry is -0.2"),
        (experts_from([0.5, 0.5, 0.5]), ValueError, "entries sum to 1.5 in place of 1"),
        (begun(MirrorDescent(Entropic())), ValueError, "cannot start.*smallest entry is 0"),
        (begun(Partition({"all": ("*", MirrorDescent(Entropic()))})), ValueError, "group 'all': its smallest entry"),
        (begun(Projected(MirrorDescent(), Simplex())), ValueError, "lies .* outside Simplex.*start inside"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_the_plug_ins_refuse_a_start_that_the_rule_cannot_move_from() -> None:
    model = torch.nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, 0.5, 0.0]]))
    rule = MirrorDescent(Entropic(), learn=("radius",))
    theta = rule.init_theta(torch.Generator())
    with pytest.raises(ValueError, match="MirrorDescent cannot start from these parameters"):
        bare(model.named_parameters(), (rule, theta))
    with pytest.raises(ValueError, match="MirrorDescent cannot start from these parameters"):
        HyperOptimizer(model.named_parameters(), (rule, theta))
