"""Estimates task by task: horizons, mixtures, limits on each task, and another estimator where they say so."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import Reference, relative_error
from problems import Mix, Quadratic, Scheduled, TanhMLP, generic_theta, one_by_one, sample, template

from learnedopt import (
    BootstrappedTarget,
    Estimate,
    EvolutionStrategies,
    FinalLoss,
    ForwardMode,
    InnerLoop,
    LogMeans,
    MeanLogLoss,
    MetaTrainer,
    SumOfLosses,
    TaskByTask,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    Validation,
    optimizers,
    predict_peak,
)
from learnedopt.core.parts import loop_of, parts_of
from learnedopt.estimators import perturbations
from learnedopt.estimators.task_by_task import TaskByTaskCarry

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch's own forward mode
]

LENGTHS = ((2, 0.5), (5, 0.3), (7, 0.2))
SEED = 1234
ES = EvolutionStrategies(4, num_pairs=3, sigma=0.05)
MIXED = Mix(Quadratic(), TanhMLP())


def taken(estimator: TaskByTask, loop: InnerLoop, theta: Theta, tasks: Any, objective: Any = None) -> Estimate:
    return estimator.estimate(loop, theta, objective or SumOfLosses(), TaskByTaskCarry(tasks, SEED))


def scheduled(family: Any = None, horizon: int = 4) -> tuple[InnerLoop, Theta]:
    loop = InnerLoop(family or Quadratic(), Scheduled(), horizon=horizon)
    return loop, generic_theta(loop)


def alone(loop: InnerLoop, theta: Theta, task: Any, part: Any = None, objective: Any = None, seed: int = 0) -> Estimate:
    """Estimate one task by the part itself, on a loop of its own."""
    part = part or Unrolled(4)
    start = part.start(loop, theta, task, perturbations.generator(SEED, seed))
    return part.estimate(loop, theta, objective or SumOfLosses(), start)


def length(theta_grads: Theta, scale: dict[str, float]) -> float:
    return math.sqrt(sum(float((scale.get(k, 1.0) * g).square().sum()) for k, g in theta_grads.items()))


def mean(found: list[Theta]) -> Theta:
    return {k: sum((each[k] for each in found[1:]), found[0][k]) / len(found) for k in found[0]}


def clipped_by_hand(grads: Theta, norm: float, limit: float) -> Theta:
    return {k: g * min(1.0, limit / norm) for k, g in grads.items()}


@pytest.mark.parametrize(
    "part", [Unrolled(4), Unrolled(4, segment=2), TruncatedBackprop(4, 3), ForwardMode(4)], ids=str
)
@pytest.mark.parametrize("rule", ["momentum", "small-mlp"])
def test_without_limits_it_is_the_estimate_of_all_tasks_together(rule: str, part: Any) -> None:
    loop = InnerLoop(Quadratic(), optimizers.example(rule, template(Quadratic())))
    theta, tasks = generic_theta(loop), sample(loop.family, 3)
    expected = part.estimate(loop, theta, SumOfLosses(), part.start(loop, theta, tasks, torch.Generator()))
    found = taken(TaskByTask(part), loop, theta, tasks)
    assert relative_error(found.grads, expected.grads) < 1e-12
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.info["losses"], expected.info["losses"], rtol=1e-13, atol=0)
    assert found.carry is None
    assert found.info["inner_steps"] == expected.info["inner_steps"]
    assert [found.info[k] for k in ("dropped", "clipped", "instead")] == [0, 0, 0]


@pytest.mark.parametrize("objective", [LogMeans(2.0), MeanLogLoss(), FinalLoss(), BootstrappedTarget(2, 0.3)], ids=str)
def test_any_objective_serves_and_what_it_would_go_on_from_is_not_followed(objective: Any) -> None:
    loop = InnerLoop(Quadratic(), optimizers.make("momentum"))
    theta, tasks = generic_theta(loop), sample(loop.family, 3)
    found = taken(TaskByTask(Unrolled(4)), loop, theta, tasks, objective)
    expected = Unrolled(4).estimate(loop, theta, objective, loop.start(tasks))
    assert relative_error(found.grads, expected.grads) < 1e-12 and found.carry is None


@pytest.mark.parametrize("drop", [False, True])
def test_each_task_is_clipped_or_left_out_by_itself_in_units_of_the_scales(*, drop: bool) -> None:
    loop, theta = scheduled()
    tasks = sample(loop.family, 4)
    grads = [alone(loop, theta, task).grads for task in one_by_one(tasks)]
    norms = [length(g, {"log_lr": 0.25, "slope": 3.0}) for g in grads]
    smallest, second, third, largest = sorted(norms)
    limit, above = (smallest + second) / 2, (third + largest) / 2
    estimator = TaskByTask(Unrolled(4), max_task_grad_norm=limit, drop_above=above if drop else None)
    found = taken(estimator, loop, theta, tasks)
    kept = [i for i in range(4) if not drop or norms[i] <= above]
    assert relative_error(found.grads, mean([clipped_by_hand(grads[i], norms[i], limit) for i in kept])) < 1e-12
    losses = [alone(loop, theta, one_by_one(tasks)[i]).loss for i in kept]
    torch.testing.assert_close(found.loss, torch.stack(losses).mean(), rtol=1e-13, atol=0)
    assert found.info["clipped"] == (2 if drop else 3) and found.info["dropped"] == drop
    # On theta's own scale another task would be the one that is not clipped, or the lengths at least differ.
    assert [length(g, {}) for g in grads] != pytest.approx(norms, rel=1e-2)


def test_tasks_that_are_not_finite_are_left_out_and_none_left_is_no_zero() -> None:
    class Hole(Quadratic):
        def loss(self, params, batch):
            found = super().loss(params, batch)
            return found + torch.where(batch["c"][0] > 0, 0.0, math.nan) * params["b"].sum().square()

    class Whole(Quadratic):
        pass

    tasks = sample(Quadratic(0.0), 4)
    tasks["c"][:, :, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    loop = InnerLoop(Hole(0.0), optimizers.make("momentum"))
    loop.cache.put("losses", True)  # the losses of the start are not asked: they are not finite
    loop.cache.put(("vetted", True), True)
    theta = generic_theta(loop)
    found = taken(TaskByTask(Unrolled(4)), loop, theta, tasks)
    good = {k: v[[0, 2]] for k, v in tasks.items()}
    expected = Unrolled(4).estimate(InnerLoop(Whole(0.0), loop.rule), theta, SumOfLosses(), loop.start(good))
    assert relative_error(found.grads, expected.grads) < 1e-12 and found.info["dropped"] == 2
    bad = taken(TaskByTask(Unrolled(4)), loop, theta, {k: v[[1, 3]] for k, v in tasks.items()})
    assert all(g.isnan().all() and g.shape == theta[k].shape for k, g in bad.grads.items()) and bad.loss.isnan()
    assert bad.info["dropped"] == 2
    far = taken(TaskByTask(Unrolled(4), drop_above=1e-9), loop, theta, good)
    assert all(g.isnan().all() for g in far.grads.values()) and far.info["dropped"] == 2


def test_horizons_are_drawn_by_weight_from_the_carry_alone_and_told_to_the_rule() -> None:
    loop, theta = scheduled()
    tasks = sample(loop.family, 6)
    estimator = TaskByTask(Unrolled(4), LENGTHS)
    drawn = estimator._drawn(SEED, 6)
    assert drawn is not None and drawn == estimator._drawn(SEED, 6) and len({*drawn}) > 1
    found = taken(estimator, loop, theta, tasks)
    again = taken(copy.deepcopy(estimator), scheduled()[0], theta, tasks)
    assert all(torch.equal(g, again.grads[k]) for k, g in found.grads.items())
    expected = [
        alone(scheduled(horizon=steps)[0], theta, task, Unrolled(steps)).grads
        for steps, task in zip(drawn, one_by_one(tasks), strict=True)
    ]
    assert relative_error(found.grads, mean(expected)) < 1e-12
    wrong = [alone(loop, theta, t, Unrolled(n)).grads for n, t in zip(drawn, one_by_one(tasks), strict=True) if n <= 4]
    right = [g for n, g in zip(drawn, expected, strict=True) if n <= 4]
    assert relative_error(mean(wrong), mean(right)) > 1e-3  # the horizon matters
    assert "losses" not in found.info and found.info["inner_steps"] == sum(drawn)
    many = estimator._drawn(7, 20000)
    assert many is not None
    for steps, weight in LENGTHS:
        assert many.count(steps) / 20000 == pytest.approx(weight, abs=4 * math.sqrt(0.25 / 20000))


def test_a_mixture_is_the_weighted_mean_over_its_tasks() -> None:
    rule = optimizers.make("momentum", lr=0.1, momentum=0.6, learn=("lr", "momentum"))
    loop = InnerLoop(MIXED, rule)
    theta, weights = generic_theta(rule), (1.5, 0.4)
    tasks = {"member": torch.tensor([1, 0, 1, 1]), "seed": torch.tensor([5, 6, 7, 8])}
    found = taken(TaskByTask(Unrolled(4), task_weights=weights), loop, theta, tasks)
    grads, losses = [], []
    for member, seed in zip(tasks["member"].tolist(), tasks["seed"].tolist(), strict=True):
        own = InnerLoop(MIXED.families[member], rule)
        task = sample(own.family, 1, seed)
        plain = Reference(own, theta, SumOfLosses(), task, 4).gradient()
        grads.append({k: weights[member] * g for k, g in plain.items()})
        losses.append(weights[member] * alone(own, theta, task).loss)
    assert relative_error(found.grads, mean(grads)) < 1e-12
    torch.testing.assert_close(found.loss, torch.stack(losses).mean(), rtol=1e-13, atol=0)


def test_the_loops_of_a_mixture_are_made_and_vetted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from learnedopt.core import estimator as checks

    loop, theta = scheduled(MIXED)
    vetted: list[Any] = []
    monkeypatch.setattr(checks, "vet", lambda loop, *args, **kw: vetted.append(loop.family))
    estimator = TaskByTask(Unrolled(4), LENGTHS)
    for member in (0, 1):
        checks.check_loop(
            loop_of(loop, member), theta, loop_of(loop, member).start(sample(MIXED.families[member])),
            second_derivatives=True,
        )  # fmt: skip
    for seed in range(4):
        estimator.estimate(loop, theta, SumOfLosses(), TaskByTaskCarry(sample(MIXED, 4, seed), seed))
    assert vetted == [*MIXED.families]
    assert loop_of(loop, 1, 7) is loop_of(loop, 1, 7) is not loop_of(loop, 1, 5)
    assert loop_of(loop, 1, 7).horizon == 7 and loop_of(loop, 1).horizon == loop_of(loop, 1, 4).horizon == 4
    single = scheduled()[0]
    assert loop_of(single, 0) is single and [p.loop for p in parts_of(single, sample(single.family))] == [single]


def test_evolution_strategies_are_taken_instead_where_the_options_say() -> None:
    loop, theta = scheduled(MIXED)
    tasks = {"member": torch.tensor([1, 0, 1, 0]), "seed": torch.tensor([5, 6, 7, 8])}
    singles = [sample(MIXED.families[m], 1, s) for m, s in zip([1, 0, 1, 0], [5, 6, 7, 8], strict=True)]

    def by_hand(member: int, position: int, part: Any, steps: int = 4) -> Theta:
        own = InnerLoop(MIXED.families[member], Scheduled(), horizon=steps)
        return alone(own, theta, singles[position], replace(part, num_steps=steps), seed=position).grads

    members = [1, 0, 1, 0]
    exact = [by_hand(m, i, Unrolled(4)) for i, m in enumerate(members)]
    smoothed = [by_hand(m, i, ES) for i, m in enumerate(members)]
    of_one = taken(TaskByTask(Unrolled(4), instead=ES, instead_for=(1,)), loop, theta, tasks)
    assert relative_error(of_one.grads, mean([smoothed[0], exact[1], smoothed[2], exact[3]])) < 1e-12
    assert of_one.info["instead"] == 2

    norms = [length(g, {"log_lr": 0.25, "slope": 3.0}) for g in exact]
    above = sorted(norms)[1] * 1.0001
    of_norm = taken(TaskByTask(Unrolled(4), instead=ES, instead_above=above), loop, theta, tasks)
    picked = [b if n > above else a for a, b, n in zip(exact, smoothed, norms, strict=True)]
    assert relative_error(of_norm.grads, mean(picked)) < 1e-12 and of_norm.info["instead"] == 2
    assert of_norm.info["inner_steps"] == 4 * 4 + 2 * 4 * 2 * ES.num_pairs

    estimator = TaskByTask(Unrolled(4), LENGTHS, ES, exact_up_to=2)
    drawn = estimator._drawn(SEED, 4)
    assert drawn is not None and min(drawn) <= 2 < max(drawn)
    parts = [Unrolled(4) if steps <= 2 else ES for steps in drawn]
    expected = [by_hand(m, i, part, n) for i, (m, part, n) in enumerate(zip(members, parts, drawn, strict=True))]
    of_length = taken(estimator, loop, theta, tasks)
    assert relative_error(of_length.grads, mean(expected)) < 1e-12
    assert of_length.info["instead"] == sum(steps > 2 for steps in drawn)


def test_a_neighbour_changes_nothing_of_a_task() -> None:
    loop, theta = scheduled(MIXED)
    estimator = TaskByTask(ES, LENGTHS)
    tasks = {"member": torch.tensor([1, 0]), "seed": torch.tensor([5, 6])}
    other = {"member": torch.tensor([1, 1]), "seed": torch.tensor([5, 9])}
    found, changed, last = (
        taken(replace(estimator, drop_above=1e9), loop, theta, t)
        for t in (tasks, other, {k: v[:1] for k, v in tasks.items()})
    )
    first = last.grads
    seconds = [{k: 2 * x.grads[k] - first[k] for k in first} for x in (found, changed)]
    assert relative_error(seconds[0], seconds[1]) > 1e-3
    # What is left of the two-task means is the second task's, by itself at its place.
    drawn = estimator._drawn(SEED, 2)
    assert drawn is not None
    own = InnerLoop(MIXED.families[0], Scheduled(), horizon=drawn[1])
    expected = alone(own, theta, sample(own.family, 1, 6), replace(ES, num_steps=drawn[1]), seed=1)
    assert relative_error(seconds[0], expected.grads) < 1e-9


def test_a_mixture_is_meta_trained_validated_and_resumed_exactly(tmp_path: Any) -> None:
    loop, theta = scheduled(MIXED)
    held_out = Validation(loop, LogMeans(), num_steps=4, num_tasks=3, every=2)
    estimator = TaskByTask(Unrolled(4), LENGTHS, ES, exact_up_to=5, max_task_grad_norm=0.3)

    def trainer(path: Any) -> MetaTrainer:
        return MetaTrainer(
            loop, estimator, LogMeans(), lambda params: torch.optim.Adam(params, 0.1), None, num_tasks=3,
            theta=theta, validation=held_out, checkpoint=path, checkpoint_every=1, average=0.3,
        )  # fmt: skip

    whole = trainer(tmp_path / "whole").run(5)
    trainer(tmp_path / "parts").run(2)
    parts = trainer(tmp_path / "parts").run(5)
    assert all(torch.equal(v, parts.theta[k]) for k, v in whole.theta.items())
    assert whole.best_value == parts.best_value < held_out.measure(theta)
    by_member = [
        held_out._judge(part.loop, theta, part.tasks)[1] * len(part.positions)
        for part in parts_of(loop, loop.family.sample(3, torch.Generator().manual_seed(2**32 - 1)))
    ]
    assert held_out.measure(theta) == pytest.approx(sum(by_member) / 3, rel=1e-14)


def test_its_memory_is_that_of_the_longest_exact_episode() -> None:
    loop, theta = scheduled()
    carry = loop.start(sample(loop.family, 1))
    estimator = TaskByTask(Unrolled(4), LENGTHS, ES, exact_up_to=5)
    assert predict_peak(loop, theta, estimator, carry) == predict_peak(loop, theta, Unrolled(5), carry)
    assert predict_peak(loop, theta, TaskByTask(Unrolled(4)), carry) == predict_peak(loop, theta, Unrolled(4), carry)
    assert predict_peak(loop, theta, TaskByTask(ES), carry) is None
    assert TaskByTask(Unrolled(4)).takes_second_derivatives and not TaskByTask(ES).takes_second_derivatives
    assert TaskByTask(ES, instead=Unrolled(4), instead_above=1.0).takes_second_derivatives


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a class": (lambda: TaskByTask(Unrolled), TypeError, "estimator=the class Unrolled is no estimator that takes"),  # type: ignore[arg-type]
    "windows": (lambda: TaskByTask(Truncated(2, 6)), TypeError, r"estimator=Truncated\(num_steps=2.*one episode whole"),
    "windows of es": (
        lambda: TaskByTask(Unrolled(2), instead=EvolutionStrategies(2, 2, 0.1, horizon=6), instead_above=1.0),
        ValueError,
        "instead=.*cuts episodes into windows, which would all be the first",
    ),
    "windows of forward mode": (lambda: TaskByTask(ForwardMode(2, 6)), ValueError, "cuts episodes into windows"),
    "no horizons": (lambda: TaskByTask(Unrolled(2), ()), ValueError, r"horizons=\(\) must be pairs of steps"),
    "no pairs": (lambda: TaskByTask(Unrolled(2), (50, 100)), ValueError, "must be pairs of steps and weight"),  # type: ignore[arg-type]
    "no steps": (lambda: TaskByTask(Unrolled(2), ((0, 1.0),)), ValueError, "a horizon=0"),
    "no weight": (lambda: TaskByTask(Unrolled(2), ((5, 0.0),)), ValueError, "weight of horizon 5=0.0 must be a pos"),
    "k-rmd": (lambda: TaskByTask(TruncatedBackprop(5, 4), ((3, 1.0),)), ValueError, "num_backward_steps=4 exceeds"),
    "clip": (lambda: TaskByTask(Unrolled(2), max_task_grad_norm=-1.0), ValueError, "max_task_grad_norm=-1.0 must be"),
    "drop": (lambda: TaskByTask(Unrolled(2), drop_above=math.nan), ValueError, "drop_above=nan must be a positive"),
    "weights": (lambda: TaskByTask(Unrolled(2), task_weights=(1.0, 0.0)), ValueError, r"task_weights\[1\]=0.0 must be"),
    "no condition": (lambda: TaskByTask(Unrolled(4), instead=ES), ValueError, "say where `instead` is taken"),
    "nothing instead": (lambda: TaskByTask(Unrolled(4), instead_above=3.0), ValueError, "say where `instead` is taken"),
    "two lengths": (
        lambda: TaskByTask(Unrolled(2), instead=ES, instead_above=3.0), ValueError, r"take \[2, 4\] steps of one task",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused(case: str) -> None:
    make, kind, told = BAD[case]
    with pytest.raises(kind, match=told):
        make()


def test_bad_members_and_carries_are_refused() -> None:
    loop, theta = scheduled(MIXED)
    tasks, generator = sample(MIXED, 2), torch.Generator()
    with pytest.raises(ValueError, match=r"task_weights=\(1.0,\) are 1, the family Mix has 2 members"):
        TaskByTask(Unrolled(4), task_weights=(1.0,)).start(loop, theta, tasks, generator)
    with pytest.raises(ValueError, match=r"instead_for=\(2,\) names members by number, of which Mix has 2"):
        TaskByTask(Unrolled(4), instead=ES, instead_for=(2,)).start(loop, theta, tasks, generator)
    single, theta = scheduled()
    with pytest.raises(TypeError, match="a carry of its own, got a Carry; begin with"):
        TaskByTask(Unrolled(4)).estimate(single, theta, SumOfLosses(), single.start(sample(single.family)))  # type: ignore[arg-type]

    class Lossy(Mix):
        def split(self, tasks):
            return [(family, own, [place + 1 for place in places]) for family, own, places in super().split(tasks)]

    class Foreign(Mix):
        def split(self, tasks):
            return [(TanhMLP(), own, places) for _, own, places in super().split(tasks)]

    for family, told in (
        (Lossy(*MIXED.families), "must give each task to one family"),
        (Foreign(*MIXED.families), "0 times"),
    ):
        loop, theta = scheduled(family)
        with pytest.raises(ValueError, match=told):
            taken(TaskByTask(Unrolled(4)), loop, theta, tasks)
