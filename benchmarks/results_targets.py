"""The identities of target matching, measured in float64: relative errors of whole meta-gradients, the worst of draws.

Run ``python benchmarks/results_targets.py`` (about a minute). It also shows rates that run away, and that stay, when a
rule along a normalised direction is drawn to where it comes itself.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from results_gradients import like, tanh_mlp
from torch import Tensor
from torch.nn import functional

from learnedopt import (
    BestInHindsight,
    BootstrappedTarget,
    FinalLoss,
    InnerLoop,
    KLDivergence,
    LastIterate,
    MetaObjective,
    ModuleFamily,
    Params,
    Rollout,
    SumOfLossesSolver,
    Tape,
    TargetMatching,
    TaskFamily,
    Theta,
    Truncated,
    Unrolled,
    UpdateRule,
    optimizers,
    tasks,
)

RULES: dict[str, dict[str, Any]] = {
    "momentum": {"lr": 0.02},
    "adam": {"lr": 0.02},
    "lstm": {},
    "meta-sgd": {"lr": 0.02},
}
NUM_STEPS, NUM_TASKS, DRAWS = 4, 3, 3


def classifier(*hidden: torch.nn.Module, noise: float = 0.5) -> TaskFamily:
    """Return 12 points with 4 features and 3 classes under a small network; without hidden layers logits are linear."""

    def data(seed: int, step: int, split: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed % 1000 + 7 * (split == "valid") + 10_000 * step)
        x = torch.randn(12, 4, generator=generator)
        return x, (x[:, :3] + noise * torch.randn(12, 3, generator=generator)).argmax(1)

    return ModuleFamily(lambda: torch.nn.Sequential(*hidden, torch.nn.Linear(4, 3)), functional.cross_entropy, data)


def error(found: Theta, expected: Theta) -> float:
    """Return the relative error of a whole meta-gradient."""
    a, b = (torch.cat([x[k].reshape(-1) for k in expected]) for x in (found, expected))
    return float((a - b).norm() / b.norm())


def setting(name: str, family: TaskFamily, draw: int) -> Any:
    """Return loop, theta and a fresh carry."""
    loop = InnerLoop(family, optimizers.make(name, template=like(family), **RULES[name]))
    theta = {k: v.double() for k, v in loop.init_theta(torch.Generator().manual_seed(draw)).items()}
    return loop, theta, loop.start(family.sample(NUM_TASKS, torch.Generator().manual_seed(10 + draw)))


def natural(alpha: float) -> MetaObjective:
    """Return the objective with the meta-gradient ``alpha J^T F grad f``, F the outputs' Fisher matrix."""

    def direction(family: TaskFamily, params: Params, batch: Any) -> Params:
        slope = torch.func.grad(family.loss)(params, batch)
        logits, pull, *_ = torch.func.vjp(lambda q: family.outputs(q, batch), params)
        jacobian = torch.func.jacrev(lambda q: family.outputs(q, batch))(params)
        pushed = torch.stack([(jacobian[k] * slope[k]).flatten(2).sum(2) for k in slope]).sum(0)
        p = logits.softmax(-1)
        return pull((p * pushed - p * (p * pushed).sum(-1, keepdim=True)) / len(logits))[0]

    def objective(loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        end = rollout.end
        fixed = {k: p.detach() for k, p in end.params.items()}
        batch = loop.batch(end.tasks, end.step, "valid")
        pushes = loop.over_tasks(lambda p, b: direction(loop.family, p, b), (), fixed, batch)
        terms = [(end.params[k] * pushes[k].detach()).flatten(1).sum(1) for k in fixed]
        return alpha * torch.stack(terms).sum(0).mean()

    return objective


def identities() -> Iterable[tuple[str, float]]:
    """Yield each identity with its worst error."""
    families = {"a tanh MLP": tanh_mlp(), "quadratics": tasks.make("quadratic", dim=4)}

    def grads(where: Any, objective: MetaObjective, num_steps: int = NUM_STEPS) -> Theta:
        loop, theta, carry = where
        return Unrolled(num_steps).estimate(loop, theta, objective, carry).grads

    for name in RULES:
        errors = []
        for family in families.values():
            for draw in range(DRAWS):
                where = setting(name, family, draw)
                scaled = {k: 0.3 * g for k, g in grads(where, FinalLoss()).items()}
                errors.append(error(grads(where, BootstrappedTarget(1, 0.3)), scaled))
        yield f"L = 1, squared distance, against 0.3 x the final loss's, {name}", max(errors)
    for name in RULES:
        errors = []
        for alpha in (0.01, 0.5, 20.0):
            for draw in range(DRAWS):
                where = setting(name, classifier(), draw)
                objective = BootstrappedTarget(1, alpha, matching=KLDivergence("reverse"))
                errors.append(error(grads(where, objective), grads(where, natural(alpha))))
        yield f"L = 1, reverse KL, linear logits, step sizes .01 to 20, {name}", max(errors)
    network = classifier(torch.nn.Linear(4, 4), torch.nn.Tanh())
    for alpha in (1e-2, 1e-3, 1e-4):
        errors = []
        for draw in range(DRAWS):
            where = setting("momentum", network, draw)
            objective = BootstrappedTarget(1, alpha, matching=KLDivergence())
            errors.append(error(grads(where, objective), grads(where, natural(alpha))))
        yield f"L = 1, forward KL on a tanh network, step size {alpha:g}: first order only", max(errors)
    reptile, leader = [], []
    quadratic = families["quadratics"]
    for draw in range(DRAWS):
        family = families["a tanh MLP"]
        loop = InnerLoop(family, optimizers.make("maml", template=like(family), lr=0.1))
        theta = loop.init_theta(torch.Generator().manual_seed(draw))
        carry = loop.start(family.sample(NUM_TASKS, torch.Generator().manual_seed(10 + draw)))
        end = loop.run(theta, carry, 5, Tape.NONE).end.params
        expected = {f"init/{k}": theta[f"init/{k}"] - p.mean(0) for k, p in end.items()}
        for objective in (TargetMatching(LastIterate(5)), BootstrappedTarget(5, 0.1, "train")):
            reptile.append(error(grads((loop, theta, carry), objective, 0), expected))
        loop = InnerLoop(quadratic, optimizers.make("maml", template=like(quadratic), lr=0.02))
        theta = loop.init_theta(torch.Generator().manual_seed(draw))
        carry = loop.start(quadratic.sample(NUM_TASKS, torch.Generator().manual_seed(10 + draw)))
        least = torch.linalg.solve(carry.tasks["W"], carry.tasks["y"])
        expected = {"init/x": theta["init/x"] - least.mean(0)}
        objective = TargetMatching(BestInHindsight(SumOfLossesSolver(), 3))
        leader.append(error(grads((loop, theta, carry), objective, 0), expected))
    yield "Reptile: no steps, five ahead, on a learned start", max(reptile)
    yield "the leader: start less the mean of the tasks' optima, quadratics", max(leader)


class Adam(UpdateRule):
    """Adam with one learned number, the logarithm of its rate."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"log_lr": torch.tensor(math.log(0.03))}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        zeros = {k: torch.zeros_like(p) for k, p in params.items()}
        return params, {"m": zeros, "v": zeros, "t": torch.zeros(())}

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        t = state["t"] + 1
        m = {k: 0.9 * state["m"][k] + 0.1 * g for k, g in grads.items()}
        v = {k: 0.99 * state["v"][k] + 0.01 * g.square() for k, g in grads.items()}
        rate = theta["log_lr"].exp()
        deltas = {k: -rate * (m[k] / (1 - 0.9**t)) / ((v[k] / (1 - 0.99**t)).sqrt() + 1e-8) for k in grads}
        return deltas, {"m": m, "v": v, "t": t}


def rate_after(objective: MetaObjective, num_windows: int = 200) -> float:
    """Return Adam's rate, learned in windows of 4 steps of one long run of 4 tasks, from .03."""
    family = classifier(torch.nn.Linear(4, 4), torch.nn.Tanh(), noise=2.0)  # fresh data at each step: never all learned
    loop = InnerLoop(family, Adam())
    carry: Any = loop.start(family.sample(4, torch.Generator().manual_seed(5)))
    theta = loop.init_theta(torch.Generator())
    optimizer = torch.optim.Adam([theta["log_lr"]], 0.1)
    for _ in range(num_windows):
        found = Truncated(4, 10**9, Tape.FULL).estimate(loop, theta, objective, carry)
        carry, theta["log_lr"].grad = found.carry, found.grads["log_lr"]
        optimizer.step()
    return float(theta["log_lr"].exp())


def unbounded(loop: InnerLoop, target: Any, end: Any, split: Any) -> Tensor:
    """Match by half the squared distance, as a function of one's own, which is not refused."""
    return 0.5 * torch.stack([(target.params[k] - end.params[k]).square().flatten(1).sum(1) for k in end.params]).sum(0)


def rates() -> Iterable[tuple[str, float]]:
    """Yield the rates that targets ahead of Adam lead to."""
    for ahead in (4, 16):
        yield f"squared distance, L = {ahead}, as it is", rate_after(BootstrappedTarget(ahead, 0.1, matching=unbounded))
        yield f"KL, L = {ahead}", rate_after(BootstrappedTarget(ahead, 0.1, matching=KLDivergence()))
    yield "squared distance, L = 1", rate_after(BootstrappedTarget(1, 0.1))


def main() -> None:
    """Print everything."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for label, found in identities():
        print(f"{label:75} {found:.1e}", flush=True)
    for label, found in rates():
        print(f"{'Adam rate after 200 windows, ' + label:75} {found:.3g}", flush=True)


if __name__ == "__main__":
    main()
