"""The predicted peak of an estimate, against the most bytes that torch's allocator holds during one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.results_memory import allocator_peak
from learnedopt import (
    ConjugateGradient,
    Execution,
    FinalLoss,
    GradientEstimator,
    Implicit,
    InnerLoop,
    ModuleFamily,
    SumOfLosses,
    Tape,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    optimizers,
)
from learnedopt.core.objective import MetaObjective
from learnedopt.execution.memory import peak_of, predict_peak

NUM_TASKS = 5
CASES: dict[str, tuple[str, GradientEstimator, MetaObjective, Execution]] = {
    "plain": ("adam", Unrolled(12), FinalLoss(), Execution(1)),
    "plain, all tasks at once": ("adam", Unrolled(12), SumOfLosses(), Execution(NUM_TASKS)),
    "few steps": ("maml", Unrolled(2), FinalLoss(), Execution(1)),
    "no step": ("maml", Unrolled(0), FinalLoss(), Execution(1)),
    "segments": ("adam", Unrolled(20, segment=4), FinalLoss(), Execution(1)),
    "long segments": ("meta-sgd", Unrolled(30, segment=10), SumOfLosses(), Execution(2)),
    "one segment": ("meta-sgd", Unrolled(6, segment=6), FinalLoss(), Execution(1)),
    "window": ("maml", Truncated(10, horizon=20, tape=Tape.FULL), SumOfLosses(), Execution(1)),
    "first order": ("meta-sgd", Unrolled(12, tape=Tape.FIRST_ORDER), SumOfLosses(), Execution(1)),
    "by coordinates": ("adam", Truncated(12, horizon=12), SumOfLosses(), Execution(2)),
    "last steps": ("adam", TruncatedBackprop(14, 7), FinalLoss(), Execution(1)),
}


def data(seed: int, step: int, split: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed % 1000 + 2 * step + (split == "valid"))
    return torch.randn(10, 200, generator=generator), torch.randint(4, (10,), generator=generator)


def family() -> ModuleFamily:
    return ModuleFamily(
        lambda: nn.Sequential(nn.Linear(200, 40), nn.Tanh(), nn.Linear(40, 4)), nn.functional.cross_entropy, data
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_prediction_is_what_the_allocator_holds(
    case: tuple[str, GradientEstimator, MetaObjective, Execution], generator: torch.Generator
) -> None:
    name, estimator, objective, execution = case
    tasks = family().sample(NUM_TASKS, generator)
    rule = optimizers.example(name, {k: p[0] for k, p in family().init_params(tasks).items()})
    loop, theta = InnerLoop(family(), rule, execution), rule.init_theta(generator)
    carry = loop.start(tasks)

    def call() -> None:
        estimator.estimate(loop, theta, objective, carry)

    call()  # what is done once
    held = allocator_peak(call)
    assert predict_peak(loop, theta, estimator, carry, objective) == pytest.approx(held, rel=0.2)
    assert peak_of(call) == pytest.approx(held, rel=0.02)


def test_segments_are_predicted_to_save_memory_and_implicit_is_not_predicted(generator: torch.Generator) -> None:
    tasks = family().sample(1, generator)
    loop = InnerLoop(family(), optimizers.example("adam", {}), Execution(compile=True))
    theta, carry = loop.rule.init_theta(generator), loop.start(tasks)
    whole, pieces = (predict_peak(loop, theta, Unrolled(10_000, segment=n), carry) for n in (None, 100))
    assert whole is not None and pieces is not None and pieces < 0.03 * whole
    assert not len(loop.cache)  # nothing is compiled, or found out, for it
    assert predict_peak(loop, theta, Implicit(5, ConjugateGradient(2)), carry) is None


def test_storage_counts_once_whatever_views_there_are_of_it_and_not_where_it_was_before() -> None:
    before = torch.ones(1000)

    def call() -> None:
        view = before[:500].reshape(50, 10)
        made = view + 1  # 2,000 bytes
        del view
        made.t()[3:].mul_(2)
        more = made.clone()  # as many again
        del made
        more.sum()  # 4

    assert peak_of(call) == 4000
