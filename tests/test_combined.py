"""Two estimates as one: the weights, what they must not know, what is left out, and what goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from problems import FLOAT, Quadratic, generic_theta, sample, template
from torch import Tensor

from learnedopt import (
    BootstrappedTarget,
    Combined,
    Execution,
    FinalLoss,
    FirstOrder,
    GradientEstimator,
    HessianFree,
    Implicit,
    InnerLoop,
    MetaTrainer,
    SumOfLosses,
    Tasks,
    Theta,
    Truncated,
    Unrolled,
    optimizers,
    predict_peak,
)
from learnedopt.core.carry import Carry
from learnedopt.core.estimator import Estimate
from learnedopt.core.objective import MetaObjective, TaskMean
from learnedopt.estimators.combined import CombinedCarry
from learnedopt.estimators.evolution import EvolutionStrategies
from learnedopt.training.json_tracker import JsonLinesTracker, read_metrics

pytestmark = pytest.mark.usefixtures("float64")

TRUE = {"a": torch.tensor([1.0, -2.0, 0.5], dtype=FLOAT), "b": torch.tensor(3.0, dtype=FLOAT)}
NAN, INF = float("nan"), float("inf")


class Draws(NamedTuple):
    """What a noisy estimator goes on with."""

    seed: int
    number: int


@dataclass(frozen=True, eq=False)
class Noisy(GradientEstimator):
    """``TRUE`` plus noise that is drawn anew for each estimate, exponential and so not symmetric, of mean 0.

    ``spread``: its standard deviation by name. ``info`` is what it adds to its own.
    """

    spread: dict[str, Any]
    salt: int = 0
    info: dict[str, Any] = field(default_factory=dict)

    def start(self, loop: InnerLoop, theta: Theta, tasks: Tasks, generator: torch.Generator) -> Draws:
        return Draws(int(torch.randint(2**31, (), generator=generator)), 0)

    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Draws) -> Estimate:
        generator = torch.Generator().manual_seed((carry.seed + 7919 * carry.number + self.salt) % 2**32)
        grads = {
            k: g + torch.as_tensor(self.spread[k]) * (torch.empty_like(g).exponential_(generator=generator) - 1)
            for k, g in TRUE.items()
        }
        return Estimate(torch.tensor(1.0 + self.salt), grads, carry._replace(number=carry.number + 1), dict(self.info))


@dataclass(frozen=True)
class Script(GradientEstimator):
    """The given gradients of a scalar ``x``, one after the other; each episode has ``length`` of them."""

    values: tuple[float, ...]
    length: int = 10**9
    loss: float = 5.0
    info: dict[str, Any] = field(default_factory=dict)
    started: list[Tasks] = field(default_factory=list, compare=False)
    taken: list[int] = field(default_factory=list, compare=False)

    def start(self, loop: InnerLoop, theta: Theta, tasks: Tasks, generator: torch.Generator) -> int:
        self.started.append(tasks)
        return 0

    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: int) -> Estimate:
        self.taken.append(carry)
        value = self.values[len(self.taken) - 1]
        onward = carry + 1 if carry + 1 < self.length else None
        return Estimate(torch.tensor(self.loss), {"x": torch.tensor(value, dtype=FLOAT)}, onward, dict(self.info))


LOOP = InnerLoop(Quadratic(), optimizers.make("sgd", lr=0.1))


def taken(estimator: Combined, theta: Theta, count: int, seed: int = 0) -> list[Estimate]:
    """Return so many estimates in a row."""
    carry, found = estimator.start(LOOP, theta, sample(LOOP.family), torch.Generator().manual_seed(seed)), []
    for _ in range(count):
        found.append(estimator.estimate(LOOP, theta, FinalLoss(), carry))
        carry = found[-1].carry
    return found


def scripted(first: Script, second: Script, decay: float = 0.8) -> list[Estimate]:
    return taken(Combined(first, second, decay), {"x": torch.zeros((), dtype=FLOAT)}, len(first.values))


# The weights


def expected_weights(first: list[float], second: list[float], decay: float) -> list[float]:
    """Return w of each estimate, from sums over all before it that are written out."""

    def variance(seen: list[float]) -> float | None:
        weights = np.array([decay ** (len(seen) - 1 - i) for i in range(len(seen))])
        if len(seen) < 2 or not weights[:-1].any():
            return None
        weights = weights / weights.sum()
        mean = (weights * seen).sum()
        return float((weights * (np.array(seen) - mean) ** 2).sum() / (1 - (weights**2).sum()))

    found = []
    for i in range(len(first)):
        b, p = variance(first[:i]), variance(second[:i])
        found.append(0.5 if b is None or p is None else p / (b + p))
    return found


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999])
def test_weights_are_inverse_running_variances_of_the_estimates_before(decay: float) -> None:
    generator = torch.Generator().manual_seed(2)
    first, second = ((s * torch.randn(9, generator=generator)).tolist() for s in (1.0, 2.0))
    found = scripted(Script(tuple(first)), Script(tuple(second)), decay)
    weights = expected_weights(first, second, decay)
    assert [float(e.grads["x"]) for e in found] == pytest.approx(
        [w * b + (1 - w) * p for w, b, p in zip(weights, first, second, strict=True)], rel=1e-10
    )
    assert [e.info["weight_back_propagated"] for e in found] == pytest.approx(weights, rel=1e-10)
    assert weights[:2] == [0.5, 0.5] and (len({*weights}) > 5) == (decay > 0)


def test_the_variances_of_independent_estimates_are_unbiased() -> None:
    totals = torch.zeros(2, dtype=FLOAT)
    for seed in range(400):
        info = taken(Combined(Noisy({"a": 1.0, "b": 2.0}), Noisy({"a": 3.0, "b": 1.0}, 1), 0.7), TRUE, 4, seed)[-1].info
        totals += torch.tensor([info["variance_back_propagated"], info["variance_perturbed"]], dtype=FLOAT)
    # Of an exponential distribution's squares the spread is large: a few per cent over 400 runs of 4.
    assert (totals / 400).tolist() == pytest.approx([3 * 1 + 4, 3 * 9 + 1], rel=0.2)


SPREAD = {"a": torch.tensor([1.0, 2.0, 0.2]), "b": 1.0}, {"a": torch.tensor([2.0, 1.0, 0.2]), "b": 0.7}


@pytest.fixture(scope="module")
def many() -> dict[str, Tensor]:
    """Return 6,000 estimates of each kind, (6000, 4), of 30 runs."""
    torch.set_default_dtype(torch.float64)
    parts = [Noisy(spread, salt) for salt, spread in enumerate(SPREAD)]
    found: dict[str, list[Tensor]] = {"combined": [], "first": [], "second": []}

    def row(grads: Theta) -> Tensor:
        return torch.cat([grads["a"], grads["b"].reshape(1)])

    for seed in range(30):
        estimator = Combined(parts[0], parts[1], 0.98)
        carry = estimator.start(LOOP, TRUE, sample(LOOP.family), torch.Generator().manual_seed(seed))
        for _ in range(200):
            for name, part, own in (("first", parts[0], carry[0]), ("second", parts[1], carry[1])):
                found[name].append(row(part.estimate(LOOP, TRUE, FinalLoss(), own).grads))
            estimate = estimator.estimate(LOOP, TRUE, FinalLoss(), carry)
            found["combined"].append(row(estimate.grads))
            carry = estimate.carry
    torch.set_default_dtype(torch.float32)
    return {k: torch.stack(v) for k, v in found.items()}


def test_the_combination_is_unbiased(many: dict[str, Tensor]) -> None:
    found, true = many["combined"], torch.tensor([1.0, -2.0, 0.5, 3.0])
    errors = (found.mean(0) - true) / (found.std(0) / len(found) ** 0.5)
    assert errors.abs().max() < 3


def test_weights_that_knew_their_own_estimate_would_be_biased(many: dict[str, Tensor]) -> None:
    # The noise is not symmetric, so that the test above can fail: weigh by squared distances from the truth itself.
    true = torch.tensor([1.0, -2.0, 0.5, 3.0])
    first, second = many["first"], many["second"]
    weights = (second - true).square() / ((first - true).square() + (second - true).square())
    found = weights * first + (1 - weights) * second
    assert ((found.mean(0) - true) / (found.std(0) / len(found) ** 0.5)).abs().min() > 6


def test_it_varies_less_than_either_entry_by_entry(many: dict[str, Tensor]) -> None:
    variances = {k: v.var(0) for k, v in many.items()}
    least = 1 / (1 / variances["first"] + 1 / variances["second"])
    assert (variances["combined"] < torch.minimum(variances["first"], variances["second"])).all()
    assert (variances["combined"] < 1.35 * least).all()  # estimated weights cost something


def test_weights_follow_variances() -> None:
    found = taken(Combined(Noisy({"a": 1.0, "b": 1.0}), Noisy({"a": 3.0, "b": 3.0}, 1), 0.99), TRUE, 400)
    weights = [e.info["weight_back_propagated"] for e in found[100:]]
    assert sum(weights) / len(weights) == pytest.approx(0.9, abs=0.03)
    assert found[-1].info["variance_perturbed"] == pytest.approx(4 * 9, rel=0.5)


def test_what_does_not_vary_is_believed() -> None:
    found = taken(Combined(Noisy({"a": 0.0, "b": 0.0}), Noisy(SPREAD[1], 1)), TRUE, 6)
    for estimate in found[2:]:
        assert estimate.grads.keys() == TRUE.keys() and all(torch.equal(estimate.grads[k], v) for k, v in TRUE.items())
        assert estimate.info["weight_back_propagated"] == 1 and estimate.info["variance_back_propagated"] == 0
    assert not torch.equal(found[1].grads["a"], TRUE["a"])


def test_two_that_do_not_vary_count_the_same() -> None:
    found = scripted(Script((1.0,) * 5), Script((2.0,) * 5))
    assert [float(e.grads["x"]) for e in found] == [1.5] * 5
    assert found[-1].info["variance_back_propagated"] == found[-1].info["variance_perturbed"] == 0


def test_variances_beyond_every_number_make_no_nan() -> None:
    # Squares overflow; the finite side then has all the weight, and two such sides count the same.
    big = (1e200, -1e200, 1e200, 1e200)
    assert [float(e.grads["x"]) for e in scripted(Script(big), Script((1.0, 2.0, 1.0, 2.0)))][2:] == [1.0, 2.0]
    assert [float(e.grads["x"]) for e in scripted(Script((1.0, 2.0, 1.0, 2.0)), Script(big))][2:] == [1.0, 2.0]
    assert [float(e.grads["x"]) for e in scripted(Script(big), Script(tuple(-x for x in big)))] == [0.0] * 4


def test_before_variances_are_known_nothing_is_told_of_them() -> None:
    found = scripted(Script((1.0, 2.0, 3.0)), Script((2.0, 4.0, 8.0)))
    told = {"variance_back_propagated", "variance_perturbed"}
    assert not told & found[0].info.keys() and told <= found[1].info.keys()
    assert found[1].info["variance_back_propagated"] == pytest.approx(0.5)


def test_low_precision_comes_back_as_it_came() -> None:
    theta = {k: v.to(torch.bfloat16) for k, v in TRUE.items()}

    @dataclass(frozen=True)
    class Low(GradientEstimator):
        value: float

        def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Any) -> Estimate:
            return Estimate(torch.tensor(0.0), {k: torch.full_like(v, self.value) for k, v in theta.items()}, carry, {})

    for estimate in taken(Combined(Low(1.0), Low(2.0)), theta, 3):
        assert {g.dtype for g in estimate.grads.values()} == {torch.bfloat16}
        assert all((g == 1.5).all() for g in estimate.grads.values())


# What is left out


def test_a_side_that_is_not_finite_is_left_out_and_counted() -> None:
    first = Script((1.0, 2.0, NAN, 4.0), length=10)
    second = Script((10.0, 30.0, 20.0, 60.0))
    found = scripted(first, second)
    assert float(found[2].grads["x"]) == 20.0 and found[2].info["weight_back_propagated"] == 0
    assert [e.info["not_finite_back_propagated"] for e in found] == [0, 0, 1, 0]
    assert [e.info["not_finite_perturbed"] for e in found] == [0] * 4
    # Its variance knows nothing of it, and its episode is dropped.
    assert found[2].info["variance_back_propagated"] == found[1].info["variance_back_propagated"] == pytest.approx(0.5)
    assert first.taken == [0, 1, 2, 0] and second.taken == [0, 1, 2, 3]
    assert found[2].carry.back_propagated is None and len(first.started) == 2 and len(second.started) == 1


def test_the_other_side_too() -> None:
    found = scripted(Script((1.0, 2.0, 3.0)), Script((10.0, INF, 20.0)))
    assert float(found[1].grads["x"]) == 2.0 and found[1].info["weight_back_propagated"] == 1
    assert found[1].info["not_finite_perturbed"] == 1
    assert float(found[2].grads["x"]) == 11.5  # of the second's variance one estimate knows nothing


def test_a_loss_that_is_not_finite_counts_as_such_and_is_not_reported() -> None:
    found = scripted(Script((1.0,), loss=NAN, info={"losses": [NAN]}), Script((3.0,), loss=7.0, info={"losses": [8.0]}))
    assert float(found[0].loss) == 7.0 and float(found[0].grads["x"]) == 3.0 and found[0].info["losses"] == [8.0]
    found = scripted(Script((1.0,), info={"losses": [6.0]}), Script((3.0,), loss=NAN))
    assert float(found[0].loss) == 5.0 and found[0].info["losses"] == [6.0]


def test_where_neither_is_finite_the_trainer_skips() -> None:
    found = scripted(Script((1.0, NAN, 3.0)), Script((1.0, INF, 3.0)))
    assert not found[1].grads["x"].isfinite()
    assert found[1].info["not_finite_back_propagated"] == found[1].info["not_finite_perturbed"] == 1

    class Broken(TaskMean):
        def __call__(self, loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
            return FinalLoss()(loop, theta, rollout) * NAN

    estimator = Combined(Unrolled(2), EvolutionStrategies(2, 2, 0.01))
    result = MetaTrainer(LOOP, estimator, Broken(), tracker=None, num_tasks=2).run(2)
    assert result.num_skipped == 2


def test_a_name_that_one_side_cannot_tell_of_counts_by_the_other() -> None:
    zero = {"zero_gradient": ["x"]}
    found = scripted(Script((0.0,) * 4, info=zero), Script((1.0, 2.0, 3.0, 4.0)))
    assert [float(e.grads["x"]) for e in found] == [1.0, 2.0, 3.0, 4.0]  # and not the zero that never varies
    assert "zero_gradient" not in found[0].info and found[0].carry.moments[0].count == {"x": 0}
    found = scripted(Script((0.0, 0.0), info=zero), Script((0.0, 0.0), loss=1.0, info=zero))
    assert [float(e.grads["x"]) for e in found] == [0.0, 0.0] and found[1].info["zero_gradient"] == ["x"]


def test_a_learned_start_in_windows_is_still_told_to_be_out_of_reach() -> None:
    loop = InnerLoop(
        Quadratic(), optimizers.make("learned-init", template=template(Quadratic()), rule=optimizers.make("sgd"))
    )
    estimator = Combined(Truncated(2, 8), EvolutionStrategies(2, 3, 0.01, horizon=8))
    theta = generic_theta(loop)
    carry = estimator.start(loop, theta, sample(loop.family), torch.Generator().manual_seed(0))
    first = estimator.estimate(loop, theta, SumOfLosses(), carry)
    second = estimator.estimate(loop, theta, SumOfLosses(), first.carry)
    assert "zero_gradient" not in first.info and second.info["zero_gradient"] == ["init/b", "init/w"]
    assert second.carry.moments[0].count == {"init/w": 1, "init/b": 1, "rule/lr": 2}
    assert not second.grads["init/w"].any() and first.grads["init/w"].any()


# Episodes


def test_an_episode_that_is_over_starts_again_on_fresh_tasks() -> None:
    first, second = Script((1.0,) * 7, length=2), Script((1.0, 2.0) * 4, length=3)
    found = scripted(first, second)
    assert first.taken == [0, 1, 0, 1, 0, 1, 0] and second.taken == [0, 1, 2, 0, 1, 2, 0]
    assert len(first.started) == 4 and len(second.started) == 3
    drawn = [*first.started, *second.started[1:]]
    assert len({float(tasks["x"].sum()) for tasks in drawn}) == 6  # those they begin with are shared, no others are
    assert {len(tasks["x"]) for tasks in drawn} == {2}
    assert [e.carry.restarts for e in found] == [0, 0, 1, 2, 3, 3, 5]
    assert all(e.carry is not None for e in found)
    again = (Script((1.0,) * 7, length=2), Script((1.0, 2.0) * 4, length=3))
    scripted(*again)
    for mine, theirs in zip((first, second), again, strict=True):
        assert all(torch.equal(a["x"], b["x"]) for a, b in zip(mine.started, theirs.started, strict=True))


def test_it_is_the_mean_of_its_parts_on_the_same_tasks() -> None:
    theta, tasks = {"lr": torch.tensor(0.1)}, sample(LOOP.family)
    estimator = Combined(Unrolled(3), EvolutionStrategies(3, 2, 0.01))
    carry = estimator.start(LOOP, theta, tasks, torch.Generator().manual_seed(0))
    found = estimator.estimate(LOOP, theta, FinalLoss(), carry)
    first = Unrolled(3).estimate(LOOP, theta, FinalLoss(), LOOP.start(tasks))
    second = EvolutionStrategies(3, 2, 0.01).estimate(LOOP, theta, FinalLoss(), carry.perturbed)
    torch.testing.assert_close(found.grads["lr"], (first.grads["lr"] + second.grads["lr"]) / 2)
    assert torch.equal(found.loss, first.loss) and torch.equal(found.info["losses"], first.info["losses"])
    assert first.info["inner_steps"] == 2 * 3 and second.info["inner_steps"] == 2 * 3 * 4
    assert found.info["inner_steps"] == 30 and found.info["gradient_variance"] == second.info["gradient_variance"]
    # What both would have to tell together is not there where only one of them does.
    assert "inner_steps" not in scripted(Script((1.0,), info={"inner_steps": 3}), Script((1.0,)))[0].info


def test_with_a_real_perturbing_estimator_it_is_unbiased_and_varies_less() -> None:
    """On tasks that are all alike, with a gradient of back-propagation that is made noisy."""

    class Alike(Quadratic):
        def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
            one = super().sample(1, torch.Generator().manual_seed(4))
            return {k: v.expand(num_tasks, *v.shape[1:]) for k, v in one.items()}

    @dataclass(frozen=True)
    class Shaken(GradientEstimator):
        """Back-propagation and noise."""

        spread: float

        def start(self, loop: InnerLoop, theta: Theta, tasks: Tasks, generator: torch.Generator) -> Any:
            return loop.start(tasks), int(torch.randint(2**31, (), generator=generator))

        def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Any) -> Estimate:
            found = Unrolled(0).estimate(loop, theta, objective, carry[0])
            generator = torch.Generator().manual_seed(carry[1])
            grads = {k: g + self.spread * torch.randn(g.shape, generator=generator) for k, g in found.grads.items()}
            return found._replace(grads=grads)

    family = Alike()
    loop = InnerLoop(family, optimizers.make("maml", template=template(family)), Execution(chunk_size=2))
    theta = generic_theta(loop)
    exact = Unrolled(0).estimate(loop, theta, FinalLoss(), loop.start(sample(family, 1))).grads
    # Without steps the objective is quadratic in the start, so that smoothing changes no gradient.
    parts = (Shaken(1.5), EvolutionStrategies(0, 6, 0.1))
    estimator = Combined(*parts, 0.95)
    carry = estimator.start(loop, theta, sample(family, 1), torch.Generator().manual_seed(1))
    rows: dict[str, list[Tensor]] = {"combined": [], "first": [], "second": []}
    for _ in range(160):
        estimate = estimator.estimate(loop, theta, FinalLoss(), carry)
        carry = estimator._restarted(loop, theta, estimate.carry)
        alone = [p.estimate(loop, theta, FinalLoss(), c) for p, c in zip(parts, carry[:2], strict=True)]
        for name, found in zip(rows, (estimate, *alone), strict=True):
            rows[name].append(torch.cat([(found.grads[k] - exact[k]).reshape(-1) for k in theta]))
    errors = {k: torch.stack(v)[20:] for k, v in rows.items()}
    for each in errors.values():
        assert (each.mean(0) / (each.std(0) / len(each) ** 0.5)).abs().max() < 3
    variances = {k: float(v.var(0).sum()) for k, v in errors.items()}
    assert variances["combined"] < 0.8 * min(variances["first"], variances["second"])


# In a training


def test_its_numbers_are_recorded(tmp_path: Any) -> None:
    estimator = Combined(Unrolled(2), EvolutionStrategies(2, 3, 0.01))
    MetaTrainer(
        LOOP, estimator, FinalLoss(), tracker=JsonLinesTracker(tmp_path / "metrics.jsonl"), num_tasks=2
    ).run(4)  # fmt: skip
    row = read_metrics(tmp_path / "metrics.jsonl")[-1]
    told = {"weight_back_propagated", "variance_back_propagated", "variance_perturbed", "not_finite_perturbed"}
    assert told <= row.keys() and 0 <= row["weight_back_propagated"] <= 1 and row["variance_perturbed"] > 0


def test_what_is_said_of_it_is_said_of_its_parts() -> None:
    es = EvolutionStrategies(4, 2, 0.01)
    assert Combined(Unrolled(4), es).takes_second_derivatives
    assert not Combined(FirstOrder(4), es).takes_second_derivatives
    assert Combined(es, Unrolled(4)).takes_second_derivatives
    assert Combined(es, Unrolled(4)).recording is not None
    carry = LOOP.start(sample(LOOP.family))
    theta = {"lr": torch.tensor(0.1)}
    peaks = [predict_peak(LOOP, theta, e, carry) for e in (Combined(Unrolled(4), es), Unrolled(4))]
    assert peaks[0] == peaks[1]


# What is refused

BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a class": (lambda: Combined(Unrolled, Unrolled(2)), TypeError, "back_propagated=the class Unrolled is no Grad"),  # type: ignore[arg-type]
    "none": (lambda: Combined(Unrolled(2), None), TypeError, "perturbed=None is no GradientEstimator"),  # type: ignore[arg-type]
    "the same": (lambda: Combined(Unrolled(2), Unrolled(2)), ValueError, r"both parts are Unrolled\(num_steps=2"),
    "decay of 1": (lambda: Combined(Unrolled(2), Unrolled(3), 1.0), ValueError, r"decay=1\.0 is out of range"),
    "negative decay": (lambda: Combined(Unrolled(2), Unrolled(3), -0.1), ValueError, r"decay=-0\.1 is out of range"),
    "nan decay": (lambda: Combined(Unrolled(2), Unrolled(3), NAN), ValueError, "decay=nan is out of range"),
    "a word": (lambda: Combined(Unrolled(2), Unrolled(3), "0.9"), ValueError, "decay='0.9' is out of range"),  # type: ignore[arg-type]
    "two solvers": (
        lambda: Combined(Implicit(5, inner=HessianFree(3)), Unrolled(5)),
        ValueError,
        r"solved by HessianFree\(.* in one part and by None in the other",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_combined_is_refused(case: str) -> None:
    make, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        make()


def test_another_carry_is_refused() -> None:
    theta = {"lr": torch.tensor(0.1)}
    estimator = Combined(Unrolled(2), FirstOrder(2))
    tasks = sample(LOOP.family)
    with pytest.raises(TypeError, match=r"got a Carry; begin with estimator\.start"):
        estimator.estimate(LOOP, theta, FinalLoss(), LOOP.start(tasks))  # type: ignore[arg-type]
    carry = estimator.start(LOOP, theta, tasks, torch.Generator())
    assert isinstance(carry, CombinedCarry) and isinstance(carry.back_propagated, Carry)
    for other in ({"lr": torch.ones(2)}, {"rate": torch.tensor(0.1)}):
        with pytest.raises(ValueError, match=r"variances are of a theta of shapes \{'lr': \(\)\}, this one has"):
            estimator.estimate(LOOP, other, FinalLoss(), carry)


def test_an_objective_that_one_part_refuses_is_refused() -> None:
    estimator = Combined(Unrolled(2), EvolutionStrategies(2, 2, 0.01))
    with pytest.raises(ValueError, match="holds a part of itself fixed"):
        MetaTrainer(LOOP, estimator, BootstrappedTarget(2, 0.1), tracker=None).run(1)
    with pytest.raises(ValueError, match="reads the losses along the way"):
        MetaTrainer(LOOP, Combined(Implicit(2), Unrolled(2)), SumOfLosses(), tracker=None).run(1)
