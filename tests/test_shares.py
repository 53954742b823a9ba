"""A meta-batch in shares: every estimator's estimate is the weighted mean of the shares' own, window after window."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from problems import Mix, Quadratic, TanhMLP, newcomers
from torch import Tensor

from learnedopt import (
    Carry,
    Combined,
    ConjugateGradient,
    EvolutionStrategies,
    FinalLoss,
    ForwardMode,
    Implicit,
    InnerLoop,
    PersistentES,
    Proximal,
    SumOfLosses,
    TaskByTask,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    optimizers,
)  # fmt: skip
from learnedopt.core.carry import Tape
from learnedopt.core.estimator import Estimate, GradientEstimator
from learnedopt.estimators.registry import ESTIMATORS as REGISTERED
from learnedopt.training import carries, meta_batch
from learnedopt.training.isolation import Found
from learnedopt.training.rank_carries import part_of_task
from learnedopt.training.rank_estimates import Share, Summing
from learnedopt.training.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own forward mode

ESTIMATORS: dict[str, GradientEstimator] = {
    "unrolled": Unrolled(3),
    "first order": Unrolled(3, tape=Tape.FIRST_ORDER, segment=2),
    "truncated": Truncated(2, horizon=6),
    "truncated backprop": TruncatedBackprop(4, 2),
    "implicit": Implicit(200, ConjugateGradient(30)),
    "forward": ForwardMode(2),
    "forward in windows": ForwardMode(2, horizon=6),
    "es": EvolutionStrategies(3, num_pairs=3, sigma=0.05),
    "es in windows": EvolutionStrategies(2, num_pairs=3, sigma=0.05, horizon=6),
    "pes": PersistentES(2, horizon=6, num_pairs=4, sigma=0.05),
    "pes of one noise": PersistentES(2, horizon=4, num_pairs=3, sigma=0.05, reuse_noise=True),
    "task by task": TaskByTask(
        Unrolled(2), ((2, 0.5), (3, 0.5)), EvolutionStrategies(2, 2, 0.05), exact_up_to=2, max_task_grad_norm=3.0
    ),
}
ESTIMATORS |= newcomers(REGISTERED, ESTIMATORS.values(), 3, besides=["Combined"])
NUM_TASKS = 5


def problem(name: str) -> tuple[InnerLoop, Any]:
    if name == "implicit":
        family = Quadratic(drift=0.0)
        tasks = family.sample(1, torch.Generator().manual_seed(5))
        template = {k: v[0] for k, v in family.init_params(tasks).items()}
        rule = optimizers.make("maml", lr=0.25, template=template)
        return InnerLoop(family, rule, inner_objective=Proximal(template, 1.0)), FinalLoss()
    family = Mix(Quadratic(), TanhMLP()) if name == "task by task" else Quadratic()
    return InnerLoop(family, optimizers.make("momentum", lr=0.1)), SumOfLosses()


def split(estimator: GradientEstimator, carry: Any, num_shares: int) -> list[Any]:
    """Return a carry in shares of its tasks; a single one is the carry itself."""
    if num_shares == 1:
        return [carry]
    bounds = meta_batch.bounds(estimator.count_tasks(carry), num_shares)
    return [estimator.narrow(carry, *each) for each in bounds]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_shares", [1, 3])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_estimate_is_the_weighted_mean_of_the_shares(name: str, num_shares: int) -> None:
    estimator, (loop, objective) = ESTIMATORS[name], problem(name)
    theta = loop.init_theta(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    whole = estimator.start(loop, theta, loop.family.sample(NUM_TASKS, generator), generator)
    parts = split(estimator, whole, num_shares)
    windows = 0
    for _ in range(5):  # across the ends of episodes of PES, which draws fresh tasks
        expected = estimator.estimate(loop, theta, objective, whole)
        found = [estimator.estimate(loop, theta, objective, part) for part in parts]
        sizes = [estimator.count_tasks(part) for part in parts]
        assert sum(sizes) == NUM_TASKS and max(sizes) - min(sizes) <= 1
        together = meta_batch.weighted_mean(estimator, found, sizes)
        assert_same(together, expected, exactly=num_shares == 1)
        whole, parts = expected.carry, [each.carry for each in found]
        assert_carries_agree(together.carry, whole)
        windows += 1
        if whole is None:
            break
        theta = {k: v * 0.99 for k, v in theta.items()}
    expected_windows = {"truncated": 3, "forward in windows": 3, "es in windows": 3, "pes": 5, "pes of one noise": 5}
    assert windows == expected_windows.get(name, 1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bounds", [[(0, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)]], ids=["two", "three"])
@pytest.mark.parametrize("name", ["es", "es in windows", "pes"])
def test_the_estimate_of_a_task_is_the_weighted_mean_of_its_parts(name: str, bounds: list[tuple[int, int]]) -> None:
    estimator, (loop, objective) = ESTIMATORS[name], problem(name)
    theta = loop.init_theta(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    whole = estimator.start(loop, theta, loop.family.sample(1, generator), generator)
    parts = [estimator.narrow_parts(whole, *each) for each in bounds]
    assert estimator.num_parts == 3 and not estimator.is_part(whole)
    for _ in range(5):
        assert all(estimator.is_part(each) and estimator.count_tasks(each) == 1 for each in parts)
        expected = estimator.estimate(loop, theta, objective, whole)
        found = [estimator.estimate(loop, theta, objective, each) for each in parts]
        weights = [each.info["num_tasks"] for each in found]
        assert weights == pytest.approx([(stop - start) / 3 for start, stop in bounds])
        grads = {k: meta_batch.mean_of([each.grads[k] for each in found], weights) for k in theta}
        torch.testing.assert_close(grads, expected.grads, rtol=1e-12, atol=1e-12)
        whole, parts = expected.carry, [each.carry for each in found]
        if whole is None:
            assert parts == [None] * len(bounds)
            break
        assert_carries_agree(estimator.join_parts(parts), whole)
        theta = {k: v * 0.99 for k, v in theta.items()}


@pytest.mark.usefixtures("float64")
def test_parts_that_are_none_or_not_all_are_refused() -> None:
    loop, _ = problem("es")
    theta = loop.init_theta(torch.Generator())
    for name in ("es", "pes"):
        estimator = ESTIMATORS[name]
        carry = estimator.start(loop, theta, loop.family.sample(1, torch.Generator()), torch.Generator())
        one, last = estimator.narrow_parts(carry, 0, 1), estimator.narrow_parts(carry, 2, 3)
        for parts in ([one, last], [last], [one], [carry], [last, one]):
            with pytest.raises(ValueError, match="are not all of the 3 there are"):
                estimator.join_parts(parts)
        with pytest.raises(ValueError, match="no share of a meta-batch of 3"):
            estimator.narrow_parts(carry, 1, 4)
    with pytest.raises(ValueError, match="Unrolled of a single task cannot be cut"):
        Unrolled(1).narrow_parts(loop.start(loop.family.sample(1, torch.Generator())), 0, 1)
    with pytest.raises(ValueError, match=r"EvolutionStrategies\(ranked=True\)"):
        ranked = EvolutionStrategies(2, 2, 0.1, ranked=True)
        ranked.narrow_parts(carry, 0, 1)


@pytest.mark.parametrize("num_parts", [1, 3, 4])
def test_tasks_and_parts_are_shared_as_evenly_as_can_be(num_parts: int) -> None:
    for num_tasks in (1, 2, 3):
        for size in range(num_tasks + 1, num_tasks * num_parts + 1):
            shares = [part_of_task(Ranks(rank, size), num_tasks, num_parts) for rank in range(size)]
            units = [(task, i) for task, start, stop in shares for i in range(start, stop)]
            assert units == [(task, i) for task in range(num_tasks) for i in range(num_parts)]
            assert all(stop > start for _, start, stop in shares)


def assert_same(found: Estimate, expected: Estimate, *, exactly: bool = False) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.loss, expected.loss, **tolerance)
    torch.testing.assert_close(found.grads, expected.grads, **tolerance)
    assert all(g.abs().sum() > 0 for g in expected.grads.values())
    told = {k for k, v in expected.info.items() if k not in meta_batch.OF_ALL}
    assert told == found.info.keys() - {*meta_batch.OF_ALL}
    for key in told - {"residual", "stationarity"}:
        torch.testing.assert_close(found.info[key], expected.info[key], **tolerance)


def assert_carries_agree(found: Any, expected: Any) -> None:
    pairs = zip(carries.leaves(found), carries.leaves(expected), strict=True)
    for (path, x), (other, y) in pairs:
        assert path == other and type(x) is type(y)
        if isinstance(x, Tensor):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        else:
            assert x == y, path


@pytest.mark.usefixtures("float64")
def test_an_episode_goes_on_over_fewer_tasks_when_one_is_left_out() -> None:
    for name in ("truncated", "forward in windows", "es in windows", "pes"):
        estimator, (loop, objective) = ESTIMATORS[name], problem(name)
        theta = loop.init_theta(torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        carry = estimator.start(loop, theta, loop.family.sample(NUM_TASKS, generator), generator)
        carry = estimator.estimate(loop, theta, objective, carry).carry
        alone = [estimator.narrow(carry, i, i + 1) for i in range(NUM_TASKS)]
        kept = estimator.join([alone[0], *alone[2:]])
        found = estimator.estimate(loop, theta, objective, kept)
        each = [estimator.estimate(loop, theta, objective, alone[i]) for i in (0, 2, 3, 4)]
        assert estimator.count_tasks(kept) == 4
        assert_same(found, meta_batch.weighted_mean(estimator, each, [1] * 4))


def test_what_cannot_be_split_says_so_by_name() -> None:
    loop, _ = problem("unrolled")
    theta = loop.init_theta(torch.Generator())
    tasks = loop.family.sample(4, torch.Generator())
    refused = {
        "Combined cannot be estimated in shares": Combined(Unrolled(2), ESTIMATORS["es"]),
        r"EvolutionStrategies\(ranked=True\) cannot": EvolutionStrategies(2, 2, 0.1, ranked=True),
        r"PersistentES\(ranked=True\) cannot": PersistentES(2, 4, 2, 0.1, ranked=True),
        r"carry holds a tensor \(3,\) beside its Carries.*let Mine say so": Mine(),
    }
    for message, estimator in refused.items():
        carry = estimator.start(loop, theta, tasks, torch.Generator())
        with pytest.raises(ValueError, match=message):
            split(estimator, carry, 2)


class Mine(GradientEstimator):
    """Whose carry holds something that is of one task or of all."""

    def start(self, loop: Any, theta: Any, tasks: Any, generator: Any) -> Any:
        return {"inner": loop.start(tasks), "seed": 3, "noise": torch.zeros(3)}

    def estimate(self, loop: Any, theta: Any, objective: Any, carry: Any) -> Estimate:
        raise NotImplementedError


class Nest(NamedTuple):
    pair: tuple[Carry, float]
    none: None


def test_a_nest_of_carries_and_numbers_is_cut_by_itself() -> None:
    loop, _ = problem("unrolled")
    tasks = loop.family.sample(4, torch.Generator())
    nest = Nest((loop.start(tasks), 0.5), None)
    estimator = Mine()
    parts = split(estimator, nest, 3)
    assert [estimator.count_tasks(part) for part in parts] == [2, 1, 1] and isinstance(parts[0], Nest)
    assert_carries_agree(estimator.join(parts), nest)
    other = parts[1]._replace(pair=(parts[1].pair[0], 0.6))
    with pytest.raises(ValueError, match="differ in a number that is of all tasks"):
        estimator.join([parts[0], other])
    ahead = parts[1]._replace(pair=(parts[1].pair[0]._replace(step=1), 0.5))
    with pytest.raises(ValueError, match="differ in a step"):
        estimator.join([parts[0], ahead])


def test_shares_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="4 tasks cannot be cut into 5 shares"):
        meta_batch.bounds(4, 5)
    loop, _ = problem("unrolled")
    carry = loop.start(loop.family.sample(4, torch.Generator()))
    for start, stop in ((2, 2), (-1, 2), (3, 5)):
        with pytest.raises(ValueError, match="no share of a meta-batch of 4"):
            Unrolled(1).narrow(carry, start, stop)
    with pytest.raises(ValueError, match="is over for some of its tasks"):
        meta_batch.join(Unrolled(1), [carry, None])


@pytest.mark.usefixtures("float64")
def test_a_carry_of_before_is_of_all_tasks() -> None:
    for name in ("pes", "task by task"):
        estimator, (loop, objective) = ESTIMATORS[name], problem(name)
        theta = loop.init_theta(torch.Generator().manual_seed(1))
        carry = estimator.start(loop, theta, loop.family.sample(3, torch.Generator()), torch.Generator())
        kind, keys, children = carries.pack(carry, torch.device("cpu"))
        later = len(keys) - keys.index("places")
        old = carries.unpack([kind, keys[:-later], children[:-later]], carries.classes_of(carry), torch.device("cpu"))
        assert old == carry._replace(places=None, **{k: getattr(old, k) for k in keys[:1]})
        found, expected = (estimator.estimate(loop, theta, objective, x) for x in (old, carry))
        torch.testing.assert_close(found.grads, expected.grads, rtol=0, atol=0)
        with pytest.raises(ValueError, match="has the fields"):
            carries.unpack(
                [kind, keys[: -later - 1], children[: -later - 1]], carries.classes_of(carry), torch.device("cpu")
            )


def test_reports_of_shares_are_put_together_by_what_they_are() -> None:
    first = {"losses": torch.tensor([1.0, 2.0]), "inner_steps": 4, "residual": 0.1, "rate": 2.0, "zero_gradient": ["a"]}
    second = {"losses": torch.tensor([3.0, 6.0]), "inner_steps": 2, "residual": 0.3, "rate": 4.0, "alone": 1.0}
    found = meta_batch.mean_info([first, second], [0.75, 0.25])
    torch.testing.assert_close(found.pop("losses"), torch.tensor([1.5, 3.0]))
    assert found == {"inner_steps": 6, "residual": 0.3, "rate": 2.5}


class Echo:
    """Two ranks, of which the other one has no tasks left."""

    alone, size, rank = False, 2, 0

    def sum(self, numbers: Tensor, what: str) -> Tensor:
        return numbers

    def everyones(self, value: Any, what: str) -> list[Any]:
        return [value, type(value)()]


def test_ranks_report_numbers_of_any_name_and_fractions_of_failed_tasks() -> None:
    theta = {"lr": torch.ones(2)}
    info = {"failed_tasks": 0.5, "two words": 3, "rate": 0.25, "losses": torch.tensor([2.0, 1.0])}
    estimate = Estimate(torch.tensor(2.0), {"lr": torch.tensor([1.0, 3.0])}, None, info)
    found = Summing(Echo())(Share(Found(estimate, 4.5, (0, 1, 2, 3, 4), []), 5, 15), theta, "a test")  # pyright: ignore[reportArgumentType]
    told = found.estimate.info
    torch.testing.assert_close(told.pop("losses"), torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert told == {k: v for k, v in info.items() if k != "losses"}
    torch.testing.assert_close(found.estimate.grads, estimate.grads)
    assert (found.num_tasks, found.stop, found.goes_on) == (5, 15, False)
