"""Which steps of a run count: guards, and the objective and the hint that go with one-step windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

from torch import Tensor

Guard: TypeAlias = Callable[[Tensor, Tensor], bool]
"""``(loss before the step, loss after it) -> whether the step counts``, both scalars on the same batch."""


@final
@dataclass(frozen=True)
class AcceptIfBetter:
    """A step counts only where the loss decreases (OSGM's null step, Gao et al. 2024): else nothing moves but theta.

    A loss that is not a number is not better.
    """

    def __call__(self, before: Tensor, after: Tensor) -> bool:
        """Return whether the loss after is less."""
        return bool(after < before)


@final
class PresentGradient:
    """The exact hint of one-step windows, ``g̃ = Dφ(x_t, w_t)ᵀ ∇f(x_t)``, for every rule (Flennerhag et al. 2023, §4).

    What the next meta-gradient would be if theta and the gradient stayed as they are. One object is handed to the
    optimizer that computes it and to the meta-optimizer that reads it.

    Example:
        >>> hint = PresentGradient()
        >>> HyperOptimizer(
        ...     model.named_parameters(), rule, hint=hint,
        ...     meta_optimizer=lambda params: DualAveraging(params, 0.1, hint=hint, averaged=False),
        ... )
    """

    def __init__(self) -> None:
        self._now: list[Tensor] | None = None

    def set(self, hint: list[Tensor]) -> None:
        """Note the hint for the meta-step that comes."""
        self._now = hint

    def __call__(self, params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Return the hint.

        Raises:
            ValueError: nobody has computed one.
        """
        if self._now is None:
            raise ValueError(
                "this PresentGradient is read before it was set: pass the same object to HyperOptimizer(hint=...), "
                "which computes it"
            )
        return self._now
