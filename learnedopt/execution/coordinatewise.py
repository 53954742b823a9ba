"""The adjoint of coordinatewise rules with detached gradients: without a graph, and a few coordinates at a time.

Under ``Tape.FIRST_ORDER`` the parameters move by ``x_{t+1} = x_t + d_t``, where ``d_t`` is the rule's answer to the
numbers ``g_0 .. g_t``. An objective of the losses ``l_t`` and of the end then has the cotangents

    dF/dd_t = dF/dx_K + sum over s > t of dF/dl_s * g_s

which need the gradients of the forward pass and nothing else. With these fixed, coordinates no longer interact: the
rule is back-propagated over a few of them at a time, and memory is that of the gradients and of one such piece.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from learnedopt.core import carry as carries
from learnedopt.core import tree
from learnedopt.core.carry import Carry, Rollout, Tape
from learnedopt.core.estimator import call_objective
from learnedopt.core.execution import TaskMap
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import MetaObjective
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.execution import compiled, flat_state, separability
from learnedopt.execution.adjoint import Adjoint, ChunkGradient
from learnedopt.execution.flat_state import NAME, Axes

logger: logging.Logger = logging.getLogger("learnedopt")

COORDINATES_AT_A_TIME = 16384  # coordinates, of all tasks together, whose graph is held at a time


class Window(NamedTuple):
    """A window that was run without a graph: ``grads`` (num_steps, num_tasks, num_coordinates)."""

    start: Carry
    end: Carry
    losses: Tensor
    grads: Tensor


def reason_against(loop: InnerLoop, theta: Theta, params: Params, tape: Tape) -> str | None:
    """Return why the coordinatewise adjoint does not apply to this loop, or None where it does; found out once.

    Raises:
        ValueError: the rule says that it is coordinatewise, and is not.
    """
    if tape is not Tape.FIRST_ORDER:
        return "the tape is not FIRST_ORDER"
    if "coordinatewise" not in loop.cache:
        found = loop.cache.put("coordinatewise", _reason(loop, tree.detach(theta), params))
        logger.info(
            "meta-gradients of %s by %s",
            type(loop.rule).__name__,
            "the coordinatewise adjoint" if found is None else f"the plain unroll, because {found}",
        )
    return loop.cache.get("coordinatewise")


def _reason(loop: InnerLoop, theta: Theta, params: Params) -> str | None:
    rule, theta = loop.mover, loop.rule_theta(theta)
    if not rule.coordinatewise:
        return "the rule is not coordinatewise"
    separability.require_apart(rule, theta, params)
    if not loop.inner_objective.is_task_loss:
        return "the inner objective is not the task's loss alone"
    first = next(iter(params.values()))
    if any(p.dtype != first.dtype for p in params.values()):
        return "the parameters are of several dtypes"
    if any(p is not params[k] for k, p in rule.init(theta, params)[0].items()):
        return "the rule has a start of its own"
    if separability.tells_tensors_apart(rule, theta, params):
        return "the rule tells tensors apart"
    separability.require_few_apart(rule, theta, first)
    like = first.new_zeros(())
    with torch.enable_grad():
        at, loss = {NAME: like.new_tensor([0.3, -0.2, 0.1]).requires_grad_()}, like.new_tensor(0.7).requires_grad_()
        _, state = rule.init(theta, at)
        grads = {NAME: like.new_tensor([0.4, -0.03, 1.2])}
        deltas, new_state = rule.update(theta, grads, state, at, loss)
        outputs = [x for x in (*deltas.values(), *tree.leaves(new_state)) if x.requires_grad]
        if outputs and any(
            g is not None for g in torch.autograd.grad([x.sum() for x in outputs], [at[NAME], loss], allow_unused=True)
        ):
            return "its update reads the parameters or the loss"
    with torch.no_grad():  # without a gradient as well
        other = {NAME: torch.tensor([-0.9, 0.7, 1.3]).to(like)}
        again = rule.update(theta, grads, tree.detach(state), other, like.new_tensor(-1.9))
        if not all(map(torch.equal, tree.leaves(again), tree.leaves(tree.detach((deltas, new_state))))):
            return "its update reads the parameters or the loss"
    return None


@final
@dataclass(frozen=True)
class Coordinatewise(Adjoint):
    """Go back through a window of steps without a graph of the inner loop; the loop has no ``reason_against``."""

    num_steps: int

    def differentiate(
        self, loop: InnerLoop, leaves: Theta, objective: MetaObjective, chunk: Carry, weight: float | Tensor
    ) -> ChunkGradient:
        """Run the window, differentiate the objective of its losses and end, and go back through the rule."""
        return _differentiate(loop, leaves, objective, chunk, self.num_steps, weight)

    def example(self, carry: Carry) -> Carry:
        """All coordinates go the same ways: two of them show which there are."""
        return carry._replace(params={NAME: next(iter(carry.params.values())).new_zeros(1, 2)})


def _differentiate(
    loop: InnerLoop, theta: Theta, objective: MetaObjective, chunk: Carry, num_steps: int, weight: float | Tensor
) -> ChunkGradient:
    rule, fixed = loop.mover, tree.detach(theta)
    with torch.enable_grad():
        begun = loop.begin(theta, chunk)  # a first state may depend on theta
        like, axes = flat_state.pattern(rule, fixed, next(iter(begun.params.values())))
        memory = WindowState(like, axes, begun)
        first = memory.enter(begun.state)
    window = _run(loop, fixed, carries.detach(begun), tree.detach(first), memory, num_steps)
    leaves = list(theta.values())

    with torch.enable_grad():
        losses = window.losses.clone().requires_grad_()
        params, state = (_leaves_of(x) for x in (window.end.params, window.end.state))
        end = window.end._replace(params=params, state=state)
        value, onward = call_objective(objective, loop, theta, Rollout(window.start, end, losses))
        value = value * weight
    wanted = [losses, *tree.leaves(params), *(x for x in tree.leaves(state) if x.requires_grad), *leaves]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if value.requires_grad:
        found = torch.autograd.grad(value, wanted, allow_unused=True)
    d_losses, d_params, d_state, direct = _split(found, len(params), len(wanted) - len(params) - len(leaves) - 1)

    reached = any(g is not None for g in (d_losses, *d_params, *d_state)) and num_steps > 0
    grads = list(direct)
    if reached:
        cotangents = _cotangents(window, d_losses, d_params)
        if memory.joined:
            window = window._replace(grads=window.grads.flatten(1).unsqueeze(1))
            cotangents = cotangents.flatten(1).unsqueeze(1)
        cotangent_state = _like(state, d_state)
        d_end = None if cotangent_state is None else memory.enter(cotangent_state)
        d_theta = _pull_back(rule, theta, window.grads, first, cotangents, d_end, axes)
        grads = [d if g is None else g if d is None else g + d for g, d in zip(direct, d_theta, strict=True)]
    end = carries.detach(onward if onward is not None else window.end)
    return ChunkGradient(value.detach(), grads, end, onward is not None, window.losses)


class WindowState:
    """How a rule's state is held during a window: flat, and of all tasks as one where no part of it is a task's own."""

    def __init__(self, like: State, axes: Axes, begun: Carry) -> None:
        self.like = like
        self.axes = axes
        self.begun = begun
        self.num_tasks: int = tree.size(begun.params)
        self.joined: bool = None not in axes
        self.task_map: TaskMap = TaskMap(1 if self.joined else self.num_tasks)

    def enter(self, state: State) -> State:
        """Return a batched state as it is held."""
        flat = flat_state.flatten(self.like, state, self.begun.params)
        return flat_state.join_tasks(flat, self.axes) if self.joined else flat

    def leave(self, held: State) -> State:
        """Return what is held as the batched state of the carry."""
        flat = flat_state.part_tasks(held, self.axes, self.num_tasks) if self.joined else held
        return flat_state.restore(self.like, flat, self.begun.state, self.begun.params)


def _run(loop: InnerLoop, theta: Theta, start: Carry, first: State, memory: WindowState, num_steps: int) -> Window:
    task_map, like = TaskMap(memory.num_tasks), list(start.params.values())
    params, state = task_map.unbatch(start.params), tree.tree_map(torch.clone, memory.task_map.unbatch(first))
    x, losses, grads = tree.ravel(like), [], []
    for step in range(start.step, start.step + num_steps):
        batch = task_map.unbatch(loop.batch(start.tasks, step, "train"))
        if loop.execution.compile:
            loss, slopes = compiled.step_gradient(loop, task_map, params, batch)
        else:
            found = loop.gradient(task_map, theta, params, batch, Tape.NONE)
            loss, slopes = found.loss, found.grads
        grads.append(tree.ravel(list(task_map.rebatch(slopes).values())))
        losses.append(task_map.rebatch(loss))
        with torch.no_grad():
            delta, state = _moved(loop.mover, memory.task_map, theta, grads[-1].reshape(-1, *_shape(memory, x)), state)
            x = x + delta.reshape(x.shape).to(x.dtype)
        params = task_map.unbatch(dict(zip(start.params, tree.unravel(x, like), strict=True)))
    rebatched = memory.leave(memory.task_map.rebatch(state))
    end = Carry(start.tasks, task_map.rebatch(params), rebatched, start.step + num_steps)
    if not losses:
        return Window(start, end, x.new_empty(0, len(x)), x.new_empty(0, len(x), 0))
    return Window(start, end, torch.stack(losses), torch.stack(grads))


def _shape(memory: WindowState, x: Tensor) -> tuple[int, ...]:
    return (x.numel(),) if memory.joined else (x.shape[1],)


def _moved(rule: UpdateRule, task_map: TaskMap, theta: Theta, grads: Tensor, state: State) -> tuple[Tensor, State]:
    """Return the deltas of flat gradients (lanes, num_coordinates), and the new state.

    It goes over the old one where the rule can: fresh memory for it costs as much as the arithmetic. Parameters and
    loss are stand-ins, as the rule does not read them.
    """
    flat = task_map.unbatch({NAME: grads})
    loss = task_map.unbatch(grads.new_ones(len(grads)))
    deltas = None
    if rule.kernel is not None and task_map.num_tasks == 1:
        deltas = rule.kernel.update_in_place(theta, flat, state, flat, loss)
    if deltas is None:
        deltas, state = task_map.apply(rule.update, (theta,), flat, state, flat, loss)
    return deltas[NAME], () if state is None else state


def _leaves_of(values: tree.Tree) -> tree.Tree:
    """Return leaves of a new graph, where they are floating-point."""
    return tree.tree_map(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x, values)


def _split(found: Sequence[Any], num_params: int, num_states: int) -> tuple[Any, ...]:
    at, to = 1 + num_params, 1 + num_params + num_states
    return found[0], found[1:at], found[at:to], found[to:]


def _like(state: State, d_state: Sequence[Tensor | None]) -> State | None:
    """Return the cotangents in the structure of ``state``, zeros where nothing came; None where nothing came at all."""
    if all(g is None for g in d_state):
        return None
    given = iter(d_state)

    def pick(x: Tensor) -> Tensor:
        found = next(given) if x.requires_grad else None
        return torch.zeros_like(x) if found is None else found

    return tree.tree_map(pick, state)


def _cotangents(window: Window, d_losses: Tensor | None, d_params: Sequence[Tensor | None]) -> Tensor:
    """Return the cotangents of the deltas (num_steps, num_tasks, num_coordinates)."""
    ends = [torch.zeros_like(p) if d is None else d for p, d in zip(window.end.params.values(), d_params, strict=True)]
    total = tree.ravel(ends)
    out = torch.empty_like(window.grads)
    for t in range(len(out) - 1, -1, -1):
        out[t] = total
        if d_losses is not None:
            total = torch.addcmul(total, d_losses[t].unsqueeze(1), window.grads[t])
    return out


def _pull_back(
    rule: UpdateRule, theta: Theta, grads: Tensor, first: State, cotangents: Tensor, end: State | None, axes: Axes
) -> list[Tensor | None]:
    """Return the cotangents of theta's leaves through the rule's updates, and through its first state."""
    fixed, start = tree.detach(theta), tree.detach(first)
    learned = any(x.requires_grad for x in tree.leaves(first))
    kernel = rule.kernel
    served = None if kernel is None else kernel.adjoint(fixed, grads, start, cotangents, end, with_state=learned)
    d_theta, d_start = served or _by_slices(rule, fixed, grads, start, cotangents, end, axes)
    pulled: list[Tensor | None] = [d_theta[k] for k in theta]
    if learned:
        pairs = zip(tree.leaves(first), tree.leaves(d_start), strict=True)
        outputs, of_start = zip(*[(x, d) for x, d in pairs if x.requires_grad], strict=True)
        through = torch.autograd.grad(outputs, list(theta.values()), of_start, allow_unused=True)
        pulled = [g if s is None else s if g is None else g + s for g, s in zip(pulled, through, strict=True)]
    return pulled


def _by_slices(
    rule: UpdateRule, theta: Theta, grads: Tensor, start: State, cotangents: Tensor, end: State | None, axes: Axes
) -> tuple[dict[str, Tensor | None], State]:
    """Back-propagate through ``rule.update`` over pieces of the coordinates."""
    num_tasks, num_coordinates = grads.shape[1:]
    leaves = {k: v.requires_grad_() for k, v in tree.detach(theta).items()}
    totals: dict[str, Tensor | None] = dict.fromkeys(theta)
    d_start = tree.tree_map(torch.zeros_like, start)
    task_map, size = TaskMap(num_tasks), max(1, COORDINATES_AT_A_TIME // num_tasks)
    for low in range(0, num_coordinates, size):
        part = slice(low, low + size)
        with torch.enable_grad():
            begun = _leaves_of(flat_state.coordinates(start, axes, part))
            state, params = task_map.unbatch(begun), task_map.unbatch({NAME: torch.zeros_like(grads[0, :, part])})
            loss, total = task_map.unbatch(grads.new_ones(num_tasks)), grads.new_zeros(())
            for g, cotangent in zip(grads[:, :, part], cotangents[:, :, part], strict=True):
                deltas, state = task_map.apply(rule.update, (leaves,), task_map.unbatch({NAME: g}), state, params, loss)
                total = total + (task_map.rebatch(deltas)[NAME] * cotangent).sum()
            if end is not None:
                last = task_map.rebatch(state)
                total = total + _paired(last, flat_state.coordinates(end, axes, part), axes, first=low == 0)
        sources = [x for x in tree.leaves(begun) if x.requires_grad]
        found: Sequence[Tensor | None] = [None] * (len(leaves) + len(sources))
        if total.requires_grad:
            found = torch.autograd.grad(total, [*leaves.values(), *sources], allow_unused=True)
        for k, g in zip(leaves, found, strict=False):
            before = totals[k]
            totals[k] = g if before is None else before if g is None else before + g
        given = iter(found[len(leaves) :])
        for x, target in zip(tree.leaves(begun), tree.leaves(flat_state.coordinates(d_start, axes, part)), strict=True):
            cotangent = next(given) if x.requires_grad else None
            if cotangent is not None:
                target.add_(cotangent)
    return totals, d_start


def _paired(state: State, cotangents: State, axes: Axes, *, first: bool) -> Tensor:
    """Return the sum of products; leaves that belong to no coordinate count in the first piece alone."""
    pairs = zip(tree.leaves(state), tree.leaves(cotangents), axes, strict=True)
    terms = [(x * d).sum() for x, d, axis in pairs if x.is_floating_point() and (axis is not None or first)]
    return torch.stack(terms).sum() if terms else torch.zeros(())
