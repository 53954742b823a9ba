"""Shares of a meta-batch: what of an estimator's carry belongs to some of its tasks, and shares put together again.

Ranks, micro-batches and the isolation of failed tasks all stand on these. A carry of an estimator is a nest of its own,
so each estimator says what its tasks are (``GradientEstimator.narrow`` and ``join``); here is what most need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from learnedopt.core import tree
from learnedopt.core.carry import Carry, join, narrow


class Indivisible(ValueError):
    """A meta-batch of this estimator cannot be estimated in shares of its tasks."""


def even(num: int, num_shares: int, index: int) -> tuple[int, int]:
    """Return where share ``index`` of ``num`` things starts and stops: as even as can be, the first ones larger."""
    least, more = divmod(num, num_shares)
    first, after = (i * least + min(i, more) for i in (index, index + 1))
    return first, after


class Places(NamedTuple):
    """Where the tasks of a share stand in their meta-batch of ``num_tasks``: what is drawn for a task depends on that
    and not on the share."""

    positions: tuple[int, ...]
    num_tasks: int

    @property
    def all(self) -> bool:
        """Whether these are all tasks, in order."""
        return self.positions == tuple(range(self.num_tasks))


def all_places(num_tasks: int) -> Places:
    """Return the places of a whole meta-batch."""
    return Places(tuple(range(num_tasks)), num_tasks)


def narrow_places(places: Places, start: int, stop: int) -> Places:
    """Return those of a share of a share."""
    require_bounds(start, stop, len(places.positions))
    return Places(places.positions[start:stop], places.num_tasks)


def join_places(places: Sequence[Places], whose: str) -> Places:
    """Return those of shares put together."""
    require_same("number of tasks", [x.num_tasks for x in places], whose)
    return Places(tuple(position for x in places for position in x.positions), places[0].num_tasks)


def count(carry: Any, whose: str) -> int:
    """Return how many tasks a nest of ``Carry``s and numbers is of.

    Raises:
        Indivisible: there is no ``Carry`` in it, or they are of different numbers of tasks.
    """
    found = {tree.size(leaf.params) for leaf in _leaves(carry, whose)[0] if isinstance(leaf, Carry)}
    if len(found) != 1:
        raise Indivisible(
            f"the carry of {whose} holds {'no Carry' if not found else f'Carries of {sorted(found)} tasks'}, so that "
            f"nobody knows its tasks: let {whose} say what they are, in count_tasks, narrow and join"
        )
    return found.pop()


def carries_in(carry: Any) -> list[Carry]:
    """Return the ``Carry``s in a nest of anything."""
    return [x for x in pytree.tree_leaves(carry, is_leaf=lambda x: isinstance(x, Carry)) if isinstance(x, Carry)]


def take(carry: Any, start: int, stop: int, whose: str) -> Any:
    """Return tasks ``start`` to ``stop - 1`` of a nest of ``Carry``s and numbers; numbers are of all tasks."""
    require_bounds(start, stop, count(carry, whose))
    leaves, spec = _leaves(carry, whose)
    return pytree.tree_unflatten([narrow(x, start, stop) if isinstance(x, Carry) else x for x in leaves], spec)


def put_together(carries: Sequence[Any], whose: str) -> Any:
    """Put shares of a nest of ``Carry``s and numbers together, in the order of their tasks.

    Raises:
        ValueError: they differ in structure, in a number, or in the step that they stand at.
    """
    parts = [_leaves(carry, whose) for carry in carries]
    if any(spec != parts[0][1] for _, spec in parts):
        raise ValueError(f"shares of a carry of {whose} differ in structure: they are not of one meta-batch")
    joined: list[Any] = []
    for each in zip(*(leaves for leaves, _ in parts), strict=True):
        if isinstance(each[0], Carry):
            require_same("step", [x.step for x in each], whose)
            joined.append(_joined(each))
        else:
            require_same("number", each, whose)
            joined.append(each[0])
    return pytree.tree_unflatten(joined, parts[0][1])


def require_bounds(start: int, stop: int, number: int, what: str = "tasks") -> None:
    """Raise ValueError unless tasks, or others, from ``start`` to ``stop - 1`` are some of so many."""
    if not 0 <= start < stop <= number:
        raise ValueError(f"{what} {start} to {stop - 1} are no share of a meta-batch of {number} {what}")


def require_parts(parts: Sequence[tuple[int, int] | None], num_parts: int, whose: str) -> None:
    """Raise ValueError unless these are all parts of a task's estimate, in order."""
    known = [each for each in parts if each is not None]
    ends = [0, *(stop for _, stop in known)]
    if len(known) < len(parts) or [start for start, _ in known] != ends[:-1] or ends[-1] != num_parts:
        raise ValueError(f"the parts {parts} of a carry of {whose} are not all of the {num_parts} there are, in order")


def require_same(what: str, values: Sequence[Any], whose: str) -> None:
    """Raise ValueError unless all shares agree in what is of all tasks."""
    if any(value != values[0] for value in values):
        raise ValueError(
            f"shares of a carry of {whose} differ in a {what} that is of all tasks ({sorted({*map(str, values)})}): "
            "they are not of one meta-batch, or were not moved by the same number of estimates"
        )


def _joined(each: Sequence[Carry]) -> Carry:
    if any((x.state is None) != (each[0].state is None) for x in each):
        raise ValueError("some shares of a carry have begun and some have not: they are not of one meta-batch")
    if each[0].state is not None:
        return join([*each])
    tasks, params = tree.concatenate([(x.tasks, x.params) for x in each])
    return Carry(tasks, params, None, each[0].step)


def _leaves(carry: Any, whose: str) -> tuple[list[Any], Any]:
    """Return the ``Carry``s and numbers of a nest, and its structure.

    Raises:
        Indivisible: it holds something else, of which nobody knows whether it is of one task or of all.
    """
    leaves, spec = pytree.tree_flatten(carry, is_leaf=lambda x: isinstance(x, Carry))
    strange = [x for x in leaves if x is not None and not isinstance(x, Carry | bool | int | float)]
    if strange:
        kinds = sorted({f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in strange})
        raise Indivisible(
            f"a meta-batch of {whose} cannot be estimated in shares: its carry holds {', '.join(kinds)} beside its "
            f"Carries, and nobody knows whether that is of one task or of all; let {whose} say so, in count_tasks, "
            "narrow and join"
        )
    return leaves, spec
