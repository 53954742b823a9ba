"""Learned directions for matrices beside AdamW: what it starts as, and what the network may and may not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Quadratic, sample
from test_rules import RULES, random_like, updates

from learnedopt import Execution, FinalLoss, InnerLoop, MetaTrainer, Tape, Unrolled
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers import Celo2
from learnedopt.optimizers.bases.newton_schulz import orthogonalised

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = {
    "embed.weight": (5, 4), "conv.weight": (3, 2, 2, 2), "conv.bias": (3,), "norm.weight": (3,), "head.weight": (4, 3),
    "head.bias": (4,),
}  # fmt: skip
MATRICES = ("conv.weight", "head.weight")


def net(seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, generator=generator) for k, shape in SHAPES.items()}


def drawn(rule: Celo2, seed: int = 7) -> Theta:
    """Return a theta whose network does something."""
    generator = torch.Generator().manual_seed(seed)
    theta = rule.init_theta(generator)
    return {**theta, **{k: torch.randn(theta[k].shape, generator=generator) for k in ("output/weight", "output/bias")}}


def assert_close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def gradients(num_steps: int = 4) -> list[Params]:
    return [random_like(net(), seed) for seed in range(num_steps)]


@pytest.mark.parametrize("orthogonalise", [True, False])
def test_untrained_matrices_move_by_muon(orthogonalise: bool) -> None:
    rule = Celo2(lr=0.03, weight_decay=0.2, orthogonalise=orthogonalise)
    found, _ = updates(rule, rule.init_theta(torch.Generator().manual_seed(0)), gradients(), net())
    momentum = {k: torch.zeros(SHAPES[k]) for k in MATRICES}
    for grads, deltas in zip(gradients(), found, strict=True):
        for name in MATRICES:
            momentum[name] = 0.9 * momentum[name] + grads[name]
            flat = momentum[name].flatten(1)
            direction = orthogonalised(flat) if orthogonalise else flat / flat.square().mean().sqrt()
            assert_close(deltas[name], -0.03 * (direction.reshape(SHAPES[name]) + 0.2 * net()[name]), 1e-10)


def test_untrained_the_rest_is_torchs_adamw() -> None:
    rule = Celo2(rest_lr=0.05, weight_decay=0.2)
    theta, params = rule.init_theta(torch.Generator().manual_seed(0)), net()
    rest = [k for k in params if k not in MATRICES]
    peers = {k: params[k].clone().requires_grad_() for k in rest}
    groups = [
        {"params": [peers[k] for k in rest if peers[k].ndim == 2], "weight_decay": 0.2},
        {"params": [peers[k] for k in rest if peers[k].ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    _, state = rule.init(theta, params)
    for grads in gradients(20):
        deltas, state = rule.update(theta, grads, state, params, torch.zeros(()))
        params = {k: p + deltas[k] for k, p in params.items()}
        for k in rest:
            peers[k].grad = grads[k].clone()
        optimizer.step()
        assert_close({k: params[k] for k in rest}, {k: p.detach() for k, p in peers.items()})


@pytest.mark.parametrize("orthogonalise", [True, False])
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_matrix_moves_by_its_rate_whatever_network_and_gradient_are(orthogonalise: bool, factor: float) -> None:
    rule = Celo2(lr=0.04, weight_decay=0.0, orthogonalise=orthogonalise)
    theta = drawn(rule)
    grads = [{k: factor * g for k, g in each.items()} for each in gradients()]
    found, _ = updates(rule, theta, grads, net())
    untrained, _ = updates(rule, rule.init_theta(torch.Generator().manual_seed(7)), grads, net())
    for deltas, others in zip(found, untrained, strict=True):
        for name in MATRICES:
            assert float(deltas[name].square().mean().sqrt()) == pytest.approx(0.04)
            assert (deltas[name] - others[name]).abs().max() > 1e-3
        assert_close(
            {k: d for k, d in deltas.items() if k not in MATRICES},
            {k: d for k, d in others.items() if k not in MATRICES},
        )


def test_the_network_leaves_what_never_had_a_gradient_alone() -> None:
    rule = Celo2(weight_decay=0.0, orthogonalise=False)
    grads = gradients()
    for each in grads:
        each["conv.weight"] = torch.zeros(SHAPES["conv.weight"])
        each["head.weight"][:, 1] = 0.0
    for deltas in updates(rule, drawn(rule), grads, net())[0]:
        assert deltas["conv.weight"].abs().max() == 0 and deltas["head.weight"][:, 1].abs().max() == 0
        assert deltas["head.weight"][:, 0].abs().min() > 0


def test_a_net_without_matrices_is_adamws() -> None:
    rule, params = Celo2(rest_lr=0.1), {"a.bias": torch.ones(3)}
    deltas, _ = updates(rule, drawn(rule), [{"a.bias": torch.tensor([2.0, -1.0, 0.0])}], params)
    assert_close(deltas[0]["a.bias"], torch.tensor([-0.1, 0.1, 0.0]), 1e-7)


def test_meta_training_improves_it() -> None:
    loop = InnerLoop(Quadratic(), Celo2(units=4), Execution(chunk_size=16))
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
    assert sum(kind.startswith("celo2") for kind in RULES) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr=0.0 is out of range"),
        ({"rest_lr": -1.0}, ValueError, "rest_lr=-1.0 is out of range"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1 is out of range"),
        ({"units": 0}, ValueError, "units=0 is not a count"),
        ({"orthogonalise": 1}, TypeError, "orthogonalise=1 is neither"),
        ({"lr": "small"}, TypeError, "pass a number"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Celo2: .*{message}"):
        Celo2(**options)


@pytest.mark.parametrize("orthogonalise", [True, False])
def test_matrices_may_be_narrower_than_vectors(orthogonalise: bool) -> None:
    rule = Celo2(orthogonalise=orthogonalise)
    theta = rule.init_theta(torch.Generator())
    params = {"a.weight": torch.ones(3, 2, dtype=torch.float32), "a.bias": torch.ones(3, dtype=torch.float64)}
    deltas, _ = rule.update(theta, params, rule.init(theta, params)[1], params, torch.zeros(()))
    assert {k: d.dtype for k, d in deltas.items()} == {k: p.dtype for k, p in params.items()}
    assert all(d.isfinite().all() and d.any() for d in deltas.values())
