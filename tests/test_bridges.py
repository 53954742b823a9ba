"""Learned optimizers in ``higher``: the same steps, the same derivatives as ``Unrolled``, groups, and bad overrides."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import relative_error
from plug_in_cases import bare
from problems import Sensitive, TanhMLP, generic_theta, sample
from torch import Tensor, nn

from learnedopt import FinalLoss, Guard, InnerLoop, LearnedOptimizer, Unrolled, UpdateRule, optimizers
from learnedopt.core.tree import Params, Theta

higher = pytest.importorskip("higher", reason="the package higher is not installed")

import learnedopt.bridges.higher as bridge  # noqa: E402 - which needs higher

pytestmark = pytest.mark.usefixtures("float64")

FAMILY = TanhMLP()
TASK = sample(FAMILY, 1)
NUM_STEPS = 4


def weights() -> Params:
    return {k: p[0].clone() for k, p in FAMILY.init_params(TASK).items()}


def model_of(params: Params) -> nn.ParameterDict:
    return nn.ParameterDict({k: nn.Parameter(p.clone()) for k, p in params.items()})


def named(model: nn.ParameterDict) -> list[tuple[str, Tensor]]:
    """Return the parameters in the family's order, which rules with a place for each tensor go by."""
    return [(k, model[k]) for k in weights()]


def loss_of(params: Params, step: int, split: str = "train") -> Tensor:
    return FAMILY.loss(params, {k: v[0] for k, v in FAMILY.batch(TASK, step, split).items()})


def fast(model: nn.ParameterDict, fmodel: Any) -> Params:
    return dict(zip([k for k, _ in model.named_parameters()], fmodel.parameters(), strict=True))


def unrolled(rule: UpdateRule, theta: Theta) -> tuple[Params, Theta]:
    """Return where the engine ends, and the gradient of the final loss, of the same task."""
    loop = InnerLoop(FAMILY, rule, horizon=NUM_STEPS)
    end = loop.run(theta, loop.start(TASK), NUM_STEPS).end.params
    return {k: p[0] for k, p in end.items()}, Unrolled(NUM_STEPS).estimate(
        loop, theta, FinalLoss(), loop.start(TASK)
    ).grads


@pytest.mark.parametrize("name", optimizers.names())
def test_every_rule_moves_and_is_differentiated_as_unrolled(name: str) -> None:
    rule = optimizers.example(name, weights())
    theta = generic_theta(InnerLoop(FAMILY, rule, horizon=NUM_STEPS))
    end, grads = unrolled(rule, theta)
    model = model_of(weights())
    optimizer = bare(named(model), (rule, theta), num_steps=NUM_STEPS, adopt_start=True)
    leaves = {k: x.clone().requires_grad_() for k, x in theta.items()}
    with higher.innerloop_ctx(model, optimizer, override={"theta": [leaves]}) as (fmodel, stepper):
        for step in range(NUM_STEPS):
            stepper.step(loss_of(fast(model, fmodel), step))
        assert relative_error({k: p.detach() for k, p in fast(model, fmodel).items()}, end) < 1e-12
        value = loss_of(fast(model, fmodel), NUM_STEPS, "valid")
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    found = {k: torch.zeros_like(x) if g is None else g for (k, x), g in zip(leaves.items(), found, strict=True)}
    assert sum(float(g.abs().sum()) for g in grads.values()) > 0
    assert relative_error(found, grads) < 1e-10


@pytest.mark.parametrize("name", ["adam", "lstm", "normalised-mlp", "tensor-gru"])
def test_first_weights_have_the_gradient_of_a_learned_start(name: str) -> None:
    rule, like = optimizers.example(name, weights()), weights()
    own = generic_theta(InnerLoop(FAMILY, rule, horizon=NUM_STEPS))
    started = optimizers.make("learned-init", rule=rule, template=like)
    theta = {**{f"init/{k}": p for k, p in like.items()}, **{f"rule/{k}": x for k, x in own.items()}}
    _, grads = unrolled(started, theta)
    model = model_of(like)
    optimizer = bare(named(model), (rule, own), num_steps=NUM_STEPS)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, stepper):
        for step in range(NUM_STEPS):
            stepper.step(loss_of(fast(model, fmodel), step))
        value = loss_of(fast(model, fmodel), NUM_STEPS, "valid")
    found = torch.autograd.grad(value, [model[k] for k in like])
    assert relative_error(dict(zip(like, found, strict=True)), {k: grads[f"init/{k}"] for k in like}) < 1e-10
    assert not optimizer.state  # nothing of it was moved


def test_a_rule_that_reads_the_loss_is_told_it_with_its_graph() -> None:
    rule = Sensitive()
    theta = rule.init_theta(torch.Generator())
    _, grads = unrolled(rule, theta)
    model, leaves = model_of(weights()), {k: x.clone().requires_grad_() for k, x in theta.items()}
    optimizer = bare(named(model), (rule, theta))
    with higher.innerloop_ctx(model, optimizer, override={"theta": [leaves]}) as (fmodel, stepper):
        for step in range(NUM_STEPS):
            stepper.step(loss_of(fast(model, fmodel), step))
        found = torch.autograd.grad(loss_of(fast(model, fmodel), NUM_STEPS, "valid"), list(leaves.values()))
    assert relative_error(dict(zip(leaves, found, strict=True)), grads) < 1e-10


def mixed(model: nn.ParameterDict) -> LearnedOptimizer:
    """Return an optimizer with groups of every kind."""
    second = optimizers.make("momentum", lr=0.2)
    groups = [
        {"params": [("w1", model["w1"])], "lr": 0.5, "weight_decay": 0.1},
        {"params": [("b1", model["b1"])], "maximize": True},
        {"params": [("w2", model["w2"])], "rule": (second, second.init_theta(torch.Generator())), "weight_decay": 0.3},
    ]
    rule = optimizers.make("adam", lr=0.05, eps=1e-3)
    return bare(groups, (rule, rule.init_theta(torch.Generator())))


def without(params: Params, step: int) -> Params:
    """Return the parameters, at odd steps with a constant in the place of one: the loss does not reach it."""
    return params if step % 2 == 0 else {**params, "b1": params["b1"].detach()}


def test_memory_that_is_kept_in_bfloat16_is_taken_over_in_the_rules_own_dtype() -> None:
    model, rule = model_of(weights()), optimizers.make("adam", lr=0.05)
    theta = rule.init_theta(torch.Generator())
    optimizer = bare(named(model), (rule, theta), state_dtype=torch.bfloat16)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(dict(model), step).backward()
        optimizer.step()
    with higher.innerloop_ctx(model, optimizer) as (fmodel, stepper):
        stepper.step(loss_of(fast(model, fmodel), 2))
        kinds = {x.dtype for entry in stepper.state[0].values() for x in entry.values() if isinstance(x, Tensor)}
        assert kinds == {torch.float64}
        assert torch.autograd.grad(fast(model, fmodel)["w1"].sum(), list(fmodel.parameters(time=0)))[0].isfinite().all()


@pytest.mark.parametrize("begun", [0, 3])
def test_groups_missing_gradients_and_memory_are_as_in_the_optimizer(begun: int) -> None:
    model = model_of(weights())
    optimizer = mixed(model)

    def step_by_itself(step: int, model: nn.ParameterDict, optimizer: LearnedOptimizer) -> None:
        optimizer.zero_grad()
        loss_of(without(dict(model), step), step).backward()
        optimizer.step()

    for step in range(begun):
        step_by_itself(step, model, optimizer)
    plain, moved = copy.deepcopy((model, optimizer))
    with higher.innerloop_ctx(model, optimizer) as (fmodel, stepper):
        for step in range(begun, begun + 5):
            stepper.step(loss_of(without(fast(model, fmodel), step), step))
            step_by_itself(step, plain, moved)
            for key, p in fast(model, fmodel).items():
                torch.testing.assert_close(p.detach(), plain[key].detach(), rtol=1e-12, atol=1e-13)


def test_rates_and_decays_are_differentiated_where_they_are_overridden() -> None:
    settings = {"lr": torch.tensor(0.6, requires_grad=True), "weight_decay": torch.tensor(0.2, requires_grad=True)}
    rule = optimizers.make("adam", lr=0.05)

    def value(settings: dict[str, Any]) -> Tensor:
        model = model_of(weights())
        optimizer = bare(named(model), (rule, rule.init_theta(torch.Generator())))
        options = {"override": {k: [x] for k, x in settings.items()}}
        with higher.innerloop_ctx(model, optimizer, **options) as (fmodel, stepper):
            for step in range(NUM_STEPS):
                stepper.step(loss_of(fast(model, fmodel), step))
            return loss_of(fast(model, fmodel), NUM_STEPS, "valid")

    found = torch.autograd.grad(value(settings), list(settings.values()))
    for (key, x), slope in zip(settings.items(), found, strict=True):
        ends = [value({**settings, key: x.detach() + sign * 1e-6}).detach() for sign in (1, -1)]
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, slope, rtol=1e-6, atol=1e-9)
        assert abs(float(slope)) > 1e-4


def test_a_guard_plays_no_part() -> None:
    rule = optimizers.make("sgd", lr=0.1)
    theta, ends = rule.init_theta(torch.Generator()), []
    for guard in (Guard(window=6), False):
        model = model_of(weights())
        optimizer = LearnedOptimizer(named(model), (rule, theta), guard=guard)
        with higher.innerloop_ctx(model, optimizer) as (fmodel, stepper):
            for step in range(9):  # past the window, where the guard would try its fallback
                stepper.step(loss_of(fast(model, fmodel), step))
            ends.append(torch.cat([p.detach().reshape(-1) for p in fmodel.parameters()]))
        assert not guard or optimizer.guard_report()
    assert torch.equal(*ends)


def test_nothing_is_recorded_where_nobody_asks_for_it() -> None:
    model = model_of(weights())
    rule = optimizers.make("lstm", hidden_size=3)
    optimizer = bare(named(model), (rule, rule.init_theta(torch.Generator().manual_seed(0))))
    with higher.innerloop_ctx(model, optimizer, track_higher_grads=False) as (fmodel, stepper):
        for step in range(2):
            stepper.step(loss_of(fast(model, fmodel), step))
        assert all(p.is_leaf and p.requires_grad for p in fmodel.parameters())
        held = [x for group in stepper.state for entry in group.values() for x in entry.values()]
        assert not any(isinstance(x, Tensor) and x.requires_grad for x in held)


def sgd_with(override: Any, groups: int = 1) -> Callable[[], Any]:
    rule = optimizers.make("sgd", lr=0.1)

    def enter() -> Any:
        model = model_of(weights())
        names = named(model)
        params = [{"params": [pair]} for pair in names] if groups > 1 else names
        optimizer = bare(params, (rule, rule.init_theta(torch.Generator())))
        return higher.get_diff_optim(optimizer, list(model.parameters()), override=override)

    return enter


def start_without_model() -> Any:
    rule = optimizers.make("maml", template=weights(), lr=0.1)
    theta = rule.init_theta(torch.Generator())
    model = model_of(weights())
    optimizer = bare(named(model), (rule, theta))
    leaves = {k: x.clone().requires_grad_() for k, x in theta.items()}
    return higher.get_diff_optim(optimizer, list(model.parameters()), override={"theta": [leaves]})


def start_elsewhere() -> Any:
    rule = optimizers.make("maml", template={"0": torch.ones(3)}, lr=0.1)
    options = {"rule": (rule, rule.init_theta(torch.Generator())), "adopt_start": True}
    fmodel = higher.monkeypatch(nn.ParameterList([nn.Parameter(torch.zeros(3))]))
    return higher.create_diff_optim(LearnedOptimizer, options, fmodel=fmodel)


def pieces() -> Any:
    model = model_of(weights())
    rule = optimizers.make("sgd", lr=0.1)
    optimizer = bare(named(model), (rule, rule.init_theta(torch.Generator())))
    model["w1"]._fsdp_flattened = True  # what marks them
    return higher.get_diff_optim(optimizer, list(model.parameters()))


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "theta is a tensor": (sgd_with({"theta": [torch.tensor(0.1)]}), TypeError, "a list of dicts"),
    "theta of another rule": (sgd_with({"theta": [{"rate": torch.tensor(0.1)}]}), ValueError, "does not fit the rule"),
    "a theta for each group": (
        sgd_with({"theta": [{"lr": torch.tensor(x)} for x in (0.1, 0.2, 0.3)]}, groups=3), ValueError,
        "different thetas",
    ),
    "a start without a model": (start_without_model, ValueError, "no model to put its start into"),
    "parameters in pieces": (pieces, ValueError, "higher knows plain tensors alone"),
    "a start in another model": (start_elsewhere, ValueError, "not in the model that higher was"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_when_it_is_made(name: str) -> None:
    make, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        make()


def test_the_class_is_registered() -> None:
    model = model_of(weights())
    rule = optimizers.make("sgd", lr=0.1)
    optimizer = bare(named(model), (rule, rule.init_theta(torch.Generator())))
    stepper = higher.get_diff_optim(optimizer, list(model.parameters()))
    assert type(stepper) is bridge.DifferentiableLearnedOptimizer
