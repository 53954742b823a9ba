"""Weights α_t of the steps t = 1, 2, ..., as averages of iterates and sums of gradients take them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, cast, final, get_args, runtime_checkable

import torch
from torch import Tensor

from learnedopt.core.registry import nearest

WeightsName: TypeAlias = Literal["constant", "linear"]
"""The weights that a configuration can name."""
_LOOK_AHEAD = 10_000


@runtime_checkable
class Weights(Protocol):
    """α_t as a function of t: elementwise, pure, and positive everywhere.

    Example:
        >>> class Squares:
        ...     def __call__(self, step):
        ...         return step**2
    """

    def __call__(self, step: Tensor) -> Tensor:
        """Return α_t, shaped as ``step``, which holds numbers t = 1, 2, ... in float64."""
        ...


@final
@dataclass(frozen=True)
class Constant:
    """α_t = 1: the plain mean."""

    def __call__(self, step: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(step)


@final
@dataclass(frozen=True)
class Linear:
    """α_t = t: the t-th of T counts 2t / (T(T+1))."""

    def __call__(self, step: Tensor) -> Tensor:
        """Return the step itself."""
        return step


_BY_NAME: dict[str, Weights] = {"constant": Constant(), "linear": Linear()}


def resolve(weights: Weights | WeightsName) -> Weights:
    """Return the weights that a name stands for, or those given.

    They are evaluated at the first 10,000 steps: what is wrong with them is said before the first one.

    Raises:
        TypeError: they cannot be called.
        ValueError: no weights have that name; or a weight is not positive and finite, or not one for each step.
    """
    if isinstance(weights, str):
        if weights not in _BY_NAME:
            raise ValueError(f"weights={weights!r} is none of {', '.join(_BY_NAME)}{nearest(weights, _BY_NAME)}")
        return _BY_NAME[weights]
    if isinstance(weights, type) or not callable(weights):
        raise TypeError(
            f"weights={weights!r} cannot be called on steps; pass Constant(), Linear(), one of the names "
            f"{', '.join(get_args(WeightsName))}, or a function of a tensor of steps"
        )
    steps = torch.arange(1, _LOOK_AHEAD + 1, dtype=torch.float64)
    found = cast("object", weights(steps))  # who knows what a user's own returns
    if not isinstance(found, Tensor) or found.shape != steps.shape:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(
            f"weights={weights!r} must return a weight for each step, of shape {tuple(steps.shape)} here, got {got}"
        )
    bad = (~((found > 0) & found.isfinite())).nonzero()
    if len(bad):
        raise _not_positive(weights, float(found[bad[0, 0]]), int(bad[0, 0]) + 1)
    return weights


def name_of(weights: Weights) -> WeightsName | Weights:
    """Return the name of weights that have one, and others themselves."""
    return next((name for name, known in _BY_NAME.items() if known == weights), weights)  # pyright: ignore[reportReturnType]


def weight_at(weights: Weights, step: int) -> float:
    """Return α_t of one step t >= 1; ValueError where it is not positive and finite."""
    value = float(weights(torch.tensor(float(step), dtype=torch.float64)))
    if not (value > 0 and math.isfinite(value)):
        raise _not_positive(weights, value, step)
    return value


def _not_positive(weights: Weights, value: float, step: int) -> ValueError:
    return ValueError(
        f"weights={weights!r} gives {value:g} at step {step}: every weight must be positive and finite, or an average "
        "would leave its steps out or divide by zero"
    )


def require_positive(owner: str, name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a positive, finite number; TypeError for no number at all."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {name}={value!r} is a {type(value).__name__}; pass a positive number")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{owner}: {name}={value!r} must be positive and finite")
