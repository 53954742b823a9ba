"""Every registered update rule against finite differences, ``torch.optim`` and its own contract; and the registry."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.rule import Kernel, State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers import (
    ANIL,
    LSTM,
    SGD,
    Adam,
    AdamW,
    Averaged,
    Clip,
    Iterate,
    LearnedInit,
    LearnedRates,
    Momentum,
    Muon,
    NAdam,
    Nesterov,
    Partition,
    Recorded,
    RecurrentHyperparameters,
    Reparametrized,
    RMSprop,
    Scheduled,
    ScheduleFree,
    StepRates,
    build,
    describe,
    example,
    make,
    names,
    per_tensor,
    register,
    registry,
)
from learnedopt.optimizers.bases.wrapper import Wrapper

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
HORIZON = 7
MOST_DIRECTIONS = 40
"""Of differences with respect to theta."""


def template(dtype: torch.dtype = torch.float64, seed: int = 1) -> Params:
    """One task's parameters: a matrix, a vector and a scalar, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layer.weight": (3, 2), "layer.bias": (2,), "scale": ()}
    return {k: (0.5 + torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype) for k, s in shapes.items()}


def data(step: int) -> tuple[Tensor, Tensor]:
    """A batch whose last input is always 0, as an image's border is: its two weights never get a gradient."""
    generator = torch.Generator().manual_seed(step)
    inputs, targets = torch.randn(8, 3, generator=generator), torch.randn(8, 2, generator=generator)
    return inputs * torch.tensor([1.0, 2.0, 0.0]), targets


def loss_of(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    hidden = torch.tanh(batch[0] @ params["layer.weight"] + params["layer.bias"])
    return (params["scale"] * hidden - batch[1]).square().mean()


def rollout(rule: UpdateRule, theta: Theta, params: Params, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum of the losses before a step on each batch but the last, and on that at the end."""
    params, state = rule.init(theta, params)
    total = torch.zeros(())
    for batch in batches[:-1]:
        grads, loss = torch.func.grad_and_value(loss_of)(params, batch)
        deltas, state = rule.update(theta, grads, state, params, loss)
        params = {k: p + deltas[k] for k, p in params.items()}
        total = total + loss
    return total + loss_of(params, batches[-1])


def small_lstm() -> LSTM:
    return LSTM(hidden_size=4)


def small_recurrent(**options: Any) -> RecurrentHyperparameters:
    return RecurrentHyperparameters(hidden_size=3, **options)


# Every registered rule as the registry makes it for a template, and the branches that these do not take.
RULES: dict[str, Callable[[Params], UpdateRule]] = {
    **{name: lambda t, name=name: example(name, t) for name in names()},
    "lstm": lambda t: small_lstm(),
    "recurrent-hyperparameters": lambda t: small_recurrent(),
    "recurrent-hyperparameters, all": lambda t: small_recurrent(normalized=True, reads_loss=True, lr=0.01),
    "recurrent-hyperparameters, no decay": lambda t: small_recurrent(weight_decay=0.0),
    "small-mlp": lambda t: make("small-mlp", step_scale=0.1),  # steps that rounding does not drown
    "small-mlp, deep": lambda t: make("small-mlp", decays=(0.0, 0.8), hidden=(4, 3), step_scale=0.1, exp_scale=0.5),
    "celo2": lambda t: make("celo2", lr=0.03, rest_lr=0.05, units=3),
    "celo2, normalised alone": lambda t: make(
        "celo2", lr=0.03, rest_lr=0.05, weight_decay=0.0, units=3, orthogonalise=False
    ),
    "rnnprop": lambda t: make("rnnprop", hidden_size=3),
    "tensor-gru": lambda t: make("tensor-gru", lr=0.1, hidden_size=3),
    "sgd, decayed": lambda t: SGD(lr=0.1, weight_decay=0.02),
    "sgd, constant rate": lambda t: SGD(lr=0.1, weight_decay=0.02, learn=("weight_decay",)),
    "momentum, dampened": lambda t: Momentum(lr=0.1, dampening=0.3, weight_decay=0.02),
    "nesterov, decayed": lambda t: Nesterov(lr=0.1, momentum=0.8, weight_decay=0.02),
    "rmsprop, centered": lambda t: RMSprop(0.01, alpha=0.9, weight_decay=0.02, momentum=0.5, centered=True, eps=1e-2),
    "adam, fast": lambda t: Adam(lr=0.05, beta1=0.8, beta2=0.9, eps=1e-2, weight_decay=0.02),
    "adam, decay learned from 0": lambda t: Adam(lr=0.05, learn=("beta2", "weight_decay")),
    "adamw, fast": lambda t: AdamW(lr=0.05, beta1=0.8, beta2=0.9, eps=1e-2, weight_decay=0.3),
    "nadam, fast": lambda t: NAdam(lr=0.05, beta2=0.9, eps=1e-2, weight_decay=0.02, momentum_decay=0.5),
    "muon": lambda t: Muon(lr=0.05, ratio=0.5, eps=1e-2, orthogonal=("first", "middle", "last")),
    "schedule-free, warm": lambda t: ScheduleFree(lr=0.05, eps=1e-2, beta1=0.8, weight_decay=0.1, warmup_steps=3),
    "schedule-free, plain": lambda t: ScheduleFree(lr=0.05, beta1=0.8, weight_decay=0.1, adaptive=False),
    "scheduled, linear": lambda t: Scheduled(AdamW(lr=0.05, eps=1e-2), "linear-end", warmup=0.3, decay=0.6),
    "scheduled around a scheduled average": lambda t: Scheduled(Averaged(Scheduled(Momentum(lr=0.1)))),
    "meta-sgd, per tensor": lambda t: make("meta-sgd", template=t, rates="tensor", lr=0.1),
    "meta-sgd, per step": lambda t: make("meta-sgd", template=t, rates="step", lr=0.1, num_steps=3),
    "step-rates, last kept": lambda t: StepRates(2, lr=0.05),
    "aruba, per tensor": lambda t: make("aruba", template=t, rates="tensor", eps=0.5, zeta=2.0),
    "aruba, isotropic": lambda t: make("aruba", template=t, rates="all", eps=0.5, zeta=2.0),
    "anil, learned rate": lambda t: ANIL(t, head="layer.*", lr=0.1, learn_lr=True),
    "clip, norm": lambda t: Clip(Adam(lr=0.05, eps=1e-2), max_norm=0.3),
    "clip around a start": lambda t: Clip(make("maml", template=t, lr=0.1), max_value=1.5),
    "learned start of an lstm": lambda t: LearnedInit(small_lstm(), t),
    "learned start of adam": lambda t: LearnedInit(Adam(lr=0.05, eps=1e-2), t),
    "average of learned rates": lambda t: Averaged(LearnedRates(t)),
    "an lstm per tensor": lambda t: per_tensor(LSTM(hidden_size=2, num_layers=1), t),
    "partition with a start": lambda t: Partition(
        {
            "scale": ("scale", Momentum(lr=0.05)),  # not the order of the parameters
            "rest": ("*", make("maml", template={k: v for k, v in t.items() if k.startswith("layer")}, lr=0.1)),
        }
    ),
}
every_rule = pytest.mark.parametrize("kind", RULES)
# Rules whose kernel adds the deltas itself.
STEPS = ("sgd", "maml", "meta-sgd", "learned-rates", "step-rates", "balanced-rates", "aruba")


def prepared(kind: str) -> tuple[UpdateRule, Theta]:
    """Return the rule and a theta that is moved off the template, so that a learned start is not the task's own.

    A rule that reads the horizon comes with its clock.
    """
    rule = RULES[kind](template()).within(HORIZON)
    generator = torch.Generator().manual_seed(7)
    theta = rule.init_theta(generator)
    return rule, {k: v + 0.1 * torch.randn(v.shape, generator=generator) if v.ndim else v for k, v in theta.items()}


def random_like(params: Params, seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(p.shape, generator=generator).to(p.dtype) for k, p in params.items()}


def updates(
    rule: UpdateRule, theta: Theta, all_grads: list[Params], params: Params, state: State | None = None
) -> tuple[list[Params], State]:
    """Feed gradients to the rule at fixed parameters; return all deltas and the last state."""
    if state is None:
        _, state = rule.init(theta, params)
    loss, deltas = torch.tensor(0.75, dtype=next(iter(params.values())).dtype), []  # the same number in every dtype
    for grads in all_grads:
        delta, state = rule.update(theta, grads, state, params, loss)
        deltas.append(delta)
    return deltas, state


def assert_close(actual: tree.Tree, expected: tree.Tree, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# What every rule promises.


@every_rule
@pytest.mark.parametrize("theta_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_keeps_names_shapes_and_dtypes(kind: str, dtype: torch.dtype, theta_dtype: torch.dtype) -> None:
    rule, theta = prepared(kind)
    theta, params = tree.to(theta, None, theta_dtype), template(dtype)
    start, state = rule.init(theta, params)
    expected = {k: (p.shape, theta_dtype if moves_start(theta, k) else dtype) for k, p in params.items()}
    assert {k: (p.shape, p.dtype) for k, p in start.items()} == expected
    for seed in (2, 3):
        loss = torch.tensor(0.7, dtype=dtype)
        deltas, after = rule.update(theta, random_like(start, seed), state, start, loss)
        assert {k: (d.shape, d.dtype) for k, d in deltas.items()} == expected
        assert list(deltas) == list(start) == list(params)
        before_and_after = [[(x.shape, x.dtype) for x in tree.leaves(s)] for s in (state, after)]
        assert before_and_after[0] == before_and_after[1]
        state = after


def moves_start(theta: Theta, name: str) -> bool:
    """Return whether theta holds a learned start, whose dtype the parameter then has."""
    return any(key == f"init/{name}" or key.endswith(f"/init/{name}") for key in theta)


@every_rule
def test_theta_lies_on_the_generators_device(kind: str) -> None:
    rule, generator = RULES[kind](template()), torch.Generator(device="cpu")
    with torch.device("meta"):  # where tensors lie that are made without a device
        assert torch.zeros(1).is_meta
        theta = rule.init_theta(generator)
    assert {v.device.type for v in theta.values()} <= {"cpu"}


@every_rule
def test_update_is_pure(kind: str) -> None:
    rule, theta = prepared(kind)
    params = template(seed=2)
    _, state = updates(rule, theta, [random_like(params, 2)], params)
    inputs = (theta, random_like(params, 3), state, params, torch.tensor(0.7))
    before = copy.deepcopy(inputs)
    first, second = rule.update(*inputs), rule.update(*inputs)
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert any(d.abs().max() > 0 for d in first[0].values())


@every_rule
def test_vmap_equals_a_loop_over_tasks(kind: str) -> None:
    rule, theta = prepared(kind)
    tasks = [template(seed=seed) for seed in (2, 3, 4)]
    params = tree.tree_map(lambda *xs: torch.stack(xs), *tasks)
    start, state = torch.func.vmap(rule.init, in_dims=(None, 0))(theta, params)
    for i, task in enumerate(tasks):
        assert_close(tree.tree_map(lambda x, i=i: x[i], (start, state)), rule.init(theta, task))
    losses = torch.tensor([0.7, 0.8, 0.9])
    states = [rule.init(theta, task)[1] for task in tasks]
    for step in range(3):
        each = [random_like(task, 10 * step + i) for i, task in enumerate(tasks)]
        grads = tree.tree_map(lambda *xs: torch.stack(xs), *each)
        deltas, state = torch.func.vmap(rule.update, in_dims=(None, 0, 0, 0, 0))(theta, grads, state, params, losses)
        for i, task in enumerate(tasks):
            delta, states[i] = rule.update(theta, each[i], states[i], task, losses[i])
            assert_close(tree.tree_map(lambda x, i=i: x[i], (deltas, state)), (delta, states[i]))


@every_rule
def test_a_rule_with_a_kernel_is_final_and_what_alters_updates_hands_on_none(kind: str) -> None:
    rule = RULES[kind](template())
    assert rule.kernel is None or getattr(type(rule), "__final__", False)
    assert rule.kernel is None or kind.partition(",")[0] not in ("clip", "partition", "an lstm per tensor")


@every_rule
def test_a_kernels_step_is_the_update_added_with_its_derivatives(kind: str) -> None:
    rule, theta = prepared(kind)
    params, grads, along = template(seed=2), random_like(template(), 3), random_like(template(), 4)
    _, state = rule.init(theta, params)
    loss, kernel = torch.tensor(0.7), rule.kernel or Kernel()
    found = kernel.step(theta, grads, state, params, loss)
    assert (found is not None) == (kind.partition(",")[0] in STEPS and "decayed" not in kind and "constant" not in kind)
    if found is None:
        return
    deltas, new_state = rule.update(theta, grads, state, params, loss)
    assert_close(found, ({k: p + deltas[k] for k, p in params.items()}, new_state))

    def by_step(theta: Theta, grads: Params, params: Params) -> Tensor:
        moved, _ = kernel.step(theta, grads, state, params, loss) or ({}, None)
        return torch.stack([(moved[k] * along[k]).sum() for k in along]).sum()

    def by_update(theta: Theta, grads: Params, params: Params) -> Tensor:
        deltas, _ = rule.update(theta, grads, state, params, loss)
        return torch.stack([((params[k] + deltas[k]) * along[k]).sum() for k in along]).sum()

    first, second = (torch.func.grad(f, argnums=(0, 1, 2))(theta, grads, params) for f in (by_step, by_update))
    assert_close(first, second)


@every_rule
def test_a_kernels_step_in_place_is_the_update_to_the_bit(kind: str) -> None:
    rule, theta = prepared(kind)
    params, kernel, loss = template(seed=2), rule.kernel or Kernel(), torch.tensor(0.7)
    _, state = updates(rule, theta, [random_like(params, 2)], params)
    own, grads = copy.deepcopy(state), random_like(params, 3)
    with torch.no_grad():
        expected, after = rule.update(theta, grads, state, params, loss)
        found = kernel.update_in_place(theta, grads, own, params, loss)
    assert (found is not None) == (kind in ("lstm", "learned start of an lstm"))
    torch.testing.assert_close(own, state if found is None else after, rtol=0, atol=0)
    if found is not None:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_rule
@pytest.mark.parametrize("with_end", [True, False])
def test_a_kernels_adjoint_is_that_of_the_updates(kind: str, with_end: bool) -> None:
    rule, theta = prepared(kind)
    kernel = rule.kernel or Kernel()
    flat = {"x": torch.cat([p.reshape(-1) for p in template().values()])}
    start = tree.tree_map(lambda x: x + 0.1, rule.init(theta, template())[1])
    generator = torch.Generator().manual_seed(5)
    grads, cotangents = (torch.randn(3, 1, len(flat["x"]), generator=generator) for _ in range(2))
    end = tree.tree_map(lambda x: torch.randn(1, *x.shape, generator=generator), start) if with_end else None
    served = kernel.adjoint(theta, grads, tree.unsqueeze(start), cotangents, end)
    assert (served is not None) == (kind in ("lstm", "learned start of an lstm"))
    if served is None:
        return

    def total(theta: Theta, state: State) -> Tensor:
        value = torch.zeros(())
        for g, cotangent in zip(grads[:, 0], cotangents[:, 0], strict=True):
            deltas, state = rule.update(theta, {"x": g}, state, flat, torch.tensor(0.7))
            value = value + (deltas["x"] * cotangent).sum()
        pairs = zip(tree.leaves(state), tree.leaves(end), strict=True) if end is not None else ()
        return value + sum((x * d[0]).sum() for x, d in pairs)

    leaves, first = (tree.tree_map(lambda x: x.detach().requires_grad_(), x) for x in (theta, start))
    wanted = [*leaves.values(), *tree.leaves(first)]
    expected = torch.autograd.grad(total(leaves, first), wanted, materialize_grads=True)
    assert list(served[0]) == list(theta)
    assert_close([*served[0].values(), *(d[0] for d in tree.leaves(served[1]))], list(expected))


def test_an_update_of_ones_own_takes_no_kernel_of_another() -> None:
    class Climbs:
        def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> Any:
            return {k: g.clone() for k, g in grads.items()}, state

    own = {"update": Climbs.update}
    for base in (SGD, LearnedRates, LSTM, LearnedInit):
        with pytest.raises(
            TypeError, match=f"Up takes update from Up and its kernel from {base.__name__}, .* kernel = None"
        ):
            type("Up", (base,), own)
    with pytest.raises(TypeError, match="takes update from Climbs and its kernel from SGD"):
        type("Mixed", (Climbs, SGD), {})
    assert SGD(0.1).kernel is not None and type("Up", (SGD,), {**own, "kernel": None})(0.1).kernel is None
    # A wrapper hands on none unless it says so, whatever the wrapped rule has.
    assert type("Around", (Wrapper,), own)(SGD(0.1)).kernel is None and Clip(LSTM(), max_value=1.0).kernel is None


@every_rule
def test_a_coordinatewise_rule_treats_all_coordinates_alike_and_apart(kind: str) -> None:
    rule, theta = prepared(kind)
    if not rule.coordinatewise:
        assert kind.partition(",")[0] in NOT_COORDINATEWISE
        return
    params = template(seed=2)
    flat = [random_like(params, seed) for seed in (3, 4, 5)]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))

    def permute(tensors: Params, order: Tensor) -> Params:
        joined = torch.cat([x.reshape(-1) for x in tensors.values()])[order]
        pieces = joined.split([x.numel() for x in tensors.values()])
        return {k: piece.reshape(x.shape) for (k, x), piece in zip(tensors.items(), pieces, strict=True)}

    _, state = rule.init(theta, params)  # all coordinates' states are alike at the start
    expected, _ = updates(rule, theta, flat, params, state)
    permuted, _ = updates(rule, theta, [permute(grads, order) for grads in flat], permute(params, order), state)
    assert_close([permute(deltas, order.argsort()) for deltas in permuted], expected)

    poked = [{**grads, "layer.bias": grads["layer.bias"] + torch.tensor([0.3, 0.0])} for grads in flat]
    differences = tree.tree_map(lambda a, b: a - b, updates(rule, theta, poked, params, state)[0], expected)
    for difference in differences:
        assert difference["layer.bias"][0] != 0
        difference["layer.bias"][0] = 0
        assert all(d.abs().max() <= TOLERANCE for d in difference.values())


@every_rule
@pytest.mark.parametrize("wrap", ["bare", "clipped by value", "clipped by norm", "from a learned start"])
@pytest.mark.parametrize("factor", [0.0, 1e-6, 1e6])
def test_scaling_coordinates_of_a_coordinatewise_rule_changes_only_those(kind: str, wrap: str, factor: float) -> None:
    rule, _ = prepared(kind)
    rule = {
        "bare": lambda: rule,
        "clipped by value": lambda: Clip(rule, max_value=0.2),
        "clipped by norm": lambda: Clip(rule, max_norm=3.0),
        "from a learned start": lambda: LearnedInit(rule, template()),
    }[wrap]()
    if not rule.coordinatewise:
        assert wrap == "clipped by norm" or kind.partition(",")[0] in NOT_COORDINATEWISE
        return
    theta, params = rule.init_theta(torch.Generator().manual_seed(7)), template(seed=2)
    largest = 0.0
    for magnitude in (1e-5, 1.0, 1e5):
        grads = [{k: magnitude * g for k, g in random_like(params, seed).items()} for seed in (3, 4, 5)]
        changed = [{**g, "layer.weight": g["layer.weight"] * torch.tensor([factor, 1.0])} for g in grads]
        before, after = (updates(rule, theta, each, params)[0] for each in (grads, changed))
        moved = [(b["layer.weight"] - a["layer.weight"]).abs() for b, a in zip(before, after, strict=True)]
        largest = max(largest, *(float(m[:, 0].max()) for m in moved))
        assert all(m[:, 1].max() == 0 for m in moved)
        others = [{k: d for k, d in each.items() if k != "layer.weight"} for each in (*before, *after)]
        torch.testing.assert_close(others[:3], others[3:], rtol=0, atol=0)
    assert largest > 0


NOT_COORDINATEWISE = (
    "learned-rates", "meta-sgd", "anil", "anil, learned rate", "clip", "partition", "an lstm per tensor",
    "partition with a start", "projected", "iterate", "average of learned rates", "recurrent-hyperparameters",
    "balanced-rates", "aruba", "aruba, per tensor", "aruba, isotropic", "recorded", "small-mlp", "small-mlp, deep",
    "tensor-gru", "celo2", "celo2, normalised alone",
    "normalised", "normalised-mlp", "normalised-lstm", "general",
    "muon",
)  # fmt: skip


def test_which_rules_are_coordinatewise() -> None:
    claimed = {kind for kind in names() if RULES[kind](template()).coordinatewise}
    coupled = {
        "learned-rates", "meta-sgd", "anil", "partition", "iterate", "projected", "recurrent-hyperparameters",
        "balanced-rates", "aruba", "recorded", "small-mlp", "tensor-gru", "celo2",
        "normalised", "normalised-mlp", "normalised-lstm", "general",
        "muon",
    }  # fmt: skip
    assert claimed == {*names()} - coupled
    assert not RULES["clip, norm"](template()).coordinatewise


@every_rule
def test_exactly_zero_gradients_give_finite_derivatives(kind: str) -> None:
    rule, theta = prepared(kind)
    params = template(seed=2)
    theta = {k: v.requires_grad_() for k, v in theta.items()}
    zeros = [{k: torch.zeros_like(p).requires_grad_() for k, p in params.items()} for _ in range(3)]
    deltas, state = updates(rule, theta, zeros, params)
    outputs = [x for x in tree.leaves((deltas, state)) if x.requires_grad]
    total = sum((x.sum() + x.square().sum() for x in outputs), torch.zeros(()))
    inputs = [*theta.values(), *tree.leaves(zeros)]
    found = torch.autograd.grad(total, inputs, allow_unused=True) if outputs else []
    assert all(torch.isfinite(x).all() for x in outputs)
    assert all(torch.isfinite(g).all() for g in found if g is not None)


@every_rule
def test_theta_gradient_equals_finite_differences(kind: str) -> None:
    rule, theta = prepared(kind)
    params, batches = template(seed=2), [data(step) for step in range(6)]
    flat, unflatten = torch.cat([v.reshape(-1) for v in theta.values()]), _unflattener(theta)

    def value(vector: Tensor) -> Tensor:
        return rollout(rule, unflatten(vector), params, batches)

    exact = torch.func.grad(value)(flat)
    assert torch.isfinite(exact).all()
    # Along every entry, or in directions that move them all.
    directions = torch.eye(len(flat))
    if len(flat) > MOST_DIRECTIONS:
        directions = torch.nn.functional.normalize(
            torch.randn(MOST_DIRECTIONS, len(flat), generator=torch.Generator().manual_seed(2))
        )
    along, approximate = directions @ exact, finite_differences(value, flat, directions)
    error = (along - approximate).abs()
    # The absolute part is what rounding leaves of a difference of losses; it admits entries that are exactly zero.
    allowed = 1e-6 * along.abs() + 1e-12
    worst = int((error / allowed).argmax())
    assert (error <= allowed).all(), (kind, worst, float(along[worst]), float(approximate[worst]))

    leaves = {k: v.detach().clone().requires_grad_() for k, v in theta.items()}
    by_autograd = torch.autograd.grad(rollout(rule, leaves, params, batches), list(leaves.values()))
    assert_close(torch.cat([g.reshape(-1) for g in by_autograd]), exact)


def _unflattener(theta: Theta) -> Callable[[Tensor], Theta]:
    sizes = [v.numel() for v in theta.values()]
    return lambda vector: {
        k: piece.reshape(v.shape) for (k, v), piece in zip(theta.items(), vector.split(sizes), strict=True)
    }


def finite_differences(value: Callable[[Tensor], Tensor], at: Tensor, directions: Tensor) -> Tensor:
    """Return central differences of fourth order, each at the step size whose two neighbours agree best with it."""
    estimates = []
    for step in torch.logspace(-1.5, -7, 12).tolist():
        near, far = (
            torch.func.vmap(value)(at + n * step * directions) - torch.func.vmap(value)(at - n * step * directions)
            for n in (1, 2)
        )
        estimates.append((8 * near - far) / (12 * step))
    stacked = torch.stack(estimates)
    differences = (stacked[1:] - stacked[:-1]).abs().nan_to_num(torch.inf)
    best = torch.maximum(differences[1:], differences[:-1]).argmin(dim=0)
    return stacked[1:-1].gather(0, best[None])[0]


@every_rule
def test_describe_and_build_give_the_same_rule(kind: str) -> None:
    rule, theta = RULES[kind](template()), prepared(kind)[1]
    config = json.loads(json.dumps(describe(rule)))
    again = build(config)
    assert describe(again) == config
    assert type(again) is type(rule)
    rule, again = rule.within(HORIZON), again.within(HORIZON)
    drawn = again.init_theta(torch.Generator().manual_seed(0))
    assert {k: (v.shape, v.dtype) for k, v in drawn.items()} == {k: (v.shape, v.dtype) for k, v in theta.items()}
    params, batches = template(seed=2), [data(step) for step in range(4)]
    assert again.coordinatewise == rule.coordinatewise
    assert float(rollout(again, theta, params, batches)) == float(rollout(rule, theta, params, batches))


# The hand-designed rules against torch.optim.

TORCH: list[tuple[UpdateRule, Callable[[list[Tensor]], torch.optim.Optimizer]]] = [
    (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    (SGD(lr=0.1, weight_decay=0.05), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05)),
    (Momentum(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    (
        Momentum(lr=0.1, momentum=0.7, dampening=0.4, weight_decay=0.05),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7, dampening=0.4, weight_decay=0.05),
    ),
    (Nesterov(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    (
        Nesterov(lr=0.1, momentum=0.7, weight_decay=0.05),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7, weight_decay=0.05, nesterov=True),
    ),
    (RMSprop(), lambda p: torch.optim.RMSprop(p)),
    (
        RMSprop(lr=0.02, alpha=0.8, eps=1e-3, weight_decay=0.05, momentum=0.6),
        lambda p: torch.optim.RMSprop(p, lr=0.02, alpha=0.8, eps=1e-3, weight_decay=0.05, momentum=0.6),
    ),
    (RMSprop(lr=0.02, centered=True), lambda p: torch.optim.RMSprop(p, lr=0.02, centered=True)),
    (Adam(), lambda p: torch.optim.Adam(p)),
    (
        Adam(lr=0.05, beta1=0.7, beta2=0.95, eps=1e-3, weight_decay=0.05),
        lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.7, 0.95), eps=1e-3, weight_decay=0.05),
    ),
    (Adam(lr=0.05, beta1=0.0, beta2=0.0), lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.0, 0.0))),
    (AdamW(), lambda p: torch.optim.AdamW(p)),
    (
        AdamW(lr=0.05, beta1=0.7, beta2=0.95, eps=1e-3, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.7, 0.95), eps=1e-3, weight_decay=0.3),
    ),
    (NAdam(), lambda p: torch.optim.NAdam(p)),
    (
        NAdam(lr=0.05, beta1=0.7, beta2=0.95, eps=1e-3, weight_decay=0.05, momentum_decay=0.1),
        lambda p: torch.optim.NAdam(p, lr=0.05, betas=(0.7, 0.95), eps=1e-3, weight_decay=0.05, momentum_decay=0.1),
    ),
]


@pytest.mark.parametrize("learn", [None, ()], ids=["theta", "constants"])
@pytest.mark.parametrize(("rule", "make_peer"), TORCH, ids=[str(rule) for rule, _ in TORCH])
def test_equals_torch_optim_over_50_steps(
    rule: Any, make_peer: Callable[[list[Tensor]], torch.optim.Optimizer], learn: tuple[str, ...] | None
) -> None:
    rule = dataclasses.replace(rule, learn=learn)
    theta = rule.init_theta(torch.Generator())
    assert bool(theta) == (learn is None)
    ours, peers = template(), {k: p.requires_grad_() for k, p in template().items()}
    peer = make_peer(list(peers.values()))
    _, state = rule.init(theta, ours)
    for step in range(50):
        grads, loss = torch.func.grad_and_value(loss_of)(ours, data(step))
        deltas, state = rule.update(theta, grads, state, ours, loss)
        ours = {k: p + deltas[k] for k, p in ours.items()}
        peer.zero_grad()
        loss_of(peers, data(step)).backward()
        peer.step()
        for name, mine in ours.items():
            assert_close(mine, peers[name].detach())
    assert any((p - template()[k]).abs().max() > 0.01 for k, p in ours.items())


# Which hyperparameters are theta.


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (SGD(), ["lr"]),
        (SGD(weight_decay=0.1), ["lr", "weight_decay"]),
        (SGD(learn=("weight_decay",)), ["weight_decay"]),
        (SGD(learn=()), []),
        (Momentum(), ["lr", "momentum"]),
        (Momentum(momentum=0.0), ["lr", "momentum"]),
        (RMSprop(), ["lr", "alpha", "eps"]),
        (RMSprop(momentum=0.1), ["lr", "alpha", "eps", "momentum"]),
        (Adam(), ["lr", "beta1", "beta2", "eps"]),
        (Adam(learn=("eps", "lr")), ["lr", "eps"]),
    ],
    ids=str,
)
def test_theta_holds_what_is_switched_on_or_named(rule: Any, expected: list[str]) -> None:
    theta = rule.init_theta(torch.Generator())
    assert list(theta) == expected
    assert all(v.ndim == 0 and v.dtype == torch.float64 and float(v) == getattr(rule, k) for k, v in theta.items())


def test_only_dampening_makes_momentum_remember_that_it_started() -> None:
    params = template()
    assert list(Momentum().init({}, params)[1]) == ["buffer"]
    assert list(Momentum(dampening=0.1).init({}, params)[1]) == ["buffer", "started"]


@pytest.mark.parametrize(
    ("make_rule", "error", "message"),
    [
        (lambda: SGD(lr=-0.1), ValueError, "lr=-0.1 .* at least 0"),
        (lambda: SGD(lr=float("nan")), ValueError, "lr=nan .* finite"),
        (lambda: SGD(lr=float("inf")), ValueError, "lr=inf .* finite"),
        (lambda: SGD(lr="0.1"), TypeError, "pass a number"),  # pyright: ignore[reportArgumentType]
        (lambda: SGD(learn=("momentum",)), ValueError, r"no hyperparameter \['momentum'\].*'lr', 'weight_decay'"),
        (lambda: SGD(learn="lr"), TypeError, "not a tuple"),  # pyright: ignore[reportArgumentType]
        (lambda: Momentum(momentum=-1.0), ValueError, "momentum=-1.0"),
        (lambda: Nesterov(momentum=0.0), ValueError, "positive momentum"),
        (lambda: RMSprop(alpha=1.5), ValueError, "alpha=1.5 .* below 1"),
        (lambda: Adam(beta2=1.0), ValueError, "beta2=1.0 .* below 1"),
        (lambda: Adam(eps=-1e-8), ValueError, "eps=-1e-08"),
        (lambda: Muon(adjust="rms"), ValueError, "adjust='rms' is none of original, match_rms_adamw"),  # pyright: ignore[reportArgumentType]
        (lambda: Muon(orthogonal="first"), ValueError, "no tuple of some of first, middle, last"),  # pyright: ignore[reportArgumentType]
        (lambda: Muon(num_newton_schulz=0), ValueError, "num_newton_schulz=0"),
        (lambda: ScheduleFree(beta1=0.0), ValueError, "beta1=0 takes the gradient at z alone"),
        (lambda: ScheduleFree(warmup_steps=-1), ValueError, "warmup_steps=-1"),
        (lambda: ScheduleFree(adaptive=False, learn=("lr", "eps")), ValueError, r"\['eps'\] do nothing"),
        (lambda: Scheduled(SGD(), "exponential"), ValueError, "'exponential' is none of cosine, linear-end"),  # pyright: ignore[reportArgumentType]
        (lambda: Scheduled(SGD(), warmup=1.0), ValueError, "warmup=1.0"),
        (lambda: Scheduled(SGD(), decay=0.4), ValueError, "no effect with schedule='cosine'"),
        (lambda: Scheduled(SGD(), "linear-end", warmup=0.7, decay=0.4), ValueError, "what the warm-up leaves"),
        (lambda: LearnedRates(template(), lr=-1.0), ValueError, "lr=-1.0"),
        (lambda: LearnedRates(template(), rates="row"), ValueError, "none of coordinate, tensor, step"),  # pyright: ignore[reportArgumentType]
        (lambda: LearnedRates({}), ValueError, "an empty one"),
        (lambda: LearnedInit(SGD(), {"n": torch.tensor(1)}), ValueError, r"\['n'\] are no floating-point"),
        (lambda: LearnedInit(template(), template()), TypeError, "not an update rule"),  # pyright: ignore[reportArgumentType]
        (lambda: Clip(SGD()), ValueError, "exactly one"),
        (lambda: Clip(SGD(), max_value=1.0, max_norm=1.0), ValueError, "exactly one"),
        (lambda: Clip(SGD(), max_norm=0.0), ValueError, "positive bound"),
        (lambda: Averaged(SGD(), "quadratic"), ValueError, "none of constant, linear"),  # pyright: ignore[reportArgumentType]
        (lambda: Averaged(SGD(), lambda step: 3 - step), ValueError, "0 at step 3: every weight must be positive"),
        (lambda: Averaged(SGD(), lambda step: 1.0), ValueError, "a weight for each step, .* got a float"),  # pyright: ignore[reportArgumentType]
        (lambda: Averaged(SGD(), 2.0), TypeError, "cannot be called on steps"),  # pyright: ignore[reportArgumentType]
        (lambda: Iterate({}), ValueError, "an empty one"),
        (lambda: Partition({}), ValueError, "no group at all"),
        (lambda: Partition({"a/b": ("*", SGD())}), ValueError, "slash"),
        (lambda: Partition({"a": SGD()}), TypeError, "pattern, rule"),  # pyright: ignore[reportArgumentType]
        (lambda: Reparametrized(SGD(), {}), ValueError, "one of log, logit"),
        (lambda: Reparametrized(SGD(), {"lr": "exp"}), ValueError, "one of log, logit"),  # pyright: ignore[reportArgumentType]
        (lambda: Reparametrized(SGD(), "log"), TypeError, "pattern -> scale"),  # pyright: ignore[reportArgumentType]
        (lambda: Recorded(SGD(), 0), ValueError, "num_steps=0"),
    ],
)
def test_a_bad_value_is_refused(make_rule: Callable[[], UpdateRule], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_rule()


# Learned starts and learned rates against closed forms.


def test_meta_sgd_meta_gradient_has_its_closed_form(generator: torch.Generator) -> None:
    root = torch.randn(4, 4, generator=generator)
    hessian, train_b, test_b = root @ root.T, torch.randn(4, generator=generator), torch.randn(4, generator=generator)
    rule = make("meta-sgd", template={"x": torch.randn(4, generator=generator)})
    theta = {k: v.requires_grad_() for k, v in rule.init_theta(generator).items()}
    start, state = rule.init(theta, {"x": torch.zeros(4)})
    train_grad = hessian @ start["x"] - train_b
    deltas, _ = rule.update(theta, {"x": train_grad}, state, start, torch.zeros(()))
    end = start["x"] + deltas["x"]
    test_grad = (end - test_b).detach()
    found = torch.autograd.grad(0.5 * (end - test_b).square().sum(), list(theta.values()))
    rates = theta["rule/lr/x"].detach()
    expected = {
        "init/x": test_grad - hessian @ (rates * test_grad),
        "rule/lr/x": -train_grad.detach() * test_grad,
    }
    assert_close(dict(zip(theta, found, strict=True)), expected)


def test_meta_sgd_draws_one_rate_from_its_range() -> None:
    drawn = []
    for seed in range(50):
        rates = make("meta-sgd", template=template()).init_theta(torch.Generator().manual_seed(seed))
        values = torch.cat([v.reshape(-1) for k, v in rates.items() if k.startswith("rule/lr/")])
        assert len(values) == 9 and (values == values[0]).all()
        drawn.append(float(values[0]))
    assert 0.005 <= min(drawn) < 0.02 and 0.085 < max(drawn) <= 0.1


def test_maml_learns_the_start_alone() -> None:
    rule = make("maml", template=template(), lr=0.3)
    theta = rule.init_theta(torch.Generator())
    assert_close(theta, {f"init/{k}": v for k, v in template().items()})
    start, state = rule.init(theta, template(seed=2))
    assert_close(start, template())
    deltas, _ = rule.update(theta, random_like(start, 0), state, start, torch.zeros(()))
    assert_close(deltas, {k: -0.3 * g for k, g in random_like(start, 0).items()})


def test_a_learned_start_refuses_other_parameters() -> None:
    rule = make("maml", template=template())
    theta = rule.init_theta(torch.Generator())
    with pytest.raises(ValueError, match="build the rule with a template"):
        rule.init(theta, {"layer.weight": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"'scale': \(1,\)"):
        rule.init(theta, {**template(), "scale": torch.zeros(1)})


# Wrappers.


def test_clip_bounds_what_the_rule_sees() -> None:
    params, grads = template(), {k: 3 * g for k, g in random_like(template(), 3).items()}
    norm = float(torch.cat([g.reshape(-1) for g in grads.values()]).norm())
    theta = {"rule/lr": torch.tensor(1.0)}
    by_value, _ = Clip(SGD(), max_value=0.4).update(theta, grads, (), params, torch.zeros(()))
    assert_close(by_value, {k: -g.clamp(-0.4, 0.4) for k, g in grads.items()})
    by_norm, _ = Clip(SGD(), max_norm=norm / 3).update(theta, grads, (), params, torch.zeros(()))
    assert_close(by_norm, {k: -g / 3 for k, g in grads.items()})
    short, _ = Clip(SGD(), max_norm=2 * norm).update(theta, grads, (), params, torch.zeros(()))
    assert_close(short, {k: -g for k, g in grads.items()})


def test_reparametrized_moves_as_the_rule_does_with_the_values_that_its_theta_stands_for() -> None:
    rule = Reparametrized(Momentum(lr=0.1, momentum=0.6), {"l*": "log", "momentum": "logit"})
    theta = rule.init_theta(torch.Generator())
    assert float(theta["rule/lr"]) == pytest.approx(math.log(0.1))
    assert float(theta["rule/momentum"]) == pytest.approx(math.log(0.6 / 0.4))
    moved = {"rule/lr": theta["rule/lr"] + 0.3, "rule/momentum": theta["rule/momentum"] - 9.0}
    read = {"lr": torch.tensor(0.1 * math.exp(0.3)), "momentum": 1 / (1 + torch.tensor(9.0).exp() * 0.4 / 0.6)}
    grads = [random_like(template(), seed) for seed in range(3)]
    found, expected = updates(rule, moved, grads, template()), updates(Momentum(), read, grads, template())
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("rule", "scales", "message"),
    [
        (SGD(lr=0.0), {"lr": "log"}, "lr=0.*cannot be put on its scale"),
        (Momentum(momentum=1.5), {"momentum": "logit"}, "momentum=1.5"),
        (SGD(), {"momentum": "log"}, r"\['momentum'\] match no meta-parameter of the rule, which has \['lr'\]"),
    ],
)
def test_a_value_off_its_scale_is_refused(rule: UpdateRule, scales: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reparametrized(rule, scales).init_theta(torch.Generator())


def test_recorded_keeps_the_first_losses_without_a_graph_and_changes_no_update() -> None:
    plain = Momentum(lr=0.1)
    rule, grads = Recorded(plain, 2), [random_like(template(), seed) for seed in range(3)]
    theta = {k: v.requires_grad_() for k, v in rule.init_theta(torch.Generator()).items()}
    params, state = rule.init(theta, template())
    assert state["losses"].tolist() == [0.0, 0.0]
    own = plain.init(plain.init_theta(torch.Generator()), template())[1]
    for i, grad in enumerate(grads):
        loss = torch.tensor(float(i + 3), requires_grad=True)
        deltas, state = rule.update(theta, grad, state, params, loss)
        expected, own = plain.update(plain.init_theta(torch.Generator()), grad, own, params, loss)
        assert_close((deltas, state["rule"]), (expected, own), 0.0)
    assert state["losses"].tolist() == [3.0, 4.0] and int(state["step"]) == 3
    assert not state["losses"].requires_grad


def test_partition_runs_each_rule_on_its_group() -> None:
    params = template()
    rule = Partition({"layer": ("layer.*", Adam(lr=0.1)), "rest": ("*", Momentum(lr=0.2))})
    theta = rule.init_theta(torch.Generator())
    assert set(theta) == {f"layer/{k}" for k in ("lr", "beta1", "beta2", "eps")} | {"rest/lr", "rest/momentum"}
    all_grads = [random_like(params, seed) for seed in (3, 4)]
    deltas, state = updates(rule, theta, all_grads, params)
    assert set(state) == {"layer", "rest"}
    for part, names_of in ((Adam(lr=0.1), ["layer.weight", "layer.bias"]), (Momentum(lr=0.2), ["scale"])):
        own = [{k: grads[k] for k in names_of} for grads in all_grads]
        alone, _ = updates(part, part.init_theta(torch.Generator()), own, {k: params[k] for k in names_of})
        assert_close([{k: delta[k] for k in names_of} for delta in deltas], alone)


def test_partition_takes_the_first_match_and_leaves_nothing_out() -> None:
    params = template()
    with pytest.raises(ValueError, match="'scale' matches none"):
        Partition({"layer": ("layer.*", SGD())}).init({}, params)
    with pytest.raises(ValueError, match=r"no parameter joins the groups \['bias'\]"):
        Partition({"all": ("*", SGD(learn=())), "bias": ("*.bias", SGD(learn=()))}).init({}, params)
    odd = {"w[0]": torch.ones(2), "w[1]": torch.ones(3)}
    assert list(per_tensor(SGD(), odd).init_theta(torch.Generator())) == ["w[0]/lr", "w[1]/lr"]
    assert per_tensor(SGD(learn=()), odd).init({}, odd)[0] == odd


# The registry.


def test_names_are_those_that_the_documentation_names() -> None:
    assert {
        "sgd", "momentum", "nesterov", "rmsprop", "adam", "lstm", "meta-sgd", "maml", "partition", "clip",
        "learned-init", "learned-rates", "anil", "aruba", "balanced-rates", "recurrent-hyperparameters",
        "small-mlp", "step-rates", "tensor-gru", "rnnprop", "celo2",
    } <= set(names())  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make("adma"), ValueError, "no update rule 'adma'; did you mean 'adam'.*nesterov"),
        (lambda: make("sgd", rate=0.1), ValueError, "no option 'rate'.*lr: float = 0.001"),
        (lambda: make("adam", beta_2=0.9), ValueError, "did you mean 'beta2'"),
        (lambda: make("sgd", lr="fast"), TypeError, r"lr='fast' \(str\).*lr: float"),
        (lambda: make("sgd", lr=True), TypeError, "lr=True"),
        (lambda: make("rmsprop", centered=1), TypeError, "centered=1"),
        (lambda: make("sgd", learn="lr"), TypeError, "learn='lr'"),
        (lambda: make("meta-sgd", template=template(), rates="raw"), ValueError, "rates='raw' is none of 'coordinate'"),
        (lambda: make("meta-sgd"), ValueError, "needs template=; template is one task's parameters"),
        (lambda: make("maml", template={"x": 1.0}), TypeError, "template="),  # pyright: ignore[reportArgumentType]
        (lambda: make("clip", max_value=1.0), ValueError, "needs rule="),
        (lambda: make("clip", rule=0.1, max_value=1.0), TypeError, "rule=0.1"),
        (lambda: make("sgd", lr=-1.0), ValueError, "lr=-1.0"),
        (lambda: build({"name": "sgd"}), ValueError, "no configuration"),
        (lambda: build({"name": "sgd", "options": {}, "more": 1}), ValueError, "no configuration"),
        (lambda: build({"name": "os", "options": {}}), ValueError, "no update rule 'os'"),
        (lambda: build({"name": "sgd", "options": {"lr": None}}), TypeError, "lr=None"),
        (
            lambda: build({"name": "maml", "options": {"template": {"x": {"shape": [-1], "dtype": "float32"}}}}),
            ValueError,
            "describe no tensor",
        ),
        (
            lambda: build({"name": "maml", "options": {"template": {"x": {"shape": [2], "dtype": "load"}}}}),
            ValueError,
            "describe no tensor",
        ),
    ],
)
def test_what_the_registry_cannot_make_is_refused(
    call: Callable[[], UpdateRule], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_make_hands_a_template_to_whatever_takes_one() -> None:
    rule = make("clip", rule={"name": "meta-sgd", "options": {"lr": 0.1}}, max_norm=1, template=template())
    assert set(rule.init_theta(torch.Generator())) == {f"rule/{p}/{k}" for p in ("init", "rule/lr") for k in template()}
    assert make("adam", lr=1, template=template()) == Adam(lr=1)


def test_a_template_on_file_costs_no_memory_until_used() -> None:
    config = {"name": "maml", "options": {"template": {"x": {"shape": [10**6, 10**6], "dtype": "float32"}}}}
    rule: Any = build(config)
    assert rule.template["x"].shape == (10**6, 10**6)
    assert rule.template["x"].untyped_storage().nbytes() == 4


@dataclasses.dataclass(frozen=True)
class Sign(UpdateRule):
    """A rule of a user's own."""

    lr: Any = 0.1

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(self.lr)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        return params, ()

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        return {k: -theta["lr"] * g.sign() for k, g in grads.items()}, state


class Loose(Sign):
    """One whose arguments are not on record."""

    def __init__(self, size: int) -> None:
        super().__init__(size)


def test_a_users_own_rule_joins_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.RULES, "registered", {})
    with pytest.raises(ValueError, match=r"Sign is not registered.*register\('<name>', Sign\)"):
        describe(Sign())
    register("sign", Sign)
    register("sign", Sign)  # a module that is imported twice does no harm
    assert names()[-1] == "sign"
    assert make("sign", lr=0.3, template=template()) == Sign(0.3)
    config = describe(LearnedInit(Sign(0.3), template()))
    assert config["options"]["rule"] == {"name": "sign", "options": {"lr": 0.3}}
    again: Any = build(json.loads(json.dumps(config)))
    assert again.rule == Sign(0.3)
    with pytest.raises(ValueError, match="did you mean 'sign'"):
        make("sgin")
    with pytest.raises(ValueError, match="no option 'rate'"):
        make("sign", rate=0.3)


def test_what_cannot_join_the_registry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.RULES, "registered", {})
    register("sign", Sign)
    with pytest.raises(ValueError, match="already registered"):
        register("sign", Loose)
    with pytest.raises(ValueError, match="already registered"):
        register("adam", Sign)
    with pytest.raises(TypeError, match="class or function"):
        register("seven", 7)  # pyright: ignore[reportArgumentType]
    register("seven", lambda: 7)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="returned a int"):
        make("seven")
    for value in (torch.ones(2), float("inf"), {1: 2.0}, object()):
        with pytest.raises(TypeError, match=r"sign\.lr is"):
            describe(Sign(value))
