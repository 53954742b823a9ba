"""Dataset distillation: learned examples and a rate for each step against loops by hand and finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import relative_error
from problems import Labelled, TanhMLP, sample
from torch.nn import functional

from benchmarks import results_distill as results
from learnedopt import DistilledData, Execution, FinalLoss, InnerLoop, Theta, Unrolled, optimizers
from learnedopt.optimizers import Reparametrized, StepRates

pytestmark = pytest.mark.usefixtures("float64")

RATES = torch.tensor([0.3, -0.1, 0.5], dtype=torch.float64)


def test_rates_are_those_of_the_steps_and_the_last_one_stays() -> None:
    family = TanhMLP()
    loop = InnerLoop(family, StepRates(3))
    carry = loop.start(sample(family, 1))
    at = {k: p[0] for k, p in carry.params.items()}
    for step in range(5):
        point = {k: p.clone().requires_grad_() for k, p in at.items()}
        batch = {k: x[0] for k, x in family.batch(carry.tasks, step, "train").items()}
        slopes = torch.autograd.grad(family.loss(point, batch), [*point.values()])
        at = {k: p - RATES[min(step, 2)] * g for (k, p), g in zip(at.items(), slopes, strict=True)}
    half = loop.run({"lr": RATES}, carry, 2).end  # the count of steps goes on with the carry
    for end in (loop.run({"lr": RATES}, carry, 5).end, loop.run({"lr": RATES}, half, 3).end):
        assert relative_error({k: p[0] for k, p in end.params.items()}, at) < 1e-14
        assert end.state is not None and end.state["step"].tolist() == [5]


def test_a_rate_that_no_step_reaches_has_a_gradient_of_zero_and_the_last_one_that_of_all_its_steps() -> None:
    family = TanhMLP()
    loop = InnerLoop(family, StepRates(3))
    carry = loop.start(sample(family, 2))
    short = Unrolled(2).estimate(loop, {"lr": RATES}, FinalLoss(), carry).grads["lr"]
    assert short[2] == 0 and (short[:2] != 0).all()
    # The same with a rate for each of the five steps, of which the last three are one.
    found = Unrolled(5).estimate(loop, {"lr": RATES}, FinalLoss(), carry).grads["lr"]
    longer = InnerLoop(family, StepRates(5))
    theta = {"lr": torch.cat([RATES, RATES[2:].expand(2)])}
    apart = Unrolled(5).estimate(longer, theta, FinalLoss(), carry).grads["lr"]
    torch.testing.assert_close(found, torch.cat([apart[:2], apart[2:].sum(0, keepdim=True)]), rtol=1e-13, atol=1e-15)


def test_rates_may_be_kept_as_logarithms() -> None:
    rule = Reparametrized(StepRates(3, lr=0.2), {"lr": "log"})
    assert torch.allclose(rule.init_theta(torch.Generator())["rule/lr"].exp(), torch.full((3,), 0.2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "num_steps=0"),
        ({"num_steps": 2.0}, TypeError, r"num_steps=2\.0"),
        ({"num_steps": 3, "lr": -0.1}, ValueError, r"StepRates: lr=-0\.1 is out of range"),
        ({"num_steps": 3, "lr": "fast"}, TypeError, "lr='fast'"),
        ({}, ValueError, "'step-rates' needs num_steps="),
    ],
)
def test_bad_rates_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimizers.make("step-rates", **options)


def distilling(chunk_size: int = 1) -> tuple[InnerLoop, Theta]:
    objective = DistilledData((3,), num_classes=2, per_class=2)
    loop = InnerLoop(Labelled(), StepRates(3), Execution(chunk_size), objective)
    return loop, {**loop.init_theta(torch.Generator().manual_seed(3)), "lr": RATES}


def test_the_meta_gradient_is_that_of_a_loop_by_hand() -> None:
    loop, theta = distilling()
    family, tasks = Labelled(), sample(Labelled(), 5)
    images, rates = (theta[k].clone().requires_grad_() for k in ("images", "lr"))
    total, labels = torch.zeros(()), torch.tensor([0, 0, 1, 1])
    start, num_tasks = family.init_params(tasks), len(tasks["y"])
    for task in range(num_tasks):
        weights = torch.cat([start["w"][task], start["b"][task]]).requires_grad_()
        for step in range(3):
            logits = images @ weights[:3] + weights[3]
            loss = functional.cross_entropy(torch.stack([torch.zeros_like(logits), logits], 1), labels)
            (slope,) = torch.autograd.grad(loss, weights, create_graph=True)
            weights = weights - rates[step] * slope
        batch = {k: x[task] for k, x in family.batch(tasks, 3, "valid").items()}
        total = total + family.loss({"w": weights[:3], "b": weights[3:]}, batch) / num_tasks
    expected: Theta = dict(zip(("images", "lr"), torch.autograd.grad(total, (images, rates)), strict=True))
    found = Unrolled(3).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    torch.testing.assert_close(found.loss, total.detach(), rtol=1e-13, atol=0)
    assert relative_error(found.grads, expected) < 1e-12


@pytest.mark.parametrize("chunk_size", [2, 8])
def test_the_meta_gradient_is_the_same_however_tasks_are_run(chunk_size: int) -> None:
    estimator = Unrolled(3)
    (plain, theta), (other, _) = distilling(), distilling(chunk_size)
    tasks = sample(Labelled(), 5)
    expected, found = (estimator.estimate(loop, theta, FinalLoss(), loop.start(tasks)) for loop in (plain, other))
    assert relative_error(found.grads, expected.grads) < 1e-12
    segments = replace(estimator, segment=2).estimate(other, theta, FinalLoss(), other.start(tasks))
    assert relative_error(segments.grads, expected.grads) < 1e-12


def test_what_a_task_trains_on_does_not_depend_on_its_own_examples() -> None:
    loop, theta = distilling()
    tasks = sample(Labelled(), 5)
    others = {**tasks, "x": tasks["x"] + 1, "y": 1 - tasks["y"]}
    ends = [loop.run(theta, loop.start(each), 3) for each in (tasks, others)]
    torch.testing.assert_close(ends[0].end.params, ends[1].end.params, rtol=0, atol=0)
    assert not torch.allclose(ends[0].losses, ends[1].losses)  # what is read is the real loss


def test_the_variants_of_the_results_change_what_they_say() -> None:
    assert [*results.VARIANTS] == [*results.LABELS]
    for name, num_steps in (("distill-mnist-5-steps", 5), ("distill-mnist", 20)):
        recipe = results.VARIANTS[name]
        assert isinstance(recipe.estimator, Unrolled)
        inside = optimizers.make(recipe.rule.name, **recipe.rule.options).init_theta(torch.Generator())
        assert {recipe.estimator.num_steps, recipe.validation.num_steps, len(inside["rule/lr"])} == {num_steps}
    ten = results.VARIANTS["distill-mnist-ten"].inner_objective
    assert ten is not None and ten.options["per_class"] == 10
    assert [results.VARIANTS[f"distill-mnist-{seed}"].seed for seed in (1, 2)] == [1, 2]


def test_the_picture_shows_the_images_row_by_row() -> None:
    learned = torch.ones(20, 784)
    learned[13, 28 * 2 + 5] = -4.0  # second row, fourth of ten; there row 2, column 5
    picture = results.sheet(learned, 10)
    assert picture.shape == (56, 280)
    assert (picture[28 + 2, 28 * 3 + 5], picture[28, 28 * 3], picture[0, 0]) == (-1, 0.25, 1)
