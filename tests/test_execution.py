"""How tasks are run changes no number: chunks and compiled programs against the plain loop over tasks."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Quadratic, TanhMLP, generic_theta, imaml_loop, sample, template
from torch import Tensor

from learnedopt import (
    BootstrappedTarget,
    CompileWarning,
    ConjugateGradient,
    Estimate,
    Execution,
    FinalLoss,
    FirstOrder,
    GradientEstimator,
    Implicit,
    InnerLoop,
    MeanLogLoss,
    Rollout,
    SumOfLosses,
    Tape,
    Tasks,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Params
from learnedopt.execution import programs
from learnedopt.execution.memory import peak_of

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # Torch's own compiler imports what torch has deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

NUM_TASKS = 3
CASES: dict[str, tuple[str, GradientEstimator, MetaObjective]] = {
    "maml": ("maml", Unrolled(2), FinalLoss()),
    "adam": ("adam", Truncated(2, horizon=4, tape=Tape.FULL), SumOfLosses()),
    "first order": ("meta-sgd", Unrolled(2, tape=Tape.FIRST_ORDER), MeanLogLoss()),
    "bootstrapped": ("meta-sgd", Unrolled(1), BootstrappedTarget(2, 0.2)),
    "last steps": ("learned-rates", TruncatedBackprop(3, 1), FinalLoss()),
}
CHUNKS = {"one by one": 1, "two and one": 2, "all": NUM_TASKS}


class Wide(TanhMLP):
    """On so many points that what a gradient reads is larger than the parameters."""

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        batch = super().batch(tasks, step, split)
        return {"x": batch["x"].repeat(1, 50, 1), "y": batch["y"].repeat(1, 50)}


def episode(name: str, execution: Execution) -> list[Estimate]:
    """Return the estimates of one episode, at most two."""
    rule_name, estimator, objective = CASES[name]
    family = TanhMLP()
    rule = optimizers.example(rule_name, template(family))
    loop, theta = InnerLoop(family, rule, execution), generic_theta(rule)
    carry, found = loop.start(sample(family, NUM_TASKS)), []
    while carry is not None and len(found) < 2:
        found.append(estimator.estimate(loop, theta, objective, carry))
        carry = found[-1].carry
    return found


def assert_same(found: list[Estimate], expected: list[Estimate]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.grads.keys() == b.grads.keys() and (a.carry is None) == (b.carry is None)
        pairs = [(a.loss, b.loss), (a.info["losses"], b.info["losses"]), *((a.grads[k], b.grads[k]) for k in b.grads)]
        if a.carry is not None and b.carry is not None:
            assert a.carry.step == b.carry.step
            pairs += [(a.carry.params[k], b.carry.params[k]) for k in b.carry.params]
        for x, y in pairs:
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
        assert all(g.abs().max() > 1e-6 for g in b.grads.values())


@pytest.fixture
def uncompiled_programs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Run what is recorded as it is, without a compiler, which is quick; return the list of the records."""
    records = []
    monkeypatch.setattr(programs, "backend", lambda record, example: records.append(record) or record)
    return records


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_size", CHUNKS.values(), ids=CHUNKS)
def test_chunks_give_the_same_meta_gradient(name: str, chunk_size: int) -> None:
    assert_same(episode(name, Execution(chunk_size)), episode(name, Execution(1)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_size", CHUNKS.values(), ids=CHUNKS)
def test_mixed_mode_gives_the_same_meta_gradient(name: str, chunk_size: int) -> None:
    assert_same(episode(name, Execution(chunk_size, mixed_mode=True)), episode(name, Execution(1)))


def test_mixed_mode_keeps_parameters_in_place_of_graphs() -> None:
    rule = optimizers.example("maml", template(Wide()))

    def peak(num_steps: int, execution: Execution) -> int:
        loop, theta = InnerLoop(Wide(), rule, execution), generic_theta(rule)
        carry = loop.start(sample(Wide(), 1))
        return peak_of(lambda: Unrolled(num_steps).estimate(loop, theta, FinalLoss(), carry))

    plain, mixed = (peak(9, x) - peak(4, x) for x in (Execution(), Execution(mixed_mode=True)))
    batch = Wide().batch(sample(Wide(), 1), 0, "train")
    params, batch = (sum(x.numel() * x.element_size() for x in y.values()) for y in (template(Wide()), batch))
    assert plain > 5 * (batch + 50 * params)
    assert mixed <= 5 * (batch + 2 * params)


def test_first_order_unrolls_keep_gradients_in_place_of_graphs() -> None:
    rule = optimizers.example("maml", template(Wide()))
    loop, theta = InnerLoop(Wide(), rule), generic_theta(rule)
    carry = loop.start(sample(Wide(), 1))
    few, many = (peak_of(lambda n=n: FirstOrder(n).estimate(loop, theta, SumOfLosses(), carry)) for n in (4, 9))
    params = sum(x.numel() * x.element_size() for x in template(Wide()).values())
    batch = sum(x.numel() * x.element_size() for x in Wide().batch(sample(Wide(), 1), 0, "train").values())
    assert many - few <= 5 * (batch + 3 * params)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_size", CHUNKS.values(), ids=CHUNKS)
def test_the_record_of_a_meta_gradient_gives_the_same(
    name: str, chunk_size: int, uncompiled_programs: list[Any], recwarn: pytest.WarningsRecorder
) -> None:
    found = episode(name, Execution(chunk_size, compile=True))
    assert_same(found, episode(name, Execution(1)))
    sizes = len({min(chunk_size, NUM_TASKS - i) for i in range(0, NUM_TASKS, chunk_size)})
    assert len(uncompiled_programs) == sizes * len(found)  # one program serves all chunks of a size
    assert all(estimate.info["compile_seconds"] > 0 for estimate in found)
    assert not any(warning.category is CompileWarning for warning in recwarn)


def test_factors_that_compilers_drop_are_recorded_as_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "backend", lambda record, example: record)
    a, b, c = (torch.randn(3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))

    def sums(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
        empty = torch.full_like(a, math.nan)
        products = [torch.addmm(a, b, c, beta=2, alpha=3), torch.addmm(empty, b, c, beta=0), a + b @ c]
        in_place = [a.clone().add_(b, alpha=2), a.clone().sub_(b, alpha=2)]
        return [torch.add(a, b, alpha=2), torch.sub(a, b, alpha=3), *products, *in_place]

    record: Any = programs.compiled(sums, (a, b, c))
    torch.testing.assert_close(record(a, b, c), sums(a, b, c))
    factors = [x for node in record.graph.nodes for k, x in node.kwargs.items() if k in ("alpha", "beta")]
    assert all(x == 1 for x in factors) and any("mm" in str(node.target) for node in record.graph.nodes)


@pytest.mark.long
@pytest.mark.parametrize("name", ["maml", "bootstrapped"])
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_compiled_meta_gradient_is_the_same(
    name: str, chunk_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    assert_same(episode(name, Execution(chunk_size, compile=True)), episode(name, Execution(1)))
    assert not any(warning.category is CompileWarning for warning in recwarn)
    assert list(tmp_path.rglob("*.so"))  # kept for the next process


def estimate_twice(
    estimator: GradientEstimator, objective: MetaObjective, *, compile: bool, rule: UpdateRule | None = None
) -> list[Estimate]:
    """Return two estimates of a loop from the same carry."""
    family = TanhMLP()
    rule = rule or optimizers.example("meta-sgd", template(family))
    loop, theta = InnerLoop(family, rule, Execution(1, compile=compile)), generic_theta(rule)
    carry = loop.start(sample(family, NUM_TASKS))
    return [estimator.estimate(loop, theta, objective, carry) for _ in range(2)]


def test_a_program_serves_every_window_and_its_compilation_is_told_once(
    uncompiled_programs: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    rule = optimizers.example("adam", template(TanhMLP()))
    loop, theta = InnerLoop(TanhMLP(), rule, Execution(compile=True)), generic_theta(rule)
    plain = InnerLoop(TanhMLP(), rule)
    estimator, carry = Truncated(2, horizon=8, tape=Tape.FULL), loop.start(sample(TanhMLP()))
    told = []
    with caplog.at_level(logging.INFO, "learnedopt"):
        for _ in range(4):
            expected = estimator.estimate(plain, theta, SumOfLosses(), carry)
            found = estimator.estimate(loop, theta, SumOfLosses(), carry)
            assert_same([found], [expected])
            told.append("compile_seconds" in found.info)
            carry = found.carry or carry
    assert told == [True, True, False, False]  # the first window begins the rule's state as well
    assert len(uncompiled_programs) == 2
    assert [record.message[:8] for record in caplog.records] == ["Compilin", "Compiled"] * 2


def test_what_is_not_compiled_says_why_and_runs(uncompiled_programs: list[Any]) -> None:
    def objective(loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        return rollout.losses.sum(0).mean()

    with pytest.warns(CompileWarning, match="because .*is no TaskMean") as caught:
        found = estimate_twice(Unrolled(2), objective, compile=True)
    assert len(caught) == 1 and not uncompiled_programs
    assert_same(found, estimate_twice(Unrolled(2), objective, compile=False))


def test_a_program_that_ends_in_nan_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "backend", lambda record, example: lambda *x: [math.nan * y for y in record(*x)])
    with pytest.warns(CompileWarning, match="ArithmeticError: the compiled objective differs by nan"):
        found = estimate_twice(Unrolled(2), FinalLoss(), compile=True)
    assert_same(found, estimate_twice(Unrolled(2), FinalLoss(), compile=False))


def failing(record: Any, **options: Any) -> Any:
    raise RuntimeError("no compiler here:\nthe second line\nthe third line")


def wrong(record: Any, **options: Any) -> Any:
    return lambda *inputs: [1.001 * x if x.is_floating_point() else x for x in record(*inputs)]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (failing, "RuntimeError: no compiler here: the second line$"),
        (wrong, "ArithmeticError: the compiled objective differs by .* from the uncompiled"),
    ],
)
def test_a_compiler_that_fails_or_errs_is_told_of_and_not_used(
    compiler: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(programs, "backend", lambda record, example: calls.append(1) or compiler(record))
    with pytest.warns(CompileWarning, match=reason) as caught:
        found = estimate_twice(Unrolled(2), FinalLoss(), compile=True)
    assert len(caught) == len(calls) == 1
    assert_same(found, estimate_twice(Unrolled(2), FinalLoss(), compile=False))


class OutsideTorch(UpdateRule):
    """Descent at a rate that numpy computes: nothing that a record of torch's operations could hold."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(0.1)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, ()

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        scale = {k: float(abs(g.detach().numpy()).max()) for k, g in grads.items()}
        return {k: -theta["lr"] * g / scale[k] for k, g in grads.items()}, state


def test_what_leaves_torch_is_not_recorded_as_a_constant() -> None:
    with pytest.warns(CompileWarning, match="because .*Error"):
        found = estimate_twice(Unrolled(2), FinalLoss(), compile=True, rule=OutsideTorch())
    assert_same(found, estimate_twice(Unrolled(2), FinalLoss(), compile=False, rule=OutsideTorch()))


def test_an_implicit_meta_gradient_says_once_that_it_is_not_compiled() -> None:
    family = Quadratic()
    estimator, theta = Implicit(4, ConjugateGradient(5), tolerance=math.inf), generic_theta(imaml_loop(family))
    results = []
    for execution in (Execution(compile=True), Execution()):
        loop = imaml_loop(family, execution)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                results.append(estimator.estimate(loop, theta, FinalLoss(), loop.start(sample(family, 2))))
        said = [str(w.message) for w in caught if issubclass(w.category, CompileWarning)]
        assert len(said) == int(execution.compile) and all("linear solve" in text for text in said)
    for result in results[1:]:
        assert all(torch.equal(result.grads[k], g) for k, g in results[0].grads.items())
