"""Rules whose parameters stay in a convex set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor

from learnedopt.core.rule import State
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.convex_sets import ConvexSet, outside
from learnedopt.optimizers.bases.precision import like, wide
from learnedopt.optimizers.bases.wrapper import Wrapper


@final
@dataclass(frozen=True, eq=False)
class Projected(Wrapper):
    """Project the parameters after each update of ``rule``: ``x' = onto(x + delta)``.

    The start is not projected, for a learned one on the set's edge would lose part of its gradient: it must lie in the
    set, and the mean of points that do is one.

    Args:
        rule: the rule that moves. A lazy one goes on from where it would be without the projection.
        onto: ``Ball(radius)``, ``Box(low, high)`` or ``Simplex()``: each is one of all of a task's parameters together.

    Theta: ``rule/<key>``, the rule's own.

    Raises:
        TypeError: ``onto`` is no set.
        ValueError: at the first step, the start lies outside.

    Example:
        >>> rule = Projected(SGD(lr=0.1), onto=Ball(1.0))
    """

    onto: ConvexSet

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(cast("object", self.onto), ConvexSet):
            raise TypeError(f"Projected: onto={self.onto!r} is no set; pass Ball(radius), Box(low, high) or Simplex()")

    @property
    def coordinatewise(self) -> bool:
        """False: the sets tie coordinates together."""
        return False

    def start_faults(self, params: Params) -> list[str]:
        """Say what the rule says, and whether the start lies outside."""
        found, gap = self.rule.start_faults(params), outside(self.onto, params)
        rounding = torch.finfo(next(iter(params.values())).dtype).eps ** 0.75
        if gap > rounding:
            found = [*found, f"it lies {gap:.3g} outside {self.onto}; start inside, with LearnedInit for one"]
        return found

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Move as the rule does, then to the closest point of the set."""
        # In the dtype to compute in, so that only the way to the projection is rounded to the parameters'.
        wide_grads, wide_params = ({k: wide(x) for k, x in tensors.items()} for tensors in (grads, params))
        deltas, state = super().update(theta, wide_grads, state, wide_params, loss)
        inside = self.onto({k: p + deltas[k] for k, p in wide_params.items()})
        return {k: like(inside[k] - p, params[k]) for k, p in wide_params.items()}, state
