"""Forward mode along the inner loop: what params and states become when theta moves, carried from step to step.

One inner step of one task is a pure function (theta, params, state) -> (params', state', outer loss), its gradient of
the inner objective taken inside by reverse mode; the step's derivative along directions of theta is forward mode over
that, with the step itself computed once for all directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from learnedopt.core import checks, tree
from learnedopt.core.carry import Carry
from learnedopt.core.execution import TaskMap
from learnedopt.core.inner import InnerLoop
from learnedopt.core.rule import State
from learnedopt.core.task import Batch
from learnedopt.core.tree import Params, Theta


class Tangents(NamedTuple):
    """Derivatives along directions of theta: of each parameter, and of each floating-point leaf of the state in order.

    Every tensor is (num_tasks, num_directions, ...); counters and flags have none.
    """

    params: Params
    state: tuple[Tensor, ...]


class Pushed(NamedTuple):
    """A piece of the inner loop with its tangents: ``losses`` (num_steps, num_tasks), ``of_losses`` (num_steps,
    num_tasks, num_directions)."""

    end: Carry
    tangents: Tangents
    losses: Tensor
    of_losses: Tensor


def directions(theta: Theta, start: int, stop: int) -> Theta:
    """Return the unit vectors ``start`` to ``stop - 1`` of theta, all its entries in order as one vector.

    Each tensor is (stop - start, ...); what these directions leave alone of theta is not in the dict.
    """
    found: Theta = {}
    offset = 0
    for name, value in theta.items():
        first, last = max(start, offset), min(stop, offset + value.numel())
        if first < last:
            units = value.new_zeros(stop - start, value.numel())
            units[range(first - start, last - start), range(first - offset, last - offset)] = 1
            found[name] = units.reshape(stop - start, *value.shape)
        offset += value.numel()
    return found


def begin(loop: InnerLoop, theta: Theta, along: Theta, carry: Carry) -> Tangents:
    """Return the tangents of a fresh carry's start: those of the rule's ``init``."""

    def start(moved: Theta, params: Params) -> tuple[list[Tensor], tuple[()]]:
        begun, state = loop.init_task(theta | moved, params)
        return [*(begun[k] for k in params), *floating(state)], ()

    def of_task(along: Theta, params: Params) -> list[Tensor]:
        def of_theta(moved: Theta) -> tuple[list[Tensor], tuple[()]]:
            return start(moved, params)

        return _push(of_theta, ({k: theta[k] for k in along},), (along,))[1]

    task_map = TaskMap(tree.size(carry.params))
    found = task_map.rebatch(task_map.apply(of_task, (along,), task_map.unbatch(carry.params)))
    return Tangents(dict(zip(carry.params, found, strict=False)), tuple(found[len(carry.params) :]))


def none_yet(carry: Carry, num_directions: int) -> Tangents:
    """Return the tangents of a begun carry that is held fixed: zeros."""

    def zeros(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], num_directions, *x.shape[1:])

    return Tangents({k: zeros(p) for k, p in carry.params.items()}, tuple(map(zeros, floating(carry.state))))


def push(
    loop: InnerLoop, theta: Theta, along: Theta, carry: Carry, tangents: Tangents, num_steps: int
) -> Pushed:  # fmt: skip
    """Take ``num_steps`` inner steps of a begun chunk of tasks with their tangents; nothing else is kept of the way."""
    task_map, num_tasks = TaskMap(tree.size(carry.params)), tree.size(carry.params)
    like, num_directions = tree.leaves(carry.params)[0], len(next(iter(along.values())))
    params, state, tangents = (task_map.unbatch(x) for x in (carry.params, carry.state, tangents))
    losses: list[Tensor] = []
    of_losses: list[Tensor] = []
    for step in range(carry.step, carry.step + num_steps):
        batch = task_map.unbatch(loop.batch(carry.tasks, step, "train"))

        def of_task(
            along: Theta, params: Params, state: State, tangents: Tangents, batch: Batch
        ) -> tuple[Params, State, Tangents, Tensor, Tensor]:
            return push_task(loop, theta, along, params, state, tangents, batch)

        found = task_map.apply(of_task, (along,), params, state, tangents, batch)
        params, state, tangents, outer, of_outer = found
        losses.append(outer)
        of_losses.append(of_outer)
    end = Carry(carry.tasks, task_map.rebatch(params), task_map.rebatch(state), carry.step + num_steps)
    stacked = torch.stack(losses) if losses else like.new_empty(0)
    of_stacked = torch.stack(of_losses) if losses else like.new_empty(0)
    return Pushed(
        end,
        task_map.rebatch(tangents),
        stacked.reshape(num_steps, num_tasks),
        of_stacked.reshape(num_steps, num_tasks, num_directions),
    )


def push_task(
    loop: InnerLoop, theta: Theta, along: Theta, params: Params, state: State, tangents: Tangents, batch: Batch
) -> tuple[Params, State, Tangents, Tensor, Tensor]:
    """Take one step of ONE task: return parameters, state, their tangents, the outer loss and its (num_directions,)."""
    leaves, build = tree.flatten(state)
    is_floating = [x.is_floating_point() for x in leaves]

    def step(moved: Theta, params: Params, own: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        floats = iter(own)
        given = build([next(floats) if is_float else x for x, is_float in zip(leaves, is_floating, strict=True)])
        new_params, new_state, outer = step_task(loop, theta | moved, params, given, batch)
        after = tree.leaves(new_state)
        rest = [x for x, is_float in zip(after, is_floating, strict=True) if not is_float]
        if any(x.is_floating_point() for x in rest):
            raise ValueError(
                f"{type(loop.rule).__name__}.update turns an integer of its state into a floating-point number, whose "
                "derivative would be lost; let init return it as a floating-point tensor"
            )
        return [outer, *new_params.values(), *floating(new_state)], rest

    primals = ({k: theta[k] for k in along}, params, tuple(floating(state)))
    outputs, found, rest = _push(step, primals, (along, tangents.params, tangents.state))
    count = 1 + len(params)
    floats, others = iter(outputs[count:]), iter(rest)
    new_state = build([next(floats) if is_float else next(others) for is_float in is_floating])
    onward = Tangents(dict(zip(params, found[1:count], strict=True)), tuple(found[count:]))
    return dict(zip(params, outputs[1:count], strict=True)), new_state, onward, outputs[0], found[0]


def step_task(
    loop: InnerLoop, theta: Theta, params: Params, state: State, batch: Batch
) -> tuple[Params, State, Tensor]:
    """One inner step of ONE task as a pure function: the parameters and state after it, and the outer loss before it.

    The rule's ``update`` is called and never its kernel, which need not have a forward derivative.
    """
    objective, family, rule = loop.inner_objective, loop.family, loop.mover

    def descended(at: Params) -> Tensor:
        # Less its penalty, as a rule is told it.
        return family.loss(at, batch) if objective.descends_task_loss else objective.loss(theta, family, at, batch)

    with _MeanOfSquares():
        grads, told = torch.func.grad_and_value(descended)(params)
    if objective.penalty is not None:
        own = _penalty_gradient(loop, theta, params)
        grads = {k: g + own[k] for k, g in grads.items()}
    shared = objective.descends_task_loss and objective.reads_task_loss
    with _MeanOfSquares():
        outer = told if shared else objective.outer_loss(theta, family, params, batch)
    result = rule.update(loop.rule_theta(theta), grads, state, params, told)
    deltas, after = checks.params_and_state(rule, "update", result, params)
    moved = {k: p + deltas[k].to(p.dtype) for k, p in params.items()}
    return moved, tree.arrange(() if after is None else after, state), outer


class _MeanOfSquares(TorchFunctionMode):
    """``mse_loss`` as the mean of what it gives unreduced: with torch's own mean, forward over reverse mode fails."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        options: dict[str, Any] = kwargs or {}
        plain = (options.get("reduction"), options.get("size_average"), options.get("reduce"), options.get("weight"))
        if func is functional.mse_loss and plain == ("mean", None, None, None):
            return func(*args, **options | {"reduction": "none"}).mean()
        return func(*args, **options)


def _penalty_gradient(loop: InnerLoop, theta: Theta, params: Params) -> Params:
    penalty = loop.inner_objective.penalty
    assert penalty is not None
    if penalty.has_gradient:
        return checks.penalty_like(penalty, penalty.gradient(theta, params), params)

    def value(at: Params) -> Tensor:
        return penalty.value(theta, at)

    return torch.func.grad(value)(params)


def _push(
    fn: Callable[..., tuple[list[Tensor], Any]], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[list[Tensor], list[Tensor], Any]:
    """Return ``fn``'s tensors, their derivatives along each of the ``tangents`` (leading dimension), and its rest."""

    def along(*each: Any) -> tuple[list[Tensor], list[Tensor], Any]:
        values, found, rest = torch.func.jvp(fn, primals, each, has_aux=True)  # pyright: ignore[reportAssignmentType]
        return values, found, rest

    primals = tree.tree_map(_without_repeats, primals)
    outputs, found, rest = torch.func.vmap(along)(*tangents)
    # What does not depend on the direction was computed once, and is only seen once per direction.
    return [x[0] for x in outputs], found, tree.tree_map(lambda x: x[0], rest)


def _without_repeats(x: Tensor) -> Tensor:
    """Return a copy of a tensor that repeats its entries, which one with a tangent must not."""
    repeats = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    return x.clone(memory_format=torch.contiguous_format) if repeats else x


def floating(state: State) -> list[Tensor]:
    """Return the floating-point leaves of a state in order: those that have tangents."""
    return [x for x in tree.leaves(state) if x.is_floating_point()]


def contract(cotangents: Sequence[Tensor | None], tangents: Sequence[Tensor]) -> Tensor | float:
    """Return ``sum <cotangent, tangent>`` by direction: cotangents (n, ...), tangents (n, num_directions, ...)."""
    total: Tensor | float = 0.0
    for c, t in zip(cotangents, tangents, strict=True):
        if c is not None:
            each = t.flatten(2) if t.ndim > 2 else t.unsqueeze(2)
            total = total + (each @ c.to(t.dtype).reshape(len(c), each.shape[2], 1)).squeeze(2).sum(0)
    return total
