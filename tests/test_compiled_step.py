"""One compiled step called over the unroll: the numbers of the plain loop, in the memory of the steps' starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Anchored, Quadratic, Sensitive, Skewed, TanhMLP, generic_theta, sample, template
from torch import Tensor

from learnedopt import (
    BootstrappedTarget,
    CompileWarning,
    Estimate,
    Execution,
    FinalLoss,
    GradientEstimator,
    InnerLoop,
    MeanLogLoss,
    Rollout,
    SumOfLosses,
    Tape,
    TaskFamily,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core import tree
from learnedopt.core.horizon import HorizonWarning
from learnedopt.core.objective import MetaObjective
from learnedopt.core.parts import loop_of
from learnedopt.core.tree import Params
from learnedopt.execution import programs
from learnedopt.execution.memory import peak_of, predict_peak

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # Torch's own compiler imports what torch has deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

NUM_TASKS = 3
HORIZON = 100
STEP = Execution(1, compile="step")


def named(name: str) -> Callable[[], UpdateRule]:
    return lambda: optimizers.example(name, template(TanhMLP()))


class Widening(UpdateRule):
    """A memory that is of another precision from the second step on."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"rate": torch.tensor(0.1), "decay": torch.tensor(0.6)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, {k: torch.zeros_like(p, dtype=torch.float32) for k, p in params.items()}

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        slow = {k: theta["decay"] * state[k] + g for k, g in grads.items()}
        return {k: -theta["rate"] * x for k, x in slow.items()}, slow


RULES: dict[str, tuple[Callable[[], TaskFamily], Callable[[], UpdateRule]]] = {
    "a learned start": (TanhMLP, named("maml")),
    "memories": (TanhMLP, named("adam")),
    "the horizon": (TanhMLP, named("normalised")),
    "flags, counts and a start in the state": (Quadratic, Anchored),
    "no state": (Quadratic, Skewed),
    "the loss": (TanhMLP, Sensitive),
    "a memory of two precisions": (TanhMLP, Widening),
}


class Weighed:
    """Everything that an objective can read: theta, the start, the losses along the way and the end."""

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        moved = sum((rollout.end.params[k] - p).square().flatten(1).sum(1) for k, p in rollout.start.params.items())
        read = sum(x.square().sum() for x in theta.values())
        return (loop.losses(theta, rollout.end, "valid") + rollout.losses.sum(0) + 0.1 * moved).mean() + 0.01 * read


def estimates(
    rule: str, estimator: GradientEstimator, execution: Execution, objective: MetaObjective | None = None, most: int = 3
) -> list[Estimate]:
    """Return the estimates of one episode, at most so many."""
    make_family, make_rule = RULES[rule]
    family, objective = make_family(), objective or SumOfLosses()
    loop = InnerLoop(family, make_rule(), execution, horizon=HORIZON)
    theta, carry, found = generic_theta(loop.rule), loop.start(sample(family, NUM_TASKS)), []
    while carry is not None and len(found) < most:
        found.append(estimator.estimate(loop, theta, objective, carry))
        carry = found[-1].carry
    return found


def assert_same(found: list[Estimate], expected: list[Estimate], rtol: float = 1e-10) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.grads.keys() == b.grads.keys() and (a.carry is None) == (b.carry is None)
        pairs = [(a.loss, b.loss), (a.info["losses"], b.info["losses"]), *((a.grads[k], b.grads[k]) for k in b.grads)]
        if b.carry is not None:
            pairs += [(a.carry.params[k], b.carry.params[k]) for k in b.carry.params]
        for x, y in pairs:
            torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * 1e-2 * float(torch.linalg.vector_norm(y)))
        # 0 is for what entered through a start that lies behind.
        assert all(g.abs().max() > 1e-9 for k, g in b.grads.items() if k not in b.info.get("zero_gradient", ()))


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> Any:
    """Run what is recorded as it is, without a compiler, which is quick; the list of the records."""
    found: list[Any] = []
    monkeypatch.setattr(programs, "backend", lambda record, example: found.append(record) or record)
    yield found
    assert not any(warning.category is CompileWarning for warning in recwarn)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunk_size", [1, NUM_TASKS])
def test_one_step_serves_an_unroll(rule: str, chunk_size: int, records: list[Any]) -> None:
    expected = estimates(rule, Unrolled(7), Execution(1))
    found = estimates(rule, Unrolled(7), Execution(chunk_size, compile="step"))
    assert_same(found, expected)
    # Two programs serve all steps and tasks of a kind.
    assert len(records) == (4 if rule == "a memory of two precisions" else 2) and found[0].info["compile_seconds"] > 0


@pytest.mark.parametrize(
    ("rule", "num_steps"),
    [
        ("a learned start", 1),
        ("the loss", 1),
        ("memories", 100),
        pytest.param("the horizon", 100, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("chunk_size", [1, NUM_TASKS])
def test_one_step_serves_unrolls_of_any_length(rule: str, num_steps: int, chunk_size: int, records: list[Any]) -> None:
    expected = estimates(rule, Unrolled(num_steps), Execution(1))
    found = estimates(rule, Unrolled(num_steps), Execution(chunk_size, compile="step"))
    assert_same(found, expected, rtol=1e-9)
    assert len(records) == 2


ESTIMATORS: dict[str, tuple[GradientEstimator, MetaObjective]] = {
    "segments": (Unrolled(7, segment=3), SumOfLosses()),
    "segments of one step": (Unrolled(4, segment=1), FinalLoss()),
    "windows": (Truncated(3, 9, Tape.FULL), MeanLogLoss()),
    "first-order windows": (Truncated(3, 6, Tape.FIRST_ORDER), SumOfLosses()),
    "last steps": (TruncatedBackprop(6, 3), SumOfLosses()),
    "a target ahead": (Unrolled(3), BootstrappedTarget(2, 0.2)),
    "no step": (Unrolled(0), FinalLoss()),
    "an objective that reads everything": (Unrolled(5), Weighed()),
}


@pytest.mark.parametrize(
    ("rule", "case"),
    [("a learned start", case) for case in ("segments of one step", "first-order windows", "no step")]
    + [("the loss", case) for case in ("segments", "windows", "first-order windows", "last steps", "a target ahead")]
    + [("flags, counts and a start in the state", case) for case in ("segments", "windows")]
    + [("a learned start", "an objective that reads everything"), ("the horizon", "segments")],
)
@pytest.mark.parametrize("chunk_size", [1, NUM_TASKS])
def test_every_unroll_is_the_same_by_steps(rule: str, case: str, chunk_size: int, records: list[Any]) -> None:
    estimator, objective = ESTIMATORS[case]
    expected = estimates(rule, estimator, Execution(1), objective)
    assert_same(estimates(rule, estimator, Execution(chunk_size, compile="step"), objective), expected)
    assert len(records) == (0 if case == "no step" else 2)


def test_long_unrolls_and_segments_go_by_steps_unless_told_otherwise(records: list[Any]) -> None:
    whole, by_steps = Execution(1, compile=True), STEP
    for estimator, execution, programs_built in (
        (Unrolled(20), whole, 1),
        (Unrolled(21), whole, 2),
        (Unrolled(4, segment=2), whole, 2),
        (Unrolled(2), by_steps, 2),
    ):
        records.clear()
        found = estimates("no state", estimator, execution)
        assert_same(found, estimates("no state", estimator, Execution(1)))
        assert len(records) == programs_built


def test_what_is_compiled_over_one_horizon_serves_all(records: list[Any]) -> None:
    family = TanhMLP()
    first = InnerLoop(family, named("normalised")(), STEP, horizon=9)
    theta, carry = generic_theta(first.rule), first.start(sample(family, 1))
    second = loop_of(first, 0, horizon=5)  # before anything is compiled for either
    for loop in (second, first, loop_of(first, 0, horizon=4)):
        plain = InnerLoop(family, loop.rule, Execution(1), horizon=loop.horizon)
        found, right = (Unrolled(3).estimate(each, theta, SumOfLosses(), carry) for each in (loop, plain))
        assert_same([found], [right])
    assert len(records) == 2 and second.horizon == 5
    with pytest.warns(HorizonWarning, match="past the horizon of 5 steps"):
        Unrolled(6).estimate(second, theta, SumOfLosses(), carry)


def test_steps_keep_where_they_begin_and_segments_only_the_first_of_them(records: list[Any]) -> None:
    make_family, make_rule = RULES["memories"]
    family = make_family()
    theta, carry = generic_theta(make_rule()), InnerLoop(family, make_rule()).start(sample(family, 1))

    def peak(num_steps: int, execution: Execution, segment: int | None = None) -> int:
        loop = InnerLoop(family, make_rule(), execution)
        estimator = Unrolled(num_steps, segment=segment)
        estimator.estimate(loop, theta, FinalLoss(), carry)  # what is done once
        return peak_of(lambda: estimator.estimate(loop, theta, FinalLoss(), carry))

    begun = InnerLoop(family, make_rule()).begin(theta, carry)
    kept = sum(x.numel() * x.element_size() for x in tree.leaves(begun[1:3]))
    batch = sum(x.numel() * x.element_size() for x in family.batch(carry.tasks, 0, "train").values())
    plain, by_steps = (peak(10, x) - peak(6, x) for x in (Execution(1), STEP))
    assert plain > 8 * (kept + batch)
    assert 4 * kept <= by_steps <= 4 * (kept + batch + 8 * 8)  # 8 scalars a step, its loss among them
    assert peak(12, STEP, 4) - peak(8, STEP, 4) <= 2 * kept + 4 * 8 * 8


def test_the_memory_of_steps_is_predicted(records: list[Any]) -> None:
    make_family, make_rule = RULES["memories"]
    family, theta = make_family(), generic_theta(make_rule())
    loop = InnerLoop(family, make_rule(), STEP)
    carry = loop.start(sample(family, 1))
    for estimator in (Unrolled(20), Unrolled(20, segment=5)):
        estimator.estimate(loop, theta, FinalLoss(), carry)
        held = peak_of(lambda estimator=estimator: estimator.estimate(loop, theta, FinalLoss(), carry))
        assert predict_peak(loop, theta, estimator, carry) == pytest.approx(held, rel=0.25)


def failing(record: Any, example: Any) -> Any:
    raise RuntimeError("no compiler here")


def wrong_back(record: Any, example: Any) -> Any:
    """Return a step that is right, and a way back, which has fewer outputs than inputs, that is not."""
    outputs = record(*example)
    is_step = len(outputs) == 4  # three parameters and the losses
    return record if is_step else lambda *inputs: [1.001 * x for x in record(*inputs)]


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (failing, "an inner step is computed uncompiled, because RuntimeError: no compiler here"),
        (
            wrong_back,
            "ArithmeticError: the compiled way back through an inner step, to parameters and state differs by",
        ),
    ],
    ids=["fails", "errs on the way back"],
)
@pytest.mark.parametrize("segment", [None, 2], ids=["whole", "segments"])
def test_a_step_that_cannot_be_compiled_runs_uncompiled_and_says_why(
    backend: Any, reason: str, segment: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator = Unrolled(5, segment=segment)
    monkeypatch.setattr(programs, "backend", backend)
    with pytest.warns(CompileWarning, match=reason) as caught:
        found = estimates("a learned start", estimator, STEP)
    assert len(caught) == 1 and "compile='step'" in str(caught[0].message)
    assert_same(found, estimates("a learned start", estimator, Execution(1)))


def test_what_else_compile_may_be_is_said() -> None:
    with pytest.raises(TypeError, match=r"compile='steps' is neither True nor False nor \"step\""):
        Execution(compile="steps")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compile='step' and mixed_mode=True exclude each other"):
        Execution(compile="step", mixed_mode=True)


@pytest.mark.long
@pytest.mark.parametrize("chunk_size", [1, NUM_TASKS])
def test_a_compiled_step_is_the_same(chunk_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    expected = estimates("the horizon", Unrolled(30), Execution(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileWarning)
        found = estimates("the horizon", Unrolled(30, segment=10), Execution(chunk_size, compile=True))
    assert_same(found, expected, rtol=1e-9)
    assert list(tmp_path.rglob("*.so"))
