"""Regret bounds and the moments of tasks, against plain loops, differences and the regret itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import difference_error, relative_error, walk
from problems import FLOAT, Logistic, Quadratic, TanhMLP, generic_theta, one_by_one, sample, template
from torch import Tensor

from learnedopt import (
    BestInHindsight,
    Carry,
    Execution,
    Found,
    InnerLoop,
    LastIterate,
    MomentMatching,
    RegretBound,
    SumOfLossesSolver,
    Tape,
    Target,
    TaskFamily,
    Unrolled,
    optimizers,
)
from learnedopt.core.tree import Params, Theta

pytestmark = pytest.mark.usefixtures("float64")

SHARED = ("coordinate", "tensor", "all")
RATED = {
    "all": lambda like: optimizers.make("learned-init", template=like, rule=optimizers.make("sgd", lr=0.1)),
    "tensor": lambda like: optimizers.make("meta-sgd", template=like, rates="tensor", lr=0.1),
    "coordinate": lambda like: optimizers.make("meta-sgd", template=like, lr=0.1),
}
"""A learned start with rates that ``RegretBound`` reads, by how these are shared."""


class Away(Target):
    """A target of the test's own: far from the start, by a wave."""

    def find(self, loop: InnerLoop, theta: Theta, end: Carry) -> Found:
        moved = {k: p + torch.sin(3.0 * torch.arange(p[0].numel())).view_as(p[0]) for k, p in end.params.items()}
        return Found(end._replace(params=moved), end)


class Linear(TaskFamily):
    """Losses ``c_i'x``, another c at each step."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        return {"c": torch.randn(num_tasks, 7, 4, generator=generator, dtype=FLOAT)}

    def init_params(self, tasks: Any) -> Params:
        return {"x": tasks["c"][:, 6]}

    def batch(self, tasks: Any, step: int, split: str) -> Any:
        return {"c": tasks["c"][:, step % 6]}

    def loss(self, params: Params, batch: Any) -> Tensor:
        return batch["c"] @ params["x"]


CONVEX = [(family, target) for family in (Quadratic(), Logistic(), Linear()) for target in (None, Away())]
CONVEX += [(Quadratic(), BestInHindsight(SumOfLossesSolver(), 6))]  # sums of the others have no minimiser


def shown_by_hand(loop: InnerLoop, theta: Theta, tasks: Any, num_steps: int) -> tuple[Params, Params]:
    """Return each task's last iterate and sums of squared gradients, out of plain loops."""
    paths = [walk(loop, theta, task, num_steps, full=False) for task in one_by_one(tasks)]
    ends = {k: torch.stack([path.points[-1][0][k].detach() for path in paths]) for k in paths[0].grads[0]}
    squares = {k: torch.stack([torch.stack([g[k] ** 2 for g in path.grads]).sum(0) for path in paths]) for k in ends}
    return ends, squares


def bound_by_hand(theta: Theta, ends: Params, squares: Params) -> Tensor:
    """Return the mean bound of ``meta-sgd``'s theta, or of one with a single rate."""
    total = torch.zeros(())
    for k in ends:
        rate = theta[f"rule/lr/{k}"] if f"rule/lr/{k}" in theta else theta["rule/lr"]
        total = total + (((ends[k] - theta[f"init/{k}"]) ** 2) / (2 * rate) + rate / 2 * squares[k]).sum()
    return total / len(next(iter(ends.values())))


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("rates", SHARED)
@pytest.mark.parametrize("family", [Quadratic(), TanhMLP()], ids=lambda f: type(f).__name__)
def test_the_bound_and_its_gradient_are_those_by_hand(family: TaskFamily, rates: str, chunk_size: int) -> None:
    loop = InnerLoop(family, RATED[rates](template(family)), Execution(chunk_size))
    theta, tasks = generic_theta(loop.rule), sample(family, 3)
    theta = {k: v.abs() + 0.01 if "/lr" in k else v for k, v in theta.items()}
    found = Unrolled(0).estimate(loop, theta, RegretBound(4), loop.start(tasks))
    ends, squares = shown_by_hand(loop, theta, tasks, 4)
    assert abs(float(found.loss) - float(bound_by_hand(theta, ends, squares))) <= 1e-12 * float(found.loss)
    assert difference_error(lambda t: float(bound_by_hand(t, ends, squares)), theta, found.grads) < 1e-7
    for k in ends:
        lr = theta["rule/lr" if rates == "all" else f"rule/lr/{k}"]
        expected = ((theta[f"init/{k}"] - ends[k]) / lr).mean(0)
        assert relative_error({k: found.grads[f"init/{k}"]}, {k: expected}) < 1e-12
    assert found.carry is None and found.grads.keys() == theta.keys()


@pytest.mark.parametrize("scale", [0.03, 1.0, 30.0])
@pytest.mark.parametrize("rates", SHARED)
@pytest.mark.parametrize(("family", "target"), CONVEX, ids=lambda x: type(x).__name__)
def test_it_bounds_the_regret_of_convex_losses(family: TaskFamily, rates: str, target: Any, scale: float) -> None:
    loop = InnerLoop(family, RATED[rates](template(family)), Execution(2))
    theta, num_steps = generic_theta(loop.rule), 6
    theta = {k: (v.abs() + 1e-3) * scale if "/lr" in k else v for k, v in theta.items()}
    start = loop.begin(theta, loop.start(sample(family, 8)))
    rollout = loop.run(theta, start, num_steps, Tape.NONE)
    against = rollout.end if target is None else target.find(loop, theta, start).target
    paid = [loop.losses(theta, against._replace(step=i), "train") for i in range(num_steps)]
    regret = (rollout.losses - torch.stack(paid)).sum(0)
    at_start = loop.run(theta, start, 0, Tape.NONE)
    bounds = RegretBound(num_steps, target).bounds(loop, theta, at_start)
    assert bounds.shape == (8,) and (regret <= bounds * (1 + 1e-12)).all()
    if isinstance(family, Linear) and target is None:  # then nothing is given away
        torch.testing.assert_close(regret, bounds, rtol=1e-12, atol=1e-12)
    else:
        assert (regret < 0.999 * bounds).any()


def test_any_optimizer_may_minimise_the_bound() -> None:
    family = Quadratic(drift=0.0)
    loop = InnerLoop(family, RATED["coordinate"](template(family)))
    theta = {k: v.clone().requires_grad_() for k, v in loop.init_theta(torch.Generator()).items()}
    optimizer, tasks = torch.optim.Adam([*theta.values()], 0.02), sample(family, 4)
    values = []
    for _ in range(100):
        found = Unrolled(0).estimate(loop, theta, RegretBound(5), loop.start(tasks))
        values.append(float(found.loss))
        for k, p in theta.items():
            p.grad = found.grads[k]
        optimizer.step()
    assert values[-1] < 0.7 * values[0]


def moments_by_hand(theta: Theta, ends: Params, squares: Params, factor: float, before: Theta) -> Tensor:
    """Return the mean of ``MomentMatching`` for ``aruba``'s theta; distances are those of the theta ``before``."""
    total = torch.zeros(())
    b = {k: factor * (before[f"init/{k}"] - end) ** 2 for k, end in ends.items()}
    for i in range(len(next(iter(ends.values())))):
        total = total + sum(0.5 * (theta[f"init/{k}"] - end[i]).square().sum() for k, end in ends.items())
        for kind, shown in (("distance", b), ("squares", squares)):
            if f"rule/{kind}" in theta:
                mean = torch.cat([x[i].reshape(-1) for x in shown.values()]).mean()
                total = total + 0.5 * (theta[f"rule/{kind}"] - mean) ** 2
                continue
            for k, x in shown.items():
                learned = theta[f"rule/{kind}/{k}"]
                total = total + 0.5 * (learned - (x[i] if learned.ndim else x[i].mean())).square().sum()
    return total / len(next(iter(ends.values())))


@pytest.mark.parametrize("factor", [0.5, 1.0])
@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("rates", SHARED)
def test_the_moments_and_their_gradient_are_those_by_hand(rates: str, chunk_size: int, factor: float) -> None:
    family = TanhMLP()
    rule = optimizers.make("aruba", template=template(family), rates=rates, eps=0.6, zeta=0.9)
    loop = InnerLoop(family, rule, Execution(chunk_size))
    theta, tasks = generic_theta(rule), sample(family, 3)
    objective = MomentMatching(4, factor=factor)
    found = Unrolled(0).estimate(loop, theta, objective, loop.start(tasks))
    ends, squares = shown_by_hand(loop, theta, tasks, 4)

    def by_hand(moved: Theta) -> float:
        return float(moments_by_hand(moved, ends, squares, factor, theta))

    assert abs(float(found.loss) - by_hand(theta)) <= 1e-12 * float(found.loss)
    assert difference_error(by_hand, theta, found.grads) < 1e-7
    for k, end in ends.items():
        assert relative_error({k: found.grads[f"init/{k}"]}, {k: (theta[f"init/{k}"] - end).mean(0)}) < 1e-12
        if rates == "coordinate":
            shown = factor * (theta[f"init/{k}"] - end).square().mean(0)
            assert (
                relative_error({k: found.grads[f"rule/distance/{k}"]}, {k: theta[f"rule/distance/{k}"] - shown}) < 1e-12
            )


def test_a_target_of_ones_own_is_what_distances_are_to() -> None:
    family = TanhMLP()
    loop = InnerLoop(family, optimizers.make("aruba", template=template(family), eps=0.6), Execution(2))
    theta, tasks = generic_theta(loop.rule), sample(family, 3)
    found = Unrolled(0).estimate(loop, theta, MomentMatching(4, Away()), loop.start(tasks))
    start = loop.begin(theta, loop.start(tasks))
    away = Away().find(loop, theta, start).target.params
    _, squares = shown_by_hand(loop, theta, tasks, 4)
    expected = moments_by_hand(theta, away, squares, 0.5, theta)
    assert abs(float(found.loss) - float(expected)) <= 1e-12 * float(expected)


@pytest.mark.parametrize("objective", [RegretBound(3), MomentMatching(3)], ids=lambda o: type(o).__name__)
def test_steps_of_the_estimators_own_are_refused(objective: Any) -> None:
    family = Quadratic()
    name = "meta-sgd" if isinstance(objective, RegretBound) else "aruba"
    loop = InnerLoop(family, optimizers.make(name, template=template(family)))
    with pytest.raises(ValueError, match=r"takes its own 3 steps from there, but the estimator takes 2.*Unrolled\(0\)"):
        Unrolled(2).estimate(loop, loop.init_theta(torch.Generator()), objective, loop.start(sample(family)))


def test_a_rate_or_moment_that_is_not_positive_is_refused() -> None:
    family = Quadratic()
    for name, key, objective in (
        ("meta-sgd", "rule/lr/w", RegretBound(3)),
        ("aruba", "rule/squares/b", MomentMatching(3)),
        ("aruba", "rule/distance/w", MomentMatching(3)),
    ):
        loop = InnerLoop(family, optimizers.make(name, template=template(family)))
        theta = loop.init_theta(torch.Generator().manual_seed(0))
        theta[key] = theta[key] - 5.0
        with pytest.raises(ValueError, match=f"'{key}' must be positive everywhere, its least entry is -"):
            Unrolled(0).estimate(loop, theta, objective, loop.start(sample(family)))


def test_theta_without_rates_is_refused() -> None:
    family = Quadratic()
    loop = InnerLoop(family, optimizers.make("maml", template=template(family)))
    theta = loop.init_theta(torch.Generator())
    for objective, missing in ((RegretBound(3), "rule/lr/w"), (MomentMatching(3), "rule/distance/w")):
        rollout = loop.run(theta, loop.start(sample(family)), 0, Tape.NONE)
        with pytest.raises(ValueError, match=f"theta has no '{missing}', only"):
            objective(loop, theta, rollout)


@pytest.mark.parametrize("rates", SHARED)
def test_without_a_target_it_is_the_last_iterate(rates: str) -> None:
    family = Quadratic()
    loop = InnerLoop(family, RATED[rates](template(family)), Execution(2))
    theta, tasks = generic_theta(loop.rule), sample(family, 3)
    found = [Unrolled(0).estimate(loop, theta, RegretBound(4, t), loop.start(tasks)) for t in (None, LastIterate(4))]
    assert abs(float(found[0].loss - found[1].loss)) <= 1e-12 * float(found[0].loss)
    assert relative_error(found[0].grads, found[1].grads) < 1e-12


def test_options_out_of_range_are_refused() -> None:
    for kind in (RegretBound, MomentMatching):
        with pytest.raises(TypeError, match=r"is no Target; pass an instance, such as BestInHindsight\("):
            kind(3, BestInHindsight)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="num_steps"):
        RegretBound(0)
    with pytest.raises(ValueError, match="num_steps"):
        MomentMatching(0)
    with pytest.raises(ValueError, match=r"factor=0.0 must be positive"):
        MomentMatching(3, factor=0.0)
