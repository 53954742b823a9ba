"""What a carry must be that an estimator can go on from: of the structure of those that it starts and leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.utils import _pytree as pytree

from learnedopt.core.carry import Carry
from learnedopt.core.containers import is_dict, is_list, is_tuple
from learnedopt.core.estimator import GradientEstimator
from learnedopt.core.inner import InnerLoop
from learnedopt.core.shares import Places, carries_in
from learnedopt.core.tree import Theta
from learnedopt.training import carries
from learnedopt.training.isolation import Remaining, opened


@dataclass(frozen=True, eq=False)
class Expected:
    """What the carries of a training are compared with.

    Args:
        loop: the loop.
        estimator: whose carries they are.
        theta: one of the loop.
        num_tasks: of a meta-batch.
        forms: ``GradientEstimator.forms`` of ``num_examples`` tasks, tensors without their numbers.
        num_examples: of how many tasks ``forms`` are.
        loops: a begun inner loop of each family, of one task.
        kind: the class of a carry that holds a loop where it starts, and none between two episodes.
    """

    loop: InnerLoop
    estimator: GradientEstimator
    theta: Theta
    num_tasks: int
    forms: Sequence[Any]
    num_examples: int
    loops: Sequence[Carry]
    kind: type[Any] | None

    def require_loaded(self, kept: Any) -> None:
        """Raise TypeError or ValueError, naming the place, unless a training can go on from what was kept in a file."""
        if kept is None:
            return
        if isinstance(kept, Remaining):
            _require_positions("carry.places", kept.places, self.num_tasks)
        carry, places = opened(kept, self.num_tasks)
        self.require(carry, len(places))
        if self.estimator.is_part(carry):
            raise ValueError("its carry is a part of one, and not the whole")
        self.estimator.require_carry(self.theta, carry)
        for own, stand, _ in self.estimator.standing(self.loop, carry):
            if type(stand.step) is not int or not 0 <= stand.step < 1 << 63:
                raise ValueError(f"an inner loop stands at the step {stand.step!r}")
            own.batch(stand.tasks, stand.step, "train")  # which tasks that there are none of do not give

    def require_own(self, carry: Any, num_tasks: int) -> None:
        """Raise TypeError where an estimator leaves another carry than it says: no checkpoint of it could be read."""
        if carry is None or not num_tasks or self.estimator.is_part(carry):
            return  # of an estimate of which nothing is left the carry is dropped
        try:
            self.require(carry, num_tasks)
        except ValueError as error:
            whose = type(self.estimator).__name__
            raise TypeError(
                f"the carry of {whose} is of another form than {whose}.forms says, so that no checkpoint could be told "
                f"from one of another training: {error}; let start return all of it, or override forms"
            ) from error

    def require(self, carry: Any, num_tasks: int) -> None:
        """Raise ValueError, naming the place, unless a carry of so many tasks has the structure of one of the forms."""
        if self.forms:
            _compare("carry", carry, list(self.forms), (self.num_examples, num_tasks, self.num_tasks))
        known = [_form(one) for one in self.loops] + [_form(one._replace(state=None)) for one in self.loops]
        found = carries_in(carry)
        if not self.forms and not found and self.kind not in (None, type(carry)):
            raise ValueError("its carry holds no inner loop")
        for one in found:
            if _form(one) not in known:
                raise ValueError("names, shapes or types of an inner loop's tensors are not those that begin here")


def expected(
    loop: InnerLoop, estimator: GradientEstimator, theta: Theta, num_tasks: int, few: int, example: Any,
    begun: Sequence[Carry],
) -> Expected:  # fmt: skip
    """Return what carries of ``num_tasks`` tasks are compared with, given one that has started on a few."""

    def shape(x: Any) -> Any:
        return x.detach().to("meta") if isinstance(x, Tensor) else x

    forms = [pytree.tree_map(shape, each) for each in estimator.forms(loop, theta, example)]
    kind = cast("type[Any]", type(example)) if carries_in(example) else None
    return Expected(loop, estimator, theta, num_tasks, forms, few, begun, kind)


def _compare(path: str, saved: Any, examples: list[Any], counts: tuple[int, int, int]) -> None:
    """Raise ValueError unless a node is as one of the examples', at any depth.

    Args:
        path: the Python expression that reaches it.
        saved: the node.
        examples: what may be in its place.
        counts: tasks of the examples, of this carry, of a meta-batch.
    """
    known = [x for x in examples if x is not None]
    if not known or (saved is None and len(known) < len(examples)):
        return
    alike = [x for x in known if (isinstance(x, Tensor) and isinstance(saved, Tensor)) or type(x) is type(saved)]
    if not alike:
        raise ValueError(f"{path} is {_told(saved)}, where {_told(known[0])} is due")
    children = carries.children(saved)
    if isinstance(saved, Places):
        _require_positions(f"{path}.positions", saved.positions, counts[2])
        if saved.num_tasks != counts[2]:
            raise ValueError(f"{path}.num_tasks is {saved.num_tasks!r}, of a meta-batch of {counts[2]} tasks")
    elif children is None:
        _require_leaf(path, saved, alike, counts)
    elif is_list(saved):
        within = [x for each in alike for x in each]
        for i, child in enumerate(saved):
            _compare(f"{path}[{i}]", child, within, counts)
    else:
        same = [x for x in map(carries.children, alike) if x is not None and x.keys() == children.keys()]
        if not same:
            due = [*(carries.children(alike[0]) or {})]
            raise ValueError(f"{path} has {[*children]}, where {due} are due")
        by_name = not (is_dict(saved) or is_tuple(saved)) or hasattr(saved, "_fields")
        for key, child in children.items():
            place = f"{path}.{key}" if by_name else f"{path}[{key!r}]"
            if key == "num_tasks" and by_name and child != counts[2]:
                raise ValueError(f"{place} is {child!r}, of a meta-batch of {counts[2]} tasks")
            _compare(place, child, [x[key] for x in same], counts)


def _require_leaf(path: str, saved: Any, alike: list[Any], counts: tuple[int, int, int]) -> None:
    if not isinstance(saved, Tensor):
        if type(saved) is int and saved < 0 <= min(alike):
            raise ValueError(f"{path} is {saved!r}, where a count is due")
        return
    few, here, _ = counts
    for x in alike:
        shapes = [tuple(x.shape)] + ([(here, *x.shape[1:])] if x.dim() and x.shape[0] == few else [])
        if saved.dtype == x.dtype and tuple(saved.shape) in shapes:
            return
    raise ValueError(f"{path} is {_told(saved)}, where {_told(alike[0])} is due (of {few} tasks; here are {here})")


def _require_positions(path: str, positions: Any, num_tasks: int) -> None:
    """Raise ValueError unless these are some of the positions in a meta-batch, in order."""
    ints = is_tuple(positions) and all(type(x) is int for x in positions)
    if not ints or not positions or sorted({*positions} & {*range(num_tasks)}) != [*positions]:
        raise ValueError(f"{path} is {positions!r}, which are no positions in a meta-batch of {num_tasks} tasks")


def _form(carry: Carry) -> Any:
    """Return names, types and shapes, but for the number of tasks, of parameters and state."""
    leaves, spec = pytree.tree_flatten((carry.params, carry.state))
    return spec, [(x.dtype, x.shape[1:]) if isinstance(x, Tensor) else type(x) for x in leaves]


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return repr(value) if isinstance(value, bool | int | float) else f"a {type(value).__name__}"
