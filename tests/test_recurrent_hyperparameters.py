"""The recurrent net that sets hyperparameters: what it starts as, its formula by hand, and what does not move it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from plug_in_cases import bare
from problems import Quadratic, generic_theta, sample
from test_rules import RULES, data, loss_of, random_like, template
from torch import Tensor, nn

from learnedopt import BootstrappedTarget, InnerLoop, LearnedOptimizer, TargetMatching, Unrolled
from learnedopt.core.estimator import Estimate
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers import Momentum, RecurrentHyperparameters
from learnedopt.optimizers.bases import cells

pytestmark = pytest.mark.usefixtures("float64")


def drawn(rule: RecurrentHyperparameters, seed: int = 7) -> Theta:
    """Return a theta whose head does something."""
    generator = torch.Generator().manual_seed(seed)
    theta = rule.init_theta(generator)
    return {**theta, "head": torch.randn(theta["head"].shape, generator=generator)}


def path(rule: Any, theta: Theta, num_steps: int = 30, scale: float = 1.0) -> list[Params]:
    """Return the parameters after each step on ``scale`` times the loss."""
    params, found = template(), []
    _, state = rule.init(theta, params)
    for step in range(num_steps):
        grads, loss = torch.func.grad_and_value(lambda p, step=step: scale * loss_of(p, data(step)))(params)
        deltas, state = rule.update(theta, grads, state, params, loss)
        params = {k: p + deltas[k] for k, p in params.items()}
        found.append(params)
    return found


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# What it starts as.


def test_untrained_it_is_momentum() -> None:
    rule = RecurrentHyperparameters(lr=0.07, momentum=0.8, weight_decay=0.0, reads_loss=True)
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    peer = Momentum(lr=0.07, momentum=0.8, learn=())
    assert_close(path(rule, theta), path(peer, {}))
    assert any((p - template()[k]).abs().max() > 0.1 for k, p in path(peer, {})[-1].items())


@pytest.mark.parametrize("normalized", [False, True])
def test_untrained_its_decay_is_decoupled(normalized: bool) -> None:
    rule = RecurrentHyperparameters(lr=0.05, momentum=0.8, weight_decay=0.3, normalized=normalized)
    params, buffers, expected = template(), {k: torch.zeros_like(p) for k, p in template().items()}, []
    for step in range(30):
        grads = torch.func.grad(loss_of)(params, data(step))
        for k, g in grads.items():
            buffers[k] = 0.8 * buffers[k] + (g / g.square().mean().sqrt() if normalized else g)
        params = {k: p - 0.05 * buffers[k] - 0.05 * 0.3 * p for k, p in params.items()}
        expected.append(params)
    assert_close(path(rule, rule.init_theta(torch.Generator().manual_seed(0))), expected)


# Its formula, number by number.


def by_hand(rule: RecurrentHyperparameters, theta: Theta, all_grads: list[Params], params: Params) -> list[Params]:
    """Return the deltas at fixed parameters and a loss of 1.5, 0.75, ...: one tensor after the other, no stacks."""
    found: list[Params] = [{} for _ in all_grads]
    for name, param in params.items():
        cell = nn.GRUCell(theta["gru/input"].shape[1], rule.hidden_size)
        with torch.no_grad():
            cell.weight_ih.copy_(theta["gru/input"])
            cell.weight_hh.copy_(theta["gru/hidden"])
            cell.bias_ih.copy_(theta["gru/bias"])
            cell.bias_hh.zero_()
        hidden, buffer, rate, logs = torch.zeros(rule.hidden_size), torch.zeros_like(param), 1.0, []
        for t, grads in enumerate(all_grads):
            g = grads[name]
            rms, rms_buffer, rms_param = (float(x.square().mean().sqrt()) for x in (g, buffer, param))
            logs.append([log(rms), math.log(1.5 / 2**t)] if rule.reads_loss else [log(rms)])
            cosine = float((g * buffer).mean()) / (rms * rms_buffer) if rms * rms_buffer > 0 else 0.0
            moved = (math.log(rate) + log(rms_buffer) - log(rms_param)) / 5
            s = [*(x - running_mean(column) for x, column in zip(logs[-1], zip(*logs, strict=True), strict=True))]
            s += [cosine, moved, math.log1p(t) / 5]
            hidden = cell(torch.tensor([[max(-2.0, min(2.0, x)) for x in s]]), hidden[None])[0].detach()
            changes = rule.max_change * torch.tanh(theta["head"] @ hidden)
            rate = float((theta["log_lr"] + changes[0]).exp())
            direction = g / rms if rule.normalized and rms > 0 else g
            buffer = float((theta["logit_momentum"] + changes[1]).sigmoid()) * buffer + direction
            found[t][name] = -rate * (buffer + float((theta["log_weight_decay"] + changes[2]).exp()) * param)
    return found


def log(x: float) -> float:
    return math.log(max(x, torch.finfo(torch.float64).tiny))


def running_mean(xs: tuple[float, ...]) -> float:
    mean = 0.0
    for i, x in enumerate(xs, start=1):
        mean += (x - mean) / min(i, 10)
    return mean


@pytest.mark.parametrize("options", [{}, {"normalized": True}, {"reads_loss": True, "max_change": 0.5}], ids=str)
def test_it_is_its_formula(options: dict[str, Any]) -> None:
    rule = RecurrentHyperparameters(lr=0.3, momentum=0.7, weight_decay=0.2, hidden_size=5, **options)
    theta, params = drawn(rule), template(seed=2)
    all_grads = [{k: 3.0**-i * g for k, g in random_like(params, i).items()} for i in range(15)]
    all_grads[0]["scale"] = all_grads[4]["scale"] = torch.zeros(())  # and once more among others
    _, state = rule.init(theta, params)
    found = []
    for t, grads in enumerate(all_grads):
        deltas, state = rule.update(theta, grads, state, params, torch.tensor(1.5 / 2**t))
        found.append(deltas)
    assert_close(found, by_hand(rule, theta, all_grads, params))


def test_the_gru_is_torchs(generator: torch.Generator) -> None:
    cell, x, h = nn.GRUCell(4, 3), torch.randn(5, 4, generator=generator), torch.randn(5, 3, generator=generator)
    with torch.no_grad():
        for p in cell.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        cell.bias_hh.zero_()
        assert_close(cells.gru(cell.weight_ih, cell.weight_hh, cell.bias_ih, x, h), cell(x, h))


# What does not move it.


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_units_of_the_loss_do_not_matter(factor: float) -> None:
    rule = RecurrentHyperparameters(lr=0.05, weight_decay=0.1, reads_loss=True)
    theta = drawn(rule)
    # A rate belongs to a loss: it falls as that grows, and the decay, which the rate multiplies, grows.
    shift = math.log(factor)
    scaled = {**theta, "log_lr": theta["log_lr"] - shift, "log_weight_decay": theta["log_weight_decay"] + shift}
    expected = path(rule, theta)
    torch.testing.assert_close(path(rule, scaled, scale=factor), expected, rtol=1e-9, atol=1e-9)
    unscaled = path(rule, theta, scale=factor)[-1]
    assert not any(torch.allclose(p, unscaled[k]) for k, p in expected[-1].items())


def test_the_size_of_a_tensor_does_not_matter() -> None:
    rule = RecurrentHyperparameters()
    theta, params = drawn(rule), {"x": template()["layer.weight"]}
    wide = {"x": params["x"].repeat(50, 1, 4)}
    (_, small), (_, large) = rule.init(theta, params), rule.init(theta, wide)
    for seed in range(4):
        grads = random_like(params, seed)
        deltas, small = rule.update(theta, grads, small, params, torch.ones(()))
        wider, large = rule.update(theta, {"x": grads["x"].repeat(50, 1, 4)}, large, wide, torch.ones(()))
        assert_close(wider["x"], deltas["x"].repeat(50, 1, 4))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_changes_are_bounded(sign: float) -> None:
    rule = RecurrentHyperparameters(lr=0.05, momentum=0.9, weight_decay=0.01, max_change=2.0)
    params = {"x": torch.ones(3)}
    theta = drawn(rule)
    theta["gru/bias"][-rule.hidden_size :] = 20.0  # a candidate of 1, so that every unit is positive
    theta["head"] = torch.full_like(theta["head"], 1e6 * sign)
    momentum = 1 / (1 + math.exp(-math.log(9) - 2 * sign))
    rate, decay = 0.05 * math.exp(2 * sign), 0.01 * math.exp(2 * sign)
    _, state = rule.init(theta, params)
    for count in range(1, 4):
        deltas, state = rule.update(theta, {"x": torch.ones(3)}, state, params, torch.ones(()))
        buffer = sum(momentum**i for i in range(count))
        assert_close(deltas["x"], torch.full((3,), -rate * (buffer + decay)))


def test_a_tensor_that_never_had_a_gradient_stays_where_it_is() -> None:
    rule = RecurrentHyperparameters(weight_decay=0.0, normalized=True)
    theta, params = drawn(rule), template()
    _, state = rule.init(theta, params)
    for seed in range(3):
        grads = {**random_like(params, seed), "layer.bias": torch.zeros(2)}
        deltas, state = rule.update(theta, grads, state, params, torch.ones(()))
        assert deltas["layer.bias"].abs().max() == 0 and deltas["layer.weight"].abs().min() > 0


# What it needs.


def plugged_in(rule: RecurrentHyperparameters) -> tuple[nn.Linear, LearnedOptimizer, Tensor]:
    model = nn.Linear(3, 2)
    optimizer = bare(model.parameters(), (rule, drawn(rule)))
    loss = model(torch.ones(4, 3)).square().mean()
    loss.backward()
    return model, optimizer, loss


def test_gradients_are_all_it_needs_unless_it_reads_the_loss() -> None:
    model, optimizer, _ = plugged_in(RecurrentHyperparameters())
    before = model.weight.detach().clone()
    optimizer.step()
    assert (model.weight != before).all()
    _, optimizer, loss = plugged_in(RecurrentHyperparameters(reads_loss=True))
    with pytest.raises(ValueError, match=r"reads the loss needs step\(loss=loss\)"):
        optimizer.step()
    optimizer.step(loss=loss)


def test_squared_distances_ahead_are_refused_where_it_is_normalized_and_only_there() -> None:
    def estimated(objective: TargetMatching, **options: Any) -> Estimate:
        loop = InnerLoop(Quadratic(), RecurrentHyperparameters(lr=0.01, hidden_size=3, **options))
        return Unrolled(2).estimate(loop, generic_theta(loop), objective, loop.start(sample(loop.family)))

    with pytest.raises(ValueError, match="RecurrentHyperparameters's updates keep their length"):
        estimated(BootstrappedTarget(3, 0.1), normalized=True, weight_decay=0.0)
    assert estimated(BootstrappedTarget(3, 0.1)).loss > 0
    assert estimated(BootstrappedTarget(1, 0.1), normalized=True, weight_decay=0.0).loss > 0


def test_it_is_enrolled_in_what_every_rule_is_tested_for() -> None:
    assert sum(kind.startswith("recurrent-hyperparameters") for kind in RULES) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr=0.0 is out of range"),
        ({"momentum": 0.0}, ValueError, "momentum=0.0 is out of range"),
        ({"momentum": 1.0}, ValueError, "momentum=1.0 is out of range"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1 is out of range"),
        ({"max_change": 0.0}, ValueError, "max_change=0.0 is out of range"),
        ({"max_change": "3"}, TypeError, "pass a number"),
        ({"hidden_size": 0}, ValueError, "hidden_size=0 is no number of units"),
        ({"hidden_size": True}, ValueError, "hidden_size=True is no number of units"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"RecurrentHyperparameters: {message}|{message}"):
        RecurrentHyperparameters(**options)
