"""Rules that read the horizon: what they are told in loops, wrappers, particles and the plug-in."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from plug_in_cases import bare

import learnedopt
from learnedopt import (
    EvolutionStrategies,
    Execution,
    ForwardMode,
    GradientEstimator,
    HyperOptimizer,
    InnerLoop,
    LearnedOptimizer,
    SumOfLosses,
    Tape,
    Truncated,
    Unrolled,
    UpdateRule,
)
from learnedopt.core.horizon import Clock, HorizonWarning, later
from learnedopt.optimizers import Averaged, Clip, Momentum, Partition

GENERATOR = torch.Generator()


class Ramp(UpdateRule):
    """The rate falls with progress, and is divided by the horizon: both can be read off the first updates."""

    coordinatewise = True
    reads_horizon = True

    def init_theta(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"slope": torch.tensor(0.3, dtype=torch.float64)}

    def init(self, theta: Any, params: Any) -> tuple[Any, Any]:
        raise AssertionError("init_for is what is asked")

    def init_for(self, theta: Any, params: Any, horizon: torch.Tensor) -> tuple[Any, Any]:
        return params, {"horizon": horizon}

    def update(self, theta: Any, grads: Any, state: Any, params: Any, loss: Any, *, progress: Any) -> tuple[Any, Any]:
        assert progress.ndim == 0
        rate = 0.4 * torch.exp(-theta["slope"] * progress) / state["horizon"]
        return {k: -rate * g for k, g in grads.items()}, state


def loop(rule: UpdateRule, horizon: int | None = 5, **options: Any) -> InnerLoop:
    execution = Execution(dtype=torch.float64, **options)
    return InnerLoop(learnedopt.tasks.make("quadratic", dim=3), rule, execution, horizon=horizon)


def by_hand(at: InnerLoop, carry: Any, num_steps: int, horizon: int, slope: torch.Tensor) -> Any:
    params, losses = dict(carry.params), []
    for step in range(num_steps):
        batch = at.family.batch(carry.tasks, step, "train")
        each = [{k: p[i].detach().requires_grad_() for k, p in params.items()} for i in range(len(batch["y"]))]
        found = [at.family.loss(p, {k: v[i].double() for k, v in batch.items()}) for i, p in enumerate(each)]
        losses.append(torch.stack(found))
        grads = torch.autograd.grad(losses[-1].sum(), [p for one in each for p in one.values()])
        rate = 0.4 * torch.exp(-slope * min(step / horizon, 1.0)) / horizon
        names = list(params)
        params = {
            k: torch.stack([each[i][k] - rate * grads[i * len(names) + j] for i in range(len(each))]).detach()
            for j, k in enumerate(names)
        }
    return params, torch.stack(losses).detach()


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_progress_and_horizon_are_as_stated(chunk_size: int) -> None:
    at = loop(Ramp(), chunk_size=chunk_size)
    theta = at.init_theta(GENERATOR)
    carry = at.start(at.family.sample(3, torch.Generator().manual_seed(1)))
    rollout = at.run(theta, carry, 5, Tape.NONE)
    params, losses = by_hand(at, carry, 5, 5, theta["slope"])
    torch.testing.assert_close(rollout.losses, losses, rtol=1e-12, atol=0)
    for name, expected in params.items():
        torch.testing.assert_close(rollout.end.params[name], expected, rtol=1e-12, atol=1e-14)


def test_it_goes_on_from_a_carry_where_it_was() -> None:
    at = loop(Ramp())
    theta = at.init_theta(GENERATOR)
    carry = at.start(at.family.sample(2, torch.Generator().manual_seed(1)))
    whole = at.run(theta, carry, 5, Tape.NONE)
    half = at.run(theta, at.run(theta, carry, 2, Tape.NONE).end, 3, Tape.NONE)
    assert all(torch.equal(half.end.params[k], p) for k, p in whole.end.params.items())


def wrapped() -> dict[str, UpdateRule]:
    return {
        "clip": Clip(Ramp(), max_value=1e3),
        "averaged": Averaged(Ramp()),
        "partition": Partition({"some": ("*", Ramp())}),
        "partly": Partition({"never": ("none*", Momentum(lr=0.1)), "some": ("*", Ramp())}),
    }


@pytest.mark.parametrize("name", ["clip", "partition"])
def test_wrappers_hand_it_on(name: str) -> None:
    plain, other = loop(Ramp()), loop(wrapped()[name])
    carry = plain.start(plain.family.sample(2, torch.Generator().manual_seed(1)))
    expected = plain.run(plain.init_theta(GENERATOR), carry, 4, Tape.NONE)
    found = other.run(other.init_theta(GENERATOR), carry, 4, Tape.NONE)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["plain", *wrapped()])
def test_without_a_horizon_it_is_refused(name: str) -> None:
    rule = {"plain": Ramp(), **wrapped()}[name]
    with pytest.raises(ValueError, match=r"Ramp reads how far a run is.*horizon=T.*num_steps=T"):
        loop(rule, horizon=None)
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="Ramp reads how far a run is"):
        bare([weight], (rule, rule.init_theta(GENERATOR)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own forward mode
def test_estimators_agree_on_the_gradient() -> None:
    at = loop(Ramp(), chunk_size=3)
    theta = at.init_theta(GENERATOR)
    carry = at.start(at.family.sample(3, torch.Generator().manual_seed(1)))
    exact = Unrolled(5).estimate(at, theta, SumOfLosses(), carry)
    others: list[GradientEstimator] = [ForwardMode(5), Truncated(5, horizon=5, tape=Tape.FULL), Unrolled(5, segment=2)]
    for other in others:
        found = other.estimate(at, theta, SumOfLosses(), other.start(at, theta, carry.tasks, GENERATOR))
        torch.testing.assert_close(found.grads["slope"], exact.grads["slope"], rtol=1e-10, atol=0)
    h = 1e-5
    values = []
    for sign in (1, -1):
        moved = {"slope": theta["slope"] + sign * h}
        values.append(SumOfLosses()(at, moved, at.run(moved, carry, 5, Tape.NONE)))
    torch.testing.assert_close((values[0] - values[1]) / (2 * h), exact.grads["slope"], rtol=1e-7, atol=0)
    strategies = EvolutionStrategies(5, num_pairs=1, sigma=1e-4)
    started = strategies.start(at, theta, carry.tasks, torch.Generator().manual_seed(0))
    found = strategies.estimate(at, theta, SumOfLosses(), started)
    assert found.grads["slope"].sign() == exact.grads["slope"].sign()


def test_the_first_order_tape_takes_the_coordinatewise_way() -> None:
    at = loop(Ramp())
    theta = at.init_theta(GENERATOR)
    carry = at.start(at.family.sample(2, torch.Generator().manual_seed(1)))
    fast = Unrolled(5, tape=Tape.FIRST_ORDER).estimate(at, theta, SumOfLosses(), carry).grads["slope"]
    leaf = {"slope": theta["slope"].clone().requires_grad_()}
    rollout = at.run(leaf, carry, 5, Tape.FIRST_ORDER)
    (slow,) = torch.autograd.grad(SumOfLosses()(at, leaf, rollout), [leaf["slope"]])
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=0)


def test_past_the_horizon_it_warns_once_and_stays_at_the_end() -> None:
    at = loop(Ramp(), horizon=2)
    theta = at.init_theta(GENERATOR)
    carry = at.start(at.family.sample(2, torch.Generator().manual_seed(1)))
    with pytest.warns(HorizonWarning, match="step 5, past the horizon of 2") as seen:
        rollout = at.run(theta, carry, 5, Tape.NONE)
        at.run(theta, carry, 5, Tape.NONE)
    assert len(seen) == 1
    _, losses = by_hand(at, carry, 5, 2, theta["slope"])
    torch.testing.assert_close(rollout.losses, losses, rtol=1e-12, atol=0)


def test_the_plug_in_moves_as_the_engine() -> None:
    at = loop(Ramp(), horizon=4)
    theta = at.init_theta(GENERATOR)
    carry = at.start(at.family.sample(1, torch.Generator().manual_seed(1)))
    params = {k: torch.nn.Parameter(p[0].clone()) for k, p in carry.params.items()}
    optimizer = bare(params.items(), (Ramp(), theta), num_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            optimizer.zero_grad()
            batch = {k: v[0].double() for k, v in at.family.batch(carry.tasks, step, "train").items()}
            at.family.loss(dict(params), batch).backward()
            optimizer.step()
    rollout = at.run(theta, carry, 4, Tape.NONE)
    assert all(torch.equal(params[k].data, p[0]) for k, p in rollout.end.params.items())
    with pytest.warns(HorizonWarning, match="step 5 is past the num_steps=4"):
        optimizer.step()


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, True])
def test_bad_numbers_of_steps_are_refused(num_steps: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises((TypeError, ValueError), match="num_steps"):
        bare([weight], (Ramp(), Ramp().init_theta(GENERATOR)), num_steps=num_steps)


@pytest.mark.parametrize("rule", [Ramp(), Averaged(Ramp()), Partition({"all": ("*", Ramp())})], ids=["it", "in", "of"])
def test_the_plug_in_goes_on_with_the_number_of_steps_that_it_had(rule: UpdateRule) -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    theta = rule.init_theta(GENERATOR)

    def made(num_steps: int) -> LearnedOptimizer:
        return bare([weight], (rule, theta), num_steps=num_steps)

    begun = made(5)
    made(7).load_state_dict(begun.state_dict())  # nothing has been told yet
    weight.grad = torch.ones_like(weight)
    begun.step()
    made(5).load_state_dict(begun.state_dict())
    with pytest.raises(ValueError, match=r"of 5 steps, and .* num_steps=7"):
        made(7).load_state_dict(begun.state_dict())


def test_windows_of_a_run_do_not_say_how_far_it_is() -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    for rule in (Ramp(), (Ramp(), Ramp().init_theta(GENERATOR))):
        with pytest.raises(ValueError, match="Ramp reads how far a run is, which windows"):
            HyperOptimizer([weight], rule)


def test_every_clock_of_a_state_is_moved_wherever_it_lies() -> None:
    def state(count: int) -> object:
        step, horizon, own = torch.tensor(count), torch.tensor(9.0), {"step": torch.tensor(2)}
        inner = Clock(step, horizon, own)
        return {"a": Clock(step, horizon, (inner, torch.ones(2))), "b": (), "c": own}

    assert str(later(state(2), 3)) == str(state(5))
    assert later((), 3) == ()
