"""Meta-objectives: their values written out, and the identities of bootstrapped targets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import Reference, relative_error
from problems import FLOAT, Quadratic, TanhMLP, generic_theta, sample, template
from torch import Tensor
from torch.nn import functional

from learnedopt import (
    BootstrappedTarget,
    Carry,
    Execution,
    FinalLoss,
    InnerLoop,
    KLDivergence,
    LogMeans,
    MeanLogLoss,
    SquaredDistance,
    SumOfLosses,
    Tape,
    TargetMatching,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.objective import MetaObjective
from learnedopt.core.task import Split

pytestmark = pytest.mark.usefixtures("float64")

FAMILY = TanhMLP()


def rule_of(name: str) -> UpdateRule:
    return optimizers.example(name, template(FAMILY))


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_values_are_those_of_the_losses_after_each_step(num_steps: int, chunk_size: int) -> None:
    loop = InnerLoop(FAMILY, rule_of("momentum"), Execution(chunk_size))
    theta, carry = generic_theta(loop.rule), loop.start(sample(FAMILY, 3))
    rollout = loop.run(theta, carry, num_steps, Tape.NONE)
    longer = loop.run(theta, carry, num_steps + 1, Tape.NONE)  # its losses are those before each update, one further
    after = longer.losses[1:] if num_steps else longer.losses
    torch.testing.assert_close(SumOfLosses()(loop, theta, rollout), after.sum(0).mean(), rtol=1e-14, atol=0)
    torch.testing.assert_close(MeanLogLoss()(loop, theta, rollout), after.log().mean(), rtol=1e-14, atol=0)
    for objective, num_last in ((LogMeans(2.0), 1), (LogMeans(0.5, last=0.6, scale=0.3), 3), (LogMeans(last=1.0), 5)):
        ends = after[-min(num_last, len(after)) :]
        value = objective.scale * (after.mean(0).log() + objective.weight_last * ends.mean(0).log()).mean()
        torch.testing.assert_close(objective(loop, theta, rollout), value, rtol=1e-14, atol=0)
    expected = loop.losses(theta, rollout.end, "valid").mean()
    torch.testing.assert_close(FinalLoss()(loop, theta, rollout), expected, rtol=1e-14, atol=0)
    assert not torch.isclose(expected, loop.losses(theta, rollout.end, "train").mean(), rtol=1e-3)


def test_the_last_tenth_of_a_hundred_losses_are_ten_and_ratios_are_what_counts() -> None:
    losses = torch.rand(101, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    before, end = losses[:-1], losses[-1]
    found = LogMeans(2.0, scale=2 / 3).of_losses(before, end)
    expected = 2 / 3 * (losses[1:].mean(0).log() + 2 * losses[91:].mean(0).log())
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    larger = LogMeans(2.0, scale=2 / 3).of_losses(10 * before, 10 * end)
    torch.testing.assert_close(larger, found + 2 * math.log(10), rtol=1e-13, atol=0)
    of_fifty = LogMeans(1.0).of_losses(losses[:50], losses[50])
    torch.testing.assert_close(of_fifty, losses[1:51].mean(0).log() + losses[46:51].mean(0).log(), rtol=1e-14, atol=0)
    # Nothing is shifted or clamped: what has no logarithm is not finite, and a meta-step on it is skipped.
    assert LogMeans().of_losses(-before, -end).isnan().all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weight_last": -0.1}, "weight_last=-0.1 must be finite and not negative"),
        ({"weight_last": math.nan}, "weight_last=nan must be"),
        ({"last": 0.0}, "last=0.0 is a share of the steps"),
        ({"last": 1.5}, "last=1.5 is a share of the steps"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
    ],
)
def test_bad_weights_of_log_means_are_refused(options: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LogMeans(**options)


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("name", ["lstm", "meta-sgd", "adam"])
def test_one_target_step_is_the_step_size_times_the_ordinary_meta_gradient(name: str, split: Split) -> None:
    loop = InnerLoop(FAMILY, rule_of(name))
    theta, carry = generic_theta(loop.rule), loop.start(sample(FAMILY, 3))
    boot = Unrolled(4).estimate(loop, theta, BootstrappedTarget(1, 0.37, split), carry)

    def final(loop: InnerLoop, theta, rollout) -> Tensor:
        return loop.losses(theta, rollout.end, split).mean()

    plain = Unrolled(4).estimate(loop, theta, FinalLoss() if split == "valid" else final, carry)
    assert relative_error(boot.grads, {k: 0.37 * g for k, g in plain.grads.items()}) < 1e-12


@pytest.mark.parametrize("num_target_steps", [1, 2, 6])
def test_reptile_is_a_bootstrapped_target_without_inner_steps(num_target_steps: int) -> None:
    alpha = 0.2
    rule = optimizers.make("maml", template=template(FAMILY), lr=alpha)
    loop = InnerLoop(FAMILY, rule)
    theta, tasks = generic_theta(rule), sample(FAMILY, 3)
    objective = BootstrappedTarget(num_target_steps, alpha, "train")
    found = Unrolled(0).estimate(loop, theta, objective, loop.start(tasks))
    end = loop.run(theta, loop.start(tasks), num_target_steps, Tape.NONE).end.params
    expected = {f"init/{k}": (theta[f"init/{k}"] - end[k]).mean(0) for k in end}
    assert relative_error(found.grads, expected) < 1e-12
    assert found.carry is None  # a learned start begins each episode anew


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("num_target_steps", [1, 4])
def test_training_goes_on_from_the_rules_own_steps(num_target_steps: int, chunk_size: int) -> None:
    loop = InnerLoop(FAMILY, rule_of("lstm"), Execution(chunk_size))
    theta, carry = generic_theta(loop.rule), loop.start(sample(FAMILY, 3))
    objective = BootstrappedTarget(num_target_steps, 0.3)
    expected = loop.run(theta, carry, 3 + num_target_steps - 1, Tape.NONE).end
    for estimator in (Unrolled(3), Unrolled(3, segment=2), Truncated(3, 99), TruncatedBackprop(3, 2)):
        found = estimator.estimate(loop, theta, objective, carry).carry
        assert found is not None and found.step == expected.step == 2 + num_target_steps
        for name in ("params", "state"):
            assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-13
        assert not any(p.requires_grad for p in found.params.values())
        torch.testing.assert_close(found.tasks, carry.tasks)


def test_an_episode_of_windows_with_targets_ends_at_the_horizon() -> None:
    loop = InnerLoop(FAMILY, rule_of("lstm"))
    theta, carry = generic_theta(loop.rule), loop.start(sample(FAMILY, 2))
    steps = []
    while carry is not None:
        steps.append(carry.step)
        carry = Truncated(2, 8).estimate(loop, theta, BootstrappedTarget(2, 0.3), carry).carry
    assert steps == [0, 3, 6]


def test_the_target_is_a_plain_step_beyond_the_rules_steps() -> None:
    loop = InnerLoop(FAMILY, rule_of("adam"))
    theta, tasks = generic_theta(loop.rule), sample(FAMILY, 2)
    end = loop.run(theta, loop.start(tasks), 3, Tape.FULL).end
    objective = BootstrappedTarget(3, 0.25, "train")
    target, ahead = objective.target.find(loop, theta, end)
    expected = loop.run(theta, loop.start(tasks), 5, Tape.NONE).end
    assert ahead.step == target.step == 5
    assert relative_error(ahead.params, expected.params) < 1e-14
    params = {k: p.clone().requires_grad_() for k, p in expected.params.items()}
    total = loop.losses(theta, expected._replace(params=params), "train").sum()
    grads = torch.autograd.grad(total, list(params.values()))
    moved = {k: expected.params[k] - 0.25 * g for k, g in zip(params, grads, strict=True)}
    assert relative_error(target.params, moved) < 1e-14
    assert not any(x.requires_grad for x in [*target.params.values(), *ahead.params.values()])


def test_matchings_have_their_textbook_values() -> None:
    loop = InnerLoop(FAMILY, rule_of("sgd"))
    theta, tasks = generic_theta(loop.rule), sample(FAMILY, 3)
    end = loop.run(theta, loop.start(tasks), 2, Tape.NONE).end
    target = loop.run(theta, loop.start(tasks), 9, Tape.NONE).end
    squared = SquaredDistance()(loop, target, end, "valid")
    divergence = KLDivergence()(loop, target, end, "valid")
    assert squared.shape == divergence.shape == (3,)
    for i in range(3):
        gaps = [target.params[k][i] - end.params[k][i] for k in end.params]
        torch.testing.assert_close(squared[i], 0.5 * torch.stack([g.square().sum() for g in gaps]).sum())
        batch = {k: v[i] for k, v in FAMILY.batch(tasks, end.step, "valid").items()}  # both at the end's step
        p, q = (FAMILY.outputs({k: v[i] for k, v in c.params.items()}, batch).softmax(-1) for c in (target, end))
        torch.testing.assert_close(divergence[i], (p * (p / q).log()).sum(-1).mean())
    assert divergence.min() > 1e-6
    assert KLDivergence()(loop, end, end, "valid").abs().max() < 1e-15


def test_a_family_without_outputs_cannot_be_matched_by_them() -> None:
    class Bare(TanhMLP):
        def outputs(self, params, batch):
            return super(TanhMLP, self).outputs(params, batch)

        def loss(self, params, batch):
            hidden = (batch["x"] @ params["w1"] + params["b1"]).tanh()
            return functional.cross_entropy(hidden @ params["w2"], batch["y"])

    loop = InnerLoop(Bare(), rule_of("sgd"))
    theta = generic_theta(loop.rule)
    objective = BootstrappedTarget(1, 0.1, matching=KLDivergence())
    with pytest.raises(NotImplementedError, match="Bare has no outputs; define outputs"):
        Unrolled(1).estimate(loop, theta, objective, loop.start(sample(FAMILY)))


def euclidean(loop: InnerLoop, target: Carry, end: Carry, split: Split) -> Tensor:
    """Match by the distance itself, as a user might."""
    squares = [(target.params[k] - end.params[k]).square().flatten(1).sum(1) for k in end.params]
    return torch.stack(squares).sum(0).sqrt()


def test_a_matching_of_ones_own() -> None:
    family = Quadratic()
    loop = InnerLoop(family, optimizers.make("sgd"), Execution(2))
    theta, tasks = generic_theta(loop.rule), sample(family, 3)
    own = Unrolled(3).estimate(loop, theta, BootstrappedTarget(2, 0.2, matching=euclidean), loop.start(tasks))
    # The derivative of the root, task by task, from the squared distance's.
    expected = torch.zeros((), dtype=FLOAT)
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in tasks.items()}
        squared = Unrolled(3).estimate(loop, theta, BootstrappedTarget(2, 0.2), loop.start(one))
        expected += squared.grads["lr"] / (2 * squared.loss).sqrt() / 3
    torch.testing.assert_close(own.grads["lr"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", [SumOfLosses(), BootstrappedTarget(3, 0.2)], ids=lambda o: type(o).__name__)
def test_the_value_of_each_window_is_its_own(objective: MetaObjective) -> None:
    loop = InnerLoop(FAMILY, rule_of("momentum"))
    theta, tasks = generic_theta(loop.rule), sample(FAMILY, 2)
    carry = loop.start(tasks)
    ahead = 2 if isinstance(objective, TargetMatching) else 0
    for window in range(3):
        found = Truncated(2, 100, Tape.FULL).estimate(loop, theta, objective, carry)
        reference = Reference(loop, theta, objective, tasks, 2, skip=window * (2 + ahead))
        assert abs(float(found.loss) - float(reference.value(theta).detach())) < 1e-12
        carry = found.carry
