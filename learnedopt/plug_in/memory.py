"""Where a rule's memory lies in ``Optimizer.state``: with the parameter that each part of it belongs to."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from learnedopt.core import tree
from learnedopt.core.rule import State
from learnedopt.plug_in import shards
from learnedopt.plug_in.state_dtype import unpacked

Entries: TypeAlias = dict[str, dict[str, Tensor]]
"""Parameter -> key -> what its entry of ``Optimizer.state`` holds of the rule's memory."""
COUNT = "step"
"""Key of the number of steps that a parameter has taken, an int, beside the memory."""


class Kind(enum.Enum):
    """Whose a leaf of a rule's state is."""

    OWN = enum.auto()
    """One parameter's: it stands in a dict under that parameter's name."""
    JOINED = enum.auto()
    """All coordinates', side by side in its last dimension."""
    COMMON = enum.auto()
    """Everything else, such as a count of steps."""


class Place(NamedTuple):
    """Where a leaf of a rule's state lies."""

    kind: Kind
    owner: str | None
    """The parameter that it belongs to, if it is one's own."""
    key: str
    """The path to the leaf, without the owner's name: parameters of other names find it by their position."""


@final
class Layout:
    """How the state of a rule lies in the entries of its parameters.

    What is a parameter's own lies in its entry; of what is joined, its coordinates do, (..., *shape), as a view. What
    is common lies in the first one's entry or, if it is ``spread``, in all of them.

    Args:
        state: the rule's, such as ``init`` made it.
        params: the parameters, in order.
        spread: whether each parameter has what is common.
        cut: the parameters that lie in pieces; entries hold pieces of the memory as of these.
        gather: whether ``params`` are whole nevertheless.
    """

    def __init__(
        self,
        state: State,
        params: Mapping[str, Tensor],
        *,
        spread: bool,
        cut: Mapping[str, Tensor] | None = None,
        gather: bool = False,
    ) -> None:
        self.cut: Mapping[str, Tensor] = cut or {}
        self._gather = gather
        self.shapes: dict[str, torch.Size] = {name: p.shape for name, p in params.items()}
        self.names: tuple[str, ...] = tuple(params)
        self.spread = spread
        self._sizes = [shape.numel() for shape in self.shapes.values()]
        placed = self._placed(state)
        self.places: tuple[Place, ...] = tuple(place for place, _ in placed)
        self._dtypes = {place: x.dtype for place, x in placed if isinstance(x, Tensor)}
        self._rebuild = tree.flatten(state)[1]

    def fits(self, state: State) -> bool:
        """Return whether a state has this structure, and tensors alone."""
        found = self._placed(state)
        same = sorted(map(str, self.places)) == sorted(str(place) for place, _ in found)
        return same and all(isinstance(x, Tensor) for _, x in found)

    def entries(self, state: State) -> Entries:
        """Return what each parameter's entry holds of a state that fits."""
        found: Entries = {name: {} for name in self.names}
        for (kind, owner, key), leaf in self._placed(state):
            if kind is Kind.JOINED:
                for name, part in zip(self.names, leaf.split(self._sizes, -1), strict=True):
                    part = part.unflatten(-1, self.shapes[name]) if self.shapes[name] else part.squeeze(-1)
                    found[name][key] = self._kept(part, name)
                continue
            for name in self._holders(owner):
                found[name][key] = leaf if owner is None else self._kept(leaf, owner)
        return found

    def of(self, cut: Mapping[str, Tensor]) -> Layout:
        """Return the same layout for these parameters in pieces."""
        found = copy.copy(self)
        found.cut = cut
        return found

    def state(self, entries: Mapping[str, Mapping[str, Any]]) -> State:
        """Return the state that entries hold; what is joined is copied, what is kept in bfloat16 is widened."""
        return self._rebuild([unpacked(self._leaf(place, entries), self._dtypes.get(place)) for place in self.places])

    @property
    def common(self) -> list[str]:
        """The keys of what is common."""
        return [key for kind, _, key in self.places if kind is Kind.COMMON]

    def with_common(self, state: State, change: Callable[[Tensor], Tensor]) -> State:
        """Return a state whose common leaves are changed."""
        entries = self.entries(state)
        for entry in entries.values():
            entry.update({key: change(entry[key]) for key in self.common if key in entry})
        return self.state(entries)

    def _leaf(self, place: Place, entries: Mapping[str, Mapping[str, Any]]) -> Any:
        if place.kind is not Kind.JOINED:
            name = place.owner or self.names[0]
            leaf = entries[name][place.key]
            return leaf if place.owner is None else self._seen(leaf, name)
        parts = [self._seen(entries[name][place.key], name) for name in self.names]
        lead = parts[0].shape[: parts[0].ndim - len(self.shapes[self.names[0]])]
        return torch.cat([part.reshape(*lead, size) for part, size in zip(parts, self._sizes, strict=True)], -1)

    def _kept(self, leaf: Any, name: str) -> Any:
        return shards.kept(leaf, self.cut[name], self._gather) if name in self.cut else leaf

    def _seen(self, leaf: Any, name: str) -> Any:
        return shards.recalled(leaf, self.cut[name], self._gather) if name in self.cut else leaf

    def _holders(self, owner: str | None) -> tuple[str, ...]:
        return (owner,) if owner is not None else self.names if self.spread else self.names[:1]

    def _placed(self, state: State) -> list[tuple[Place, Any]]:
        return [(self._place(path, leaf), leaf) for path, leaf in pytree.tree_flatten_with_path(state)[0]]

    def _place(self, path: tuple[Any, ...], leaf: Any) -> Place:
        mine = [i for i, part in enumerate(path) if isinstance(part, pytree.MappingKey) and path[i].key in self.shapes]
        words = [_word(part) for i, part in enumerate(path) if not mine or i != mine[-1]]
        if mine and mine[-1] != len(path) - 1:
            words.insert(mine[-1], "*")
        key = ".".join(["memory", *words])
        if mine:
            return Place(Kind.OWN, path[mine[-1]].key, key)
        joined = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[-1] == sum(self._sizes)
        return Place(Kind.JOINED if joined else Kind.COMMON, None, key)


def _word(part: Any) -> str:
    for kind in ("name", "key", "idx"):  # a named tuple's field, a dict's key, a place in a tuple
        if hasattr(part, kind):
            return str(getattr(part, kind))
    return str(part)
