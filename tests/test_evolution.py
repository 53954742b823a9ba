"""Evolution strategies: what they estimate, of what they make their estimates, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import relative_error
from problems import FLOAT, Labelled, Quadratic, generic_theta, sample, template
from torch import Tensor

from learnedopt import (
    BootstrappedTarget,
    Carry,
    EvolutionStrategies,
    Execution,
    FinalLoss,
    InnerLoop,
    MeanLogLoss,
    MetaTrainer,
    SumOfLosses,
    Tape,
    TaskFamily,
    TaskMean,
    Tasks,
    Theta,
    Truncated,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.estimator import Estimate
from learnedopt.estimators import perturbations

pytestmark = pytest.mark.usefixtures("float64")


class Direct(TaskMean):
    """A function of theta itself, after one inner step."""

    reads_theta = ("*",)

    def __init__(self, fn: Any) -> None:
        self.fn = fn

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
        return self.fn(torch.cat([x.reshape(-1) for x in theta.values()]))


def adam_loop(execution: Execution = Execution()) -> InnerLoop:  # noqa: B008 - frozen
    return InnerLoop(Quadratic(), optimizers.make("adam"), execution)


def estimate(
    loop: InnerLoop, estimator: EvolutionStrategies, objective: Any, seed: int = 0, tasks: Tasks | None = None
) -> Estimate:
    theta, tasks = generic_theta(loop), sample(loop.family) if tasks is None else tasks
    carry = estimator.start(loop, theta, tasks, torch.Generator().manual_seed(seed))
    return estimator.estimate(loop, theta, objective, carry)


def z_scores(found: Theta, variance: Theta, expected: Theta) -> Tensor:
    return torch.cat([((found[k] - expected[k]) / variance[k].sqrt()).reshape(-1) for k in expected])


CENTRE = torch.tensor([0.3, -1.2, 0.7, 2.0], dtype=FLOAT)
CURVATURE = torch.tensor([[2.0, 0.3, 0, 0], [0.3, 1.0, 0.2, 0], [0, 0.2, 0.5, 0.1], [0, 0, 0.1, 3.0]], dtype=FLOAT)


def test_of_a_quadratic_the_mean_over_4096_pairs_is_the_smoothed_gradient_whatever_sigma_is() -> None:
    loop = adam_loop()
    x = torch.cat([v.reshape(-1) for v in generic_theta(loop).values()])
    expected = CURVATURE @ (x - CENTRE)
    for sigma in (0.01, 1.0, 30.0):
        found = estimate(loop, EvolutionStrategies(1, 4096, sigma), Direct(quadratic))
        z = z_scores(found.grads, found.info["variance"], dict(zip(found.grads, expected, strict=True)))
        assert z.abs().max() < 3 and z.abs().max() > 0.01


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * (x - CENTRE) @ CURVATURE @ (x - CENTRE) + 1


def test_of_a_linear_objective_every_pair_tells_its_share_exactly() -> None:
    loop, slope = adam_loop(), torch.tensor([1.0, -2.0, 0.5, 3.0])
    estimator = EvolutionStrategies(1, 5, 0.7)
    theta = generic_theta(loop)
    carry = estimator.start(loop, theta, sample(loop.family), torch.Generator().manual_seed(4))
    found = estimator.estimate(loop, theta, Direct(lambda x: x @ slope + 2), carry)
    noise = perturbations.draw(theta, 5, perturbations.generator(carry.seed, 0), [])
    n = torch.stack([*noise.values()], 1)
    expected = dict(zip(theta, (n * (n @ slope)[:, None]).mean(0), strict=True))
    assert relative_error(found.grads, expected) < 1e-12


def test_of_inner_steps_it_is_the_exact_gradient_up_to_its_noise() -> None:
    loop = adam_loop()
    exact = Unrolled(4).estimate(loop, generic_theta(loop), SumOfLosses(), loop.start(sample(loop.family))).grads
    found = estimate(loop, EvolutionStrategies(4, 4096, 1e-4), SumOfLosses())
    assert z_scores(found.grads, found.info["variance"], exact).abs().max() < 3


def test_its_variance_is_that_of_independent_estimates() -> None:
    loop = adam_loop()
    many = [estimate(loop, EvolutionStrategies(2, 16, 0.01), FinalLoss(), seed) for seed in range(200)]
    for k in many[0].grads:
        told = torch.stack([e.info["variance"][k] for e in many]).mean()
        found = torch.stack([e.grads[k] for e in many]).var()
        assert 0.7 < float(found / told) < 1.4
    total = sum(float(v) for v in many[0].info["variance"].values())
    assert many[0].info["gradient_variance"] == pytest.approx(total, rel=1e-12)


def test_windows_go_on_from_theta_itself_and_have_the_bias_of_windows() -> None:
    loop = adam_loop()
    theta, tasks = generic_theta(loop), sample(loop.family)
    truncated, exact = Truncated(2, 6, Tape.FULL), loop.start(tasks)
    estimator = EvolutionStrategies(2, 4096, 1e-4, horizon=6)
    carry: Any = estimator.start(loop, theta, tasks, torch.Generator().manual_seed(0))
    whole = Unrolled(6).estimate(loop, theta, SumOfLosses(), loop.start(tasks)).grads
    total: Theta = {k: torch.zeros_like(v) for k, v in theta.items()}
    while exact is not None:
        window, found = (e.estimate(loop, theta, SumOfLosses(), c) for e, c in ((truncated, exact), (estimator, carry)))
        assert z_scores(found.grads, found.info["variance"], window.grads).abs().max() < 3.5
        exact, carry = window.carry, found.carry
        assert (exact is None) == (carry is None)
        if exact is not None:
            for a, b in zip(exact.params.values(), carry.inner.params.values(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
            assert carry.inner.step == exact.step
        total = {k: total[k] + window.grads[k] for k in theta}
    differs = {k: float((total[k] - whole[k]).abs() / whole[k].abs()) for k in theta}
    assert max(differs.values()) > 0.2


def test_a_learned_start_has_no_gradient_in_later_windows() -> None:
    family = Quadratic()
    loop = InnerLoop(family, optimizers.example("meta-sgd", template(family)))
    theta = generic_theta(loop)
    estimator = EvolutionStrategies(2, 3, 0.01, horizon=6)
    carry = estimator.start(loop, theta, sample(family), torch.Generator().manual_seed(0))
    first = estimator.estimate(loop, theta, FinalLoss(), carry)
    second = estimator.estimate(loop, theta, FinalLoss(), first.carry)
    starts = [k for k in theta if "init" in k]
    assert starts and all(first.grads[k].all() for k in starts) and not any(second.grads[k].any() for k in starts)
    assert second.info["zero_gradient"] == sorted(starts) and "zero_gradient" not in first.info


def test_scales_are_how_far_theta_is_perturbed() -> None:
    class Scaled(type(optimizers.make("adam"))):
        def theta_scale(self):
            return {"lr": 0.01, "beta1": torch.tensor(2.0)}

    plain, scaled = adam_loop(), InnerLoop(Quadratic(), Scaled())
    theta = generic_theta(plain)
    lengths = perturbations.lengths_of(scaled, theta, 0.5)
    assert {k: float(v) for k, v in lengths.items()} == {"lr": 0.005, "beta1": 1.0, "beta2": 0.5, "eps": 0.5}
    noise = perturbations.draw(theta, 2, torch.Generator().manual_seed(0), [])
    moved = perturbations.perturbed(theta, noise, lengths)
    torch.testing.assert_close(moved["lr"], theta["lr"] + 0.005 * torch.cat([noise["lr"], -noise["lr"]]))
    found = [estimate(loop, EvolutionStrategies(1, 3, 0.5), Direct(lambda x: 2 * x[0])) for loop in (plain, scaled)]
    # Of what is linear in one entry the scale of that entry does not matter, to its own share of the estimate.
    torch.testing.assert_close(found[0].grads["lr"], found[1].grads["lr"])


def test_ranks_take_the_place_of_values() -> None:
    values = torch.tensor([3.0, torch.nan, 1.0, 1.0, 1e9, torch.inf])
    found = perturbations.ranks(values, values.isfinite())
    assert found[values.isfinite()].tolist() == pytest.approx([1 / 6, -1 / 3, -1 / 3, 0.5], rel=1e-12)
    assert found[~values.isfinite()].isnan().all()
    loop = adam_loop()
    plain, squashed = (
        estimate(loop, EvolutionStrategies(1, 8, 0.1, ranked=True), Direct(fn)).grads
        for fn in (quadratic, lambda x: quadratic(x).exp())
    )
    assert all(torch.equal(plain[k], squashed[k]) for k in plain)  # what is monotone in the objective changes nothing
    assert not torch.equal(plain["lr"], estimate(loop, EvolutionStrategies(1, 8, 0.1), Direct(quadratic)).grads["lr"])


class Cliff(TaskMean):
    """The final loss, but not finite where the learning rate is above a bound."""

    def __init__(self, bound: float, beyond: float = math.nan) -> None:
        self.bound, self.beyond = bound, beyond

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
        value = FinalLoss()(loop, theta, rollout)
        return torch.where(theta["lr"] > self.bound, self.beyond, value)


@pytest.mark.parametrize("beyond", [math.nan, math.inf])
def test_pairs_that_are_not_finite_are_left_out_and_counted(beyond: float) -> None:
    loop = adam_loop()
    theta, tasks = generic_theta(loop), sample(loop.family)
    estimator = EvolutionStrategies(2, 6, 0.01)
    carry = estimator.start(loop, theta, tasks, torch.Generator().manual_seed(0))
    noise = perturbations.draw(theta, 6, perturbations.generator(carry.seed, 0), [])
    bound = float(theta["lr"]) + 0.01 * float(noise["lr"].abs().sort().values[3]) + 1e-9
    lost = noise["lr"].abs() > noise["lr"].abs().sort().values[3]
    found = estimator.estimate(loop, theta, Cliff(bound, beyond), carry)
    assert found.info["not_finite"] == int(lost.sum()) == 2
    assert all(v.isfinite().all() for v in found.grads.values()) and found.loss.isfinite()
    plain = estimator.estimate(loop, theta, FinalLoss(), carry)
    assert not torch.equal(found.grads["lr"], plain.grads["lr"])
    # What is left is the mean over the others.
    values = {k: [] for k in theta}
    for pair in range(6):
        if lost[pair]:
            continue
        ends = []
        for sign in (1, -1):
            own = {k: v + sign * 0.01 * noise[k][pair] for k, v in theta.items()}
            rollout = loop.run(own, loop.start(tasks), 2, Tape.NONE)
            ends.append(loop.losses(own, rollout.end, "valid").mean())
        for k in theta:
            values[k].append(noise[k][pair] * (ends[0] - ends[1]) / 0.02)
    assert relative_error(found.grads, {k: torch.stack(v).mean(0) for k, v in values.items()}) < 1e-9


def test_where_no_pair_is_finite_neither_is_the_estimate() -> None:
    found = estimate(adam_loop(), EvolutionStrategies(2, 3, 0.01), Cliff(-1e9))
    assert found.info["not_finite"] == 3 and found.loss.isnan() and all(v.isnan().all() for v in found.grads.values())
    assert "variance" not in found.info


def test_one_pair_has_no_variance_to_tell() -> None:
    assert "variance" not in estimate(adam_loop(), EvolutionStrategies(2, 1, 0.01), FinalLoss()).info


def test_cost_and_curve() -> None:
    loop = adam_loop()
    found = estimate(loop, EvolutionStrategies(5, 3, 1e-9), SumOfLosses())
    assert found.info["inner_steps"] == 5 * 2 * 6 and found.carry is None
    curve = loop.run(generic_theta(loop), loop.start(sample(loop.family)), 5, Tape.NONE).losses.mean(1)
    torch.testing.assert_close(found.info["losses"], curve, rtol=1e-6, atol=1e-6)
    rollout = loop.run(generic_theta(loop), loop.start(sample(loop.family)), 5)
    torch.testing.assert_close(
        found.loss, SumOfLosses()(loop, generic_theta(loop), rollout).detach(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_pieces_change_nothing(chunk_size: int) -> None:
    expected = estimate(adam_loop(), EvolutionStrategies(3, 4, 0.01), MeanLogLoss())
    found = estimate(adam_loop(Execution(chunk_size)), EvolutionStrategies(3, 4, 0.01), MeanLogLoss())
    assert relative_error(found.grads, expected.grads) < 1e-10


class Rounded(UpdateRule):
    """Gradient descent whose rate is rounded to tenths: no derivative says what it does."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(0.1)}

    def init(self, theta, params):
        return params, ()

    def update(self, theta, grads, state, params, loss):
        return {k: -(theta["lr"] * 10).round() / 10 * g for k, g in grads.items()}, state


def test_it_goes_through_what_has_no_derivative() -> None:
    loop = InnerLoop(Quadratic(), Rounded())
    estimator = EvolutionStrategies(3, 64, 0.1)
    result = MetaTrainer(
        loop, estimator, FinalLoss(), lambda p: torch.optim.Adam(p, 0.02), None, num_tasks=4,
        theta={"lr": torch.tensor(0.02)},
    ).run(30)  # fmt: skip
    assert 0.1 < float(result.theta["lr"]) < 0.6


class Deaf(Rounded):
    """A rule with a meta-parameter that it never reads."""

    def init_theta(self, generator):
        return {**super().init_theta(generator), "unread": torch.zeros(2)}


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"num_pairs": 0}, ValueError, "num_pairs=0"),
        ({"num_pairs": 2.0}, ValueError, "num_pairs=2.0 is not a count"),
        ({"sigma": 0.0}, ValueError, "sigma=0.0 must be positive"),
        ({"sigma": -0.1}, ValueError, "sigma=-0.1 must be positive"),
        ({"sigma": math.nan}, ValueError, "sigma=nan must be positive"),
        ({"sigma": "0.1"}, TypeError, "sigma='0.1' is a str"),
        ({"horizon": 7}, ValueError, "horizon=7 is not a multiple of the window num_steps=2"),
        ({"num_steps": -1}, ValueError, "num_steps=-1"),
        ({"num_steps": 0, "horizon": 4}, ValueError, "num_steps=0"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(options: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        EvolutionStrategies(**{"num_steps": 2, "num_pairs": 4, "sigma": 0.1, **options})


def test_a_meta_parameter_that_moves_nothing_is_named() -> None:
    loop = InnerLoop(Quadratic(), Deaf())
    with pytest.raises(ValueError, match=r"\['unread'\] by 0.1 .* moves nothing in 2 inner steps"):
        estimate(loop, EvolutionStrategies(2, 4, 0.1), FinalLoss())
    with pytest.raises(ValueError, match=r"\['lr', 'unread'\] by 1e-09 .* moves nothing"):
        estimate(loop, EvolutionStrategies(3, 4, 1e-9), FinalLoss())


def test_an_objective_that_holds_a_target_fixed_is_refused() -> None:
    with pytest.raises(ValueError, match="TargetMatching holds a part of itself fixed"):
        estimate(adam_loop(), EvolutionStrategies(2, 4, 0.1), BootstrappedTarget(2, 0.1))


def test_an_objective_that_names_a_carry_is_refused() -> None:
    def onward(loop: InnerLoop, theta: Theta, rollout: Any) -> tuple[Tensor, Carry]:
        return FinalLoss()(loop, theta, rollout), rollout.end

    with pytest.raises(ValueError, match="onward names a carry"):
        estimate(adam_loop(), EvolutionStrategies(2, 4, 0.1), onward)


def test_the_carry_of_another_kind_is_refused() -> None:
    loop = adam_loop()
    with pytest.raises(TypeError, match="a carry of its own, got a Carry"):
        EvolutionStrategies(2, 4, 0.1).estimate(loop, generic_theta(loop), FinalLoss(), loop.start(sample(loop.family)))


def test_theta_of_integers_is_refused() -> None:
    loop = InnerLoop(Quadratic(), Rounded())
    theta = {"lr": torch.tensor(1)}
    estimator = EvolutionStrategies(2, 4, 0.1)
    carry = estimator.start(loop, theta, sample(loop.family), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"lr.*int64"):
        estimator.estimate(loop, theta, FinalLoss(), carry)


def test_nothing_global_is_drawn_and_the_seed_decides() -> None:
    loop = adam_loop()
    before = torch.get_rng_state()
    first, again, other = (estimate(loop, EvolutionStrategies(2, 4, 0.1), FinalLoss(), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first.grads[k], again.grads[k]) for k in first.grads)
    assert not torch.equal(first.grads["lr"], other.grads["lr"])


def test_float32_perturbs_by_the_same_numbers() -> None:
    theta = {"a": torch.zeros(3, dtype=FLOAT)}
    wide = perturbations.draw(theta, 4, perturbations.generator(1, 2), [])["a"]
    narrow = perturbations.draw({"a": theta["a"].float()}, 4, perturbations.generator(1, 2), [])["a"]
    assert narrow.dtype is torch.float32 and torch.equal(narrow, wide.float())


def test_accuracy_itself_may_be_what_is_wanted() -> None:
    """Of a step function, by no derivative at all."""

    def error_rate(loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
        outputs = loop.outputs(rollout.end, "valid")
        targets = loop.batch(rollout.end.tasks, rollout.end.step, "valid")["targets"]
        return (outputs.argmax(-1) != targets).double().mean()

    family: TaskFamily = Labelled()
    loop = InnerLoop(family, optimizers.make("sgd", lr=0.1))
    found = estimate(loop, EvolutionStrategies(4, 64, 1.0), error_rate, tasks=sample(family, 4))
    assert found.grads["lr"].isfinite() and found.grads["lr"] != 0
