"""Targets and their matchings: what they are, the identities of their meta-gradients, and where training goes on."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from oracles import relative_error
from problems import FLOAT, Quadratic, TanhMLP, generic_theta, join, sample, template
from torch import Tensor
from torch.nn import functional

from learnedopt import (
    BestInHindsight,
    Bootstrap,
    BootstrappedTarget,
    Carry,
    Execution,
    FinalLoss,
    Found,
    InnerLoop,
    KLDivergence,
    LastIterate,
    RegularizedSolution,
    Rollout,
    SumOfLossesSolver,
    Tape,
    Target,
    TargetMatching,
    TaskFamily,
    Tasks,
    Theta,
    Truncated,
    Unrolled,
    optimizers,
)
from learnedopt.core.carry import detach
from learnedopt.core.objective import MetaObjective
from learnedopt.core.task import Split
from learnedopt.core.tree import Params
from learnedopt.objectives.target_matching import Onward

pytestmark = pytest.mark.usefixtures("float64")

RULES = ("sgd", "momentum", "lstm", "meta-sgd", "learned-rates", "adam")


class Softmax(TaskFamily):
    """Softmax regression: 7 points with 2 features, 3 classes; the logits are linear in the parameters.

    Classes are scaled differently: slopes that sum to zero over them would leave a rule's offsets without a gradient.
    """

    scales = torch.tensor([1.0, 0.6, -1.4], dtype=FLOAT)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        shapes = {"x": (2, 7, 2), "w": (2, 3), "b": (3,)}
        tasks = {k: torch.randn(num_tasks, *s, generator=generator, dtype=FLOAT) for k, s in shapes.items()}
        return {**tasks, "y": torch.randint(3, (num_tasks, 7), generator=generator)}

    def init_params(self, tasks: Tasks) -> Params:
        return {"w": tasks["w"], "b": tasks["b"]}

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        wave = 0.3 * torch.sin(torch.arange(14, dtype=FLOAT) + step).reshape(7, 2)
        return {"x": tasks["x"][:, int(split == "valid")] + wave, "y": tasks["y"]}

    def outputs(self, params: Params, batch: Any) -> Tensor:
        return (batch["x"] @ params["w"] + params["b"]) * self.scales

    def loss(self, params: Params, batch: Any) -> Tensor:
        return functional.cross_entropy(self.outputs(params, batch), batch["y"])


def loop_of(name: str, family: TaskFamily, execution: Execution = Execution()) -> InnerLoop:  # noqa: B008
    return InnerLoop(family, optimizers.example(name, template(family)), execution)


def estimated(loop: InnerLoop, objective: MetaObjective, tasks: Tasks, num_steps: int = 3) -> Theta:
    return Unrolled(num_steps).estimate(loop, generic_theta(loop), objective, loop.start(tasks)).grads


def natural(alpha: float) -> MetaObjective:
    """Return the objective whose meta-gradient is ``alpha J^T F grad f`` of the valid loss f: ``<alpha F grad f, x>``.

    F is the Fisher matrix of the outputs, a mean over the examples, from the softmax's own derivative.
    """

    def direction(loop: InnerLoop, params: Params, batch: Any) -> Params:
        family = loop.family
        slope = torch.func.grad(family.loss)(params, batch)
        logits, pull, *_ = torch.func.vjp(lambda q: family.outputs(q, batch), params)
        jacobian = torch.func.jacrev(lambda q: family.outputs(q, batch))(params)
        pushed = sum((jacobian[k] * slope[k]).flatten(2).sum(2) for k in slope)
        p = logits.softmax(-1)
        return pull((p * pushed - p * (p * pushed).sum(-1, keepdim=True)) / len(logits))[0]

    def objective(loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        end = rollout.end
        batch = loop.family.batch(end.tasks, end.step, "valid")
        fixed = {k: p.detach() for k, p in end.params.items()}
        pushes = torch.func.vmap(lambda p, b: direction(loop, p, b))(fixed, batch)
        terms = [(end.params[k] * pushes[k].detach()).flatten(1).sum(1) for k in fixed]
        return alpha * torch.stack(terms).sum(0).mean()

    return objective


# Identities


@pytest.mark.parametrize("family", [TanhMLP(), Quadratic()], ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("name", RULES)
def test_one_step_ahead_is_the_step_size_times_the_ordinary_meta_gradient(name: str, family: TaskFamily) -> None:
    loop, tasks = loop_of(name, family), sample(family, 3)
    found = estimated(loop, TargetMatching(Bootstrap(1, 0.37)), tasks)
    plain = estimated(loop, FinalLoss(), tasks)
    assert relative_error(found, {k: 0.37 * g for k, g in plain.items()}) < 1e-12


@pytest.mark.parametrize("alpha", [0.01, 0.5, 20.0])
@pytest.mark.parametrize("name", RULES)
def test_reverse_kl_with_linear_logits_is_natural_at_any_step_size(name: str, alpha: float) -> None:
    family = Softmax()
    loop, tasks = loop_of(name, family), sample(family, 3)
    found = estimated(loop, TargetMatching(Bootstrap(1, alpha), KLDivergence("reverse")), tasks)
    assert relative_error(found, estimated(loop, natural(alpha), tasks)) < 1e-12


@pytest.mark.parametrize(
    ("direction", "family"),
    [("forward", Softmax()), ("forward", TanhMLP()), ("reverse", TanhMLP())],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
@pytest.mark.parametrize("name", ["momentum", "lstm", "meta-sgd"])
def test_elsewhere_kl_is_natural_to_first_order(name: str, direction: Any, family: TaskFamily) -> None:
    loop, tasks = loop_of(name, family), sample(family, 3)

    def error(alpha: float) -> float:
        found = estimated(loop, TargetMatching(Bootstrap(1, alpha), KLDivergence(direction)), tasks)
        return relative_error(found, estimated(loop, natural(alpha), tasks))

    assert 5e-6 < error(1e-3) < 0.02 and error(1e-3) / error(1e-4) == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_reptile_is_the_last_iterate_without_inner_steps(num_steps: int) -> None:
    family = TanhMLP()
    rule = optimizers.make("maml", template=template(family), lr=0.2)
    loop, tasks = InnerLoop(family, rule), sample(family, 3)
    found = Unrolled(0).estimate(loop, generic_theta(loop), TargetMatching(LastIterate(num_steps)), loop.start(tasks))
    end = loop.run(generic_theta(loop), loop.start(tasks), num_steps, Tape.NONE).end.params
    expected = {f"init/{k}": (generic_theta(loop)[f"init/{k}"] - end[k]).mean(0) for k in end}
    assert relative_error(found.grads, expected) < 1e-12 and found.carry is None
    boot = BootstrappedTarget(num_steps, 0.2, "train")  # its plain step is the last of the rule's
    other = Unrolled(0).estimate(loop, generic_theta(loop), boot, loop.start(tasks))
    assert relative_error(found.grads, other.grads) < 1e-12


def test_following_the_leader_is_the_way_to_the_mean_of_the_tasks_optima() -> None:
    family = Quadratic()
    rule = optimizers.make("maml", template=template(family), lr=0.2)
    loop, tasks = InnerLoop(family, rule), sample(family, 3)
    theta = generic_theta(loop)
    objective = TargetMatching(BestInHindsight(SumOfLossesSolver(), 4))
    found = Unrolled(0).estimate(loop, theta, objective, loop.start(tasks)).grads
    mean = optima(tasks, range(4)).mean(0)
    start = join({k: theta[f"init/{k}"] for k in ("w", "b")})
    got = join({k: found[f"init/{k}"] for k in ("w", "b")})
    torch.testing.assert_close(got, start - mean, rtol=0, atol=1e-12)


# What the targets are


def optima(tasks: Tasks, steps: range, strength: float = 0.0, center: Tensor | float = 0.0) -> Tensor:
    """Return each task's minimiser (num_tasks, 5) of its sum of quadratics, drawn to ``center``."""
    c = torch.stack([Quadratic().batch(tasks, step, "train")["c"] for step in steps]).sum(0)
    hessian = len(steps) * tasks["hessian"] + strength * torch.eye(5, dtype=FLOAT)
    return torch.linalg.solve(hessian, (c + strength * center)[:, :, None]).squeeze(2)


def flat(carry: Carry) -> Tensor:
    return torch.cat([carry.params["w"].flatten(1), carry.params["b"]], dim=1)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_each_target_is_what_it_says(chunk_size: int) -> None:
    loop = loop_of("momentum", Quadratic(), Execution(chunk_size))
    theta, tasks = generic_theta(loop), sample(loop.family, 3)
    end = loop.run(theta, loop.start(tasks), 2, Tape.FULL).end
    longer = loop.run(theta, loop.start(tasks), 5, Tape.NONE).end

    last = LastIterate(3).find(loop, theta, end)
    torch.testing.assert_close(flat(last.target), flat(longer), rtol=1e-14, atol=0)
    assert last.ahead.step == 5
    torch.testing.assert_close(last.ahead.state, longer.state, rtol=1e-14, atol=0)

    leader = BestInHindsight(SumOfLossesSolver(), 3).find(loop, theta, end)
    torch.testing.assert_close(flat(leader.target), optima(tasks, range(2, 5)), rtol=0, atol=1e-12)

    drawn = RegularizedSolution(SumOfLossesSolver(), 3, 0.7).find(loop, theta, end)
    expected = optima(tasks, range(2, 5), 0.7, flat(end).detach())
    torch.testing.assert_close(flat(drawn.target), expected, rtol=0, atol=1e-12)

    for found in (last, leader, drawn):
        assert not any(x.requires_grad for carry in found for x in carry.params.values())
    for found in (leader, drawn):  # the solver's way is no part of the training
        assert found.ahead.step == 2 and torch.equal(flat(found.ahead), flat(end).detach())


class Midway(Target):
    """Half-way to the origin."""

    def find(self, loop: InnerLoop, theta: Theta, end: Carry) -> Found:
        end = detach(end)
        return Found(end._replace(params={k: p / 2 for k, p in end.params.items()}), end)


def test_a_target_of_ones_own() -> None:
    loop = loop_of("momentum", Quadratic())
    found = estimated(loop, TargetMatching(Midway()), sample(loop.family))

    def halved(loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        return 0.25 * flat(rollout.end).square().sum(1).mean()

    assert relative_error(found, estimated(loop, halved, sample(loop.family))) < 1e-12


def test_both_directions_of_the_divergence_on_either_split() -> None:
    loop = loop_of("sgd", TanhMLP())
    theta, tasks = generic_theta(loop), sample(loop.family, 3)
    end, target = (loop.run(theta, loop.start(tasks), n, Tape.NONE).end for n in (2, 9))
    splits: tuple[Split, ...] = ("train", "valid")
    directions: tuple[Literal["forward", "reverse"], ...] = ("forward", "reverse")
    for split, other in zip(splits, splits[::-1], strict=True):
        for direction in directions:
            batch = loop.family.batch(tasks, end.step, split)
            p, q = (torch.func.vmap(loop.family.outputs)(c.params, batch).softmax(-1) for c in (target, end))
            p, q = (p, q) if direction == "forward" else (q, p)
            expected = (p * (p / q).log()).sum(-1).mean(1)
            for matching, asked in ((KLDivergence(direction), split), (KLDivergence(direction, split), other)):
                torch.testing.assert_close(matching(loop, target, end, asked), expected, rtol=1e-12, atol=0)


# Where training goes on


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        (Bootstrap(4, 0.3), 3),
        (Bootstrap(1, 0.3), 0),
        (LastIterate(3), 3),
        (BestInHindsight(SumOfLossesSolver(), 3), 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_training_goes_on_from_the_bootstrap_or_from_the_rollout(target: Target, steps: int, chunk_size: int) -> None:
    loop = loop_of("momentum", Quadratic(), Execution(chunk_size))
    theta, tasks = generic_theta(loop), sample(loop.family, 3)
    onwards: tuple[tuple[Onward, int], ...] = (("bootstrap", steps), ("rollout", 0))
    for continue_from, ahead in onwards:
        objective = TargetMatching(target, continue_from=continue_from)
        for estimator in (Truncated(2, 100), Truncated(2, 100, Tape.FULL), Unrolled(2)):
            carry: Carry = loop.start(tasks)
            for window in (1, 2, 3):
                carry = estimator.estimate(loop, theta, objective, carry).carry
                expected = loop.run(theta, loop.start(tasks), window * (2 + ahead), Tape.NONE).end
                assert carry.step == expected.step
                assert relative_error(carry.params, expected.params) < 1e-12
                torch.testing.assert_close(carry.state, expected.state, rtol=1e-12, atol=1e-13)
                assert not any(p.requires_grad for p in carry.params.values())
