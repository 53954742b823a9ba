"""A rule's state as it would be for one flat parameter, so that coordinates can be cut, joined and counted alike."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.containers import is_dict, is_list_or_tuple, is_tuple
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta

NAME = "x"
"""Of the flat parameter."""
Axes: TypeAlias = "list[int | None]"
"""Each leaf's axis of coordinates in one task's flat state; None where a leaf belongs to no coordinate."""


def flat_params(params: Params) -> Params:
    """Return batched parameters as one, (num_tasks, num_coordinates)."""
    return {NAME: tree.ravel(list(params.values()))}


def pattern(rule: UpdateRule, theta: Theta, like: Tensor) -> tuple[State, Axes]:
    """Return the rule's first state for two flat coordinates, and where its coordinates lie.

    The axis is the one that is longer in the first state for three.
    """
    two, three = (rule.init(tree.detach(theta), {NAME: like.new_zeros(n)})[1] for n in (2, 3))
    two, three = (() if x is None else x for x in (two, three))
    shapes = zip(tree.leaves(two), tree.leaves(three), strict=True)
    return two, [
        next((i for i, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if a != b), None) for x, y in shapes
    ]


def flatten(like: State, state: State, params: Params) -> State:
    """Return a batched state in the structure of ``like``, a pattern; dicts keyed as ``params`` become one entry."""
    if is_dict(like):
        if _keyed(like, state, params):
            return {NAME: tree.ravel([state[k] for k in params])}
        return {k: flatten(x, state[k], params) for k, x in like.items()}
    if is_tuple(like) and hasattr(like, "_fields"):
        return type(like)(*(flatten(x, y, params) for x, y in zip(like, state, strict=True)))
    if is_list_or_tuple(like):
        return type(like)(flatten(x, y, params) for x, y in zip(like, state, strict=True))
    return state


def restore(like: State, flat: State, state: State, params: Params) -> State:
    """Undo ``flatten``: ``state`` is one of the original structure, whose values are not read."""
    if is_dict(like):
        if _keyed(like, state, params):
            return dict(zip(params, tree.unravel(flat[NAME], list(params.values())), strict=True))
        return {k: restore(like[k], flat[k], x, params) for k, x in state.items()}
    if is_tuple(like) and hasattr(like, "_fields"):
        return type(like)(*(restore(*each, params) for each in zip(like, flat, state, strict=True)))
    if is_list_or_tuple(like):
        return type(like)(restore(*each, params) for each in zip(like, flat, state, strict=True))
    return flat


def _keyed(like: State, state: State, params: Params) -> bool:
    return list(like) == [NAME] and set(state) == set(params)


def join_tasks(state: State, axes: Axes) -> State:
    """Return a flat batched state as that of one task that has the coordinates of all, side by side."""
    leaves, rebuild = tree.flatten(state)
    joined = [
        x.movedim(0, axis).flatten(axis, axis + 1).unsqueeze(0) for x, axis in zip(leaves, axes, strict=True)
        if axis is not None
    ]  # fmt: skip
    return rebuild(joined)


def part_tasks(state: State, axes: Axes, num_tasks: int) -> State:
    """Undo ``join_tasks``."""
    leaves, rebuild = tree.flatten(state)
    parted = [
        x.squeeze(0).unflatten(axis, (num_tasks, -1)).movedim(axis, 0).contiguous()
        for x, axis in zip(leaves, axes, strict=True)
        if axis is not None
    ]
    return rebuild(parted)


def coordinates(state: State, axes: Axes, which: slice) -> State:
    """Return some coordinates of a flat batched state (views); what belongs to no coordinate stays whole."""
    leaves, rebuild = tree.flatten(state)
    cut = [
        x if axis is None else x[(slice(None),) * (axis + 1) + (which,)] for x, axis in zip(leaves, axes, strict=True)
    ]
    return rebuild(cut)
