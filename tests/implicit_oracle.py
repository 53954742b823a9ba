"""The slow oracle of implicit meta-gradients: dense matrices at the end of the rule's own steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracles import data, descended, gradient_of, rule_theta, target_of, value_of, walk
from problems import FLOAT, one_by_one
from torch import Tensor
from torch.utils import _pytree as pytree

from learnedopt import InnerLoop, Tasks, Theta, UpdateRule
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Params


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

    What the objective takes from theta directly is added. Parameters that an update leaves where they are, whatever
    the gradient, are the start: on the step map they are no unknowns, and carry the derivative of ``init``.

    Args:
        step_map: solve with I - dPhi/dz on (params, state) instead of the Hessian of the inner objective.
        num_terms: sum so many terms of the Neumann series instead.
        damping: added to the Hessian's diagonal.
    """

    def value(leaves: Theta) -> Tensor:
        values = [
            _implicit_value(loop, theta, leaves, objective, task, num_steps, step_map, num_terms, damping)
            for task in one_by_one(tasks)
        ]
        return torch.stack(values).mean()

    return gradient_of(value, theta)


def _implicit_value(
    loop: InnerLoop, at: Theta, theta: Theta, objective: MetaObjective, task: Tasks, num_steps: int, step_map: bool,
    num_terms: int | None, damping: float,
) -> Tensor:  # fmt: skip
    """Return a task's value at the end found with the constant ``at``, with the implicit derivative for ``theta``."""
    path = walk(loop, at, task, num_steps, full=False)
    target = target_of(objective, loop, at, task, path)
    end = _fixed(path.points[-1])
    params = {k: p.requires_grad_() for k, p in end[0].items()}
    here = path._replace(points=[(params, end[1])])
    value = value_of(objective, loop, theta, task, here, target)
    cotangents = torch.autograd.grad(value, list(params.values()), retain_graph=True)
    batch = data(loop.family, task, max(num_steps - 1, 0), "train")
    map_of, z = (_step_map_system if step_map else _optimality_system)(loop, batch, _fixed(end))
    v = torch.cat([c.reshape(-1) for c in cotangents])
    v = torch.cat([v, torch.zeros(len(z) - len(v), dtype=FLOAT)])
    free = torch.ones(len(z), dtype=torch.bool)
    if step_map:
        starts = {k: p[0] for k, p in loop.family.init_params(task).items()}
        start = loop.mover.init(rule_theta(loop.rule, theta), starts)[0]
        start = torch.cat([start[k].reshape(-1) for k in end[0]])
        free[: len(start)] = ~_left_alone(loop.mover, at, end)
    jacobian = torch.func.jacrev(map_of)(z, at).mT[:, free]
    square, right = jacobian[free], v[free]
    eye = torch.eye(len(right), dtype=FLOAT)
    if num_terms is not None:
        u = sum(torch.linalg.matrix_power(square, k) @ right for k in range(num_terms))
    elif step_map:
        u = torch.linalg.solve(eye - square, right)
    else:
        u = -torch.linalg.solve(square + damping * eye, right)
    direct = value_of(objective, loop, theta, task, here._replace(points=[_fixed(end)]), target)
    total = direct + map_of(z, theta)[free] @ u
    if step_map and not free.all():
        still = ~free[: len(start)]
        total = total + start[still] @ (v + jacobian @ u)[: len(start)][still]
    return total


def _fixed(point: tuple[Params, Any]) -> tuple[Params, Any]:
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, point)


def _left_alone(rule: UpdateRule, theta: Theta, end: Any) -> Tensor:
    """Return, for each of the parameters' numbers, whether an update at random gradients leaves it where it is put."""
    params, state = end
    generator = torch.Generator().manual_seed(3)
    # Off the end: there, a rule that jumps to its solution leaves everything where it is.
    params = {k: p + torch.randn(p.shape, generator=generator, dtype=FLOAT) for k, p in params.items()}
    grads = {k: torch.randn(p.shape, generator=generator, dtype=FLOAT) for k, p in params.items()}
    deltas, _ = rule.update(rule_theta(rule, theta), grads, state, params, torch.ones((), dtype=FLOAT))
    return torch.cat([(deltas[k] == 0).reshape(-1) for k in params])


def _step_map_system(loop: InnerLoop, batch: Any, end: Any) -> tuple[Callable[[Tensor, Theta], Tensor], Tensor]:
    """Return Phi on vectors of all floating-point numbers in (params, state), and where to take it."""
    flat, spec = pytree.tree_flatten(end)
    moving = [i for i, x in enumerate(flat) if x.is_floating_point()]

    def step(z: Tensor, theta: Theta) -> Tensor:
        pieces = z.split([flat[i].numel() for i in moving])
        filled = list(flat)
        for i, piece in zip(moving, pieces, strict=True):
            filled[i] = piece.reshape(flat[i].shape)
        params, state = pytree.tree_unflatten(filled, spec)
        grads, (_, told) = torch.func.grad_and_value(_descended_at, has_aux=True)(params, loop, theta, batch)
        deltas, state = loop.mover.update(rule_theta(loop.rule, theta), grads, state, params, told)
        image = pytree.tree_leaves(({k: p + deltas[k] for k, p in params.items()}, state))
        return torch.cat([image[i].reshape(-1) for i in moving])

    return step, torch.cat([flat[i].reshape(-1) for i in moving])


def _optimality_system(loop: InnerLoop, batch: Any, end: Any) -> tuple[Callable[[Tensor, Theta], Tensor], Tensor]:
    """Return the gradient of the inner objective on vectors of the parameters, and where to take it."""
    flat, spec = pytree.tree_flatten(end[0])

    def gradient(z: Tensor, theta: Theta) -> Tensor:
        pieces = z.split([x.numel() for x in flat])
        params = pytree.tree_unflatten([p.reshape(x.shape) for p, x in zip(pieces, flat, strict=True)], spec)
        grads = torch.func.grad(lambda p: descended(loop, theta, p, batch)[0])(params)
        return torch.cat([g.reshape(-1) for g in grads.values()])

    return gradient, torch.cat([x.reshape(-1) for x in flat])


def _descended_at(params: Params, loop: InnerLoop, theta: Theta, batch: Any) -> tuple[Tensor, Tensor]:
    return descended(loop, theta, params, batch)
