"""Slow oracles of meta-gradients: plain loops over tasks, finite differences, dense linear algebra.

Nothing here comes from the engine: the inner loop, the objectives and the solves are written out a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from problems import FLOAT, one_by_one
from torch import Tensor
from torch.utils import _pytree as pytree

from learnedopt import (
    Bootstrap,
    FinalLoss,
    InnerLoop,
    KLDivergence,
    LogMeans,
    MeanLogLoss,
    MomentMatching,
    OfLosses,
    RegretBound,
    SumOfLosses,
    TargetMatching,
    TaskFamily,
    Tasks,
    Theta,
    UpdateRule,
)
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Params


class Path(NamedTuple):
    """One task's inner loop: num_steps + 1 points (params, state), and what was met at each of the first num_steps.

    ``losses`` are the outer losses, ``told`` what the rule was told: the loss descended less its penalty.
    """

    points: list[tuple[Params, Any]]
    losses: list[Tensor]
    told: list[Tensor]
    grads: list[Params]
    first_step: int


def walk(
    loop: InnerLoop,
    theta: Theta,
    task: Tasks,
    num_steps: int,
    *,
    full: bool = True,
    held: Path | None = None,
    start: tuple[Params, Any] | None = None,
    first_step: int = 0,
) -> Path:
    """Run one task (a batched tree of one) step by step; ``held`` replays recorded gradients and losses instead.

    What is held are the gradients and losses that the rule was given: the outer losses that are read along the way are
    computed anew, where the replay has come to.
    """
    family, rule, objective = loop.family, loop.mover, loop.inner_objective
    rules_own = rule_theta(rule, theta)
    own = {k: p[0] for k, p in family.init_params(task).items()}
    points, losses, told, grads = [rule.init(rules_own, own) if start is None else start], [], [], []
    for i in range(num_steps):
        params, state = points[-1]
        params = {k: p if p.requires_grad else p.detach().requires_grad_() for k, p in params.items()}
        batch = data(family, task, first_step + i, "train")
        losses.append(objective.outer_loss(theta, family, params, batch))
        if held is None:
            total, loss = descended(loop, theta, params, batch)
            found = torch.autograd.grad(total, list(params.values()), create_graph=full, retain_graph=True)
            grad, seen = dict(zip(params, found, strict=True)), loss if full else loss.detach()
        else:
            grad, seen = held.grads[i], held.told[i].detach()
        deltas, state = rule.update(rules_own, grad, state, params, seen)
        points.append(({k: p + deltas[k] for k, p in params.items()}, state))
        told.append(seen)
        grads.append({k: g.detach() for k, g in grad.items()})
    return Path(points, losses, told, grads, first_step)


def descended(loop: InnerLoop, theta: Theta, params: Params, batch: Any) -> tuple[Tensor, Tensor]:
    """Return what an inner step descends, and the same less its penalty."""
    objective = loop.inner_objective
    total = objective.loss(theta, loop.family, params, batch)
    return total, total if objective.penalty is None else loop.family.loss(params, batch)


def rule_theta(rule: UpdateRule, theta: Theta) -> Theta:
    """Return the part of theta that the rule is handed."""
    return {k: theta[k] for k in rule.init_theta(torch.Generator())}


def data(family: TaskFamily, task: Tasks, step: int, split: Any) -> Any:
    """Return one task's batch."""
    return pytree.tree_map(lambda x: x[0], family.batch(task, step, split))


def value_of(objective: MetaObjective, loop: InnerLoop, theta: Theta, task: Tasks, path: Path, target: Any) -> Tensor:
    """Return one task's objective, written out a second time; ``target`` is held fixed where one is needed."""
    family, step, end = loop.family, path.first_step + len(path.losses), path.points[-1][0]

    def outer_loss(split: str) -> Tensor:
        return loop.inner_objective.outer_loss(theta, family, end, data(family, task, step, split))

    if isinstance(objective, FinalLoss):
        return outer_loss("valid")
    if isinstance(objective, SumOfLosses | MeanLogLoss):
        losses = torch.stack([*path.losses[1:], outer_loss("train")])
        return losses.sum() if isinstance(objective, SumOfLosses) else losses.log().mean()
    if isinstance(objective, LogMeans):
        losses = [*path.losses[1:], outer_loss("train")]
        last = losses[-max(1, round(objective.last * len(losses))) :]
        logs = [(sum(part, torch.zeros(())) / len(part)).log() for part in (losses, last)]
        return objective.scale * (logs[0] + objective.weight_last * logs[1])
    if isinstance(objective, RegretBound | MomentMatching):
        return from_start(objective, theta, end, *target)
    if isinstance(objective, OfLosses):  # a new one by its own formula, of losses that are taken here
        return objective.of_losses(torch.stack(path.losses)[:, None], outer_loss(objective.split)[None])[0]
    assert isinstance(objective, TargetMatching), f"write {objective} out here a second time"
    if isinstance(objective.matching, KLDivergence):
        batch = data(family, task, step, objective.target.split)
        log_p, log_q = (family.outputs(x, batch).log_softmax(-1) for x in (target, end))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return 0.5 * torch.stack([((end[k] - target[k]) ** 2).sum() for k in end]).sum()


def from_start(
    objective: RegretBound | MomentMatching, theta: Theta, start: Params, last: Params, squares: Params, held: Params
) -> Tensor:
    """Return one task's bound, or half the squares of its moments: held are its last iterate, squares and distances."""

    def entry(kind: str, k: str) -> Tensor:
        return next(theta[key] for key in (kind, f"{kind}/{k}", f"rule/{kind}/{k}") if key in theta)

    total = torch.zeros(())
    for k, x in start.items():
        gaps = (x - last[k]) ** 2
        if isinstance(objective, RegretBound):
            total = total + (gaps / (2 * entry("lr", k)) + entry("lr", k) / 2 * squares[k]).sum()
            continue
        of_moments = (entry("distance", k) - objective.factor * held[k]) ** 2 + (entry("squares", k) - squares[k]) ** 2
        total = total + 0.5 * (gaps + of_moments).sum()
    return total


def target_of(objective: MetaObjective, loop: InnerLoop, theta: Theta, task: Tasks, path: Path) -> Any:
    """Return one task's bootstrapped target: further steps of the rule, then a plain step down the outer loss.

    Of an objective that takes its steps from the start: the last iterate, and the sums of squared gradients.
    """
    if isinstance(objective, RegretBound | MomentMatching):
        taken = walk(loop, theta, task, objective.num_steps, full=False)
        begin, last = ({k: p.detach() for k, p in taken.points[i][0].items()} for i in (0, -1))
        squares = {k: sum(grad[k] ** 2 for grad in taken.grads) for k in last}
        return last, squares, {k: (last[k] - begin[k]) ** 2 for k in last}
    if not isinstance(objective, TargetMatching):
        return None
    bootstrap = objective.target
    assert isinstance(bootstrap, Bootstrap)
    step, steps = path.first_step + len(path.losses), bootstrap.num_target_steps - 1
    start = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, path.points[-1])
    x = walk(loop, theta, task, steps, full=False, start=start, first_step=step).points[-1][0]
    x = {k: p.detach().requires_grad_() for k, p in x.items()}
    batch = data(loop.family, task, step + steps, bootstrap.split)
    loss = loop.inner_objective.outer_loss(theta, loop.family, x, batch)
    grads = torch.autograd.grad(loss, list(x.values()))
    return {k: (p - bootstrap.step_size * g).detach() for (k, p), g in zip(x.items(), grads, strict=True)}


class Reference:
    """An objective of theta over whole paths, or over the last steps of them, and its derivative by two routes.

    Args:
        skip: steps taken before the window, without a graph; the window starts there.
        whole: the objective sees the losses before the window too, at constant parameters.
        through: the derivative goes back through the steps before the window as well.
        full: the whole tape, or gradients and losses detached.
    """

    def __init__(
        self,
        loop: InnerLoop,
        theta: Theta,
        objective: MetaObjective,
        tasks: Tasks,
        num_steps: int,
        *,
        full: bool = True,
        skip: int = 0,
        whole: bool = False,
        through: bool = False,
    ) -> None:
        self.loop, self.objective, self.full, self.through = loop, objective, full, through
        self.theta, self.num_steps, self.skip = theta, num_steps, skip
        self.tasks = one_by_one(tasks)
        self.starts, self.held, self.targets, self.before = [], [], [], []
        for task in self.tasks:
            ahead = walk(loop, theta, task, skip, full=False)
            start = pytree.tree_map(lambda x: x.detach(), ahead.points[-1]) if skip else None
            path = walk(loop, theta, task, num_steps, full=False, start=start, first_step=skip)
            self.starts.append(start)
            fixed = [pytree.tree_map(lambda x: x.detach(), params) for params, _ in ahead.points[:-1]]
            self.before.append(fixed if whole else [])
            self.held.append(path)
            self.targets.append(target_of(objective, loop, theta, task, path))

    def value(self, theta: Theta, *, differences: bool = False) -> Tensor:
        """Return the mean over tasks, with a graph to theta or for ``differences`` of values.

        A detached tape's derivative is that of the values with the recorded gradients and losses held: they replay.
        """
        values = []
        cases = zip(self.tasks, self.starts, self.held, self.targets, self.before, strict=True)
        for task, start, held, target, before in cases:
            if self.through:
                start = walk(self.loop, theta, task, self.skip).points[-1]
            path = walk(
                self.loop,
                theta,
                task,
                self.num_steps,
                full=self.full and not differences,
                held=held if differences and not self.full else None,
                start=start,
                first_step=self.skip,
            )
            read, family = self.loop.inner_objective.outer_loss, self.loop.family
            losses = [read(theta, family, at, data(family, task, i, "train")) for i, at in enumerate(before)]
            path = path._replace(losses=losses + path.losses, first_step=path.first_step - len(before))
            values.append(value_of(self.objective, self.loop, theta, task, path, target))
        return torch.stack(values).mean()

    def gradient(self) -> Theta:
        """Return the derivative by plain back-propagation through the loops above."""
        return gradient_of(self.value, self.theta)

    def difference_error(self, grads: Theta) -> float:
        """Return the worst relative error of ``grads`` against finite differences, over the entries of theta."""
        return difference_error(lambda theta: float(self.value(theta, differences=True).detach()), self.theta, grads)


def gradient_of(fn: Callable[[Theta], Tensor], theta: Theta) -> Theta:
    """Return the derivative of a scalar function, zeros where it does not depend on an entry."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in theta.items()}
    found = torch.autograd.grad(fn(leaves), list(leaves.values()), allow_unused=True)
    return {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(leaves.items(), found, strict=True)}


def difference_error(fn: Callable[[Theta], float], theta: Theta, grads: Theta, *, step: float = 4e-4) -> float:
    """Return the worst error of ``grads``, relative to each entry's norm, against central differences.

    Each entry of theta is moved along its gradient plus a random direction of the same length, so that neither a wrong
    length nor a wrong direction can hide; Richardson's extrapolation cancels the error of order step^2. Where what is
    left of order step^4 may count, a fourth of the step decides if it comes nearer: a wrong gradient is near to none.
    """
    errors, generator = [], torch.Generator().manual_seed(1)
    for key, grad in grads.items():
        assert grad.shape == theta[key].shape and grad.isfinite().all() and grad.any(), f"no gradient of {key}"
        noise = torch.randn(grad.shape, generator=generator, dtype=FLOAT)
        direction = grad / grad.norm() + (noise / noise.norm() if grad.numel() > 1 else 0.0)

        product, norm = float((grad * direction).sum()), float(grad.norm())

        def slope(h: float, key: str = key, direction: Tensor = direction) -> float:
            ends = [fn({**theta, key: theta[key] + sign * h * direction}) for sign in (1, -1)]
            return (ends[0] - ends[1]) / (2 * h)

        found = [abs(product - (4 * slope(step / 2) - slope(step)) / 3) / norm]
        if not found[0] < 1e-8:
            found.append(abs(product - (4 * slope(step / 8) - slope(step / 4)) / 3) / norm)
        errors.append(float("nan") if any(map(math.isnan, found)) else min(found))
    return worst(errors)


def relative_error(found: Theta, expected: Theta) -> float:
    """Return the worst error over the entries, relative to the norm of each one expected."""
    assert found.keys() == expected.keys()
    found, expected = ({k: v.detach() for k, v in tree.items()} for tree in (found, expected))
    return worst(
        float((found[k] - e).norm() / e.norm()) if e.any() else float(found[k].norm()) for k, e in expected.items()
    )


def worst(errors: Iterable[float]) -> float:
    """Return the largest; NaN, which no comparison of Python's ``max`` would notice, where there is one."""
    return float(torch.tensor(list(errors), dtype=FLOAT).max())
