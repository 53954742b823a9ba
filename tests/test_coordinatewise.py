"""The coordinatewise adjoint against the plain unroll, and where it does not apply."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, final

import pytest
import torch
from oracles import relative_error
from problems import FLOAT, Both, Quadratic, TanhMLP, generic_theta, sample, template
from torch import Tensor

from learnedopt import (
    L2,
    BootstrappedTarget,
    Execution,
    FinalLoss,
    FirstOrder,
    GradientEstimator,
    InnerLoop,
    InnerObjective,
    MeanLogLoss,
    Rollout,
    SumOfLosses,
    Tape,
    TaskFamily,
    Theta,
    Truncated,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.estimator import Estimate
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Params
from learnedopt.execution import coordinatewise, programs
from learnedopt.execution.programs import CompileWarning
from learnedopt.optimizers import SGD, Clip, LearnedInit, registry
from learnedopt.optimizers.kernels import lstm_kernel

pytestmark = pytest.mark.usefixtures("float64")


@final
class LearnedMemory(UpdateRule):
    """A momentum whose first value and first count are learned, with a counter that belongs to no coordinate."""

    coordinatewise = True

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(0.1, dtype=FLOAT), "first": torch.tensor(0.3, dtype=FLOAT), "age": torch.tensor(2.0)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        momentum = {k: theta["first"] * torch.ones_like(p) for k, p in params.items()}
        age, steps = theta["age"] * torch.ones(1, dtype=FLOAT), torch.zeros((), dtype=torch.int64)
        return params, (momentum, {"age": age, "steps": steps})

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        momentum, counts = state
        momentum = {k: 0.8 * m + torch.tanh(grads[k]) for k, m in momentum.items()}
        deltas = {k: -theta["lr"] * m / counts["age"] for k, m in momentum.items()}
        return deltas, (momentum, {"age": counts["age"] + 1, "steps": counts["steps"] + 1})


@final
class Awkward(UpdateRule):
    """Descent that calls itself coordinatewise, with a step that depends on what ``kind`` says."""

    coordinatewise = True

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(0.1, dtype=FLOAT)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, ()

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        scale = {
            "params": lambda k: 1 + 0.1 * params[k],
            "loss": lambda k: 1 + 0.01 * loss,
            "ranks": lambda k: 0.5 + 0.1 * params[k].ndim,
            "names": lambda k: {"w": 0.5, "b": 0.7}[k],
        }[self.kind]
        return {k: -theta["lr"] * scale(k) * g for k, g in grads.items()}, state


def joined(grads: Params) -> Tensor:
    return torch.cat([g.flatten() for g in grads.values()])


Scale = Callable[[Params, Any], dict[str, Any]]
LIES: dict[str, Scale] = {
    **{
        f"clipped at {bound:g}": lambda grads, norm, bound=bound: dict.fromkeys(
            grads, bound / joined(grads).norm().clamp(min=bound)
        )
        for bound in (1e-5, 1e-2, 1.0, 30.0, 1e4)
    },
    "normalised": lambda grads, norm: dict.fromkeys(grads, 1 / joined(grads).norm()),
    "normalised by tensor": lambda grads, norm: {k: 1 / g.norm() for k, g in grads.items()},
    "matrices normalised": lambda grads, norm: {k: 1 / g.norm() if g.ndim > 1 else 1.0 for k, g in grads.items()},
    "mean": lambda grads, norm: {k: g.abs().mean() for k, g in grads.items()},
    "largest alone": lambda grads, norm: {k: (g.abs() >= joined(grads).abs().max()) for k, g in grads.items()},
    "by the last step's norm": lambda grads, norm: dict.fromkeys(grads, 1 / (1 + norm)),
    "by the number of coordinates": lambda grads, norm: dict.fromkeys(grads, joined(grads).numel() ** -0.5),
}
NOT_BY_GRADIENTS = ("by the number of coordinates",)


@final
class Lying(UpdateRule):
    """Descent that calls itself coordinatewise, and scales gradients by something of all of them."""

    coordinatewise = True

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(0.1, dtype=FLOAT)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, {"norm": torch.zeros((), dtype=FLOAT)}

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        scales = LIES[self.kind](grads, state["norm"])
        return {k: -theta["lr"] * scales[k] * g for k, g in grads.items()}, {"norm": joined(grads).norm()}


@pytest.mark.parametrize("execution", [Execution(), Execution(chunk_size=3)], ids=["one by one", "at once"])
@pytest.mark.parametrize("kind", LIES)
def test_a_rule_that_lies_about_itself_is_refused(kind: str, execution: Execution) -> None:
    loop = InnerLoop(Quadratic(), Lying(kind), execution)
    theta, carry = generic_theta(loop.rule), loop.start(sample(loop.family, 3))
    with pytest.raises(ValueError, match="Lying says coordinatewise = True, but its coordinates interact"):
        FirstOrder(4).estimate(loop, theta, FinalLoss(), carry)
    full = Unrolled(4).estimate(loop, theta, FinalLoss(), carry)  # which makes no use of what it says
    assert full.grads["lr"].isfinite()


@pytest.mark.parametrize("kind", [kind for kind in LIES if kind not in NOT_BY_GRADIENTS])
def test_a_lie_is_found_under_a_start_of_its_own_too(kind: str) -> None:
    rule = LearnedInit(Lying(kind), template(Quadratic()))
    loop = InnerLoop(Quadratic(), rule)
    with pytest.raises(ValueError, match="LearnedInit says coordinatewise = True"):
        FirstOrder(4).estimate(loop, generic_theta(rule), FinalLoss(), loop.start(sample(loop.family, 3)))


def reads_the_last_state(loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
    """An objective of losses, parameters, states and theta at once."""
    state: Any = rollout.end.state
    momentum, counts = state
    squares = sum((m.square().flatten(1).sum(1) for m in momentum.values()), counts["age"].square().sum(1))
    total = loop.losses(theta, rollout.end, "valid") + 0.1 * squares + rollout.losses.square().sum(0)
    return total.mean() + theta["lr"] ** 2


OBJECTIVES: dict[str, MetaObjective] = {
    "final loss": FinalLoss(),
    "sum of losses": SumOfLosses(),
    "mean log loss": MeanLogLoss(),
    "bootstrapped": BootstrappedTarget(3, 0.2),
}
CHUNKS = {"one by one": Execution(), "by twos": Execution(chunk_size=2), "at once": Execution(chunk_size=9)}


@cache
def coordinatewise_rules() -> list[str]:
    kinds = []
    for kind in optimizers.names():
        rule = registry.example(kind, template(Quadratic()))
        loop = InnerLoop(Quadratic(), rule, horizon=20)
        params = {k: p.to(FLOAT) for k, p in template(Quadratic()).items()}
        if coordinatewise.reason_against(loop, generic_theta(rule), params, Tape.FIRST_ORDER) is None:
            kinds.append(kind)
    return kinds


def windows(
    estimator: GradientEstimator, rule: UpdateRule, objective: MetaObjective, execution: Execution, *, plain: bool
) -> list[Estimate]:
    """Return the estimates of two windows in a row, by the adjoint or by the plain unroll."""
    loop = InnerLoop(Quadratic(), rule, execution, horizon=20)
    if plain:
        loop.cache.put("coordinatewise", "it is what is compared with")
    theta, carry, found = generic_theta(rule), loop.start(sample(Quadratic(), 3)), []
    for _ in range(2):
        found.append(estimator.estimate(loop, theta, objective, carry))
        carry = found[-1].carry or carry
    return found


def assert_same(found: list[Estimate], expected: list[Estimate]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a.grads, b.grads) < 1e-12
        torch.testing.assert_close(a.loss, b.loss)
        torch.testing.assert_close(a.info["losses"], b.info["losses"])
        assert (a.carry is None) == (b.carry is None)
        if a.carry is not None and b.carry is not None:
            torch.testing.assert_close(tuple(a.carry), tuple(b.carry))


def test_it_serves_the_rules_that_it_should() -> None:
    assert set(coordinatewise_rules()) >= {"lstm", "sgd", "momentum", "nesterov", "rmsprop", "adam"}


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "pure torch"])
@pytest.mark.parametrize("execution", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_rule_that_it_serves_agrees_with_the_plain_unroll(
    objective: MetaObjective, execution: Execution, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinatewise, "COORDINATES_AT_A_TIME", 6)  # pieces of 2 to 5 coordinates, some of them broken
    if not compiled:
        monkeypatch.setattr(lstm_kernel, "computed_dtype", lambda *tensors: None)
    # Rules whose updates keep their length are refused a target of several steps.
    refused = {"rnnprop"} if objective is OBJECTIVES["bootstrapped"] else set()
    both = (FirstOrder(4), Truncated(3, 30))
    turn = [*OBJECTIVES.values()].index(objective) + [*CHUNKS.values()].index(execution)
    for kind in [k for k in coordinatewise_rules() if k not in refused] if compiled else ["lstm"]:
        turn += 1
        for estimator in both if kind == "lstm" else (both[turn % 2],):  # the one with an adjoint of its own
            rule = registry.example(kind, template(Quadratic()))
            assert_same(*(windows(estimator, rule, objective, execution, plain=plain) for plain in (False, True)))


@pytest.mark.parametrize("execution", CHUNKS.values(), ids=CHUNKS)
def test_the_record_of_an_inner_gradient_gives_the_same(
    execution: Execution, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    records: list[Any] = []
    monkeypatch.setattr(programs, "backend", lambda record, example: records.append(record) or record)
    compiled = replace(execution, compile=True)
    for kind in ("lstm", "adam"):
        rule = registry.example(kind, template(Quadratic()))
        found = windows(FirstOrder(4), rule, SumOfLosses(), compiled, plain=False)
        assert_same(found, windows(FirstOrder(4), rule, SumOfLosses(), execution, plain=True))
        assert found[0].info["compile_seconds"] > 0 and "compile_seconds" not in found[1].info
    assert records and not any(warning.category is CompileWarning for warning in recwarn)


def test_an_inner_gradient_that_is_compiled_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "backend", lambda record, example: lambda *x: [1.001 * y for y in record(*x)])
    rule = registry.example("lstm", template(Quadratic()))
    with pytest.warns(CompileWarning, match="ArithmeticError: the compiled loss differs by") as caught:
        found = windows(FirstOrder(4), rule, SumOfLosses(), Execution(compile=True), plain=False)
    assert len(caught) == 1
    assert_same(found, windows(FirstOrder(4), rule, SumOfLosses(), Execution(), plain=True))


@pytest.mark.parametrize("objective", [*OBJECTIVES.values(), reads_the_last_state], ids=[*OBJECTIVES, "all there is"])
@pytest.mark.parametrize("execution", CHUNKS.values(), ids=CHUNKS)
def test_a_learned_first_state_gets_its_gradient(
    objective: MetaObjective, execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinatewise, "COORDINATES_AT_A_TIME", 6)
    found, expected = (
        windows(FirstOrder(4), LearnedMemory(), objective, execution, plain=plain) for plain in (False, True)
    )
    assert_same(found, expected)
    assert all(float(found[0].grads[k].abs()) > 1e-6 for k in ("lr", "first", "age"))


@pytest.mark.parametrize(
    "make, tape, reason",
    [
        (lambda like: optimizers.make("sgd"), Tape.FULL, "FIRST_ORDER"),
        (lambda like: optimizers.make("meta-sgd", template=like), Tape.FIRST_ORDER, "not coordinatewise"),
        (lambda like: registry.example("learned-init", like), Tape.FIRST_ORDER, "a start of its own"),
        (lambda like: Awkward("params"), Tape.FIRST_ORDER, "reads the parameters or the loss"),
        (lambda like: Awkward("loss"), Tape.FIRST_ORDER, "reads the parameters or the loss"),
        (lambda like: Awkward("ranks"), Tape.FIRST_ORDER, "tells tensors apart"),
        (lambda like: Awkward("names"), Tape.FIRST_ORDER, "tells tensors apart"),
        (lambda like: Clip(SGD(0.1), max_norm=1.0), Tape.FIRST_ORDER, "not coordinatewise"),
    ],
)  # fmt: skip
def test_elsewhere_the_reason_is_given(make: Callable[[Params], UpdateRule], tape: Tape, reason: str) -> None:
    like = template(Quadratic())
    rule = make(like)
    loop, theta = InnerLoop(Quadratic(), rule), generic_theta(rule)
    found = coordinatewise.reason_against(loop, theta, like, tape)
    assert found is not None and any(part in found for part in reason.split("|"))


@pytest.mark.parametrize("inner", [L2(template(Quadratic()), 0.5, learn=False), Both()], ids=lambda x: type(x).__name__)
def test_it_serves_the_tasks_loss_alone(inner: InnerObjective) -> None:
    loop = InnerLoop(Quadratic(), optimizers.make("sgd"), inner_objective=inner)
    found = coordinatewise.reason_against(loop, generic_theta(loop), template(Quadratic()), Tape.FIRST_ORDER)
    assert found == "the inner objective is not the task's loss alone"


@pytest.mark.parametrize("kind", ["params", "loss", "ranks", "names"])
def test_what_it_does_not_serve_is_unrolled(kind: str) -> None:
    found, expected = (
        windows(Truncated(3, 30), Awkward(kind), SumOfLosses(), Execution(), plain=plain) for plain in (False, True)
    )
    assert_same(found, expected)


def test_which_way_was_taken_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="learnedopt"):
        windows(Truncated(3, 30), optimizers.make("sgd"), SumOfLosses(), Execution(), plain=False)
        windows(Truncated(3, 30), Awkward("loss"), SumOfLosses(), Execution(), plain=False)
    said = [record.getMessage() for record in caplog.records if "meta-gradients of" in record.getMessage()]
    assert len(said) == 2 and "coordinatewise adjoint" in said[0] and "the loss" in said[1]


class CountingMLP(TanhMLP):
    """Counts calls, and the graphs that loss values are still part of."""

    calls = 0

    def loss(self, params: Params, batch: Any) -> Tensor:
        type(self).calls += 1
        return super().loss(params, batch)


def test_the_optimizee_is_evaluated_once_a_step_and_once_for_the_objective() -> None:
    family: TaskFamily = CountingMLP()
    rule = optimizers.make("lstm", hidden_size=3)
    loop, theta = InnerLoop(family, rule), generic_theta(rule)
    carry = FirstOrder(5).estimate(loop, theta, FinalLoss(), loop.start(sample(family, 1))).carry
    assert carry is None
    CountingMLP.calls = 0
    FirstOrder(5).estimate(loop, theta, FinalLoss(), loop.begin(theta, loop.start(sample(family, 1))))
    assert CountingMLP.calls == 5 + 1
