"""One bad task does not cost the meta-batch: the others' estimate is theirs alone, and the failed one is named."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from bad_tasks import Failing, Steep
from problems import Mix, Quadratic, TanhMLP, newcomers

from learnedopt import (
    Combined,
    ConjugateGradient,
    EvolutionStrategies,
    Execution,
    FinalLoss,
    ForwardMode,
    Implicit,
    InnerLoop,
    PersistentES,
    Proximal,
    SumOfLosses,
    TaskByTask,
    Truncated,
    Unrolled,
    optimizers,
)
from learnedopt.core.carry import Rollout
from learnedopt.core.estimator import GradientEstimator
from learnedopt.core.objective import TaskMean
from learnedopt.estimators.implicit import ConvergenceWarning
from learnedopt.estimators.registry import ESTIMATORS as REGISTERED
from learnedopt.training.faults import Fault
from learnedopt.training.isolation import Found, estimate_finite, opened, remaining

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch's own forward mode
]
NUM_TASKS, BAD = 6, (1, 4)
GOOD = tuple(i for i in range(NUM_TASKS) if i not in BAD)
ESTIMATORS: dict[str, GradientEstimator] = {
    "unrolled": Unrolled(3),
    "truncated": Truncated(2, horizon=8),
    "forward in windows": ForwardMode(2, horizon=8),
    "es": EvolutionStrategies(3, num_pairs=3, sigma=0.05),
    "es in windows": EvolutionStrategies(2, num_pairs=3, sigma=0.05, horizon=8),
    "pes": PersistentES(2, horizon=8, num_pairs=3, sigma=0.05),
    "task by task": TaskByTask(Unrolled(3)),
}
OF_OTHER_TESTS = ("TruncatedBackprop", "Implicit", "Combined")
ESTIMATORS |= newcomers(REGISTERED, ESTIMATORS.values(), 3, besides=OF_OTHER_TESTS)


def loop_on(family: Any, chunk_size: int | None = None) -> InnerLoop:
    return InnerLoop(family, optimizers.make("momentum", lr=0.1), Execution(chunk_size=chunk_size))


def start(estimator: GradientEstimator, loop: InnerLoop, num_tasks: int = NUM_TASKS) -> tuple[Any, Any]:
    theta = {k: v.requires_grad_() for k, v in loop.init_theta(torch.Generator().manual_seed(1)).items()}
    generator = torch.Generator().manual_seed(2)
    return theta, estimator.start(loop, theta, loop.family.sample(num_tasks, generator), generator)


def only(estimator: GradientEstimator, carry: Any, places: tuple[int, ...]) -> Any:
    return estimator.join([estimator.narrow(carry, i, i + 1) for i in places])


@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_estimate_is_that_of_the_finite_tasks_alone_window_after_window(name: str, chunk_size: int | None) -> None:
    estimator = ESTIMATORS[name]
    # In the second window, so that the first one's carry is cut; the cohorts of PES come to it at their own times.
    loop = loop_on(Failing(at=1 if name in ("unrolled", "es", "task by task") else 3, listed=BAD), chunk_size)
    theta, carry = start(estimator, loop)
    alone, places = only(estimator, carry, GOOD), tuple(range(NUM_TASKS))
    named = set()
    for _ in range(3):
        found = estimate_finite(estimator, loop, theta, SumOfLosses(), carry, places)
        if not named and not found.failures:  # nobody has failed so far
            alone = only(estimator, found.estimate.carry, GOOD)
            carry, places = found.estimate.carry, found.places
            continue
        expected = estimator.estimate(loop, theta, SumOfLosses(), alone)
        assert expected.finite
        named |= {failure.position for failure in found.failures}
        if name != "pes":
            assert found.weight == len(GOOD) and named == {*BAD}
            torch.testing.assert_close(found.estimate.loss, expected.loss, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(found.estimate.grads, expected.grads, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.estimate.info["losses"], expected.info["losses"], rtol=1e-12, atol=1e-12)
        if expected.carry is None:
            break
        carry, alone, places = found.estimate.carry, expected.carry, found.places
    assert named == {*BAD}


def test_a_failed_task_costs_no_cohort_of_pes() -> None:
    estimator = PersistentES(2, horizon=8, num_pairs=4, sigma=0.05)
    loop = loop_on(Failing(at=5, listed=BAD))
    theta, carry = start(estimator, loop)
    counts = []
    for _ in range(6):
        found = estimate_finite(estimator, loop, theta, SumOfLosses(), carry, range(NUM_TASKS))
        counts.append(found.estimate.info.get("failed_tasks", 0.0))
        assert found.weight == NUM_TASKS - counts[-1] and found.places == tuple(range(NUM_TASKS))
        assert [failure.position for failure in found.failures] == [*BAD]
        carry = found.estimate.carry
    # Two of six tasks in two of four cohorts: in one they have just come to step 5, in the other before.
    assert counts == [1.0] * 6


@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_a_cohort_with_failed_tasks_has_the_mean_of_the_others(micro_batch: int | None) -> None:
    estimator = PersistentES(2, horizon=8, num_pairs=1, sigma=0.05)  # one cohort
    loop = loop_on(Failing(at=3, listed=BAD))
    theta, carry = start(estimator, loop)
    alone, places = only(estimator, carry, GOOD), tuple(range(NUM_TASKS))
    for window in range(6):  # the episode ends after four: then there are fresh tasks, as many as ever
        found = estimate_finite(estimator, loop, theta, SumOfLosses(), carry, places, micro_batch=micro_batch)
        expected = estimator.estimate(loop, theta, SumOfLosses(), alone)
        assert found.places == places  # a failed one is back with its next episode, also where it has a share alone
        if window == 0 or window >= 4:
            assert not found.failures if window != 5 else found.failures
        if 1 <= window < 4:
            assert found.weight == len(GOOD)
            torch.testing.assert_close(found.estimate.loss, expected.loss, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(found.estimate.grads, expected.grads, rtol=1e-12, atol=1e-12)
        assert len(found.failures) == (2 if window in (1, 5) else 0)
        carry, alone = found.estimate.carry, expected.carry


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
def test_the_first_tensor_is_named_with_its_step_and_the_tasks_seed(together: bool) -> None:
    loop = loop_on(Failing(at=2, listed=BAD), 8 if together else None)
    estimator = Unrolled(4)
    theta, carry = start(estimator, loop)
    seeds = carry.tasks["seed"].tolist()
    found = estimate_finite(estimator, loop, theta, FinalLoss(), carry, range(10, 16))
    assert found.places == (10, 12, 13, 15)
    assert found.failures == [(10 + i, Fault("batch['c']", 2, seeds[i])) for i in BAD]
    assert str(found.failures[0].fault) == f"batch['c'] at inner step 2 (task seed {seeds[1]})"
    assert found.estimate.info["failed_tasks"] == 2 and found.estimate.info["inner_steps"] == 16


def test_a_slope_that_is_not_finite_is_named_by_its_parameter() -> None:
    loop = loop_on(Steep(at=1, listed=(2,)))
    loop = InnerLoop(loop.family, loop.rule, Execution(vet=False))
    theta, carry = start(Unrolled(3), loop)
    found = estimate_finite(Unrolled(3), loop, theta, FinalLoss(), carry, range(NUM_TASKS))
    assert found.failures == [(2, Fault("grads['b']", 1, None))]


class Blunt(TaskMean):
    """The loss at the end; of a task that starts right of zero its slope is not finite."""

    end_only = False

    def __call__(self, loop: InnerLoop, theta: Any, rollout: Rollout) -> torch.Tensor:
        left = rollout.start.params["b"].detach().flatten() < 0
        losses = loop.losses(theta, rollout.end, "valid")
        return (losses + (left * (losses - losses.detach())).sqrt() * 0 + (~left) * 0).mean()


def test_a_meta_gradient_that_alone_is_not_finite_is_named_as_such() -> None:
    loop = loop_on(Quadratic())
    theta, carry = start(Unrolled(3), loop)
    found = estimate_finite(Unrolled(3), loop, theta, Blunt(), carry, range(NUM_TASKS))
    assert not found.estimate.finite and found.weight == 0 and found.places == ()
    assert [failure.position for failure in found.failures] == list(range(NUM_TASKS))
    assert all("meta-gradient" in failure.fault.tensor and failure.fault.step is None for failure in found.failures)


def test_the_estimate_of_a_finite_meta_batch_is_taken_once_and_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = loop_on(Failing(at=9, listed=BAD))
    theta, carry = start(Unrolled(3), loop)
    expected = Unrolled(3).estimate(loop, theta, FinalLoss(), carry)
    calls = []
    estimate = Unrolled.estimate
    monkeypatch.setattr(Unrolled, "estimate", lambda self, *given: calls.append(1) or estimate(self, *given))
    found = estimate_finite(Unrolled(3), loop, theta, FinalLoss(), carry, range(NUM_TASKS))
    assert calls == [1] and found.weight == NUM_TASKS and not found.failures
    torch.testing.assert_close(found.estimate.grads, expected.grads, rtol=0, atol=0)
    assert "failed_tasks" not in found.estimate.info
    whole = estimate_finite(
        Unrolled(3), loop_on(Failing(at=0, listed=BAD)), theta, FinalLoss(), carry, range(6), apart=False
    )
    assert len(calls) == 2 and not whole.estimate.finite and whole.weight == NUM_TASKS and not whole.failures


def test_ranks_with_and_without_failures_come_to_the_same_mean() -> None:
    loop, estimator = loop_on(Failing(at=1, listed=(0, 1, 4))), Unrolled(3)
    theta, carry = start(estimator, loop)
    whole = estimate_finite(estimator, loop, theta, FinalLoss(), carry, range(NUM_TASKS))
    shares: list[Found] = []
    for first, last in ((0, 2), (2, 4), (4, 6)):  # all fail, none, one
        share = estimator.narrow(carry, first, last)
        shares.append(estimate_finite(estimator, loop, theta, FinalLoss(), share, range(first, last)))
    weights = [each.weight for each in shares]
    assert weights == [0.0, 2, 1] and whole.weight == 3
    total = sum(w * each.estimate.grads["lr"] for w, each in zip(weights, shares, strict=True) if w)
    torch.testing.assert_close(total / sum(weights), whole.estimate.grads["lr"], rtol=1e-13, atol=0)
    assert [f for each in shares for f in each.failures] == whole.failures


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_are_isolated_as_well(micro_batch: int) -> None:
    loop, estimator = loop_on(Failing(at=1, listed=BAD), 8), Truncated(3, horizon=9)
    theta, carry = start(estimator, loop)
    whole = estimate_finite(estimator, loop, theta, SumOfLosses(), carry, range(NUM_TASKS))
    found = estimate_finite(estimator, loop, theta, SumOfLosses(), carry, range(NUM_TASKS), micro_batch=micro_batch)
    torch.testing.assert_close(found.estimate.grads, whole.estimate.grads, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.estimate.carry, whole.estimate.carry, rtol=1e-12, atol=1e-12)
    assert found[1:] == whole[1:] and found.estimate.info["failed_tasks"] == 2


def test_tasks_that_an_estimator_leaves_out_as_too_steep_have_not_failed() -> None:
    loop = loop_on(Failing(at=1, listed=(0,)))
    theta, carry = start(TaskByTask(Unrolled(3)), loop)
    for drop_above in (1e-9, 1e3):  # all that are finite, and none of them
        estimator = TaskByTask(Unrolled(3), drop_above=drop_above)
        for micro_batch in (None, 1):
            found = estimate_finite(
                estimator, loop, theta, SumOfLosses(), carry, range(NUM_TASKS), micro_batch=micro_batch
            )
            assert [failure.position for failure in found.failures] == [0]
            assert found.estimate.info["failed_tasks"] == 1
            assert found.weight == (0 if drop_above < 1 else NUM_TASKS - 1)
            assert found.estimate.finite == (drop_above > 1)


def test_what_cannot_be_told_apart_leaves_no_finite_mean_with_others() -> None:
    loop, estimator = loop_on(Failing(at=1, listed=(0,))), Unrolled(3)
    theta, carry = start(estimator, loop)
    found = estimate_finite(estimator, loop, theta, SumOfLosses(), carry, range(NUM_TASKS), micro_batch=2, apart=False)
    assert not found.estimate.finite and found.weight == NUM_TASKS and found.places == tuple(range(NUM_TASKS))


def test_what_knows_no_shares_is_skipped_as_a_whole() -> None:
    estimator = Combined(Unrolled(3), EvolutionStrategies(3, 2, 0.05))
    loop = loop_on(Failing(at=1, listed=(0, 1, 2, 3, 4, 5)))
    loop = InnerLoop(loop.family, loop.rule, Execution(vet=False))
    theta, carry = start(estimator, loop)
    found = estimate_finite(estimator, loop, theta, FinalLoss(), carry, range(NUM_TASKS))
    assert found.weight == NUM_TASKS and found.failures == []
    assert math.isnan(float(found.estimate.loss))


def test_a_part_of_two_that_leaves_out_all_of_its_tasks_leaves_the_other_parts() -> None:
    estimator = Combined(Unrolled(1), EvolutionStrategies(3, 2, 0.05))  # the longer one alone comes to where tasks fail
    loop = loop_on(Failing(at=2, listed=tuple(range(NUM_TASKS))))
    loop = InnerLoop(loop.family, loop.rule, Execution(vet=False))
    theta, carry = start(estimator, loop)
    found = estimate_finite(estimator, loop, theta, SumOfLosses(), carry, range(NUM_TASKS))
    assert found.estimate.finite and found.weight == NUM_TASKS and found.failures == []
    assert found.estimate.info["failed_tasks_perturbed"] == NUM_TASKS and "failed_tasks" not in found.estimate.info


def test_a_ranked_estimator_names_the_task_that_it_leaves_out() -> None:
    estimator = EvolutionStrategies(3, 3, 0.05, ranked=True)
    loop = loop_on(Failing(at=1, listed=(4,)))
    theta, carry = start(estimator, loop)
    found = estimate_finite(estimator, loop, theta, FinalLoss(), carry, range(NUM_TASKS))
    assert found.estimate.finite and found.weight == 5
    assert found.failures == [(4, Fault("batch['c']", 1, int(carry.inner.tasks["seed"][4])))]


def test_what_is_left_of_a_meta_batch_is_kept_with_its_places() -> None:
    assert opened(remaining("carry", (0, 1, 2), 3), 3) == ("carry", (0, 1, 2))
    assert opened(remaining("carry", (0, 2), 3), 3) == ("carry", (0, 2))
    assert remaining(None, (0, 2), 3) is None


def test_a_failed_solution_of_an_inner_problem_is_left_out_of_an_implicit_gradient() -> None:
    template = {k: v[0] for k, v in Quadratic().init_params(Quadratic().sample(1, torch.Generator())).items()}
    rule = optimizers.make("maml", lr=0.25, template=template)
    loop = InnerLoop(Failing(at=150, listed=BAD), rule, inner_objective=Proximal(template, 1.0))
    estimator = Implicit(200, ConjugateGradient(30), tolerance=math.inf)  # of a failed one it would warn
    theta, carry = start(estimator, loop)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = estimate_finite(estimator, loop, theta, FinalLoss(), carry, range(NUM_TASKS))
    expected = estimator.estimate(loop, theta, FinalLoss(), only(estimator, carry, GOOD))
    torch.testing.assert_close(found.estimate.grads, expected.grads, rtol=1e-12, atol=1e-12)
    assert [(x.position, x.fault.tensor, x.fault.step) for x in found.failures] == [(i, "batch['c']", 150) for i in BAD]


def test_a_task_of_a_mixture_is_named_with_its_horizon_and_perturbations_as_in_the_whole_batch() -> None:
    estimator = TaskByTask(Unrolled(3), ((3, 0.5), (5, 0.5)), EvolutionStrategies(3, 2, 0.05), exact_up_to=3)
    loop = loop_on(Mix(Failing(at=2, listed=(0,)), TanhMLP()))  # of each sample of one, the first
    theta, carry = start(estimator, loop)
    bad = tuple(carry.tasks["member"].eq(0).nonzero().flatten().tolist())
    good = tuple(i for i in range(NUM_TASKS) if i not in bad)
    assert len(bad) > 1 and len(good) > 1
    found = estimate_finite(estimator, loop, theta, SumOfLosses(), carry, range(NUM_TASKS), micro_batch=2)
    expected = estimator.estimate(loop, theta, SumOfLosses(), only(estimator, carry, good))
    torch.testing.assert_close(found.estimate.grads, expected.grads, rtol=1e-12, atol=1e-12)
    assert found.weight == len(good) and tuple(x.position for x in found.failures) == bad
    assert {(x.fault.tensor, x.fault.step) for x in found.failures} == {("batch['c']", 2)}


def test_targets_of_the_valid_split_are_named_as_such() -> None:
    class Unseen(Failing):
        """Only the objective sees it."""

        def batch(self, tasks: Any, step: int, split: Any) -> Any:
            return super().batch(tasks, step if split == "valid" else 0, split)

    loop = loop_on(Unseen(at=3, listed=BAD))
    theta, carry = start(Unrolled(3), loop)
    found = estimate_finite(Unrolled(3), loop, theta, FinalLoss(), carry, range(NUM_TASKS))
    assert [(x.fault.tensor, x.fault.step) for x in found.failures] == [("valid_batch['c']", 3)] * 2
