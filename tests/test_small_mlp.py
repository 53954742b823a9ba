"""The small network for every coordinate: its formula by hand, what it starts as, and what trains and uses it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from plug_in_cases import bare
from problems import FLOAT, Quadratic, sample
from torch import Tensor, nn

from learnedopt import Execution, FinalLoss, InnerLoop, MetaTrainer, Tape, Unrolled, optimizers
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers import SmallMLP
from learnedopt.optimizers.kernels import small_mlp_kernel
from learnedopt.optimizers.small_mlp import TIME_SCALES, Memory

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
SHAPES = {"w": (37, 19), "scale": (), "b": (20,), "none": (0, 3), "whole": (128, 4)}
"""Tensors of whole blocks, of less than one, of no coordinate at all."""
RULES = {
    "default": SmallMLP(step_scale=0.1, exp_scale=0.3),
    "six averages, odd layers": SmallMLP((0.1, 0.5, 0.9, 0.99, 0.999, 0.9999), (7, 5), step_scale=0.1, exp_scale=0.5),
    "linear, no averages": SmallMLP((), (), step_scale=0.5),
    "last gradient": SmallMLP((0.0,), (32, 32), step_scale=0.1, eps=1e-8),
}
every_rule = pytest.mark.parametrize("kind", RULES)


def drawn(
    rule: SmallMLP, lanes: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[Theta, Params, Memory, Params]:
    """Return theta, gradients, a state in the middle of training, and parameters, all with leading ``lanes``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn((*lanes, *shape), generator=generator, dtype=FLOAT).to(dtype)

    theta = {k: normal(*v.shape) / v.shape[-1] ** 0.5 for k, v in rule.init_theta(generator).items()}
    grads = {k: 0.01 * normal(*shape) for k, shape in SHAPES.items()}
    step = torch.randint(2000, lanes, generator=generator).to(dtype)
    averages = {k: 0.01 * normal(len(rule.decays), *shape) for k, shape in SHAPES.items()}
    return theta, grads, Memory(step, averages), {k: normal(*shape) for k, shape in SHAPES.items()}


def by_update(rule: SmallMLP, theta: Theta, grads: Params, state: Memory, params: Params) -> tuple[Params, Memory]:
    deltas, state = rule.update(theta, grads, state, params, torch.zeros(()))
    return {k: p + deltas[k] for k, p in params.items()}, state


def assert_close(found: Any, expected: Any, dtype: torch.dtype = FLOAT) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# The rule.


def by_hand(rule: SmallMLP, theta: Theta, grads: Params, state: Memory, params: Params) -> tuple[Params, Memory]:
    """Return deltas and the new state, a number at a time."""
    deltas, averages = {}, {}
    clocks = [math.tanh(float(state.step) / s - 1) for s in TIME_SCALES]
    for name, grad in grads.items():
        kept = [b * m + (1 - b) * grad for b, m in zip(rule.decays, state.averages[name], strict=True)]
        averages[name] = torch.stack(kept) if kept else grad.new_empty(0, *grad.shape)
        columns = [[float(x) for x in column.flatten()] for column in (grad, params[name], *kept)]
        roots = [math.sqrt(sum(x * x for x in column) / max(len(column), 1) + rule.eps) for column in columns]
        found = []
        for coordinate in zip(*columns, strict=True):
            signal = [x / root for x, root in zip(coordinate, roots, strict=True)] + clocks
            for i in range(len(rule.hidden) + 1):
                signal = [max(x, 0.0) for x in signal] if i else signal
                rows = zip(theta[f"layer{i}/weight"].tolist(), theta[f"layer{i}/bias"].tolist(), strict=True)
                signal = [sum(w * x for w, x in zip(row, signal, strict=True)) + b for row, b in rows]
            found.append(-rule.step_scale * signal[0] * math.exp(rule.exp_scale * signal[1]))
        deltas[name] = torch.tensor(found, dtype=FLOAT).reshape(grad.shape)
    return deltas, Memory(state.step + 1, averages)


@every_rule
def test_update_is_the_formula_by_hand(kind: str) -> None:
    rule = RULES[kind]
    inputs = drawn(rule, (), FLOAT)
    assert_close(rule.update(*inputs, torch.zeros(())), by_hand(rule, *inputs))


def test_it_starts_with_about_200_weights_and_small_steps() -> None:
    rule = SmallMLP()
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    assert sum(v.numel() for v in theta.values()) == 202 and len(rule.decays) + 2 <= 8
    params = {"w": torch.randn(30, 30, generator=torch.Generator().manual_seed(1))}
    _, state = rule.init(theta, params)
    assert int(state.step) == 0 and not state.averages["w"].any() and state.averages["w"].shape == (4, 30, 30)
    deltas, state = rule.update(theta, params, state, params, torch.zeros(()))
    assert 0 < deltas["w"].abs().max() < 0.5 * rule.step_scale and int(state.step) == 1


def test_neither_the_scale_of_gradients_nor_of_parameters_matters_far_above_eps() -> None:
    rule = SmallMLP(eps=1e-30)
    theta, grads, state, params = drawn(rule, (), FLOAT)
    scaled = (
        {k: 1e3 * g for k, g in grads.items()},
        Memory(state.step, {k: 1e3 * m for k, m in state.averages.items()}),
    )
    expected, _ = rule.update(theta, grads, state, params, torch.zeros(()))
    found, _ = rule.update(theta, *scaled, {k: 1e-2 * p for k, p in params.items()}, torch.zeros(()))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_the_clock_moves_it_and_stops_after_the_longest_scale() -> None:
    rule = RULES["default"]
    theta, grads, state, params = drawn(rule, (), FLOAT)

    def at(step: float) -> Tensor:
        return rule.update(theta, grads, state._replace(step=torch.tensor(step)), params, torch.zeros(()))[0]["w"]

    assert (at(0.0) - at(1.0)).abs().max() > 1e-3 and (at(1e4) - at(3e4)).abs().max() > 1e-4
    assert (at(1e7) - at(1e8)).abs().max() < 1e-12


def test_meta_training_improves_it() -> None:
    loop = InnerLoop(Quadratic(), SmallMLP(step_scale=0.1), Execution(chunk_size=16))
    trainer = MetaTrainer(
        loop, Unrolled(8), FinalLoss(), meta_optimizer=lambda p: torch.optim.Adam(p, 0.01), num_tasks=8, seed=0
    )
    tasks = loop.start(sample(loop.family, 16, seed=9))

    def loss() -> float:
        theta = {k: v.detach() for k, v in trainer.theta.items()}
        return float(loop.losses(theta, loop.run(theta, tasks, 8, Tape.NONE).end, "valid").mean())

    before = loss()
    trainer.run(30)
    assert loss() < before - 0.2


def test_plugged_into_torch_it_moves_by_the_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model = [], nn.Linear(3, 2)
    rule = SmallMLP()
    monkeypatch.setattr(small_mlp_kernel, "_run", lambda *args, run=small_mlp_kernel._run: calls.append(run(*args)))
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    optimizer = bare(model.named_parameters(), (rule, theta))
    params = {k: p.detach().clone() for k, p in model.named_parameters()}
    _, state = rule.init(theta, params)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        params, state = by_update(rule, theta, grads, state, params)
        assert_close({k: p.detach() for k, p in model.named_parameters()}, params, torch.float32)
    assert len(calls) == 3


# Options.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decays": (0.9, 1.0)}, ValueError, r"decays=1.0 is out of range"),
        ({"decays": [0.9]}, TypeError, r"decays=\[0.9\] .* tuples"),
        ({"decays": ("0.9",)}, TypeError, "decays='0.9' is a str"),
        ({"hidden": (8, 0)}, ValueError, "hidden=0 is not a count"),
        ({"hidden": 8}, TypeError, "hidden=8 must both be tuples"),
        ({"step_scale": 0.0}, ValueError, "step_scale=0.0 is out of range"),
        ({"exp_scale": -1.0}, ValueError, "exp_scale=-1.0 is out of range"),
        ({"eps": 0.0}, ValueError, "eps=0.0 is out of range"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"SmallMLP: .*{message}"):
        SmallMLP(**options)


def test_the_registry_takes_lists_for_its_tuples() -> None:
    config = optimizers.describe(SmallMLP(hidden=(4,)))
    assert optimizers.build({**config, "options": {**config["options"], "decays": [0.5]}}) == SmallMLP((0.5,), (4,))
