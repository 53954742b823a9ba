"""The base of hand-designed rules: their hyperparameters are meta-parameters, or constants."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from learnedopt.core.containers import is_tuple
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Theta
from learnedopt.optimizers.bases.precision import wide, wide_dtype

Hyper: TypeAlias = float | Tensor
"""A hyperparameter's value: a constant, or a 0-d tensor out of theta."""

NOT_NEGATIVE = (0.0, math.inf)
DECAY_RATE = (0.0, 1.0)


@dataclass(frozen=True)
class HandDesigned(UpdateRule):
    """A coordinatewise rule whose meta-parameters are its own hyperparameters.

    Subclasses are dataclasses with one float field per hyperparameter. Those in theta are raw values, 0-d tensors of
    the default dtype that start at the constructor's values; nothing keeps meta-training from moving them out of their
    range. An ``optional`` hyperparameter that is 0, such as a weight decay that nobody asked for, is switched off and
    is not in theta, unless ``learn`` names it.

    Args:
        learn: the hyperparameters in theta; the others are constants. None: all that are switched on; ``()``: none.

    Raises:
        TypeError: a hyperparameter is not a number, or ``learn`` is not a tuple of names.
        ValueError: a hyperparameter is out of its range, or ``learn`` names one that the rule does not have.
    """

    ranges: ClassVar[dict[str, tuple[float, float]]]
    """Hyperparameter -> (low, high); low is allowed, high is not."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Hyperparameters whose value 0 switches a feature off."""

    learn: tuple[str, ...] | None = field(default=None, kw_only=True)

    coordinatewise = True

    def __post_init__(self) -> None:
        for name, (low, high) in self.ranges.items():
            check_number(type(self).__name__, name, getattr(self, name), low, high)
        if self.learn is None:
            return
        if not is_tuple(self.learn) or not all(isinstance(name, str) for name in self.learn):
            raise TypeError(
                f"learn={self.learn!r} is not a tuple of names; pass learn=('lr',), () for none, or None for all"
            )
        unknown = [name for name in self.learn if name not in self.ranges]
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no hyperparameter {unknown} to learn; it has {list(self.ranges)}"
            )

    def uses(self, name: str) -> bool:
        """Return whether a hyperparameter is switched on: not optional, not 0, or learned."""
        return name not in self.optional or getattr(self, name) != 0 or name in (self.learn or ())

    @cached_property
    def learned(self) -> tuple[str, ...]:
        """The hyperparameters that are in theta."""
        return tuple(name for name in self.ranges if (self.uses(name) if self.learn is None else name in self.learn))

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the learned hyperparameters at the constructor's values."""
        return {name: torch.tensor(float(getattr(self, name)), device=generator.device) for name in self.learned}

    def theta_faults(self, theta: Theta) -> dict[str, str]:
        """Say which learned hyperparameters the constructor would not take."""
        found = {name: float(theta[name]) for name in self.learned}
        return {
            name: f"is {value:.6g} and must be {_bounds(*self.ranges[name])}"
            for name, value in found.items()
            if not (self.ranges[name][0] <= value < self.ranges[name][1])
        }

    def values(self, theta: Theta, tensors: Iterable[Tensor]) -> dict[torch.dtype, dict[str, Hyper]]:
        """Return all hyperparameters by dtype: each that ``tensors`` are computed in, so that none promotes another."""
        constants = {name: getattr(self, name) for name in self.ranges if name not in self.learned}
        return {
            dtype: {**constants, **{name: theta[name].to(dtype) for name in self.learned}}
            for dtype in {wide_dtype(x) for x in tensors}
        }

    def decayed(self, hyper: dict[str, Hyper], grad: Tensor, param: Tensor) -> Tensor:
        """Return the gradient, in the dtype to compute in, plus that of ``weight_decay / 2 * |param|^2``."""
        grad = wide(grad)
        return grad + hyper["weight_decay"] * wide(param) if self.uses("weight_decay") else grad


def check_number(owner: str, name: str, value: object, low: float, high: float) -> None:
    """Raise unless ``value`` is a finite number with ``low <= value < high``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {name}={value!r} is a {type(value).__name__}; pass a number")
    if not (low <= value < high):
        raise ValueError(f"{owner}: {name}={value!r} is out of range; it must be {_bounds(low, high)}")


def _bounds(low: float, high: float) -> str:
    return f"at least {low:g}" + (f" and below {high:g}" if high < math.inf else " and finite")


def sqrt(x: Tensor) -> Tensor:
    """Return the square root with derivative 0 where ``x <= 0``, at which the plain one back-propagates NaN.

    The inner ``where`` keeps the infinite derivative from being formed, the outer one sets value and derivative to 0.
    """
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
