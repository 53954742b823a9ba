"""What an inner loop asks of its family, its rule and theta, as errors that say what was passed and what to do.

Each question is asked before the first inner step, the one about an update at every update: shapes cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.task import Batch, TaskFamily
from learnedopt.core.tree import Params, Theta


def require_count(name: str, value: int, least: int = 0) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is not a count; pass an integer of at least {least}")


def theta_shapes(rule: UpdateRule) -> dict[str, torch.Size]:
    """Return the shapes of the rule's own theta.

    Raises:
        ValueError: ``init_theta`` does not return tensors.
    """
    example = rule.init_theta(torch.Generator().manual_seed(0))
    if not all(isinstance(v, Tensor) for v in example.values()):
        kinds = {k: type(v).__name__ for k, v in example.items()}
        raise ValueError(f"{type(rule).__name__}.init_theta must return a dict of tensors, got {kinds}")
    return {k: v.shape for k, v in example.items()}


def require_theta(rule: UpdateRule, theta: Theta, expected: dict[str, torch.Size]) -> None:
    """Raise ValueError unless theta has the expected names and shapes, and is floating-point."""
    if not isinstance(theta, dict) or {k: getattr(v, "shape", None) for k, v in theta.items()} != expected:
        raise ValueError(
            f"this theta is not one of {type(rule).__name__}: expected {shapes(expected)}, got {shapes(theta)}; take "
            "it from the rule's init_theta, or load it together with its rule"
        )
    whole = sorted(k for k, v in theta.items() if not v.is_floating_point())
    if whole:
        raise ValueError(f"the meta-parameters {whole} are not floating-point, so they have no gradient; use float()")


def require_like(start: Params, own: Params) -> None:
    """Raise ValueError unless a rule starts from parameters of the names, shapes and dtypes of the family's own."""
    if start.keys() != own.keys() or any(start[k].shape != p.shape for k, p in own.items()):
        raise ValueError(
            f"the rule starts from parameters {shapes(start)}, the family's are {shapes(own)} (leading dimension: "
            "tasks); build the rule with a template of this family"
        )
    other = sorted(k for k, p in own.items() if start[k].dtype != p.dtype)
    if other:
        raise ValueError(
            f"the rule starts the parameters {other} as {start[other[0]].dtype}, the inner loop's are "
            f"{own[other[0]].dtype}; convert theta, or build the rule with a template of that dtype"
        )


def require_tensors(rule: UpdateRule, state: State) -> None:
    """Raise ValueError unless every leaf of a rule's first state is a tensor."""
    strange = sorted({type(x).__name__ for x in tree.leaves(state) if not isinstance(x, Tensor)})
    if strange:
        raise ValueError(
            f"{type(rule).__name__}.init returned a state with {strange} as leaves; a state holds tensors, counters "
            "too: torch.zeros((), dtype=torch.int64)"
        )


def params_and_state(rule: UpdateRule, method: str, result: Any, params: Params) -> tuple[Params, State]:
    """Return what ``update`` or the kernel returned; raise ValueError unless each parameter has its tensor in it."""
    name, what = f"{type(rule).__name__}.{method}", {"update": "delta", "kernel.step": "new value"}[method]
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], dict):
        raise ValueError(f"{name} must return ({what}s, state), got {type(result).__name__}")
    found, state = result
    if found.keys() != params.keys() or any(found[k].shape != p.shape for k, p in params.items()):
        raise ValueError(
            f"{name} must return one {what} of the same shape per parameter: expected {shapes(params)}, got "
            f"{shapes(found)}"
        )
    return found, state


def pull_like(rule: UpdateRule, found: Any, params: Params) -> Params:
    """Return what ``regularizer_gradient`` returned, in the order and dtypes of the parameters.

    Raises:
        ValueError: it is not one tensor shaped as each parameter.
    """
    if not isinstance(found, dict) or {k: x.shape for k, x in found.items()} != {k: p.shape for k, p in params.items()}:
        raise ValueError(
            f"{type(rule).__name__}.regularizer_gradient must return one gradient of the same shape per parameter: "
            f"expected {shapes(params)}, got {shapes(found)}"
        )
    return {k: found[k].to(p.dtype) for k, p in params.items()}


def require_num_tasks(family: TaskFamily, batch: Batch, num_tasks: int) -> None:
    """Raise ValueError unless a batch has the tasks' leading dimension."""
    if tree.size(batch) != num_tasks:
        raise ValueError(
            f"{type(family).__name__}.batch must return a leading dimension of {num_tasks} tasks, got "
            f"{tree.size(batch)}"
        )


def scalar_loss(family: TaskFamily) -> Callable[[Params, Batch], Tensor]:
    """Return the family's loss, which raises ValueError where it is no scalar tensor."""

    def loss(params: Params, batch: Batch) -> Tensor:
        value = family.loss(params, batch)
        if not isinstance(value, Tensor) or value.ndim:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"{type(family).__name__}.loss must return a scalar tensor for one task, got {got}; reduce it with "
                "mean() or sum(), and keep it a tensor"
            )
        return value

    return loss


def require_trainable(family: TaskFamily, losses: Tensor, params: Params) -> None:
    """Raise ValueError unless the losses (num_tasks,) are finite and depend on ``params``, which are leaves."""
    name = type(family).__name__
    if not losses.isfinite().all():
        raise ValueError(
            f"{name}.loss is not finite at the start: {losses.detach().tolist()}; check data and initialisation"
        )
    found: tuple[Tensor | None, ...] = ()
    if losses.requires_grad:
        found = torch.autograd.grad(losses.sum(), [*params.values()], allow_unused=True)
    if all(g is None for g in found):
        raise ValueError(f"{name}.loss does not depend on the parameters {sorted(params)}: there is nothing to train")


def shapes(tensors: Any) -> Any:
    """Return the shapes in a dict of tensors for a message, and the type's name of anything else."""
    if not isinstance(tensors, dict):
        return type(tensors).__name__
    return {k: tuple(getattr(v, "shape", v)) if not isinstance(v, int | float) else v for k, v in tensors.items()}
