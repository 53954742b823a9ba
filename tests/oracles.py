"""Slow oracles of meta-gradients: plain loops over tasks, finite differences, dense linear algebra.

Nothing here comes from the engine: the inner loop, the objectives and the solves are written out a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from problems import FLOAT, one_by_one
from torch import Tensor
from torch.utils import _pytree as pytree

from learnedopt import (
    BootstrappedTarget,
    FinalLoss,
    InnerLoop,
    KLDivergence,
    MeanLogLoss,
    SumOfLosses,
    TaskFamily,
    Tasks,
    Theta,
    UpdateRule,
)
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Params


class Path(NamedTuple):
    """One task's inner loop: num_steps + 1 points (params, state), and what was met at each of the first num_steps."""

    points: list[tuple[Params, Any]]
    losses: list[Tensor]
    grads: list[Params]
    first_step: int


def walk(
    family: TaskFamily,
    rule: UpdateRule,
    theta: Theta,
    task: Tasks,
    num_steps: int,
    *,
    full: bool = True,
    held: Path | None = None,
    start: tuple[Params, Any] | None = None,
    first_step: int = 0,
) -> Path:
    """Run one task (a batched tree of one) step by step; ``held`` replays recorded gradients and losses instead."""
    own = {k: p[0] for k, p in family.init_params(task).items()}
    points, losses, grads = [rule.init(theta, own) if start is None else start], [], []
    for i in range(num_steps):
        params, state = points[-1]
        params = {k: p if p.requires_grad else p.detach().requires_grad_() for k, p in params.items()}
        loss = family.loss(params, data(family, task, first_step + i, "train"))
        total = loss + rule.regularizer(theta, params) if rule.has_regularizer else loss
        if held is None:
            found = torch.autograd.grad(total, list(params.values()), create_graph=full, retain_graph=True)
            grad, seen = dict(zip(params, found, strict=True)), loss if full else loss.detach()
        else:
            grad, seen = held.grads[i], held.losses[i].detach()
        deltas, state = rule.update(theta, grad, state, params, seen)
        points.append(({k: p + deltas[k] for k, p in params.items()}, state))
        losses.append(loss)
        grads.append({k: g.detach() for k, g in grad.items()})
    return Path(points, losses, grads, first_step)


def data(family: TaskFamily, task: Tasks, step: int, split: Any) -> Any:
    """Return one task's batch."""
    return pytree.tree_map(lambda x: x[0], family.batch(task, step, split))


def value_of(
    objective: MetaObjective, family: TaskFamily, rule: UpdateRule, theta: Theta, task: Tasks, path: Path, target: Any
) -> Tensor:
    """Return one task's objective, written out a second time; ``target`` is held fixed where one is needed."""
    step, end = path.first_step + len(path.losses), path.points[-1][0]
    if isinstance(objective, FinalLoss):
        return family.loss(end, data(family, task, step, "valid"))
    if isinstance(objective, SumOfLosses | MeanLogLoss):
        last = family.loss(end, data(family, task, step, "train"))
        losses = torch.stack([*path.losses[1:], last])
        return losses.sum() if isinstance(objective, SumOfLosses) else losses.log().mean()
    assert isinstance(objective, BootstrappedTarget)
    if isinstance(objective.matching, KLDivergence):
        batch = data(family, task, step, objective.split)
        log_p, log_q = (family.outputs(x, batch).log_softmax(-1) for x in (target, end))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return 0.5 * sum(((end[k] - target[k]) ** 2).sum() for k in end)


def target_of(
    objective: MetaObjective, family: TaskFamily, rule: UpdateRule, theta: Theta, task: Tasks, path: Path
) -> Params | None:
    """Return one task's bootstrapped target: further steps of the rule, then a plain gradient step."""
    if not isinstance(objective, BootstrappedTarget):
        return None
    step, steps = path.first_step + len(path.losses), objective.num_target_steps - 1
    start = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, path.points[-1])
    x = walk(family, rule, theta, task, steps, full=False, start=start, first_step=step).points[-1][0]
    x = {k: p.detach().requires_grad_() for k, p in x.items()}
    loss = family.loss(x, data(family, task, step + steps, objective.split))
    grads = torch.autograd.grad(loss, list(x.values()))
    return {k: (p - objective.step_size * g).detach() for (k, p), g in zip(x.items(), grads, strict=True)}


class Reference:
    """An objective of theta over whole paths, or over the last steps of them, and its derivative by two routes.

    Args:
        skip: steps taken before the window, without a graph; the window starts there.
        whole: the objective sees the steps before the window too, as constants.
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
    ) -> None:
        self.family, self.rule, self.objective, self.full = loop.family, loop.rule, objective, full
        self.theta, self.num_steps, self.skip = theta, num_steps, skip
        self.tasks = one_by_one(tasks)
        self.starts, self.held, self.targets, self.before = [], [], [], []
        for task in self.tasks:
            ahead = walk(self.family, self.rule, theta, task, skip, full=False)
            start = pytree.tree_map(lambda x: x.detach(), ahead.points[-1]) if skip else None
            path = walk(self.family, self.rule, theta, task, num_steps, full=False, start=start, first_step=skip)
            self.starts.append(start)
            self.before.append([x.detach() for x in ahead.losses] if whole else [])
            self.held.append(path)
            self.targets.append(target_of(objective, self.family, self.rule, theta, task, path))

    def value(self, theta: Theta, *, differences: bool = False) -> Tensor:
        """Return the mean over tasks, with a graph to theta or for ``differences`` of values.

        A detached tape's derivative is that of the values with the recorded gradients and losses held: they replay.
        """
        values = []
        cases = zip(self.tasks, self.starts, self.held, self.targets, self.before, strict=True)
        for task, start, held, target, before in cases:
            path = walk(
                self.family,
                self.rule,
                theta,
                task,
                self.num_steps,
                full=self.full and not differences,
                held=held if differences and not self.full else None,
                start=start,
                first_step=self.skip,
            )
            path = path._replace(losses=before + path.losses, first_step=path.first_step - len(before))
            values.append(value_of(self.objective, self.family, self.rule, theta, task, path, target))
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
    length nor a wrong direction can hide; Richardson's extrapolation cancels the error of order step^2.
    """
    errors, generator = [], torch.Generator().manual_seed(1)
    for key, grad in grads.items():
        assert grad.shape == theta[key].shape and grad.isfinite().all() and grad.any(), f"no gradient of {key}"
        noise = torch.randn(grad.shape, generator=generator, dtype=FLOAT)
        direction = grad / grad.norm() + (noise / noise.norm() if grad.numel() > 1 else 0.0)

        def slope(h: float, key: str = key, direction: Tensor = direction) -> float:
            ends = [fn({**theta, key: theta[key] + sign * h * direction}) for sign in (1, -1)]
            return (ends[0] - ends[1]) / (2 * h)

        expected = (4 * slope(step / 2) - slope(step)) / 3
        errors.append(abs(float((grad * direction).sum()) - expected) / float(grad.norm()))
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


def implicit_gradient(
    loop: InnerLoop,
    theta: Theta,
    objective: MetaObjective,
    tasks: Tasks,
    num_steps: int,
    *,
    step_map: bool,
    num_terms: int | None = None,
    damping: float = 0.0,
) -> Theta:
    """Return the implicit gradient at the end of the rule's own steps, by dense matrices, a mean over tasks.

    Args:
        step_map: solve with I - dPhi/dz on (params, state) instead of the Hessian of loss + regularizer.
        num_terms: sum so many terms of the Neumann series instead.
        damping: added to the Hessian's diagonal.
    """
    totals = {k: torch.zeros_like(v) for k, v in theta.items()}
    count = len(one_by_one(tasks))
    for task in one_by_one(tasks):
        path = walk(loop.family, loop.rule, theta, task, num_steps, full=False)
        target = target_of(objective, loop.family, loop.rule, theta, task, path)
        end = pytree.tree_map(lambda x: x.detach(), path.points[-1])
        params = {k: p.requires_grad_() for k, p in end[0].items()}
        value = value_of(
            objective, loop.family, loop.rule, theta, task, path._replace(points=[(params, end[1])]), target
        )
        cotangents = torch.autograd.grad(value, list(params.values()))
        batch = data(loop.family, task, max(num_steps - 1, 0), "train")
        system = _step_map_system if step_map else _optimality_system
        map_of, z, num_params = system(loop, batch, pytree.tree_map(lambda x: x.detach(), end))
        v = torch.cat([*[c.reshape(-1) for c in cotangents], torch.zeros(len(z) - num_params, dtype=FLOAT)])
        jacobian = torch.func.jacrev(map_of)(z, theta).mT
        if num_terms is not None:
            u = sum(torch.linalg.matrix_power(jacobian, k) @ v for k in range(num_terms))
        elif step_map:
            u = torch.linalg.solve(torch.eye(len(z), dtype=FLOAT) - jacobian, v)
        else:
            u = -torch.linalg.solve(jacobian + damping * torch.eye(len(z), dtype=FLOAT), v)
        pulled = torch.func.vjp(lambda th, f=map_of, at=z: f(at, th), theta)[1](u)[0]
        totals = {k: t + pulled[k] / count for k, t in totals.items()}
    return totals


def _step_map_system(loop: InnerLoop, batch: Any, end: Any) -> tuple[Callable[[Tensor, Theta], Tensor], Tensor, int]:
    """Return Phi on vectors of all floating-point numbers in (params, state), and where to take it."""
    flat, spec = pytree.tree_flatten(end)
    moving = [i for i, x in enumerate(flat) if x.is_floating_point()]

    def step(z: Tensor, theta: Theta) -> Tensor:
        pieces = z.split([flat[i].numel() for i in moving])
        filled = list(flat)
        for i, piece in zip(moving, pieces, strict=True):
            filled[i] = piece.reshape(flat[i].shape)
        params, state = pytree.tree_unflatten(filled, spec)
        grads, loss = torch.func.grad_and_value(_total, has_aux=True)(params, loop, theta, batch)
        deltas, state = loop.rule.update(theta, grads, state, params, loss[1])
        image = pytree.tree_leaves(({k: p + deltas[k] for k, p in params.items()}, state))
        return torch.cat([image[i].reshape(-1) for i in moving])

    return step, torch.cat([flat[i].reshape(-1) for i in moving]), sum(p.numel() for p in end[0].values())


def _optimality_system(loop: InnerLoop, batch: Any, end: Any) -> tuple[Callable[[Tensor, Theta], Tensor], Tensor, int]:
    """Return the gradient of loss + regularizer on vectors of the parameters, and where to take it."""
    flat, spec = pytree.tree_flatten(end[0])

    def gradient(z: Tensor, theta: Theta) -> Tensor:
        pieces = z.split([x.numel() for x in flat])
        params = pytree.tree_unflatten([p.reshape(x.shape) for p, x in zip(pieces, flat, strict=True)], spec)
        grads = torch.func.grad(lambda p: _total(p, loop, theta, batch)[0])(params)
        return torch.cat([g.reshape(-1) for g in grads.values()])

    z = torch.cat([x.reshape(-1) for x in flat])
    return gradient, z, len(z)


def _total(params: Params, loop: InnerLoop, theta: Theta, batch: Any) -> tuple[Tensor, Tensor]:
    loss = loop.family.loss(params, batch)
    return (loss + loop.rule.regularizer(theta, params) if loop.rule.has_regularizer else loss), loss
