"""What a loop has checked, found out or compiled once: a store of bounded size, so that nothing is kept for ever."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, final

T = TypeVar("T")


@final
class Cache:
    """The ``max_entries`` most recently used answers by key."""

    def __init__(self, max_entries: int = 128) -> None:
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._max_entries = max_entries

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any:
        """Return the answer under ``key``; KeyError where there is none."""
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: Hashable, answer: T) -> T:
        """Keep an answer, in place of the longest unused one where there are too many; return it."""
        self._entries[key] = answer
        self._entries.move_to_end(key)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)
        return answer

    def pop(self, key: Hashable, default: Any = None) -> Any:
        """Take an answer out."""
        return self._entries.pop(key, default)

    def remember(self, key: Hashable, find: Callable[[], T]) -> T:
        """Return the answer under ``key``, found now where it is not there."""
        return self.get(key) if key in self._entries else self.put(key, find())

    def seen(self, thing: Any, *what: Hashable) -> bool:
        """Whether ``saw(thing, *what)`` was told of this very object; it is not kept alive by that."""
        reference = self._entries.get(("seen", id(thing), *what))
        return reference is not None and reference() is thing

    def saw(self, thing: Any, *what: Hashable) -> None:
        """Note an object; one that cannot be referred to weakly is forgotten at once."""
        if getattr(type(thing), "__weakrefoffset__", 0):
            self.put(("seen", id(thing), *what), weakref.ref(thing))
