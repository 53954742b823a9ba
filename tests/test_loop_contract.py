"""What a loop promises besides its values: immutable, bounded, and whole under any grad mode."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from oracles import relative_error
from problems import Both, FromStart, Labelled, Quadratic, Tied, generic_theta, sample, template
from torch import Tensor

from learnedopt import (
    GMRES,
    ConjugateGradient,
    Execution,
    FinalLoss,
    FirstOrder,
    GradientEstimator,
    Implicit,
    InnerLoop,
    InnerObjective,
    Neumann,
    SumOfLosses,
    Tape,
    TaskLoss,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.cache import MISSING, Cache

pytestmark = pytest.mark.usefixtures("float64")

STILL = Quadratic(drift=0.0)
ESTIMATORS: dict[str, tuple[GradientEstimator, bool]] = {
    "unrolled": (Unrolled(4), True),
    "segments": (Unrolled(4, segment=2), True),
    "first order": (FirstOrder(4), False),
    "truncated": (Truncated(2, 4), False),
    "truncated full": (Truncated(2, 4, Tape.FULL), True),
    "k-rmd": (TruncatedBackprop(4, 2), True),
    "implicit cg": (Implicit(60, ConjugateGradient(5)), True),
    "implicit gmres": (Implicit(60, GMRES()), True),
    "implicit neumann": (Implicit(60, Neumann(9)), True),
}
"""Estimators, and whether theta may enter what is descended alone."""
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def loop_for(name: str, execution: Execution = Execution()) -> InnerLoop:  # noqa: B008
    """Return a loop that the estimator serves: a learned start that is pulled to, or else a recurrent network."""
    if ESTIMATORS[name][1]:
        return InnerLoop(STILL, FromStart(template(STILL), 0.25), execution, Tied())
    return InnerLoop(STILL, optimizers.make("lstm", hidden_size=3), execution)


# Immutable


def test_a_loop_cannot_be_changed() -> None:
    loop = loop_for("unrolled")
    for field in dataclasses.fields(loop):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(loop, field.name, getattr(loop, field.name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        loop.vetted = True  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del loop.rule
    with pytest.raises(TypeError, match="unexpected keyword"):
        InnerLoop(STILL, loop.rule, inner_loss=Tied())  # pyright: ignore[reportCallIssue]
    other = dataclasses.replace(loop, execution=Execution(2))
    assert other.inner_objective is loop.inner_objective and loop.execution == Execution()
    assert loop != loop_for("unrolled") and loop == loop and hash(loop) == hash(loop)


@every_estimator
def test_an_estimate_leaves_no_trace_in_a_loop_but_in_its_cache(name: str) -> None:
    loop = loop_for(name)
    before = {k: v for k, v in vars(loop).items() if k != "cache"}
    parts = [dict(vars(part)) for part in (loop.family, loop.rule, loop.inner_objective, loop.execution)]
    ESTIMATORS[name][0].estimate(loop, generic_theta(loop), FinalLoss(), loop.start(sample(STILL)))
    assert {k: v for k, v in vars(loop).items() if k != "cache"} == before
    assert parts == [dict(vars(part)) for part in (loop.family, loop.rule, loop.inner_objective, loop.execution)]
    assert len(loop.cache) > 0 and len(loop_for(name).cache) == 0


# Bounded


def test_a_cache_holds_the_most_recently_used() -> None:
    cache = Cache(max_entries=3)
    for key in "abc":
        cache.put(key, key.upper())
    assert cache.get("a") == "A"  # used again
    cache.put("d", "D")
    assert [key in cache for key in "abcd"] == [True, False, True, True] and len(cache) == 3
    assert cache.remember("a", lambda: "new") == "A" and cache.remember("b", lambda: "new") == "new"
    assert len(cache) == 3 and cache.pop("b") == "new" and cache.pop("b") is None
    assert cache.get("b") is MISSING


@every_estimator
def test_the_loops_cache_is_bounded_and_nothing_depends_on_what_it_has_dropped(name: str) -> None:
    estimator, _ = ESTIMATORS[name]
    small, plain = loop_for(name), loop_for(name)
    object.__setattr__(small, "cache", Cache(max_entries=2))
    theta = generic_theta(plain)
    for i in range(40):

        def objective(loop: InnerLoop, theta: Theta, rollout: Any, factor: float = 1.0 + i) -> Tensor:
            return factor * loop.losses(theta, rollout.end, "valid").mean()

        each = dataclasses.replace(estimator, num_steps=2 * (i % 5 + 15) if name.startswith("implicit") else 2)
        if isinstance(each, Truncated):
            each = dataclasses.replace(each, horizon=4)
        found = each.estimate(small, theta, objective, small.start(sample(STILL)))
        assert len(small.cache) <= 2
        if i % 13 == 0:
            expected = each.estimate(plain, theta, objective, plain.start(sample(STILL)))
            assert relative_error(found.grads, expected.grads) == 0
    assert len(plain.cache) <= 128


def held(factor: Tensor) -> Callable[..., Tensor]:
    """Return a function that is an objective, and holds a tensor."""
    return lambda loop, theta, rollout: factor * loop.losses(theta, rollout.end, "valid").mean()


class Held:
    """An object that is an objective, and holds a tensor."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
        return self.factor * loop.losses(theta, rollout.end, "valid").mean()


@every_estimator
@pytest.mark.parametrize("make", [held, Held], ids=["closures", "objects"])
def test_an_objective_made_anew_at_each_estimate_is_not_kept(name: str, make: Callable[[Tensor], Any]) -> None:
    estimator, _ = ESTIMATORS[name]
    loop = loop_for(name)
    theta, carry = generic_theta(loop), loop.start(sample(STILL))
    dropped, sizes = [], []
    for i in range(4):
        factor = torch.tensor(1.0 + i)
        objective = make(factor)
        found = estimator.estimate(loop, theta, objective, carry)
        dropped += [weakref.ref(objective), weakref.ref(factor)]
        del factor, objective, found
        gc.collect()
        sizes.append(len(loop.cache))
    assert all(reference() is None for reference in dropped)
    assert max(sizes) <= 128


def test_two_objectives_at_one_address_are_both_looked_at() -> None:
    """Ids are used again: what was seen must not be taken for what comes to lie in its place."""
    loop = loop_for("unrolled")
    theta, carry = generic_theta(loop), loop.start(sample(STILL))
    for _ in range(20):
        Unrolled(2).estimate(loop, theta, held(torch.tensor(2.0)), carry)
        with pytest.raises(ValueError, match="not a mean over tasks"):
            Unrolled(2).estimate(
                loop, theta, lambda loop, theta, rollout: loop.losses(theta, rollout.end, "valid").sum(), carry
            )


# Under any grad mode

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


@every_estimator
@every_mode
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_the_first_use_of_a_loop_may_be_under_any_mode(
    name: str, mode: Callable[[], AbstractContextManager[Any]], chunk_size: int
) -> None:
    estimator, _ = ESTIMATORS[name]
    loop = loop_for(name, Execution(chunk_size))
    theta = generic_theta(loop)
    expected = estimator.estimate(loop, theta, FinalLoss(), loop.start(sample(STILL, 3)))
    with mode():
        first = loop_for(name, Execution(chunk_size))
        drawn, tasks = generic_theta(first), sample(STILL, 3)  # made under the mode as well
        found = estimator.estimate(first, drawn, FinalLoss(), first.start(tasks))
        again = estimator.estimate(first, theta, FinalLoss(), found.carry or first.start(tasks))
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode) and not torch.is_grad_enabled()
    assert relative_error(found.grads, expected.grads) == 0 and torch.equal(found.loss, expected.loss)
    if expected.carry is None:
        assert relative_error(again.grads, expected.grads) == 0
    else:
        follows = estimator.estimate(loop, theta, FinalLoss(), expected.carry)
        assert relative_error(again.grads, follows.grads) == 0


@every_mode
@pytest.mark.parametrize("objective", [TaskLoss(), Tied(), Both()], ids=lambda x: type(x).__name__)
def test_runs_and_losses_are_the_same_under_any_mode(
    objective: InnerObjective, mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    def use() -> tuple[Tensor, ...]:
        loop = InnerLoop(STILL, FromStart(template(STILL)), Execution(2), objective)
        theta = generic_theta(loop)
        rollout = loop.run(theta, loop.start(sample(STILL, 3)), 3, Tape.NONE)
        return rollout.losses, loop.losses(theta, rollout.end, "valid"), loop.outputs(rollout.end, "valid")

    expected = use()
    with mode():
        found = use()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_inner_objective_of_defaults_is_the_tasks_loss() -> None:
    class Plain(InnerObjective):
        pass

    rule: UpdateRule = optimizers.make("momentum", lr=0.1)
    loops = [InnerLoop(Labelled(), rule, Execution(2), objective) for objective in (Plain(), TaskLoss())]
    theta, tasks = generic_theta(rule), sample(Labelled(), 3)
    a, b = (Unrolled(4).estimate(loop, theta, SumOfLosses(), loop.start(tasks)) for loop in loops)
    assert torch.equal(a.loss, b.loss) and all(torch.equal(a.grads[k], g) for k, g in b.grads.items())
