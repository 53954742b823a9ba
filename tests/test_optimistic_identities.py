"""Meta-gradients of one convex task in the engine against the recursions that they are (Flennerhag et al. 2023).

``MetaTrainer`` x ``Truncated(1)`` x ``FinalLoss`` x ``Averaged(rule)`` x ``DualAveraging``, in float64: every iterate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from learnedopt import (
    DualAveraging,
    FinalLoss,
    InnerLoop,
    LastGradient,
    MetaTrainer,
    TaskFamily,
    Theta,
    Truncated,
    UpdateRule,
)
from learnedopt.core.carry import Carry, Rollout
from learnedopt.core.objective import MetaObjective, TaskMean
from learnedopt.core.tree import Params
from learnedopt.optimizers import Averaged, Iterate, LearnedRates

pytestmark = pytest.mark.usefixtures("float64")

STEPS, TOLERANCE = 40, 1e-12
DIM = 5


class Convex(TaskFamily):
    """``scale · log Σ_j exp(a_j·x + b_j) + 0.05 |x|²``, convex and not quadratic, in two tensors; one function."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        drawn = torch.Generator().manual_seed(4)
        a, b = torch.randn(8, DIM, generator=drawn), torch.randn(8, generator=drawn)
        return {"a": a.expand(num_tasks, 8, DIM), "b": b.expand(num_tasks, 8)}

    def init_params(self, tasks: Any) -> Params:
        start = torch.linspace(-1.0, 2.0, DIM).expand(len(tasks["b"]), DIM)
        return {"w": start[:, :3].clone(), "c": start[:, 3:].clone()}

    def batch(self, tasks: Any, step: int, split: str) -> Any:
        return tasks

    def loss(self, params: Params, batch: Any) -> Tensor:
        x = torch.cat([params["w"], params["c"]])
        return self.scale * ((batch["a"] @ x + batch["b"]).logsumexp(0) + 0.05 * x.square().sum())


FAMILY = Convex()
TASKS = FAMILY.sample(1, torch.Generator())
TEMPLATE = {k: p[0].double() for k, p in FAMILY.init_params(TASKS).items()}
START = torch.cat([*TEMPLATE.values()])


def gradient(x: Tensor, scale: float = 1.0) -> Tensor:
    """Return ∇f by a formula of its own."""
    one = {k: v[0].double() for k, v in Convex().sample(1, torch.Generator()).items()}
    shares = (one["a"] @ x + one["b"]).softmax(0)
    return scale * (one["a"].T @ shares + 0.1 * x)


def flat(params: Params) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in params.values()])


def trace(
    rule: UpdateRule,
    meta_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    objective: MetaObjective = FinalLoss(),  # noqa: B008
    family: TaskFamily = FAMILY,
    steps: int = STEPS,
) -> tuple[Tensor, Tensor]:
    """Return the engine's x̄_0 to x̄_T and w_1 to w_{T+1}, each (T+1, DIM)."""
    trainer = MetaTrainer(InnerLoop(family, rule), Truncated(1), objective, meta_optimizer, None)
    params, thetas = [START], [flat(trainer.theta)]
    for step in range(steps):
        trainer.run(step + 1)
        params.append(flat({k: p[0] for k, p in trainer.progress.carry.params.items()}))
        thetas.append(flat(trainer.theta))
    return torch.stack(params), torch.stack(thetas)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1)
    assert (expected[1:] - expected[:-1]).norm(dim=1).min() > 1e-9  # it moves all along, or nothing was shown


@dataclass(frozen=True)
class Root:
    """Weights of one's own."""

    def __call__(self, step: Tensor) -> Tensor:
        return step.sqrt()


WEIGHTS: dict[str, tuple[Any, Callable[[int], float]]] = {
    "constant": ("constant", lambda t: 1.0),
    "linear": ("linear", float),
    "own": (Root(), lambda t: t**0.5),
}
RULES: dict[str, Callable[[], UpdateRule]] = {
    "iterate": lambda: Iterate(TEMPLATE),
    "element-wise rates": lambda: LearnedRates(TEMPLATE, lr=0.05),
}


class Noting(TaskMean):
    """The final loss, which notes where it was taken: what a hint of the rule's next step needs."""

    end: Carry

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        self.end = rollout.end
        return FinalLoss()(loop, theta, rollout)


def recursion(rule: str, alpha: Callable[[int], float], hint: str, form: str, beta: float) -> tuple[Tensor, Tensor]:
    """Return what the engine should, written out on vectors."""

    def phi(x: Tensor, w: Tensor) -> Tensor:
        return w if rule == "iterate" else x - w * gradient(x)

    def pull_back(x: Tensor, cotangent: Tensor) -> Tensor:  # Dφ(x, w)ᵀ, which depends on w in neither rule
        return cotangent if rule == "iterate" else -gradient(x) * cotangent

    w1 = START if rule == "iterate" else torch.full((DIM,), 0.05)
    mean, w, total = START, w1, 0.0
    weighted, squares, ahead = torch.zeros(DIM), torch.zeros(DIM), torch.zeros(DIM)
    means, ws = [mean], [w]
    for t in range(1, STEPS + 1):
        total += alpha(t)
        rho = alpha(t) / total
        before, mean = mean, (1 - rho) * mean + rho * phi(mean, w)
        g = pull_back(before, gradient(mean))
        weighted, squares = weighted + alpha(t) * g, squares + (alpha(t) * g - ahead) ** 2
        guess = {"none": 0 * g, "last": g, "next": pull_back(mean, gradient(mean))}[hint]
        ahead = alpha(t + 1) * guess
        w = w1 - (beta if form == "euclidean" else beta / (squares + ahead**2).sqrt()) * (weighted + ahead)
        means.append(mean)
        ws.append(w)
    return torch.stack(means), torch.stack(ws)


@pytest.mark.parametrize("form", ["euclidean", "adagrad"])
@pytest.mark.parametrize("hint", ["none", "last", "next"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rule", RULES)
def test_the_engine_is_the_recursion(rule: str, weights: str, hint: str, form: str) -> None:
    given, alpha = WEIGHTS[weights]
    beta = {"euclidean": {"iterate": 0.02, "element-wise rates": 0.002}[rule], "adagrad": 0.01}[form]
    noting, shapes = Noting(), [p.shape for p in TEMPLATE.values()]

    def next_gradient(params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        x = flat(noting.end.params)
        pieces = (gradient(x) if rule == "iterate" else -(gradient(x) ** 2)).split([s.numel() for s in shapes])
        return [piece.reshape(s) for piece, s in zip(pieces, shapes, strict=True)]

    own = {"none": None, "last": LastGradient(), "next": next_gradient}[hint]
    means, ws = trace(
        Averaged(RULES[rule](), given), lambda p: DualAveraging(p, beta, given, own, form), objective=noting
    )
    expected = recursion(rule, alpha, hint, form, beta)
    assert_same(means[1:] if rule == "iterate" else means, expected[0][1:] if rule == "iterate" else expected[0])
    assert_same(ws, expected[1])


def steps_of(means: Tensor) -> Tensor:
    """Return x̄_1 to x̄_T, in which φ(x, w) = w begins at the start."""
    assert torch.equal(means[0], means[1])
    return means[1:]


@pytest.mark.parametrize(
    ("weights", "momentum", "share"),
    [
        ("constant", lambda t: (t - 1) / (t + 1), lambda t: 1 / (t + 1)),
        ("linear", lambda t: (t - 1) / (t + 2), lambda t: 2 * t / (t + 2)),
    ],
)
def test_without_a_hint_averaged_iterates_are_momentum(weights: Any, momentum: Any, share: Any) -> None:
    # share(t) = ρ_{t+1} α_t
    beta = 0.1
    means, _ = trace(Averaged(Iterate(TEMPLATE), weights), lambda p: DualAveraging(p, beta, weights))
    x = [START, START]
    for t in range(1, STEPS):
        x.append(x[-1] - share(t) * beta * gradient(x[-1]) + momentum(t) * (x[-1] - x[-2]))
    assert_same(steps_of(means), torch.stack(x[1:]))


def test_with_the_last_gradient_as_hint_momentum_is_nesterovs_with_its_correction_of_the_gradient() -> None:
    # x' = x + (t-1)/(t+2) (x - x_before) - 2β(t+1)/(t+2) [g + t/(t+1) (g - g_before)]: Nesterov's look-ahead steps are
    # of this form with one momentum for both, a rate of 2β and a gradient that is corrected by it.
    beta = 0.05
    means, _ = trace(Averaged(Iterate(TEMPLATE), "linear"), lambda p: DualAveraging(p, beta, "linear", "last-gradient"))
    x, before = [START, START], torch.zeros(DIM)
    for t in range(1, STEPS):
        g = gradient(x[-1])
        corrected = g + t / (t + 1) * (g - before)
        x.append(x[-1] + (t - 1) / (t + 2) * (x[-1] - x[-2]) - 2 * beta * (t + 1) / (t + 2) * corrected)
        before = g
    assert_same(steps_of(means), torch.stack(x[1:]))


def test_iterates_that_are_not_averaged_are_gradient_descent() -> None:
    means, _ = trace(Iterate(TEMPLATE), lambda p: DualAveraging(p, 0.1, averaged=False))
    x = [START]
    for _ in range(1, STEPS):
        x.append(x[-1] - 0.1 * gradient(x[-1]))
    assert_same(steps_of(means), torch.stack(x))


class Shift(UpdateRule):
    """φ(x, w) = x + w."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {k: torch.zeros_like(p) for k, p in TEMPLATE.items()}

    def init(self, theta: Theta, params: Params) -> Any:
        return params, ()

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> Any:
        return {k: theta[k] + 0.0 * p for k, p in params.items()}, state


def test_additive_updates_under_decay_are_the_heavy_ball() -> None:
    momentum, beta = 0.8, 0.05  # w ← μ w - β ∇f(x), which is descent on w with a weight decay
    means, _ = trace(Shift(), lambda p: torch.optim.SGD(p, beta, weight_decay=(1 - momentum) / beta))
    x = [START, START]
    for _ in range(1, STEPS):
        x.append(x[-1] - beta * gradient(x[-1]) + momentum * (x[-1] - x[-2]))
    assert_same(steps_of(means), torch.stack(x[1:]))


class OptimisticTarget(TaskMean):
    """½|z_t - x_t(w)|² with z_t = x_t - [α_{t+1}∇f(x̄_t) + α_t(∇f(x̄_t) - ∇f(x̄_{t-1}))], ∇f(x̄_0) := 0.

    The engine's parameters are averages, of which x_t(w) = x̄_{t-1} + (x̄_t - x̄_{t-1})/ρ_t is the newest part.
    """

    def __init__(self, alpha: Callable[[int], float]) -> None:
        self.alpha = alpha

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        t = rollout.end.step
        rho = self.alpha(t) / sum(self.alpha(s) for s in range(1, t + 1))
        start, end = (torch.cat([*(p[0] for p in c.params.values())]) for c in (rollout.start, rollout.end))
        x = start + (end - start) / rho
        here, before = gradient(end.detach()), gradient(start.detach()) if t > 1 else torch.zeros(DIM)
        target = x.detach() - (self.alpha(t + 1) * here + self.alpha(t) * (here - before))
        return 0.5 * (target - x).square().sum()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_optimism_is_a_bootstrapped_target(weights: str) -> None:
    (given, alpha), beta = WEIGHTS[weights], 0.02
    rule = Averaged(Iterate(TEMPLATE), given)
    optimistic = trace(rule, lambda p: DualAveraging(p, beta, given, LastGradient()))
    bootstrapped = trace(rule, lambda p: torch.optim.SGD(p, beta), objective=OptimisticTarget(alpha))
    assert_same(steps_of(bootstrapped[0]), steps_of(optimistic[0]))
    assert_same(bootstrapped[1], optimistic[1])


@pytest.mark.parametrize("form", ["euclidean", "adagrad"])
@pytest.mark.parametrize("hint", [None, "last-gradient"])
def test_the_scale_of_weights_is_that_of_the_rate_and_none_of_adagrads(hint: Any, form: Any) -> None:
    @dataclass(frozen=True)
    class Thrice:
        def __call__(self, step: Tensor) -> Tensor:
            return 3 * step

    rule, beta = Averaged(Iterate(TEMPLATE), "linear"), 0.02
    means, ws = trace(rule, lambda p: DualAveraging(p, beta, "linear", hint, form))
    thrice = Averaged(Iterate(TEMPLATE), Thrice())
    rate = beta / 3 if form == "euclidean" else beta
    for found, expected in zip(
        trace(thrice, lambda p: DualAveraging(p, rate, Thrice(), hint, form)), (means, ws), strict=True
    ):
        assert_same(found[1:], expected[1:])


@pytest.mark.parametrize("form", ["euclidean", "adagrad"])
@pytest.mark.parametrize("hint", [None, "last-gradient"])
def test_the_scale_of_the_loss_is_that_of_the_rate_and_none_of_adagrads(hint: Any, form: Any) -> None:
    rule, beta = Averaged(Iterate(TEMPLATE), "linear"), 0.02
    _, ws = trace(rule, lambda p: DualAveraging(p, beta, "linear", hint, form))
    rate = beta / 8 if form == "euclidean" else beta
    _, scaled = trace(rule, lambda p: DualAveraging(p, rate, "linear", hint, form), family=Convex(8.0))
    assert_same(scaled, ws)
