"""What a loop has checked, found out or compiled once: a store of bounded size, so that nothing is kept for ever."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, final

T = TypeVar("T")
MISSING: Any = object()
"""What ``Cache.get`` returns where there is no answer, as None may be one."""
PROGRAMS = "programs of a step"
"""Where a loop's cache has a cache of them; they hold for its family, rule and inner objective over any horizon."""


@final
class Cache:
    """The ``max_entries`` most recently used answers by key."""

    def __init__(self, max_entries: int = 128) -> None:
        # [answer, when it was last used]: keys may be long, and are to be hashed once an access.
        self._entries: dict[Hashable, list[Any]] = {}
        self._max_entries, self._uses = max_entries, 0

    def __contains__(self, key: Hashable) -> bool:
        return self.get(key) is not MISSING

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or what is read from a pickle, finds out for itself: programs and references stay here.
        return {"_entries": {}, "_max_entries": self._max_entries, "_uses": 0}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any:
        """Return the answer under ``key``, or ``MISSING``."""
        entry = self._entries.get(key)
        if entry is None:
            return MISSING
        self._uses += 1
        entry[1] = self._uses
        return entry[0]

    def put(self, key: Hashable, answer: T) -> T:
        """Keep an answer, in place of the longest unused one where there are too many; return it."""
        self._uses += 1
        self._entries[key] = [answer, self._uses]
        if len(self._entries) > self._max_entries:
            del self._entries[min(self._entries, key=lambda key: self._entries[key][1])]
        return answer

    def pop(self, key: Hashable, default: Any = None) -> Any:
        """Take an answer out."""
        entry = self._entries.pop(key, None)
        return default if entry is None else entry[0]

    def remember(self, key: Hashable, find: Callable[[], T]) -> T:
        """Return the answer under ``key``, found now where it is not there."""
        answer = self.get(key)
        return self.put(key, find()) if answer is MISSING else answer

    def seen(self, thing: object, *what: Hashable) -> bool:
        """Whether ``saw(thing, *what)`` was told of this very object; it is not kept alive by that."""
        reference = self.get(("seen", id(thing), *what))
        return reference is not MISSING and reference() is thing

    def saw(self, thing: object, *what: Hashable) -> None:
        """Note an object; one that cannot be referred to weakly is forgotten at once."""
        if getattr(type(thing), "__weakrefoffset__", 0):
            self.put(("seen", id(thing), *what), weakref.ref(thing))
