"""Rules in bfloat16 and float16: they compute in float32 and round nothing but the deltas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from plug_in_cases import bare
from test_rules import HORIZON, RULES, every_rule, loss_of, random_like, template, updates
from torch import Tensor

from learnedopt import Execution, InnerLoop, Kernel, SumOfLosses, Tape, Truncated, UpdateRule
from learnedopt import optimizers as rules
from learnedopt import tasks as families
from learnedopt.core import tree
from learnedopt.core.tree import Params
from learnedopt.optimizers import SGD, Adam, AdamW, Momentum, NAdam, Nesterov, RMSprop

LOW = [torch.bfloat16, torch.float16]
low_precision = pytest.mark.parametrize("dtype", LOW, ids=str)


@every_rule
@low_precision
def test_the_deltas_are_those_of_float32_rounded(kind: str, dtype: torch.dtype) -> None:
    rule = RULES[kind](template(torch.float32)).within(HORIZON)
    theta = rule.init_theta(torch.Generator().manual_seed(7))
    params = template(dtype, seed=2)
    # From 256 on a float16 has no square.
    grads = [{k: 100 * g for k, g in random_like(params, seed).items()} for seed in (3, 4, 5)]
    deltas, state = updates(rule, theta, grads, params)
    wide_grads, wide_params = tree.to(grads, None, torch.float32), tree.to(params, None, torch.float32)
    expected, wide_state = updates(rule, theta, wide_grads, wide_params)
    assert all(d.dtype == dtype for each in deltas for d in each.values())
    torch.testing.assert_close(deltas, [tree.to(each, None, dtype) for each in expected], rtol=0, atol=0)
    torch.testing.assert_close(state, wide_state, rtol=0, atol=0)
    assert all(torch.isfinite(d).all() for each in deltas for d in each.values())


@every_rule
@low_precision
def test_a_kernels_step_is_that_of_float32_rounded(kind: str, dtype: torch.dtype) -> None:
    rule = RULES[kind](template(torch.float32)).within(HORIZON)
    theta, kernel = rule.init_theta(torch.Generator().manual_seed(7)), rule.kernel or Kernel()
    params, grads, loss = template(dtype, seed=2), random_like(template(dtype), 3), torch.tensor(0.7)
    state = rule.init(theta, params)[1]
    found = kernel.step(theta, grads, state, params, loss)
    expected = kernel.step(theta, *tree.to((grads, state, params, loss), None, torch.float32))
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        torch.testing.assert_close(found[0], tree.to(expected[0], None, dtype), rtol=0, atol=0)


def trained(make: Callable[[Params], UpdateRule], dtype: torch.dtype) -> tuple[float, float, Params]:
    """Return the loss before and after 30 steps on one batch in ``dtype``, and the last parameters in float32."""
    rule, generator = make(template(dtype)).within(40), torch.Generator().manual_seed(3)
    theta = rule.init_theta(torch.Generator().manual_seed(7))
    params, state = rule.init(theta, template(dtype, seed=2))
    batch = (torch.randn(8, 3, generator=generator).to(dtype), torch.randn(8, 2, generator=generator).to(dtype))
    losses = []
    for _ in range(30):
        grads, loss = torch.func.grad_and_value(loss_of)(params, batch)
        deltas, state = rule.update(theta, grads, state, params, loss)
        params = {k: p + deltas[k] for k, p in params.items()}
        losses.append(float(loss))
    return losses[0], float(loss_of(params, batch)), tree.to(params, None, torch.float32)


@every_rule
@pytest.mark.parametrize(("dtype", "distance"), [(torch.bfloat16, 0.12), (torch.float16, 0.015)], ids=str)
def test_every_rule_goes_where_it_goes_in_float32(kind: str, dtype: torch.dtype, distance: float) -> None:
    start, end, params = trained(RULES[kind], dtype)
    exact_start, exact_end, exact = trained(RULES[kind], torch.float32)
    # Thirty roundings of numbers near one, each by up to half a unit in the last place.
    assert max(float((params[k] - p).abs().max()) for k, p in exact.items()) < distance
    gain = exact_start - exact_end
    if gain > 0.05:  # else the steps are smaller than a unit in the last place
        assert start - end > 0.7 * gain


@low_precision
def test_adam_stays_nearer_to_float32_than_that_of_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix, target = (torch.randn(size, generator=generator) for size in ((20, 10), (20,)))

    def by_torch(dtype: torch.dtype) -> Tensor:
        x = torch.zeros(10, dtype=dtype, requires_grad=True)
        optimizer = torch.optim.Adam([x], lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            (matrix.to(dtype) @ x - target.to(dtype)).square().mean().backward()
            optimizer.step()
        return x.detach().float()

    def by_ours(dtype: torch.dtype) -> Tensor:
        rule, params = Adam(lr=0.02), {"x": torch.zeros(10, dtype=dtype)}
        theta = rule.init_theta(torch.Generator())
        _, state = rule.init(theta, params)
        for _ in range(200):
            x = params["x"].clone().requires_grad_()
            loss = (matrix.to(dtype) @ x - target.to(dtype)).square().mean()
            (grad,) = torch.autograd.grad(loss, x)
            deltas, state = rule.update(theta, {"x": grad}, state, params, loss.detach())
            params = {"x": params["x"] + deltas["x"]}
        return params["x"].float()

    exact = by_torch(torch.float32)
    torch.testing.assert_close(by_ours(torch.float32), exact, rtol=1e-4, atol=1e-5)
    ours, theirs = ((f(dtype) - exact).abs().max() for f in (by_ours, by_torch))
    assert ours < 1.05 * theirs


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize(
    "name", ["sgd", "momentum", "nesterov", "rmsprop", "adam", "lstm", "recurrent-hyperparameters"]
)
@low_precision
def test_the_engine_runs_and_differentiates_rules_in_low_precision(
    name: str, dtype: torch.dtype, chunk_size: int
) -> None:
    def estimated(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rule = rules.make(name) if name == "lstm" else rules.make(name, lr=0.01)
        loop = InnerLoop(families.make("quadratic", dim=4), rule, Execution(chunk_size, dtype=dtype))
        theta = rule.init_theta(torch.Generator().manual_seed(0))
        carry = loop.start(loop.family.sample(4, torch.Generator().manual_seed(1)))
        losses = loop.run(theta, carry, 30, Tape.NONE).losses.float()
        grads = Truncated(5, 20).estimate(loop, theta, SumOfLosses(), carry).grads
        return losses, torch.cat([g.flatten().float() for g in grads.values()])

    (losses, grads), (exact_losses, exact_grads) = estimated(dtype), estimated(torch.float32)
    torch.testing.assert_close(losses, exact_losses, rtol=0.03, atol=0.01 * float(exact_losses[0].max()))
    assert name == "lstm" or (losses[-1] < losses[0]).all()
    assert float(torch.nn.functional.cosine_similarity(grads, exact_grads, dim=0)) > 0.99


def plugged_in(kind: str, dtype: torch.dtype) -> tuple[float, float, Params]:
    """Return what ``trained`` does, of the rule as an optimizer of a model's parameters."""
    rule, generator = RULES[kind](template(torch.float32)), torch.Generator().manual_seed(3)
    params = {k: torch.nn.Parameter(p) for k, p in template(dtype, seed=2).items()}
    optimizer = bare(
        params.items(), (rule, rule.init_theta(torch.Generator().manual_seed(7))), num_steps=40, adopt_start=True
    )
    batch = (torch.randn(8, 3, generator=generator).to(dtype), torch.randn(8, 2, generator=generator).to(dtype))
    losses = []
    for _ in range(31):
        optimizer.zero_grad()
        loss = loss_of(params, batch)
        losses.append(float(loss.detach()))
        if len(losses) <= 30:
            loss.backward()
            optimizer.step(loss=loss)
    return losses[0], losses[-1], {k: p.detach().float() for k, p in params.items()}


@every_rule
def test_every_rule_moves_bfloat16_parameters_where_it_moves_float32(kind: str) -> None:
    start, end, params = plugged_in(kind, torch.bfloat16)
    exact_start, exact_end, exact = plugged_in(kind, torch.float32)
    assert all(p.isfinite().all() for p in params.values())
    assert max(float((params[k] - p).abs().max()) for k, p in exact.items()) < 0.12
    gain = exact_start - exact_end
    if gain > 0.05:
        assert start - end > 0.7 * gain


TORCHS: dict[str, tuple[UpdateRule, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "sgd": (SGD(lr=0.01, weight_decay=0.02), lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.02)),
    "momentum": (Momentum(lr=0.01), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
    "nesterov": (Nesterov(lr=0.01), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True)),
    "rmsprop": (
        RMSprop(lr=0.01, momentum=0.5, centered=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    ),
    "adam": (Adam(lr=0.01, weight_decay=0.02), lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.02)),
    "adamw": (AdamW(lr=0.01, weight_decay=0.3), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3)),
    "nadam": (NAdam(lr=0.01), lambda p: torch.optim.NAdam(p, lr=0.01)),
}


@pytest.mark.parametrize("name", TORCHS)
def test_bfloat16_parameters_take_torchs_own_steps_rounded(name: str) -> None:
    # torch keeps bfloat16 memory for bfloat16 parameters; so compare with its steps of float32 copies, each rounded.
    rule, make = TORCHS[name]
    generator = torch.Generator().manual_seed(5)
    param = torch.nn.Parameter(torch.randn(300, generator=generator).bfloat16())
    copy = param.detach().float().requires_grad_()
    ours, theirs = bare([param], (rule, rule.init_theta(torch.Generator()))), make([copy])
    for _ in range(30):
        param.grad = torch.randn(300, generator=generator).bfloat16()
        before, copy.grad = param.detach().clone(), param.grad.float()
        ours.step()
        theirs.step()
        step = (copy.detach() - before.float()).bfloat16()  # the delta is rounded, then the sum
        moved = before + step
        # torch's difference has lost the last bits of float32: now and then, they decide which way is rounded.
        assert (param.detach() - moved).abs().le(2.0**-7 * (step.abs() + moved.abs())).all()
        assert param.detach().eq(moved).float().mean() > 0.99
        with torch.no_grad():
            copy.copy_(param)


def test_the_first_steps_of_adam_on_bfloat16_are_those_of_torch() -> None:
    param, other = (torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    rule = Adam(lr=0.01)
    both = bare([param], (rule, rule.init_theta(torch.Generator()))), torch.optim.Adam([other], lr=0.01)
    for _ in range(3):
        param.grad, other.grad = (torch.full_like(p, 0.5) for p in (param, other))
        for optimizer in both:
            optimizer.step()
    assert param.equal(other)
    assert float(param.detach()[0]) == 0.96484375
