"""Persistent evolution strategies: unbiased where windows are not, staggered, isolated, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import relative_error
from problems import Quadratic, generic_theta, sample, template
from torch import Tensor
from turns import by_turns

from learnedopt import (
    Execution,
    FinalLoss,
    InnerLoop,
    PersistentES,
    SumOfLosses,
    Tape,
    TaskFamily,
    TaskMean,
    Tasks,
    Theta,
    Truncated,
    Unrolled,
    optimizers,
)
from learnedopt.core import tree
from learnedopt.estimators.persistent import PersistentCarry

pytestmark = pytest.mark.usefixtures("float64")

HORIZON, WINDOW = 8, 2
WINDOWS = HORIZON // WINDOW


class Same(Quadratic):
    """A distribution over one set of tasks: an episode that begins anew is the same problem."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        return super().sample(num_tasks, torch.Generator().manual_seed(5))


def loop_of(family: TaskFamily | None = None, execution: Execution = Execution()) -> InnerLoop:  # noqa: B008 - frozen
    return InnerLoop(family or Same(), optimizers.make("momentum"), execution)


def estimates(
    loop: InnerLoop, estimator: PersistentES, count: int, seed: int = 0, objective: Any = None
) -> tuple[list[Any], PersistentCarry]:
    """Return estimates in a row, and the carry after them."""
    theta, tasks = generic_theta(loop), sample(loop.family)
    carry, found = estimator.start(loop, theta, tasks, torch.Generator().manual_seed(seed)), []
    for _ in range(count):
        found.append(estimator.estimate(loop, theta, objective or SumOfLosses(), carry))
        carry = found[-1].carry
    return found, carry


def exact_and_windows(loop: InnerLoop) -> tuple[Theta, Theta]:
    """Return the gradient of the sum of the windows' objectives through all steps, and the sum of the windows' own."""
    theta, tasks = generic_theta(loop), sample(loop.family)
    exact = Unrolled(HORIZON).estimate(loop, theta, SumOfLosses(), loop.start(tasks)).grads
    carry, total = loop.start(tasks), {k: torch.zeros_like(v) for k, v in theta.items()}
    while carry is not None:
        found = Truncated(WINDOW, HORIZON, Tape.FULL).estimate(loop, theta, SumOfLosses(), carry)
        total, carry = {k: total[k] + found.grads[k] for k in theta}, found.carry
    return exact, total


@pytest.mark.parametrize(
    ("reuse", "num_pairs"),
    by_turns([(False,), (True,)], [(64,), (3,)]),
    ids={False: "fresh noise", True: "noise reuse", 64: "all phases", 3: "fewer pairs than phases"}.get,
)
def test_it_is_unbiased_where_windows_are_off_by_more_than_a_fifth(reuse: bool, num_pairs: int) -> None:
    loop = loop_of()
    exact, windows = exact_and_windows(loop)
    off = {k: float((windows[k] - exact[k]).abs() / exact[k].abs()) for k in exact}
    assert max(off.values()) > 0.2
    runs = []  # of independent seeds: estimates in a row are not
    for seed in range(60):
        found, _ = estimates(loop, PersistentES(WINDOW, HORIZON, num_pairs, 1e-4, reuse_noise=reuse), WINDOWS, seed)
        runs.append({k: torch.stack([e.grads[k] for e in found]).sum() for k in exact})
    told = 0.0
    for k in exact:
        each = torch.stack([run[k] for run in runs])
        error = each.std() / len(runs) ** 0.5
        assert (each.mean() - exact[k]).abs() < 3 * error
        told = max(told, float((each.mean() - windows[k]).abs() / error))
    assert num_pairs < 64 or told > 10  # it could tell


def test_every_estimate_sees_all_parts_of_the_horizon() -> None:
    estimator = PersistentES(WINDOW, HORIZON, 6, 1e-3)
    assert estimator.cohort_sizes == [2, 2, 1, 1]
    _, carry = estimates(loop_of(), estimator, 0)
    for number in range(2 * WINDOWS):
        steps = sorted(cohort.step for cohort in carry.cohorts)
        assert steps == [0, 2, 4, 6]
        assert all((cohort.state is None) == (cohort.step == 0) for cohort in carry.cohorts)
        carry = estimator.estimate(loop_of(), generic_theta(loop_of()), SumOfLosses(), carry).carry
        assert carry.window == WINDOWS + number + 1


def test_an_episode_that_is_over_begins_on_fresh_tasks_with_nothing_remembered() -> None:
    loop = loop_of(Quadratic())
    estimator = PersistentES(WINDOW, HORIZON, 4, 1e-3)
    _, carry = estimates(loop, estimator, WINDOWS)
    first = sample(loop.family)
    episodes = [cohort.episode for cohort in carry.cohorts]
    assert episodes == [1, 1, 1, 1]
    seen = [cohort.tasks["c"] for cohort in carry.cohorts]
    assert all(not torch.equal(c, first["c"]) for c in seen)
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    over = next(cohort for cohort in carry.cohorts if cohort.step == 0)
    assert not any(x.any() for x in over.drift.values())
    for a, b in zip(over.params.values(), loop.family.init_params(over.tasks).values(), strict=True):
        assert torch.equal(a, b)


def test_with_one_window_an_episode_it_is_evolution_strategies() -> None:
    loop = loop_of()
    reused, fresh = (estimates(loop, PersistentES(4, 4, 5, 0.01, reuse_noise=reuse), 3)[0] for reuse in (True, False))
    for a, b in zip(reused, fresh, strict=True):
        assert all(torch.equal(a.grads[k], b.grads[k]) for k in a.grads)


def test_noise_reuse_keeps_its_perturbation_for_an_episode() -> None:
    estimator = PersistentES(WINDOW, HORIZON, 1, 0.01, reuse_noise=True)
    drifts = []
    for count in range(1, WINDOWS + 2):
        _, carry = estimates(loop_of(), estimator, count)
        drifts.append(torch.stack([x[0] for x in carry.cohorts[0].drift.values()]))
    assert all(torch.equal(drifts[0], d) for d in drifts[1 : WINDOWS - 1])
    assert not drifts[WINDOWS - 1].any()  # over
    assert drifts[WINDOWS].any() and not torch.equal(drifts[WINDOWS], drifts[0])


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_pieces_change_nothing(chunk_size: int) -> None:
    estimator = PersistentES(WINDOW, HORIZON, 6, 0.01)
    expected, _ = estimates(loop_of(), estimator, 3)
    found, _ = estimates(loop_of(execution=Execution(chunk_size)), estimator, 3)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a.grads, b.grads) < 1e-9
        assert a.info["gradient_variance"] == pytest.approx(b.info["gradient_variance"], rel=1e-9)


class Squashed(TaskMean):
    """A monotone function of the sum of losses."""

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
        return SumOfLosses()(loop, theta, rollout).log()


def test_ranks_are_those_within_a_cohort() -> None:
    ranked, plain = (PersistentES(WINDOW, HORIZON, 8, 0.01, ranked=ranked) for ranked in (True, False))
    first, squashed = (estimates(loop_of(), ranked, 3, objective=objective)[0] for objective in (None, Squashed()))
    values = estimates(loop_of(), plain, 3)[0]
    for a, b, c in zip(first, squashed, values, strict=True):
        assert all(torch.equal(a.grads[k], b.grads[k]) for k in a.grads)
        assert not any(torch.equal(a.grads[k], c.grads[k]) for k in a.grads)
    (one,), carry = estimates(loop_of(), PersistentES(WINDOW, HORIZON, 1, 0.01, ranked=True), 1)
    for k, drift in carry.cohorts[0].drift.items():  # of a single pair a rank is a sign
        torch.testing.assert_close(one.grads[k].abs(), drift[0].abs() / (2 * 0.01), rtol=1e-12, atol=0)


class Cliff(TaskMean):
    """The final loss, but NaN for particles whose weights have gone below a bound."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
        value = FinalLoss()(loop, theta, rollout)
        return torch.where(rollout.end.params["w"].flatten()[0] < self.bound, torch.nan, value)


def test_pairs_that_are_not_finite_are_left_out_and_counted() -> None:
    loop = loop_of()
    estimator = PersistentES(WINDOW, HORIZON, 8, 0.05)
    _, carry = estimates(loop, estimator, 1)
    ends = torch.cat([c.params["w"][0, :, 0, 0] for c in carry.cohorts if c.state is not None])
    some = Cliff(float(ends.median()))
    theta = generic_theta(loop)
    found = estimator.estimate(loop, theta, some, carry)
    assert 0 < found.info["not_finite"] < 8 and found.loss.isfinite()
    assert all(v.isfinite().all() for v in found.grads.values())
    none = estimator.estimate(loop, theta, Cliff(math.inf), carry)
    assert none.info["not_finite"] == 8 and none.loss.isnan() and all(v.isnan().all() for v in none.grads.values())
    assert none.info["losses"].isnan().all() and "variance" not in none.info


def test_a_particle_that_is_lost_stays_out_until_its_episode_is_over() -> None:
    loop = loop_of()
    estimator = PersistentES(WINDOW, HORIZON, 4, 0.01)
    _, carry = estimates(loop, estimator, 1)
    i = next(i for i, cohort in enumerate(carry.cohorts) if cohort.step == WINDOW)
    params = {k: x.clone() for k, x in carry.cohorts[i].params.items()}
    params["w"][:, 0] = torch.nan
    cohorts = list(carry.cohorts)
    cohorts[i] = cohorts[i]._replace(params=params)
    carry, counts = carry._replace(cohorts=tuple(cohorts)), []
    for _ in range(WINDOWS + 1):
        found = estimator.estimate(loop, generic_theta(loop), SumOfLosses(), carry)
        counts.append(found.info["not_finite"])
        carry = found.carry
        assert all(v.isfinite().all() for v in found.grads.values())
    assert counts == [1] * (WINDOWS - 1) + [0] * 2


def test_a_learned_start_counts_only_where_it_is_used() -> None:
    """Perturbations of it in later windows would only add noise: the sum that a pair remembers is the first one."""
    family = Same()
    loop = InnerLoop(family, optimizers.example("meta-sgd", template(family)))
    estimator = PersistentES(WINDOW, HORIZON, 1, 0.01)
    drifts = [estimates(loop, estimator, count)[1].cohorts[0].drift for count in (1, 2, 3)]
    starts = [k for k in drifts[0] if "init" in k]
    assert starts and len(starts) < len(drifts[0])
    for k in drifts[0]:
        assert torch.equal(drifts[0][k], drifts[1][k]) == torch.equal(drifts[1][k], drifts[2][k]) == (k in starts)


def test_its_carry_grows_with_the_pairs_and_not_with_the_horizon() -> None:
    def numbers(num_pairs: int, horizon: int) -> int:
        _, carry = estimates(loop_of(), PersistentES(WINDOW, horizon, num_pairs, 0.01), 1)
        return sum(x.numel() for cohort in carry.cohorts for x in tree.leaves(cohort[1:3]) if cohort.state is not None)

    assert numbers(32, 8) == 2 * numbers(16, 8)
    assert numbers(3, 200) == numbers(3, 100)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_pairs": 0}, "num_pairs=0"),
        ({"sigma": 0.0}, "sigma=0.0 must be positive"),
        ({"sigma": math.inf}, "sigma=inf must be positive and finite"),
        ({"horizon": 7}, "horizon=7 is not a multiple of the window num_steps=2.*use 6 or 8"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"horizon": 0}, "horizon=0"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PersistentES(**{"num_steps": 2, "horizon": 8, "num_pairs": 4, "sigma": 0.1, **options})


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (PersistentES(2, 8, 5, 0.1), r"holds 4 pairs at 4 phases .* this estimator has 5 at 4"),
        (PersistentES(2, 4, 4, 0.1), r"4 pairs at 4 phases .* has 4 at 2"),
        (PersistentES(3, 12, 4, 0.1), r"stand at the steps \[0, 2, 4, 6\], which are no windows of 3 steps within 12"),
        (PersistentES(1, 4, 4, 0.1), r"which are no windows of 1 steps within 4"),
        (PersistentES(2, 8, 4, 0.2), r"with sigma=0.1 and reuse_noise=False, this estimator has sigma=0.2"),
        (PersistentES(2, 8, 4, 0.1, reuse_noise=True), r"this estimator has sigma=0.1 and reuse_noise=True"),
    ],
    ids=["pairs", "phases", "window", "horizon", "sigma", "reuse"],
)
def test_a_carry_of_another_estimator_is_refused(other: PersistentES, told: str) -> None:
    loop = loop_of()
    _, carry = estimates(loop, PersistentES(2, 8, 4, 0.1), 0)
    with pytest.raises(ValueError, match=told):
        other.estimate(loop, generic_theta(loop), SumOfLosses(), carry)


def test_a_carry_of_another_kind_or_theta_is_refused() -> None:
    loop = loop_of()
    estimator = PersistentES(2, 8, 4, 0.1)
    with pytest.raises(TypeError, match="a carry of its own, got a Carry"):
        estimator.estimate(loop, generic_theta(loop), SumOfLosses(), loop.start(sample(loop.family)))
    _, carry = estimates(loop, estimator, 0)
    other = InnerLoop(Same(), optimizers.make("sgd"))
    with pytest.raises(ValueError, match=r"perturbations are of a theta of shapes .*'momentum'.* this one has \{'lr'"):
        estimator.estimate(other, generic_theta(other), SumOfLosses(), carry)


def test_an_objective_is_asked_of_a_window_and_not_of_the_horizon() -> None:
    weights = torch.arange(1.0, 1 + WINDOW)

    def weighted(loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
        return (weights[:, None] * rollout.losses).sum(0).mean()

    found, _ = estimates(loop_of(), PersistentES(WINDOW, HORIZON, 4, 0.01), 2, objective=weighted)
    assert all(v.isfinite().all() for v in found[1].grads.values())


def test_theta_of_integers_is_refused_at_the_start() -> None:
    loop = loop_of()
    theta = {k: v.long() for k, v in generic_theta(loop).items()}
    with pytest.raises(ValueError, match="int64"):
        PersistentES(2, 8, 4, 0.1).start(loop, theta, sample(loop.family), torch.Generator().manual_seed(0))


def test_the_seed_decides_and_nothing_global_is_drawn() -> None:
    before = torch.get_rng_state()
    first, again, other = (estimates(loop_of(), PersistentES(2, 8, 4, 0.1), 3, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a.grads[k], b.grads[k]) for a, b in zip(first, again, strict=True) for k in a.grads)
    assert not torch.equal(first[0].grads["lr"], other[0].grads["lr"])
