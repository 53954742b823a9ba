"""Trees of tensors: dicts, tuples and named tuples whose leaves are tensors.

Everything that flows through the engine (parameters, rule states, batches, descriptions of tasks) is such a tree. A
*batched* tree has a leading dimension of size ``num_tasks`` on every leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from learnedopt.core.containers import is_dict

Params: TypeAlias = dict[str, Tensor]
"""The optimizee's parameters by name."""
Theta: TypeAlias = dict[str, Tensor]
"""The meta-parameters of an update rule by name."""
Tree: TypeAlias = Any
"""Nested dicts, lists, tuples and named tuples with tensors as leaves."""
_Node: TypeAlias = "Tensor | dict[Any, Tree] | tuple[Tree, ...] | list[Tree] | float | None"
"""What stands at one place of it."""


@overload
def tree_map(fn: Callable[[Any], Any], tree: Tree) -> Tree: ...
@overload
def tree_map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree: ...
def tree_map(fn: Callable[..., Any], tree: _Node, *rest: Tree) -> Tree:
    """Apply ``fn`` to corresponding leaves and return a tree of the same structure.

    Raises:
        ValueError: the structures of the others differ from ``tree``'s; dicts may differ in order.
    """
    # What flows is mostly tensors in dicts and tuples, and for small tasks walking them is much of a step's time.
    if not rest:
        return _map(fn, tree)
    if isinstance(tree, Tensor):
        return fn(tree, *rest)
    if type(tree) is dict:
        if any(type(other) is not dict or other.keys() != tree.keys() for other in rest):
            raise ValueError(f"expected a dict with the keys {list(tree)}, got {_others(rest)}")
        return {k: tree_map(fn, x, *(other[k] for other in rest)) for k, x in tree.items()}
    if type(tree) is tuple:
        if any(type(other) is not tuple or len(other) != len(tree) for other in rest):
            raise ValueError(f"expected a tuple of {len(tree)}, got {_others(rest)}")
        return tuple(tree_map(fn, *each) for each in zip(tree, *rest, strict=True))
    return pytree.tree_map(fn, tree, *rest)


def _map(fn: Callable[[Any], Any], tree: _Node) -> Tree:
    if isinstance(tree, Tensor):
        return fn(tree)
    if type(tree) is dict:
        return {k: fn(x) if isinstance(x, Tensor) else _map(fn, x) for k, x in tree.items()}
    if type(tree) is tuple:
        return tuple([fn(x) if isinstance(x, Tensor) else _map(fn, x) for x in tree])
    return pytree.tree_map(fn, tree)


def _others(trees: Sequence[Tree]) -> str:
    return ", ".join(f"{type(x).__name__} {list(x) if is_dict(x) else ''}".strip() for x in trees)


def leaves(tree: _Node) -> list[Any]:
    """Return the leaves in a fixed order (dicts in insertion order)."""
    if type(tree) is dict and all(isinstance(x, Tensor) for x in tree.values()):
        return list(tree.values())
    return pytree.tree_leaves(tree)


def flatten(tree: Tree) -> tuple[list[Any], Callable[[Sequence[Any]], Tree]]:
    """Return the leaves and the function that puts as many new ones back into the same structure."""
    flat, spec = pytree.tree_flatten(tree)
    return flat, lambda new: pytree.tree_unflatten(list(new), spec)


def detach(tree: Tree) -> Tree:
    """Cut every leaf from the autograd graph; values are shared, not copied."""
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)


def arrange(tree: Tree, like: Tree) -> Tree:
    """Return ``tree`` with its dicts in the order of ``like``'s; ValueError where the structures differ."""

    def second(_: Any, x: Any) -> Any:
        return x

    return tree_map(second, like, tree)


def size(tree: Tree) -> int:
    """Return ``num_tasks``, the common leading dimension of a batched tree.

    Raises:
        ValueError: there is no leaf, a leaf is not a tensor, or leading dimensions differ.
    """
    found = leaves(tree)
    if not found or not all(isinstance(x, Tensor) for x in found):
        raise ValueError(
            f"a batched tree needs tensors as leaves, got {[type(x).__name__ for x in found] or 'no leaf at all'}; "
            "describe each task by at least one tensor (its seed, say) with a leading dimension of num_tasks"
        )
    sizes = {x.shape[0] if x.ndim else None for x in found}
    if 0 in sizes:
        raise ValueError("a batched tree of no tasks; sample at least one")
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"the leaves of a batched tree must share one leading dimension, got {[tuple(x.shape) for x in found]}"
        )
    return int(found[0].shape[0])


def narrow(tree: Tree, start: int, stop: int) -> Tree:
    """Return tasks ``start`` to ``stop - 1`` of a batched tree (views)."""
    # A slice of everything would cost a copy on the way back.
    return tree_map(lambda x: x if (start, stop) == (0, x.shape[0]) else x[start:stop], tree)


def concatenate(trees: Sequence[Tree]) -> Tree:
    """Join batched trees along their leading dimension."""
    if len(trees) == 1:
        return trees[0]

    def joined(*each: Tensor) -> Tensor:
        return torch.cat(each)

    return tree_map(joined, trees[0], *trees[1:])


def squeeze(tree: Tree) -> Tree:
    """Drop the leading dimension of a batched tree of one task (views)."""
    return tree_map(lambda x: x.squeeze(0), tree)


def unsqueeze(tree: Tree) -> Tree:
    """Give a single task's tree its leading dimension of size one (views)."""
    return tree_map(lambda x: x.unsqueeze(0), tree)


def to(tree: Tree, device: torch.device | str | None, dtype: torch.dtype | None) -> Tree:
    """Move every leaf to ``device`` and floating-point leaves to ``dtype``; None leaves as it is."""
    if device is None and dtype is None:
        return tree
    return tree_map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None), tree)


def in_dtype_of(like: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` in the dtype of ``like``."""
    return x if x.dtype is like.dtype else x.to(like.dtype)


def ravel(tensors: Sequence[Tensor]) -> Tensor:
    """Join batched tensors, each (num_tasks, ...), into one matrix (num_tasks, dim)."""
    return torch.cat([x.reshape(x.shape[0], -1) for x in tensors], dim=1)


def unravel(matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a matrix (num_tasks, dim) into tensors shaped as ``like``; the inverse of ``ravel``."""
    pieces = torch.split(matrix, [x[0].numel() for x in like], dim=1)
    return [piece.reshape(x.shape) for piece, x in zip(pieces, like, strict=True)]


def numbers(x: Tensor) -> Any:
    """Return a tensor's values as Python's numbers, in nested lists, on one way from its device."""
    # torch does not say of what the lists are.
    return x.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def from_numpy(array: Any) -> Tensor:
    """Return numpy's array as a tensor that shares its memory."""
    # torch gives the array no type.
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]


def length(x: Tensor) -> Tensor:
    """Return the Euclidean length of all its entries, a scalar."""
    # torch gives it no types.
    return x.norm()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def row_lengths(matrix: Tensor) -> Tensor:
    """Return the Euclidean length (num_tasks,) of each row of a matrix (num_tasks, dim)."""
    return matrix.norm(dim=1)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
