"""What an inner loop asks of its family, its rule and theta, as errors that say what was passed and what to do.

Each question is asked before the first inner step, the one about an update at every update: shapes cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.containers import is_dict, is_tuple
from learnedopt.core.inner_objective import InnerObjective, Penalty
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.task import Batch, Split, TaskFamily
from learnedopt.core.tree import Params, Theta

if TYPE_CHECKING:
    from learnedopt.core.carry import Carry


def require_parts(family: object, rule: object, execution: object, objective: object) -> None:
    """Raise TypeError unless an inner loop is made of what it is made of; ValueError where that contradicts itself."""
    parts = ((family, "loss"), (rule, "update"))
    if any(isinstance(part, type) or not hasattr(part, method) for part, method in parts):
        got = ", ".join(f"the class {x.__name__}" if isinstance(x, type) else type(x).__name__ for x, _ in parts)
        raise TypeError(
            f"InnerLoop takes a TaskFamily and an UpdateRule, got {got}; make them by name with "
            "learnedopt.tasks.make(name) and learnedopt.optimizers.make(name)"
        )
    if not hasattr(execution, "chunk_size"):
        raise TypeError(f"execution={execution!r} is no Execution; pass Execution(chunk_size=...), or nothing")
    if not isinstance(objective, InnerObjective):
        raise TypeError(
            f"inner_objective={objective!r} is no InnerObjective; pass an instance, such as TaskLoss(), or one of a "
            "class of your own that derives from InnerObjective"
        )
    penalty = cast("object", objective.penalty)
    if penalty is not None and not isinstance(penalty, Penalty):
        raise TypeError(
            f"{type(objective).__name__}.penalty is {type(penalty).__name__}, not a Penalty; derive a class "
            "from Penalty with value(theta, params), and set penalty to an instance of it"
        )
    if penalty is not None and not objective.descends_task_loss:
        raise ValueError(
            f"{type(objective).__name__} has a loss of its own and a penalty, which stands in place of one: define "
            "loss, with the penalty in it, or set penalty, and leave the loss as it is"
        )


def joined_theta(rule: UpdateRule, objective: InnerObjective, generator: torch.Generator) -> Theta:
    """Return the rule's theta and the inner objective's as one dict.

    Raises:
        ValueError: ``init_theta`` does not return tensors; both have a meta-parameter of the same name.
    """
    parts: list[Theta] = []
    for owner in (rule, objective):
        theta = cast("object", owner.init_theta(generator))
        if not is_dict(theta) or not all(isinstance(v, Tensor) for v in theta.values()):
            kinds = {k: type(v).__name__ for k, v in theta.items()} if is_dict(theta) else type(theta).__name__
            raise ValueError(f"{type(owner).__name__}.init_theta must return a dict of tensors, got {kinds}")
        parts.append(theta)
    both = sorted(parts[0].keys() & parts[1].keys())
    if both:
        raise ValueError(
            f"the rule {type(rule).__name__} and the inner objective {type(objective).__name__} both have "
            f"meta-parameters named {both}, and theta is one dict; rename the inner objective's, or give them a prefix"
        )
    return {**parts[0], **parts[1]}


def theta_shapes(rule: UpdateRule, objective: InnerObjective) -> tuple[dict[str, torch.Size], set[str]]:
    """Return the shapes of theta, and the names of the inner objective's own part."""
    example = joined_theta(rule, objective, torch.Generator().manual_seed(0))
    own = objective.init_theta(torch.Generator().manual_seed(0))
    return {k: v.shape for k, v in example.items()}, set(own)


def require_theta(
    rule: UpdateRule, objective: InnerObjective, theta: object, expected: dict[str, torch.Size], num_tasks: int | None
) -> None:
    """Raise ValueError unless theta has the expected names and shapes, and is floating-point.

    With ``num_tasks`` every shape has that leading dimension: one theta a task.
    """
    if num_tasks is not None:
        expected = {k: torch.Size((num_tasks, *shape)) for k, shape in expected.items()}
    if not is_dict(theta) or {k: getattr(v, "shape", None) for k, v in theta.items()} != expected:
        owner = type(rule).__name__ + ("" if objective.is_task_loss else f" on {type(objective).__name__}")
        each = "" if num_tasks is None else f" for each of {num_tasks} tasks (theta_per_task=True)"
        raise ValueError(
            f"this theta is not one of {owner}{each}: expected {shapes(expected)}, got {shapes(theta)}; take it from "
            "the loop's init_theta, or load it together with its rule and inner objective"
        )
    require_real(theta)


def require_real(theta: Theta) -> None:
    """Raise ValueError unless every meta-parameter is of real floating-point numbers."""
    wrong = {k: str(v.dtype) for k, v in theta.items() if not v.is_floating_point()}
    if wrong:
        raise ValueError(
            f"the meta-parameters {wrong} are no real floating-point numbers, so that no small step changes them and "
            "no estimator has a gradient for them: make learned ones floating-point, such as by value.float() (two "
            "real tensors of a complex one), and keep what is not learned out of theta, as an option of its owner"
        )


def require_begun(carry: Carry, split: Split) -> None:
    """Raise ValueError unless a carry can be evaluated on that split."""
    if split not in ("train", "valid"):
        raise ValueError(f"split={split!r} is neither 'train' nor 'valid'; other tasks are another family's meta_split")
    if carry.state is None:
        raise ValueError(
            "the carry has not begun: pass it through loop.begin(theta, carry), which applies the rule's init"
        )


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


def require_start(rule: UpdateRule, params: Params) -> None:
    """Raise ValueError with what the rule says is wrong with batched starting parameters."""
    found = rule.start_faults(params)
    if found:
        raise ValueError(f"{type(rule).__name__} cannot start from these parameters: " + "; ".join(found))


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
    if not is_tuple(result) or len(result) != 2 or not is_dict(result[0]):
        raise ValueError(f"{name} must return ({what}s, state), got {type(result).__name__}")
    found, state = result
    if found.keys() != params.keys() or any(found[k].shape != p.shape for k, p in params.items()):
        raise ValueError(
            f"{name} must return one {what} of the same shape per parameter: expected {shapes(params)}, got "
            f"{shapes(found)}"
        )
    return found, state


def penalty_like(penalty: Penalty, found: Any, params: Params) -> Params:
    """Return what a penalty's ``gradient`` returned, in the order and dtypes of the parameters.

    Raises:
        ValueError: it is not one tensor shaped as each parameter.
    """
    if not is_dict(found) or {k: x.shape for k, x in found.items()} != {k: p.shape for k, p in params.items()}:
        raise ValueError(
            f"{type(penalty).__name__}.gradient must return one gradient of the same shape per parameter: expected "
            f"{shapes(params)}, got {shapes(found)}"
        )
    return {k: tree.in_dtype_of(p, found[k]) for k, p in params.items()}


def require_num_tasks(family: TaskFamily, batch: Batch, num_tasks: int) -> None:
    """Raise ValueError unless a batch has the tasks' leading dimension."""
    if tree.size(batch) != num_tasks:
        raise ValueError(
            f"{type(family).__name__}.batch must return a leading dimension of {num_tasks} tasks, got "
            f"{tree.size(batch)}"
        )


def require_faultless(family: TaskFamily, params: Params, batch: Batch, *, second_derivatives: bool = False) -> None:
    """Raise ValueError with what the family says is wrong with the loss of the first of these tasks."""
    params, batch = tree.squeeze(tree.narrow((params, batch), 0, 1))
    found = family.faults(tree.detach(params), batch, second_derivatives=second_derivatives)
    if found:
        raise ValueError(f"{type(family).__name__} cannot be trained inside a loop: " + "; ".join(found))


def losses_by_owner(
    family: TaskFamily, objective: InnerObjective
) -> list[tuple[str, Callable[[Theta, Params, Batch], Tensor]]]:
    """Return every loss of ONE task that a loop calls, by whose it is; each raises ValueError where it is no scalar."""
    named: list[tuple[str, Callable[[Theta, Params, Batch], Tensor]]] = []
    if objective.descends_task_loss or objective.reads_task_loss:
        named.append((f"{type(family).__name__}.loss", lambda theta, params, batch: family.loss(params, batch)))
    own = type(objective).__name__
    if not objective.descends_task_loss or objective.penalty is not None:
        named.append((f"{own}.loss", lambda theta, params, batch: objective.loss(theta, family, params, batch)))
    if not objective.reads_task_loss:
        named.append(
            (f"{own}.outer_loss", lambda theta, params, batch: objective.outer_loss(theta, family, params, batch))
        )
    return [(name, _scalar(name, loss)) for name, loss in named]


def _scalar(name: str, loss: Callable[..., object]) -> Callable[[Theta, Params, Batch], Tensor]:
    def checked(theta: Theta, params: Params, batch: Batch) -> Tensor:
        value = loss(theta, params, batch)
        if not isinstance(value, Tensor) or value.ndim:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"{name} must return a scalar tensor for one task, got {got}; reduce it with mean() or sum(), and keep "
                "it a tensor"
            )
        return value

    return checked


class NotFinite(ValueError):
    """A task that was looked at has no finite loss at its start, or none of them has."""


def on_finite_tasks(num_tasks: int, look: Callable[[int, int], object]) -> None:
    """Call ``look(start, stop)`` on the first two tasks or, where these fail at once, on the first two that do not;
    NotFinite where all do."""
    failed: NotFinite | None = None
    for start in range(0, num_tasks, 2):
        try:
            look(start, min(start + 2, num_tasks))
            return
        except NotFinite as error:
            failed = failed or error
    if failed is not None:
        raise failed


def require_trainable(name: str, losses: Tensor, params: Params) -> None:
    """Raise ValueError unless the losses (num_tasks,) depend on ``params``, which are leaves, and one is finite: a task
    that fails is no fault of the others'."""
    if not losses.isfinite().any():
        found = tree.numbers(losses.detach())
        raise NotFinite(f"{name} is not finite at the start: {found}; check data and initialisation")
    found: list[Tensor | None] = []
    if losses.requires_grad:
        found = [*torch.autograd.grad(losses.sum(), [*params.values()], allow_unused=True)]
    if all(g is None for g in found):
        raise ValueError(f"{name} does not depend on the parameters {sorted(params)}: there is nothing to train")


def shapes(tensors: Any) -> Any:
    """Return the shapes in a dict of tensors for a message, and the type's name of anything else."""
    if not is_dict(tensors):
        return type(tensors).__name__
    return {k: tuple(getattr(v, "shape", v)) if not isinstance(v, int | float) else v for k, v in tensors.items()}
