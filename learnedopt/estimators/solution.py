"""What can be said of an inner problem's solution before it is solved: what defines it, and what of theta moves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Rollout, Tape, narrow
from learnedopt.core.estimator import call_objective
from learnedopt.core.execution import TaskMap
from learnedopt.core.inner import InnerLoop
from learnedopt.core.inner_gradient import penalty_gradient
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Params, Theta

ONE = TaskMap(1)
Key = TypeVar("Key")


def is_stationary_point(loop: InnerLoop, theta: Theta, begun: Carry) -> bool:
    """Whether the solution is a stationary point of an inner objective of its own.

    So it is where the rule rests at a gradient of zero and moves every coordinate elsewhere. Of the family's loss alone
    theta moves no stationary point, but it may move a fixed point of the step map.
    """
    if loop.inner_objective.is_task_loss:
        return False
    params, state = _one_task(begun)
    ways = random_like(params, 3)
    params = {k: p + ways[k] for k, p in params.items()}  # a weight decay, say, shows away from zero
    zeros, loss = {k: torch.zeros_like(p) for k, p in params.items()}, next(iter(params.values())).new_zeros(())
    with torch.no_grad():
        rested, _ = loop.move(ONE, theta, zeros, state, params, loss)
        moved, _ = loop.move(ONE, theta, random_like(params, 4), state, params, loss)
    # A coordinate that no gradient moves, as the body's under ANIL, is not at a stationary point.
    return all(torch.equal(rested[k], p) and bool((moved[k] != p).all()) for k, p in params.items())


def require_solution_moves(
    loop: InnerLoop, theta: Theta, carry: Carry, objective: MetaObjective, *, stationary: bool
) -> list[str]:
    """Check once, before the inner run, that every meta-parameter can move the solution, and that there is one.

    A step map that rests wherever the gradient is zero, as descent does, has the stationary points of the loss as its
    fixed points: what does not move an update there moves no solution. Of other maps only a missing path is certain.
    What enters the objective directly needs no solution, and a start moves what the rule leaves where it is.

    Returns:
        Entries of a learned start that the solution forgets, where the rest of the start does move it: zero gradients.

    Raises:
        ValueError: a meta-parameter structurally does not move the solution; the step map depends on a counter.
    """
    key = ("moves", stationary, carry.state is None)
    still, forgotten = loop.cache.remember(key, lambda: _unmoving(loop, theta, carry, stationary=stationary))
    if still and not loop.cache.seen(objective, "direct", stationary):
        lost = still - _direct(loop, theta, loop.begin(theta, narrow(carry, 0, 1)), objective)
        if lost:
            raise ValueError(does_not_move(sorted(lost), "the update at zero gradient does not depend on it"))
        loop.cache.saw(objective, "direct", stationary)
    return sorted(forgotten)


def _unmoving(loop: InnerLoop, theta: Theta, carry: Carry, *, stationary: bool) -> tuple[set[str], set[str]]:
    """Return what moves no task's solution, and the entries of a learned start that are forgotten."""
    if not stationary:
        _refuse_counter(loop, theta, *_one_task(loop.begin(theta, narrow(carry, 0, 1))))
    still = set(theta)
    for i in range(tree.size(carry.params)):  # what one task says is no reason yet; mostly the first is enough
        still &= _without_effect(loop, theta, loop.begin(theta, narrow(carry, i, i + 1)), stationary=stationary)
        if not still:
            break
    forgotten: set[str] = set()
    if still and carry.state is None:
        starts, kept = _starts(loop, theta, carry)
        forgotten = (still & starts) - kept if kept else set()
        still -= kept | forgotten
    return still, forgotten


def _without_effect(loop: InnerLoop, theta: Theta, begun: Carry, *, stationary: bool) -> set[str]:
    params, state = _one_task(begun)
    leaves = {k: v.detach().requires_grad_() for k, v in theta.items()}
    with torch.enable_grad():
        moved = random_like(params, 0)
        params = {k: (p + moved[k]).requires_grad_() for k, p in params.items()}
        slopes, is_zero = _gradient_of_objective(loop, leaves, begun, params)
        loss = next(iter(params.values())).new_zeros(())
        if stationary:
            outputs, rests = list(slopes.values()), is_zero
        else:
            _, settled = tree.detach(loop.move(ONE, leaves, slopes, state, params, loss))  # flags have settled there
            image = loop.move(ONE, leaves, slopes, settled, params, loss)
            outputs = [x for x in tree.leaves(image) if x.is_floating_point()]
            rests = is_zero and all(map(torch.equal, tree.leaves(image), tree.leaves((params, settled))))
        found = _effects(outputs, leaves)
    return {k for k, g in found.items() if g is None or (rests and not g.any())}


def _gradient_of_objective(loop: InnerLoop, theta: Theta, begun: Carry, params: Params) -> tuple[Params, bool]:
    """Return what is descended beside the family's loss, as if that were flat, and whether this is zero.

    Of an inner objective that cannot be taken apart the whole gradient is returned.
    """
    objective = loop.inner_objective
    if not objective.descends_task_loss:
        batch = tree.squeeze(loop.batch(tree.narrow(begun.tasks, 0, 1), begun.step, "train"))
        return loop.gradient(ONE, theta, params, batch, Tape.FULL).grads, False
    if objective.penalty is not None:
        return penalty_gradient(objective.penalty, ONE, theta, params, create_graph=True), True
    return {k: torch.zeros_like(p) for k, p in params.items()}, True


def _direct(loop: InnerLoop, theta: Theta, begun: Carry, objective: MetaObjective) -> set[str]:
    """Return the meta-parameters that the objective itself reads."""
    leaves = {k: v.detach().requires_grad_() for k, v in theta.items()}
    with torch.enable_grad():
        losses = loop.losses(tree.detach(theta), begun, "train").detach().unsqueeze(0)
        value, _ = call_objective(objective, loop, leaves, Rollout(begun, begun, losses))
        found = _effects([value], leaves)
    return {k for k, g in found.items() if g is not None}


def _starts(loop: InnerLoop, theta: Theta, fresh: Carry) -> tuple[set[str], set[str]]:
    """Return the meta-parameters that enter a start, and those of them whose coordinates an update leaves alone."""
    leaves = {k: v.detach().requires_grad_() for k, v in theta.items()}
    with torch.enable_grad():
        start, state = loop.init_task(leaves, tree.squeeze(tree.narrow(fresh.params, 0, 1)))
        fixed = tree.detach(start)
        grads = random_like(fixed, 2)
        moved, _ = loop.move(ONE, theta, grads, tree.detach(state), fixed, next(iter(fixed.values())).new_ones(()))
        entering = _effects(list(start.values()), leaves)
        left = [torch.where(moved[k] == fixed[k], p, torch.zeros_like(p)) for k, p in start.items()]
        kept = _effects(left, leaves)
    return {k for k, g in entering.items() if g is not None}, {k for k, g in kept.items() if g is not None and g.any()}


def _effects(outputs: Sequence[Tensor], leaves: Theta) -> dict[str, Tensor | None]:
    """Return the gradient of a random combination of ``outputs`` by name, None where there is no path."""
    directions = random_like(dict(enumerate(outputs)), 1)
    terms = [(x * directions[i]).sum() for i, x in enumerate(outputs) if x.requires_grad]
    if not terms:
        return dict.fromkeys(leaves)
    return dict(zip(leaves, torch.autograd.grad(terms, list(leaves.values()), allow_unused=True), strict=True))


def _one_task(begun: Carry) -> tuple[Params, tree.Tree]:
    params, state = (tree.detach(tree.squeeze(tree.narrow(x, 0, 1))) for x in (begun.params, begun.state))
    return params, state


def _refuse_counter(loop: InnerLoop, theta: Theta, params: Params, state: tree.Tree) -> None:
    """Refuse a state that goes on by the same amount at every update, though nothing moves: a counter."""
    zeros, seen = {k: torch.zeros_like(p) for k, p in params.items()}, [tree.leaves(state)]
    with torch.no_grad():
        for _ in range(2):
            _, state = loop.move(ONE, theta, zeros, state, params, next(iter(zeros.values())).new_zeros(()))
            seen.append(tree.leaves(state))
    for before, between, after in zip(*seen, strict=True):
        if before.dtype is torch.bool:  # a flag
            continue
        step = between - before
        if step.any() and torch.equal(after - between, step):
            raise ValueError(
                f"{type(loop.rule).__name__} counts its steps, and a step that depends on a counter has no fixed point "
                "to differentiate; give the loop an inner objective that theta enters, such as Proximal, so that the "
                "optimality condition defines the solution, or use an unrolled estimator"
            )


def does_not_move(names: Sequence[str], why: str) -> str:
    """Return the message for meta-parameters that do not move the solution."""
    return (
        f"the meta-parameters {list(names)} do not move the solution of the inner problem ({why}), so an implicit "
        "meta-gradient of them is zero; fix them, or use an unrolled estimator, which sees the path"
    )


def random_like(tensors: Mapping[Key, Tensor], seed: int) -> dict[Key, Tensor]:
    """Return standard normal tensors of the same shapes, dtypes and devices."""
    generator = torch.Generator().manual_seed(0x7E57 * 0x10001 + seed)  # not a seed that tasks are drawn with
    return {k: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for k, x in tensors.items()}
