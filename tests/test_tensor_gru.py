"""The recurrent rule for whole tensors: what it starts as, its formula by hand, BFGS, and what does not move it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from plug_in_cases import bare
from test_rules import RULES, data, loss_of, random_like, template
from torch import Tensor, nn

from learnedopt import Execution, InnerLoop, Tape, load, tasks
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers import Momentum, TensorGRU

pytestmark = pytest.mark.usefixtures("float64")


def drawn(rule: TensorGRU, seed: int = 7, factor: float = 0.5) -> Theta:
    """Return a theta whose head does something."""
    generator = torch.Generator().manual_seed(seed)
    theta = rule.init_theta(generator)
    return {**theta, "head": factor * torch.randn(theta["head"].shape, generator=generator)}


def blended(rule: TensorGRU, blend: float, logit: float = 0.0) -> Theta:
    """Return a theta that blends by tanh(``blend``) at every step, at a constant rate; the candidate gate is 1."""
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    theta["gru/bias"][-rule.hidden_size :] = 40.0
    theta["gru/bias"][rule.hidden_size : -rule.hidden_size] = -40.0  # nothing of the old state is kept
    theta["head"][2, : rule.hidden_size] = blend / rule.hidden_size
    return {**theta, "logit_momentum": torch.tensor(logit)}


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


def assert_close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# What it starts as, and what it can be.


def test_untrained_it_is_momentum() -> None:
    rule = TensorGRU(lr=0.07, momentum=0.8)
    expected = path(Momentum(lr=0.07, momentum=0.8, learn=()), {})
    assert_close(path(rule, rule.init_theta(torch.Generator().manual_seed(0))), expected)
    assert any((p - template()[k]).abs().max() > 0.1 for k, p in expected[-1].items())


def test_by_default_there_are_as_many_weights_as_it_says() -> None:
    assert sum(v.numel() for v in TensorGRU().init_theta(torch.Generator()).values()) == 1325


def bfgs(hessian: Tensor, start: Tensor, rate: float, num_steps: int) -> list[Tensor]:
    """Return the steps of memoryless BFGS on the quadratic of that Hessian, by the formula for matrices."""
    x, steps, one = start, [], torch.eye(len(start))
    grad = hessian @ x
    steps.append(-rate * grad)
    for _ in range(num_steps - 1):
        s, x = steps[-1], x + steps[-1]
        change, grad = hessian @ x - grad, hessian @ x
        rho = 1 / (s @ change)
        left = one - rho * torch.outer(s, change)
        steps.append(-(rate * left @ left.T + rho * torch.outer(s, s)) @ grad)
    return steps


def test_wholly_blended_it_is_memoryless_bfgs(generator: torch.Generator) -> None:
    root = torch.randn(5, 5, generator=generator)
    hessian = torch.eye(5) + 0.1 * root @ root.T
    start, rule, steps = torch.randn(5, generator=generator), TensorGRU(lr=0.3), []
    theta = blended(rule, 50.0)  # tanh is 1
    x, state = rule.init(theta, {"x": start})
    for _ in range(8):
        grad = hessian @ x["x"]
        deltas, state = rule.update(theta, {"x": grad}, state, x, 0.5 * grad @ x["x"])
        steps.append(deltas["x"])
        x = {"x": x["x"] + deltas["x"]}
    expected = bfgs(hessian, start, 0.3, 8)
    assert_close(steps, expected, 1e-10)
    assert all(step.abs().max() > 1e-6 for step in expected)


def test_where_the_curvature_is_negative_nothing_is_blended() -> None:
    rule = TensorGRU(lr=0.1, momentum=0.5)
    theta = blended(rule, 50.0)
    x, state = rule.init(theta, {"x": torch.tensor([1.0, 2.0])})
    for _ in range(3):  # of a concave function
        deltas, after = rule.update(theta, {"x": -x["x"]}, state, x, torch.ones(()))
        assert_close(deltas["x"], 0.5 * state.step["x"] + 0.1 * x["x"])
        x, state = {"x": x["x"] + deltas["x"]}, after


# Its formula, number by number.


def by_hand(rule: TensorGRU, theta: Theta, all_grads: list[Params], losses: list[float]) -> list[Params]:
    """Return the deltas, one tensor after the other, in numbers of Python's own."""
    found: list[Params] = [{} for _ in all_grads]
    for name in all_grads[0]:
        cell = nn.GRUCell(9, rule.hidden_size)
        with torch.no_grad():
            cell.weight_ih.copy_(theta["gru/input"])
            cell.weight_hh.copy_(theta["gru/hidden"])
            cell.bias_ih.copy_(theta["gru/bias"])
            cell.bias_hh.zero_()
        hidden, log_rate = torch.zeros(rule.hidden_size), float(theta["log_lr"])
        p = s = torch.zeros_like(all_grads[0][name])
        for t, grads in enumerate(all_grads):
            g, y = grads[name], grads[name] - p
            z = inputs_by_hand(g, p, s, y, log_rate, t, losses)
            hidden = cell(torch.tensor([z]), hidden[None])[0].detach()
            o1, o2, o3 = (theta["head"] @ torch.cat([hidden, torch.tensor(z)])).tolist()
            log_rate += rule.max_change * math.tanh(o1)
            rate, momentum, k = math.exp(log_rate), 1 / (1 + math.exp(-float(theta["logit_momentum"]) - o2)), 0.0
            a = b = 0.0
            if cosine(s, y) > 1e-3:
                k, sy = math.tanh(o3), dot(s, y)
                a = k * max(-4.0, min(4.0, dot(g, s) / sy))
                b = k * max(-4.0, min(4.0, rate * dot(y, g - a * y) / sy))
            found[t][name] = s = -rate * (g - a * y) + ((1 - k) * momentum + b - a) * s
            p = g
    return found


def inputs_by_hand(
    g: Tensor, p: Tensor, s: Tensor, y: Tensor, log_rate: float, t: int, losses: list[float]
) -> list[float]:
    known = dot(s, s) > 0 and dot(y, y) > 0
    angle = math.log(max(cosine(s, y), 0.01))
    ratio = math.log(dot(s, s) / dot(y, y)) / 2 - log_rate if known else 0.0
    found = [
        math.log(losses[t] / losses[t - 1]) / 2 if t else 0.0,
        math.log(dot(g, g) / dot(p, p)) / 4 if dot(g, g) > 0 and dot(p, p) > 0 else 0.0,
        (ratio - angle) / 2 if known else 0.0,
        (ratio + angle) / 2 if known else 0.0,
        (math.log(losses[t] / dot(g, g)) - log_rate) / 2 if dot(g, g) > 0 else 0.0,
        cosine(g, p),
        cosine(g, s),
        math.log1p(t) / 6,
        float(known),
    ]
    return [max(-2.0, min(2.0, x)) for x in found]


def dot(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum())


def cosine(left: Tensor, right: Tensor) -> float:
    lengths = math.sqrt(dot(left, left) * dot(right, right))
    return dot(left, right) / lengths if lengths > 0 else 0.0


@pytest.mark.parametrize("options", [{}, {"hidden_size": 5, "max_change": 0.3, "lr": 0.2}], ids=["default", "small"])
def test_it_is_its_formula(options: dict[str, Any]) -> None:
    rule = TensorGRU(momentum=0.7, **options)
    theta, params = drawn(rule, factor=0.15), template(seed=2)
    all_grads = [{k: 1.5**-i * g for k, g in random_like(params, i).items()} for i in range(12)]
    all_grads[0]["scale"] = all_grads[4]["scale"] = torch.zeros(())
    losses = [1.5 / 1.3**t for t in range(12)]
    _, state = rule.init(theta, params)
    found = []
    for grads, loss in zip(all_grads, losses, strict=True):
        deltas, state = rule.update(theta, grads, state, params, torch.tensor(loss))
        found.append(deltas)
    assert_close(found, by_hand(rule, theta, all_grads, losses), 1e-10)


# What does not move it.


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_units_of_the_loss_do_not_matter(factor: float) -> None:
    rule = TensorGRU(lr=0.05)
    theta = drawn(rule, factor=0.1)
    scaled = {**theta, "log_lr": theta["log_lr"] - math.log(factor)}
    expected = path(rule, theta)
    torch.testing.assert_close(path(rule, scaled, scale=factor), expected, rtol=1e-8, atol=1e-8)
    unscaled = path(rule, theta, scale=factor)[-1]
    assert not any(torch.allclose(p, unscaled[k]) for k, p in expected[-1].items())


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_rate_is_bounded(sign: float) -> None:
    rule = TensorGRU(lr=0.05, hidden_size=3)
    theta, params = blended(rule, 0.0, logit=-50.0), {"x": torch.ones(3)}
    theta["head"][0, :3] = 1e6 * sign
    _, state = rule.init(theta, params)
    for t in range(1, 9):
        deltas, state = rule.update(theta, {"x": torch.ones(3)}, state, params, torch.ones(()))
        assert_close(deltas["x"], torch.full((3,), -0.05 * math.exp(sign * min(3.0 * t, 16.0))))


def test_a_tensor_without_a_gradient_stays_where_it_is() -> None:
    rule = TensorGRU()
    theta, params = drawn(rule), template()
    _, state = rule.init(theta, params)
    for seed in range(3):
        grads = {**random_like(params, seed), "layer.bias": torch.zeros(2)}
        deltas, state = rule.update(theta, grads, state, params, torch.ones(()))
        assert deltas["layer.bias"].abs().max() == 0 and deltas["layer.weight"].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e-40, 1e-19, 1e-15, 1e-10, 1e15])
def test_lengths_that_vanish_or_grow_leave_derivatives_finite(size: float, dtype: torch.dtype) -> None:
    rule = TensorGRU(hidden_size=3, lr=0.05)
    theta = {k: v.to(dtype).requires_grad_() for k, v in drawn(rule).items()}
    params = {"x": torch.ones(4, dtype=dtype)}
    grads = [(size * g["x"]).to(dtype).requires_grad_() for g in (random_like(params, seed) for seed in range(4))]
    _, state = rule.init(theta, params)
    total = torch.zeros((), dtype=dtype)
    for grad in grads:
        loss = grad.detach().abs().max() ** 2
        deltas, state = rule.update(theta, {"x": grad}, state, params, loss)
        total = total + (deltas["x"] / size).sum() if size > 1e-30 else total + deltas["x"].sum()
    found = torch.autograd.grad(total, [*theta.values(), *grads], allow_unused=True)
    assert total.isfinite() and all(g.isfinite().all() for g in found if g is not None)


@pytest.mark.parametrize("loss", [0.0, -3.0])
def test_a_loss_that_is_not_positive_is_the_smallest(loss: float) -> None:
    rule = TensorGRU()
    theta, params = drawn(rule), template()
    found = []
    for value in (loss, 1e-300):
        _, state = rule.init(theta, params)
        deltas, _ = rule.update(theta, random_like(params, 1), state, params, torch.tensor(value))
        found.append(deltas)
    assert_close(found[0], found[1])


# What it needs.


def test_it_needs_the_loss_in_a_users_own_loop() -> None:
    rule, model = TensorGRU(), nn.Linear(3, 2)
    optimizer = bare(model.parameters(), (rule, drawn(rule)))
    loss = model(torch.ones(4, 3)).square().mean()
    loss.backward()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"reads the loss needs step\(loss=loss\)"):
        optimizer.step()
    optimizer.step(loss=loss)
    assert (model.weight != before).all()


def test_the_packaged_one_is_ahead_of_the_packaged_lstm() -> None:
    family = tasks.make("quadratic", dim=10, dtype="float32", meta_split="valid")
    sampled = family.sample(500, torch.Generator().manual_seed(3))
    sums = []
    for name in ("tensor-gru-quadratic", "lstm-quadratic"):
        rule, theta = load(name)
        loop = InnerLoop(family, rule, Execution(chunk_size=500))
        sums.append(loop.run(theta, loop.start(sampled), 100, Tape.NONE).losses.sum(0))
    assert sums[0].mean() < 47 < sums[1].mean() - 3
    assert (sums[0] < sums[1]).float().mean() > 0.7


def test_it_is_enrolled_in_what_every_rule_is_tested_for() -> None:
    assert "tensor-gru" in RULES


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr=0.0 is out of range"),
        ({"momentum": 0.0}, ValueError, "momentum=0.0 is out of range"),
        ({"momentum": 1.0}, ValueError, "momentum=1.0 is out of range"),
        ({"max_change": 0.0}, ValueError, "max_change=0.0 is out of range"),
        ({"max_change": "3"}, TypeError, "pass a number"),
        ({"hidden_size": 0}, ValueError, "hidden_size=0 is not a count"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"TensorGRU: .*{message}"):
        TensorGRU(**options)
