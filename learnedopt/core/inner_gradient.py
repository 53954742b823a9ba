"""The gradient that an inner step descends, and the loss that is recorded, with as much graph as the tape says."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnedopt.core import checks, mixed_mode
from learnedopt.core.carry import Tape
from learnedopt.core.execution import ThetaMap
from learnedopt.core.inner_objective import InnerObjective, Penalty
from learnedopt.core.task import Batch, TaskFamily
from learnedopt.core.tree import Params, Theta


class StepGradient(NamedTuple):
    """Of what a ``ThetaMap`` maps over: what a step descends, and what is recorded.

    ``loss`` is what is descended, less its penalty, as the rule is told it; ``outer`` the outer loss; ``grads`` the
    gradient with the penalty's, at ``params``; ``penalty`` the penalty's own part of it, None without one.
    """

    loss: Tensor
    outer: Tensor
    grads: Params
    params: Params
    penalty: Params | None


def step_gradient(
    family: TaskFamily, objective: InnerObjective, task_map: ThetaMap, theta: Theta, params: Params, batch: Batch,
    tape: Tape, *, mixed_plans: dict[Hashable, Any] | None = None,
) -> StepGradient:  # fmt: skip
    """Evaluate and differentiate the inner objective on the train batch.

    Parameters without a graph become leaves: the gradient is taken with respect to what the loss has read. With
    ``mixed_plans``, what mixed mode has found out about this loss, it takes the derivatives of the gradient.
    """

    def descended(theta: Theta, params: Params, batch: Batch) -> Tensor:
        # Less its penalty, whose gradient is taken by itself.
        if objective.descends_task_loss:
            return family.loss(params, batch)
        return objective.loss(theta, family, params, batch)

    def losses(params: Params, theta: Theta) -> Tensor:
        return task_map.apply_theta(descended, theta, params, batch)

    with torch.enable_grad():
        params = {k: p if p.requires_grad else p.detach().requires_grad_() for k, p in params.items()}
        read = {} if objective.descends_task_loss else theta
        if mixed_plans is not None and tape is Tape.FULL:
            loss, found = mixed_mode.value_and_gradient(losses, params, read, mixed_plans)
        else:
            loss = losses(params, read)
            found = _gradient(loss, params, create_graph=tape is Tape.FULL)
        outer = _outer(family, objective, task_map, theta, params, batch, tape, (loss, found))
        penalty = None
        if objective.penalty is not None:
            # Taken apart and then added: the family's loss is evaluated once for what is descended and recorded.
            penalty = penalty_gradient(objective.penalty, task_map, theta, params, create_graph=tape is Tape.FULL)
            with torch.set_grad_enabled(tape is Tape.FULL):
                found = [g + penalty[k] for g, k in zip(found, params, strict=True)]
    if tape is not Tape.FULL:
        loss = loss.detach()
    return StepGradient(loss, outer, dict(zip(params, found, strict=True)), params, penalty)


def penalty_gradient(
    penalty: Penalty, task_map: ThetaMap, theta: Theta, params: Params, *, create_graph: bool
) -> Params:
    """Return the gradient of a penalty at unbatched parameters."""
    if penalty.has_gradient:
        with torch.set_grad_enabled(create_graph):
            found = task_map.apply_theta(penalty.gradient, theta, params)
        return checks.penalty_like(penalty, found, params)
    with torch.enable_grad():
        at = {k: p if p.requires_grad else p.detach().requires_grad_() for k, p in params.items()}
        value = task_map.apply_theta(penalty.value, theta, at).sum()
        grads = torch.autograd.grad(value, tuple(at.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(params, grads, strict=True))


def _gradient(values: Tensor, params: Params, *, create_graph: bool) -> list[Tensor]:
    # Tasks do not interact, so the gradient of the sum holds each task's own gradient.
    total = values.sum() if values.ndim else values
    return list(torch.autograd.grad(total, tuple(params.values()), create_graph=create_graph, materialize_grads=True))


def _outer(
    family: TaskFamily, objective: InnerObjective, task_map: ThetaMap, theta: Theta, params: Params, batch: Batch,
    tape: Tape, descended: tuple[Tensor, list[Tensor]],
) -> Tensor:  # fmt: skip
    loss, grads = descended
    if objective.descends_task_loss and objective.reads_task_loss:
        if tape is Tape.FIRST_ORDER:
            arguments = (loss.detach(), len(grads), *params.values(), *grads)
            # torch gives it no types.
            return _KnownGradient.apply(*arguments)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return loss if tape is Tape.FULL else loss.detach()

    def outer_loss(theta: Theta, params: Params, batch: Batch) -> Tensor:
        return objective.outer_loss(theta, family, params, batch)

    with torch.set_grad_enabled(tape is not Tape.NONE):
        return task_map.apply_theta(outer_loss, theta, params, batch)


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient is known: the gradient is kept in place of the loss's graph."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, num_params: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[num_params:])
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's decorator loses the arguments' names
        ctx: Any, cotangent: Tensor
    ) -> tuple[Any, ...]:  # (num_tasks,), or () of one task
        grads = ctx.saved_tensors
        scaled = [cotangent.reshape(cotangent.shape + (1,) * (g.ndim - cotangent.ndim)) * g for g in grads]
        return None, None, *scaled, *[None] * len(grads)
