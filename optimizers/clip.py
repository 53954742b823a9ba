"""Gradient clipping before any rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnedopt.core.rule import State
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import check_number
from learnedopt.optimizers.bases.precision import wide, wide_dtype
from learnedopt.optimizers.bases.wrapper import Wrapper


@final
@dataclass(frozen=True, eq=False)
class Clip(Wrapper):
    """Clip the gradients before ``rule`` sees them; differentiable, with derivative 0 where a value is cut.

    Args:
        rule: the rule that moves.
        max_value: bound on the magnitude of each entry.
        max_norm: bound on the norm of all entries together, across all tensors of a task; a longer gradient is scaled
            to exactly this norm. It ties coordinates together: the rule is then not coordinatewise.

    Theta: ``rule/<key>``, the rule's own.

    Raises:
        TypeError: a bound is not a number.
        ValueError: not exactly one of the bounds is given, or it is not positive.

    Example:
        >>> rule = Clip(SGD(lr=0.1), max_norm=1.0)
    """

    max_value: float | None = None
    max_norm: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {k: v for k, v in (("max_value", self.max_value), ("max_norm", self.max_norm)) if v is not None}
        if len(given) != 1:
            raise ValueError(f"Clip: got {given or 'no bound'}; pass exactly one of max_value= and max_norm=")
        for name, bound in given.items():
            check_number("Clip", name, bound, 0.0, math.inf)
            if bound == 0:
                raise ValueError(f"Clip: {name}=0 would stop all motion; pass a positive bound")

    @property
    def coordinatewise(self) -> bool:
        """Whether the wrapped rule is and each entry is clipped by itself."""
        return self.max_norm is None and self.rule.coordinatewise

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Move as the rule does on clipped gradients."""
        if self.max_norm is not None:
            scale = _scale(grads, self.max_norm)
            clipped = {name: scale.to(wide_dtype(grad)) * wide(grad) for name, grad in grads.items()}
        else:
            assert self.max_value is not None  # one of the two is given
            clipped = {name: wide(grad).clamp(-self.max_value, self.max_value) for name, grad in grads.items()}
        deltas, state = super().update(theta, clipped, state, params, loss)
        return {name: deltas[name].to(grad.dtype) for name, grad in grads.items()}, state


def _scale(grads: Params, max_norm: float) -> Tensor:
    squared = torch.stack([wide(grad).square().sum() for grad in grads.values()]).sum()
    long = squared > max_norm**2
    # The root's derivative is infinite at 0, so it only ever sees squares that it is used for.
    return torch.where(long, max_norm * torch.where(long, squared, 1.0).rsqrt(), 1.0)
