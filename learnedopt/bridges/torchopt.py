"""Gradient transformations of ``torchopt`` as update rules."""

from __future__ import annotations

import dis
import inspect
import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from learnedopt.bridges.options import foreign_code
from learnedopt.core import tree
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta

try:
    from torchopt.base import GradientTransformation
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        f"learnedopt.bridges.torchopt needs the package torchopt ({_error}); install learnedopt[bridges]"
    ) from _error


@final
@dataclass(frozen=True, eq=False)
class TorchOpt(UpdateRule):
    """A functional optimizer of ``torchopt``, or a chain of its transformations.

        updates, state = transformation.update(grads, state, params=params),    delta = updates,  or  lr * updates

    Values and derivatives are torchopt's. Its Adam and its relatives back-propagate NaN at a coordinate that never had
    a gradient, unless they are made with a positive ``eps_root``, which changes the values. Several tasks at once are
    for transformations that read no tensor as a number, as ``radam`` and clipping by norm do. The factor that torchopt
    clips by is a constant to its derivative; ``learnedopt.optimizers.make("clip", ...)`` around the rule is exact.

    Args:
        transformation: such as ``torchopt.adam(1e-3)`` or ``torchopt.combine.chain(...)``.
        lr: a factor on all it adds, which is then learned; the transformation is best made with a rate of 1.

    Theta: ``lr`` () where it is given, at that value; else empty. State: the transformation's, numbers in it as
    float64 tensors.

    Raises:
        TypeError: it is no transformation, but perhaps an optimizer with parameters of its own; its state holds
            something else than tensors and numbers.
        ValueError: ``lr`` is not finite; the transformation is momentum with dampening, which remembers outside its
            state whether it was called before: a second task would not start as the first one did.

    Example:
        >>> loop = InnerLoop(family, TorchOpt(torchopt.rmsprop(1.0), lr=0.01))
    """

    transformation: Any
    lr: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.transformation, GradientTransformation):
            raise TypeError(
                f"TorchOpt got a {type(self.transformation).__name__}; pass a functional optimizer, which has no "
                "parameters, such as torchopt.adam(lr=1e-3), and not torchopt.Adam or torchopt.MetaAdam"
            )
        if self.lr is not None and (isinstance(self.lr, bool) or not math.isfinite(self.lr)):
            raise ValueError(f"TorchOpt: lr={self.lr!r} is not a finite number")
        remembered = sorted(_remembered(self.transformation))
        if remembered:
            raise ValueError(
                f"this transformation remembers {', '.join(remembered)} outside its state, so that a second task would "
                "not start as the first one did; torchopt's momentum with dampening does: leave the dampening out, or "
                "use learnedopt.optimizers.make('momentum', dampening=...)"
            )

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the factor, where there is one."""
        return {} if self.lr is None else {"lr": torch.tensor(float(self.lr), device=generator.device)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start where the parameters are."""
        device = next(iter(params.values())).device
        return params, tree.tree_map(lambda x: _tensor(x, device), self.transformation.init(params))

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Move by the transformed gradient."""
        with foreign_code("TorchOpt with this transformation"):
            found, state = self.transformation.update(grads, state, params=params, inplace=False)
        if self.lr is None:
            return found, state
        return {k: theta["lr"].to(x.dtype) * x for k, x in found.items()}, state


def _tensor(x: Any, device: torch.device) -> Tensor:
    """Return a leaf of a state as a tensor; numbers in the precision that torchopt has them in."""
    if not isinstance(x, Tensor | int | float):
        raise TypeError(f"the state of this transformation holds a {type(x).__name__}; a rule's may hold tensors only")
    return x if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64, device=device)


def _remembered(transformation: Any) -> set[str]:
    """Return what the functions of a transformation, and of those it is made of, change outside of their state."""
    found: set[str] = set()
    waiting: list[Any] = list(transformation)
    seen: set[int] = set()
    while waiting:
        function = waiting.pop()
        if id(function) in seen or not inspect.isfunction(function):
            continue
        seen.add(id(function))
        known = inspect.getclosurevars(function).nonlocals
        written = {i.argval for i in dis.get_instructions(function) if i.opname == "STORE_DEREF"} & known.keys()
        # Momentum from zeros without dampening is the same at the first call as later.
        found |= written if known.get("dampening") != 0 else set()
        for inside in known.values():
            waiting += inside if isinstance(inside, tuple | list) else [inside]
    return found
