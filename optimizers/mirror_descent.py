"""Online mirror descent with a step size out of a radius, and its lazy form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, cast, final

from torch import Tensor

from learnedopt.core.counts import require_count
from learnedopt.core.rule import State
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.geometry import Euclidean, Geometry, differences
from learnedopt.optimizers.bases.hand_designed import HandDesigned, Hyper, check_number
from learnedopt.optimizers.bases.precision import like, wide, wide_dtype


@final
@dataclass(frozen=True)
class MirrorDescent(HandDesigned):
    """``grad psi(x') = grad psi(x) - eta g`` with ``eta = radius / (lipschitz sqrt(num_steps))``.

    With ``Euclidean()`` it is online gradient descent, with ``Entropic()`` exponentiated gradient: ``x' proportional to
    x exp(-eta g)``. From a start phi, on ``num_steps`` convex losses whose gradients are no longer than ``lipschitz``
    (in the dual norm: the largest entry in the entropic geometry), the regret against x* is at most ``(B(x*, phi) /
    radius + radius / 2) lipschitz sqrt(num_steps)`` (Shalev-Shwartz 2012, theorem 2.15; Balcan, Khodak and Talwalkar
    2019). It holds with a projection, which is a wrapper: ``Projected``. The entropic rule stays on the simplex.

    Args:
        geometry: ``Euclidean()`` or ``Entropic()``.
        radius: D, about how far the start is from where tasks end, ``sqrt(2 B(x*, phi))``; positive.
        lipschitz: G, a bound on the gradients; positive.
        num_steps: m, the losses of a task.
        lazy: follow the regularised leader of the linearised losses, ``grad psi(x_i) = grad psi(phi) - eta sum g``
            (dual averaging): the same but where it is projected, for then the sum goes on as it was.
        learn: ``("radius",)`` puts the radius into theta; by default it is a constant.

    Theta: ``radius``, if learned; raw. State: with ``lazy`` the sum, as the parameters' mirror image.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: an option is not positive; at the first step, an entropic start with zeros or off the simplex.

    Example:
        >>> rule = LearnedInit(Projected(MirrorDescent(radius=0.5, num_steps=16), Ball(1.0)), template)
    """

    geometry: Geometry = field(default=Euclidean())
    radius: float = 1.0
    lipschitz: float = 1.0
    num_steps: int = 1
    lazy: bool = False
    learn: tuple[str, ...] | None = field(default=(), kw_only=True)

    ranges: ClassVar[dict[str, tuple[float, float]]] = {"radius": (0.0, math.inf)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(cast("object", self.geometry), Geometry):
            raise TypeError(
                f"MirrorDescent: geometry={self.geometry!r} is no Geometry; pass an instance, Euclidean() or Entropic()"
            )
        check_number("MirrorDescent", "lipschitz", self.lipschitz, 0.0, math.inf)
        for name in ("radius", "lipschitz"):
            if not getattr(self, name) > 0:
                raise ValueError(f"MirrorDescent: {name}=0 gives no step size; pass a positive number")
        require_count("num_steps", self.num_steps, least=1)

    @property
    def coordinatewise(self) -> bool:
        """Whether it is plain gradient descent."""
        return self.geometry.flat and not self.lazy

    @property
    def learns_radius(self) -> bool:
        """Whether the radius is theta's."""
        return "radius" in self.learned

    def start_faults(self, params: Params) -> list[str]:
        """Say what the geometry says."""
        return self.geometry.start_faults(params)

    def step_size(self, radius: Hyper) -> Hyper:
        """Return eta for a radius."""
        return radius / (self.lipschitz * math.sqrt(self.num_steps))

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start where the parameters are."""
        return params, {"dual": self.geometry.to_dual(params)} if self.lazy else ()

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Step in the dual, and map back."""
        etas = {d: self.step_size(hyper["radius"]) for d, hyper in self.values(theta, grads.values()).items()}
        steps = {k: -etas[wide_dtype(g)] * wide(g) for k, g in grads.items()}
        if self.coordinatewise:
            return {k: like(step, grads[k]) for k, step in steps.items()}, state
        before = state["dual"] if self.lazy else self.geometry.to_dual(params)
        dual = {k: before[k] + step for k, step in steps.items()}
        return differences(self.geometry.from_dual(dual), params), {"dual": dual} if self.lazy else state
