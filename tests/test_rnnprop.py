"""RNNprop: what it starts as, its formula against torch's own cells, and what does not move it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import Quadratic, sample
from test_rules import RULES, random_like, template, updates
from torch import Tensor, nn

from learnedopt import Execution, FinalLoss, InnerLoop, MetaTrainer, Tape, Unrolled
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers import Adam, RNNprop

pytestmark = pytest.mark.usefixtures("float64")


def drawn(rule: RNNprop, seed: int = 7) -> Theta:
    """Return a theta whose read-out does something."""
    generator = torch.Generator().manual_seed(seed)
    theta = rule.init_theta(generator)
    return {
        **theta,
        **{k: torch.randn(theta[k].shape, generator=generator) for k in ("readout/weight", "readout/bias")},
    }


def steps(seeds: range) -> list[Params]:
    return [{k: 2.0**seed * g for k, g in random_like(template(), seed).items()} for seed in seeds]


def assert_close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_untrained_it_is_adam_with_squashed_steps() -> None:
    rule = RNNprop(step_scale=0.02, beta1=0.8, beta2=0.95)
    deltas, state = updates(rule, rule.init_theta(torch.Generator().manual_seed(0)), steps(range(5)), template())
    of_adam, _ = updates(Adam(lr=1.0, beta1=0.8, beta2=0.95, learn=()), {}, steps(range(5)), template())
    assert_close(deltas, [{k: 0.02 * d.tanh() for k, d in delta.items()} for delta in of_adam])
    assert state["h2"].abs().max() > 0


def reordered(gates: Tensor) -> Tensor:
    """Return rows in torch's order of gates, input, forget, candidate, output, from the rule's."""
    i, f, o, g = gates.chunk(4)
    return torch.cat([i, f, g, o])


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_it_is_its_formula(num_layers: int) -> None:
    rule = RNNprop(hidden_size=5, num_layers=num_layers, step_scale=0.3, beta1=0.8, beta2=0.9)
    theta, grads = drawn(rule), [g["layer.weight"].reshape(-1, 1) for g in steps(range(6))]
    layers = [nn.LSTMCell(5, 5) for _ in range(num_layers)]
    with torch.no_grad():
        for i, layer in enumerate(layers, start=1):
            weight = reordered(theta[f"lstm{i}/weight"])
            layer.weight_ih.copy_(weight[:, :5])
            layer.weight_hh.copy_(weight[:, 5:])
            layer.bias_ih.copy_(reordered(theta[f"lstm{i}/bias"]))
            layer.bias_hh.zero_()
        states = [(torch.zeros(6, 5), torch.zeros(6, 5)) for _ in layers]
        mean = square = torch.zeros(6, 1)
        expected = []
        for t, grad in enumerate(grads, start=1):
            mean, square = 0.8 * mean + 0.2 * grad, 0.9 * square + 0.1 * grad**2
            root = (square / (1 - 0.9**t)).sqrt() + 1e-8
            seen = torch.cat([mean / (1 - 0.8**t) / root, grad / root], dim=1)
            signal = nn.functional.elu(seen @ theta["input/weight"].T + theta["input/bias"])
            for i, layer in enumerate(layers):
                states[i] = layer(signal, states[i])
                signal = states[i][0]
            out = torch.cat([signal, seen], dim=1) @ theta["readout/weight"].T + theta["readout/bias"]
            expected.append({"layer.weight": 0.3 * out.tanh().reshape(3, 2)})
    alone = [{"layer.weight": grad.reshape(3, 2)} for grad in grads]
    found, _ = updates(rule, theta, alone, {"layer.weight": template()["layer.weight"]})
    assert_close(found, expected)


@pytest.mark.parametrize("factor", [1e-4, 1e6])
def test_the_scale_of_the_gradient_does_not_matter(factor: float) -> None:
    rule = RNNprop(hidden_size=4, eps=1e-14)
    theta, grads = drawn(rule), steps(range(5))
    found, _ = updates(rule, theta, [{k: factor * g for k, g in each.items()} for each in grads], template())
    assert_close(found, updates(rule, theta, grads, template())[0], 1e-7)


def test_no_step_is_longer_than_its_scale() -> None:
    rule = RNNprop(hidden_size=4, step_scale=0.02)
    theta = {**drawn(rule), "readout/weight": torch.full((1, 6), 1e3)}
    deltas, _ = updates(rule, theta, steps(range(0, 60, 10)), template())
    largest = [float(d.abs().max()) for delta in deltas for d in delta.values()]
    assert max(largest) == pytest.approx(0.02) and max(largest) <= 0.02


def test_with_equal_decays_its_inputs_are_bounded() -> None:
    seen: list[Tensor] = []
    rule = RNNprop(hidden_size=2, beta1=0.9, beta2=0.9)
    theta, grads = rule.init_theta(torch.Generator().manual_seed(0)), steps(range(0, 200, 20))
    _, state = rule.init(theta, template())
    for t, each in enumerate(grads, start=1):
        _, state = rule.update(theta, each, state, template(), torch.zeros(()))
        root = (state["square"] / (1 - 0.9**t)).sqrt()
        flat = torch.cat([g.reshape(-1) for g in each.values()])
        seen.append(torch.stack([state["mean"] / (1 - 0.9**t) / root, flat / root]).abs().amax(1))
    assert torch.stack(seen).amax(0)[0] <= 1 + 1e-12 and torch.stack(seen).amax(0)[1] <= 1 / math.sqrt(0.1)


def test_meta_training_improves_it() -> None:
    loop = InnerLoop(Quadratic(), RNNprop(hidden_size=6, step_scale=0.3), Execution(chunk_size=16))
    trainer = MetaTrainer(
        loop, Unrolled(8), FinalLoss(), meta_optimizer=lambda p: torch.optim.Adam(p, 0.2), num_tasks=8, seed=0
    )
    tasks = loop.start(sample(loop.family, 16, seed=9))

    def loss() -> float:
        theta = {k: v.detach() for k, v in trainer.theta.items()}
        return float(loop.losses(theta, loop.run(theta, tasks, 8, Tape.NONE).end, "valid").mean())

    before = loss()
    trainer.run(30)
    assert loss() < before - 0.2


def test_it_is_enrolled_in_what_every_rule_is_tested_for() -> None:
    assert "rnnprop" in RULES


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size=0 is not a count"),
        ({"num_layers": True}, ValueError, "num_layers=True is not a count"),
        ({"step_scale": 0.0}, ValueError, "step_scale=0.0 is out of range"),
        ({"beta1": 1.0}, ValueError, "beta1=1.0 is out of range"),
        ({"beta2": -0.1}, ValueError, "beta2=-0.1 is out of range"),
        ({"eps": 0.0}, ValueError, "eps=0.0 is out of range"),
        ({"eps": "small"}, TypeError, "pass a number"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"RNNprop: .*{message}"):
        RNNprop(**options)
