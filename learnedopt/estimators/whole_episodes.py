"""Estimators that can take one episode whole, and over how many steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from learnedopt.core.containers import is_list_or_tuple
from learnedopt.estimators.evolution import EvolutionStrategies
from learnedopt.estimators.forward import ForwardMode
from learnedopt.estimators.unrolled import TruncatedBackprop, Unrolled

WHOLE_EPISODES = (Unrolled, TruncatedBackprop, ForwardMode, EvolutionStrategies)
"""Estimators of a given number of steps."""


def require_whole(name: str, part: Any) -> None:
    """Raise unless an option ``name`` of ``TaskByTask`` is an estimator that takes one episode whole.

    Raises:
        TypeError: it is of another kind.
        ValueError: it cuts episodes into windows.
    """
    kinds = ", ".join(kind.__name__ for kind in WHOLE_EPISODES)
    if not isinstance(part, WHOLE_EPISODES):
        got = f"the class {part.__name__}" if isinstance(part, type) else repr(part)
        raise TypeError(
            f"TaskByTask: {name}={got} is no estimator that takes one episode whole; pass an instance of {kinds}"
        )
    if isinstance(part, ForwardMode | EvolutionStrategies) and part.horizon is not None:
        raise ValueError(
            f"TaskByTask: {name}={part!r} cuts episodes into windows, which would all be the first; leave its horizon "
            "out"
        )


def over(part: Any, num_steps: int) -> Any:
    """Return such an estimator of so many steps instead."""
    return replace(part, num_steps=num_steps)


def steps_of(part: Any) -> int:
    """Return how many steps it takes."""
    return part.num_steps


def pairs_of(horizons: Any) -> tuple[tuple[int, float], ...]:
    """Return pairs of steps and weight; none of None.

    Raises:
        ValueError: these are no pairs.
    """
    if horizons is None:
        return ()
    if not horizons or not all(is_list_or_tuple(pair) and len(pair) == 2 for pair in horizons):
        raise ValueError(f"horizons={horizons!r} must be pairs of steps and weight, such as ((50, 0.5), (100, 0.5))")
    return tuple((steps, weight) for steps, weight in horizons)
