"""How exact the meta-gradients are, in float64: the errors that the tests bound, measured.

Run ``python benchmarks/results_gradients.py`` (about a minute). Each line is the worst relative error ``|a - b| / |b|``
over meta-parameters, with the norms taken over one meta-parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt import (
    BootstrappedTarget,
    ConjugateGradient,
    Execution,
    FinalLoss,
    GradientEstimator,
    Implicit,
    InnerLoop,
    MeanLogLoss,
    ModuleFamily,
    Neumann,
    Params,
    Proximal,
    SumOfLosses,
    Tape,
    TargetMatching,
    TaskFamily,
    TaskLoss,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    UpdateRule,
    optimizers,
    tasks,
)

RULES = ("lstm", "meta-sgd", "maml", "maml, proximal", "sgd", "momentum", "nesterov", "rmsprop", "adam")
OBJECTIVES = (FinalLoss(), SumOfLosses(), MeanLogLoss())


def tanh_mlp() -> TaskFamily:
    """Return a small regression with a tanh network."""

    def data(seed: int, step: int, split: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed % 1000 + 7 * (split == "valid"))
        x = torch.randn(6, 2, generator=generator)
        return x, x.sin().sum(1, keepdim=True) + 2

    def build() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))

    return ModuleFamily(build, functional.mse_loss, data)


def like(family: TaskFamily) -> Params:
    """Return one task's parameters."""
    drawn = family.init_params(family.sample(1, torch.Generator().manual_seed(1)))
    return {k: p[0] for k, p in drawn.items()}


def make_rule(name: str, family: TaskFamily) -> UpdateRule:
    """Return the rule at a learning rate that suits small problems; that of iMAML is MAML's."""
    name = "maml" if name == "maml, proximal" else name
    options = {} if name == "lstm" else {"lr": 0.02}
    # At the usual 1e-8 and 0.99, eps and 1 - alpha are small against the steps of finite differences.
    options |= {"rmsprop": {"eps": 0.1, "alpha": 0.9}, "adam": {"eps": 0.1}}.get(name, {})
    return optimizers.make(name, template=like(family), **options)


def setting(name: str, family: TaskFamily, chunk_size: int = 1, num_tasks: int = 2):
    """Return the loop, theta and a fresh carry; iMAML's loop descends a proximal inner objective."""
    objective = Proximal(like(family), 1.0) if name == "maml, proximal" else TaskLoss()
    loop = InnerLoop(family, make_rule(name, family), Execution(chunk_size), objective)
    theta = {k: v.double() for k, v in loop.init_theta(torch.Generator().manual_seed(2)).items()}
    return loop, theta, loop.start(family.sample(num_tasks, torch.Generator().manual_seed(3)))


def error(found: Theta, expected: Theta) -> float:
    """Return the worst relative error over meta-parameters."""
    return max(float((found[k] - v).norm() / v.norm()) for k, v in expected.items() if v.norm() > 0)


def along(theta: Theta, direction: Theta, size: float) -> Theta:
    """Return theta moved along a direction."""
    return {k: v + size * direction[k] for k, v in theta.items()}


def difference_error(value: Callable[[Theta], float], theta: Theta, grads: Theta) -> float:
    """Return the worst error of a directional derivative, one random direction per meta-parameter.

    Central differences at two steps, extrapolated (Richardson), along one meta-parameter at a time.
    """
    generator, worst = torch.Generator().manual_seed(4), 0.0
    for k, v in theta.items():
        zeros = {name: torch.zeros_like(x) for name, x in theta.items()}
        # Mostly along the gradient, where there is something to measure, and as long as the meta-parameter is large.
        unit = grads[k] / grads[k].norm() + 0.1 * torch.randn(v.shape, generator=generator)
        unit = unit * v.abs().max().clamp(1e-2, 1)
        direction = {**zeros, k: unit}
        coarse, fine = (
            (value(along(theta, direction, h)) - value(along(theta, direction, -h))) / (2 * h) for h in (2e-3, 1e-3)
        )
        exact = (4 * fine - coarse) / 3
        worst = max(worst, abs(float((grads[k] * unit).sum()) / exact - 1))
    return worst


def differences(family: TaskFamily) -> Iterable[tuple[str, float]]:
    """Yield the unrolled gradient against finite differences: of each rule its worst over objectives."""
    for name in RULES:
        loop, theta, carry = setting(name, family)
        errors = []
        for objective in (*OBJECTIVES, BootstrappedTarget(2, 0.1)):
            estimate = Unrolled(4).estimate(loop, theta, objective, carry)
            value = held(loop, objective, theta, carry)
            errors.append(difference_error(value, theta, estimate.grads))
        yield name, max(errors)


def held(loop: InnerLoop, objective, theta: Theta, carry) -> Callable[[Theta], float]:
    """Return the objective as a function of theta, a bootstrapped target held where it is."""
    if not isinstance(objective, TargetMatching):
        return lambda t: float(objective(loop, t, loop.run(t, carry, 4, Tape.NONE)))
    target, split = objective.target.find(loop, theta, loop.run(theta, carry, 4, Tape.NONE).end).target, "valid"

    def value(t: Theta) -> float:
        return float(objective.matching(loop, target, loop.run(t, carry, 4, Tape.NONE).end, split).mean())

    return value


def pairs() -> Iterable[tuple[str, float]]:
    """Yield estimators that must agree."""
    mlp, quadratic = tanh_mlp(), tasks.make("quadratic", dim=4)
    lstm = setting("lstm", mlp)

    def grads(estimator: GradientEstimator, where: Any = lstm, objective: Any = SumOfLosses()) -> Theta:  # noqa: B008 - frozen
        return estimator.estimate(where[0], where[1], objective, where[2]).grads

    yield "segments of 3 against the plain unroll, 10 steps", error(grads(Unrolled(10, segment=3)), grads(Unrolled(10)))
    yield (
        "one window as long as the horizon against the unroll",
        error(grads(Truncated(6, 6, Tape.FULL)), grads(Unrolled(6))),
    )
    together = setting("lstm", mlp, chunk_size=2)
    yield "vmapped against looped tasks", error(grads(Unrolled(6), together), grads(Unrolled(6)))
    for name in ("lstm", "meta-sgd"):
        where = setting(name, mlp)
        scaled = {k: 0.3 * g for k, g in grads(Unrolled(4), where, FinalLoss()).items()}
        target = BootstrappedTarget(1, 0.3)
        yield (
            f"bootstrapped, L = 1, against 0.3 x the final loss's, {name}",
            error(grads(Unrolled(4), where, target), scaled),
        )
    where = setting("maml, proximal", quadratic)
    series = grads(Implicit(4000, Neumann(7)), where, FinalLoss())
    yield (
        "K-RMD against 7 terms of the Neumann series",
        error(grads(TruncatedBackprop(4000, 7), where, FinalLoss()), series),
    )
    exact = grads(Implicit(4000, ConjugateGradient(4)), where, FinalLoss())
    yield "implicit, 4 eigenvalues, 4 CG iterations, against the closed form", error(exact, closed_form(where))


def closed_form(where) -> Theta:
    """Return ``strength P^-1 grad L(x*)`` for quadratics ``|W x - y|^2`` with ``P = 2 W^T W + strength I``."""
    loop, theta, carry = where
    w, y, start = carry.tasks["W"], carry.tasks["y"], theta["init/x"]
    strength = loop.inner_objective.strength
    hessian, pull = 2 * w.mT @ w, 2 * (w.mT @ y[..., None]).squeeze(-1)
    p = hessian + strength * torch.eye(4)
    x = torch.linalg.solve(p, pull + strength * start)
    return {"init/x": (strength * torch.linalg.solve(p, (hessian @ x[..., None]).squeeze(-1) - pull)).mean(0)}


def main() -> None:
    """Print everything."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for label, family in (("quadratics", tasks.make("quadratic", dim=4)), ("a tanh MLP", tanh_mlp())):
        for name, worst in differences(family):
            print(f"{'unrolled against finite differences on ' + label + ', ' + name:72} {worst:.1e}", flush=True)
    for label, found in pairs():
        print(f"{label:72} {found:.1e}", flush=True)


if __name__ == "__main__":
    main()
