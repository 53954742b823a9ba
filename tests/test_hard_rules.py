"""Baselines that are hard to beat: Muon, Schedule-Free and schedules against what torch and its authors have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn

from learnedopt import InnerLoop, Tape, optimizers, tasks
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params
from learnedopt.optimizers import (
    SGD,
    Adam,
    AdamW,
    Averaged,
    Clip,
    Muon,
    NAdam,
    Nesterov,
    Partition,
    Scheduled,
    ScheduleFree,
)
from learnedopt.optimizers.bases.newton_schulz import iterated

pytestmark = pytest.mark.usefixtures("float64")

HORIZON = 30


class Net(nn.Module):
    """An embedding, a convolution, two hidden matrices of one shape, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 9)
        self.conv = nn.Conv2d(1, 3, 2)
        self.inner = nn.Linear(12, 12)
        self.outer = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.embedding(x).reshape(-1, 1, 3, 3)).flatten(1)
        return self.head(self.norm(torch.tanh(self.outer(torch.relu(self.inner(x))))))


HIDDEN = ("conv.weight", "inner.weight", "outer.weight")


def problem() -> tuple[Net, Callable[[Any, int], Tensor]]:
    torch.manual_seed(0)
    net = Net()

    def loss(params: Any, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(5, (16,), generator=generator)
        return nn.functional.cross_entropy(torch.func.functional_call(net, params, (x,)), x % 4)

    return net, loss


def run(rule: UpdateRule, num_steps: int = HORIZON) -> tuple[Params, Any, UpdateRule]:
    """Train the net by a rule without theta of its own; return parameters, state and what was stepped."""
    net, loss_of = problem()
    mover = rule.within(HORIZON)
    theta = rule.init_theta(torch.Generator())
    params, state = mover.init(theta, {k: p.detach() for k, p in net.named_parameters()})
    for step in range(num_steps):
        grads, loss = torch.func.grad_and_value(lambda p, step=step: loss_of(p, step))(params)
        deltas, state = mover.update(theta, grads, state, params, loss)
        params = {k: p + deltas[k] for k, p in params.items()}
    return params, state, mover


def by_torch(
    make: Callable[[dict[str, nn.Parameter]], list[torch.optim.Optimizer]],
    factor: Callable[[int], float] = lambda step: 1.0,
) -> Params:
    """Train it by optimizers of torch, their rates multiplied by a factor of the step."""
    net, loss_of = problem()
    params = dict(net.named_parameters())
    peers = make(params)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(peer, factor) for peer in peers]
    for step in range(HORIZON):
        loss = loss_of(params, step)
        for p, grad in zip(params.values(), torch.autograd.grad(loss, list(params.values())), strict=True):
            p.grad = grad
        for each in (*peers, *schedulers):
            each.step()
    return {k: p.detach() for k, p in params.items()}


def assert_same(ours: Params, theirs: Params, tolerance: float = 1e-10) -> None:
    start = {k: p.detach() for k, p in problem()[0].named_parameters()}
    for name, mine in ours.items():
        assert (mine - start[name]).abs().max() > 1e-3, name
        torch.testing.assert_close(
            mine, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# Muon


def exact_newton_schulz(grad: Tensor, coefficients: Any, num_steps: int, eps: float) -> Tensor:
    """torch's iteration, in the dtype of its argument."""
    a, b, c = coefficients
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(num_steps):
        x = a * x + b * (x @ x.T) @ x + c * torch.linalg.matrix_power(x @ x.T, 2) @ x
    return x.T if grad.shape[0] > grad.shape[1] else x


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_equals_torchs_beside_adamw(adjust: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", exact_newton_schulz)

    def make(params: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
        kernel = params["conv.weight"]  # torch takes matrices alone
        matrix = nn.Parameter(kernel.detach().flatten(1))
        kernel.data = matrix.data.view_as(kernel)

        class Flat(torch.optim.Muon):
            def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
                assert kernel.grad is not None
                matrix.grad = kernel.grad.flatten(1)
                super().step()

        hidden = [matrix, params["inner.weight"], params["outer.weight"]]
        rest = [p for k, p in params.items() if k not in HIDDEN]
        return [
            Flat(hidden, lr=0.02, weight_decay=0.3, momentum=0.8, adjust_lr_fn=adjust),
            torch.optim.AdamW(rest, lr=0.02 * 0.3, weight_decay=0.3),
        ]

    ours, state, _ = run(Muon(lr=0.02, weight_decay=0.3, momentum=0.8, ratio=0.3, adjust=adjust, learn=()))
    assert tuple(state["buffer"]) == HIDDEN
    assert_same(ours, by_torch(make))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_the_iteration_is_torchs_up_to_bfloat16() -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 6), (4, 9), (9, 4)):
        x = torch.randn(shape, generator=generator)
        exact = exact_newton_schulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        torch.testing.assert_close(iterated((x / x.norm())[None], 5)[0], exact, rtol=1e-12, atol=1e-12)
        rounded = _zeropower_via_newtonschulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7).double()
        assert (rounded - exact).norm() < 0.05 * exact.norm()
        singular = torch.linalg.svdvals(exact)
        assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3


@pytest.mark.parametrize("learn", ["momentum", "ratio", "weight_decay", "lr", "beta1"])
def test_muons_hypergradients_equal_differences(learn: str) -> None:
    net, loss_of = problem()
    rule = Muon(lr=0.02, momentum=0.7, eps=1e-2, learn=(learn,))

    def end(value: Tensor) -> Tensor:
        theta = {learn: value}
        params, state = rule.init(theta, {k: p.detach() for k, p in net.named_parameters()})
        for step in range(4):
            grads, loss = torch.func.grad_and_value(lambda p, step=step: loss_of(p, step))(params)
            deltas, state = rule.update(theta, grads, state, params, loss)
            params = {k: p + deltas[k] for k, p in params.items()}
        return loss_of(params, 9)

    at, h = torch.tensor(float(getattr(rule, learn))), 1e-4
    exact = float(torch.func.grad(end)(at))
    difference = float((8 * (end(at + h) - end(at - h)) - (end(at + 2 * h) - end(at - 2 * h))) / (12 * h))
    assert exact == pytest.approx(difference, rel=1e-6) and abs(exact) > 1e-6


# Schedule-Free

FREE: list[tuple[ScheduleFree, Callable[[Any], Any]]] = [
    (
        ScheduleFree(lr=0.02, beta1=0.8, weight_decay=0.1, warmup_steps=7),
        lambda p: schedulefree.AdamWScheduleFree(p, lr=0.02, betas=(0.8, 0.999), weight_decay=0.1, warmup_steps=7),
    ),
    (ScheduleFree(), lambda p: schedulefree.AdamWScheduleFree(p)),
    (
        ScheduleFree(lr=0.5, weight_decay=0.01, adaptive=False, warmup_steps=4),
        lambda p: schedulefree.SGDScheduleFree(p, lr=0.5, momentum=0.9, weight_decay=0.01, warmup_steps=4),
    ),
]


@pytest.mark.parametrize(("rule", "make"), FREE, ids=["adamw, warm", "adamw", "sgd, warm"])
def test_schedule_free_equals_the_package_along_the_way_and_at_its_average(
    rule: ScheduleFree, make: Callable[[Any], Any]
) -> None:
    net, loss_of = problem()
    params = dict(net.named_parameters())
    peer = make(list(params.values()))
    peer.train()
    ours, state, _ = run(rule, 0)
    theta = rule.init_theta(torch.Generator())
    for step in range(HORIZON):
        grads = torch.autograd.grad(loss_of(params, step), list(params.values()))
        for p, grad in zip(params.values(), grads, strict=True):
            p.grad = grad.clone()
        mine, loss = torch.func.grad_and_value(lambda p, step=step: loss_of(p, step))(ours)
        deltas, state = rule.update(theta, mine, state, ours, loss)
        ours = {k: p + deltas[k] for k, p in ours.items()}
        peer.step()
        assert_near(ours, params)
    between = {k: p.detach().clone() for k, p in params.items()}
    peer.eval()
    found = rule.result(theta, ours, state)
    assert_near(found, params)
    assert any((found[k] - between[k]).abs().max() > 1e-4 for k in found)


def assert_near(ours: Params, theirs: Any) -> None:
    for name, mine in ours.items():
        torch.testing.assert_close(mine, theirs[name].detach(), rtol=1e-9, atol=1e-11)


def test_whoever_wraps_a_rule_hands_on_what_it_keeps() -> None:
    rule = ScheduleFree(lr=0.02, learn=())
    ours, state, _ = run(rule)
    expected = rule.result({}, ours, state)
    wrapped: list[UpdateRule] = [
        Clip(rule, max_value=1e9),
        Partition({"all": ("*", rule)}),
        optimizers.Recorded(rule, 3),
        optimizers.Reparametrized(ScheduleFree(lr=0.02, learn=("lr",)), {"lr": "log"}),
        optimizers.LearnedInit(rule, {k: p.detach() for k, p in problem()[0].named_parameters()}),
    ]
    for outer in wrapped:
        params, state, mover = run(outer)
        assert_near(mover.result(outer.init_theta(torch.Generator()), params, state), expected)
    params, state, mover = run(Scheduled(rule, "linear-end", warmup=0.0))
    kept = mover.result({}, params, state)
    assert any((kept[k] - p).abs().max() > 1e-4 for k, p in params.items())
    params, state, mover = run(Averaged(rule))
    assert mover.result({}, params, state) is params
    params, state, mover = run(SGD(learn=()))
    assert mover.result({}, params, state) is params


# Schedules


def cosine(step: int) -> float:
    share = step / HORIZON
    return 0.1 + 0.9 * share / 0.2 if share < 0.2 else 0.5 * (1 + math.cos(math.pi * (share - 0.2) / 0.8))


def linear_end(step: int) -> float:
    return min(1.0, (1 - step / HORIZON) / 0.4)


SCHEDULED: dict[str, tuple[UpdateRule, Callable[[Any], torch.optim.Optimizer]]] = {
    "nesterov": (Nesterov(0.1, learn=()), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True)),
    "adam": (Adam(0.01, learn=()), lambda p: torch.optim.Adam(p, 0.01)),
    "adamw": (AdamW(0.01, weight_decay=0.5, learn=()), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5)),
    "nadam": (NAdam(0.01, learn=()), lambda p: torch.optim.NAdam(p, 0.01)),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_is_one_of_the_rate_as_torch_has_them(name: str) -> None:
    rule, make = SCHEDULED[name]
    for schedule, factor in (
        (Scheduled(rule, "cosine", warmup=0.2), cosine),
        (Scheduled(rule, "linear-end", warmup=0.0), linear_end),
    ):
        assert_same(run(schedule)[0], by_torch(lambda params: [make(list(params.values()))], factor))


def test_factors_at_the_ends() -> None:
    warm, bare = Scheduled(SGD()), Scheduled(SGD(), "linear-end", warmup=0.0)
    at = [float(warm.factor(torch.tensor(p))) for p in (0.0, 0.05, 0.525, 1.0)]
    assert at == pytest.approx([0.1, 1.0, 0.5, 0.0], abs=1e-12)
    at = [float(bare.factor(torch.tensor(p))) for p in (0.0, 0.6, 0.8, 1.0)]
    assert at == pytest.approx([1.0, 1.0, 0.5, 0.0], abs=1e-12)


def test_past_its_horizon_a_schedule_stands_still_and_without_one_it_is_refused() -> None:
    family = tasks.make("quadratic", dim=3)
    rule = Scheduled(SGD(lr=0.01))
    with pytest.raises(ValueError, match=r"Scheduled reads how far a run is.*horizon=T"):
        InnerLoop(family, rule)
    loop = InnerLoop(family, rule, horizon=4)
    theta = loop.init_theta(torch.Generator())
    rollout = loop.run(theta, loop.start(family.sample(2, torch.Generator().manual_seed(0))), 4, Tape.NONE)
    with pytest.warns(UserWarning, match="past the horizon of 4 steps"):
        after = loop.run(theta, rollout.end, 2, Tape.NONE).end
    torch.testing.assert_close(after.params, rollout.end.params, rtol=0, atol=0)
