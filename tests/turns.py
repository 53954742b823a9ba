"""Grids of test cases of which a part is run at once and the whole in the long run: ``make test-long``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def by_turns(every: Iterable[tuple[Any, ...]], turns: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return all pairs of one of ``every`` and one of ``turns``, joined; the long ones are marked so.

    Each of ``every`` has one case that is not long: the first with the first of ``turns``, the next with the next.
    Where ``every`` is a product itself its longest axis belongs last, so that all of that product's values meet
    all ``turns``.
    """
    return [
        pytest.param(*first, *second, marks=() if i % len(turns) == j else pytest.mark.long)
        for i, first in enumerate(every)
        for j, second in enumerate(turns)
    ]
