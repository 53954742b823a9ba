"""Scales of meta-parameters: what rule and inner objective say, checked, and theta as it is moved on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, final

import torch
from torch import Tensor

from learnedopt.core.cache import Cache
from learnedopt.core.containers import is_dict
from learnedopt.core.inner_objective import InnerObjective
from learnedopt.core.named_tensors import NamedTensors
from learnedopt.core.registry import nearest
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Theta


def scales_of(rule: UpdateRule, objective: InnerObjective, theta: Theta, own: set[str], cache: Cache) -> Theta:
    """Return a scale for every entry of theta, of its dtype and on its device: a scalar, or of its shape.

    Args:
        rule: says them of its own.
        objective: says them of its own, whose names are ``own``.
        theta: one of the two.
        own: names.
        cache: where the answer is kept: it is found once.

    Raises:
        ValueError: a scale is of no meta-parameter of its owner, of another shape, or not positive and finite.
    """

    def find() -> Theta:
        found = _declared(rule, {k: v for k, v in theta.items() if k not in own})
        found |= _declared(objective, {k: v for k, v in theta.items() if k in own})
        return {k: found[k] if k in found else v.new_ones(()) for k, v in theta.items()}

    kinds = tuple((k, v.dtype, v.device) for k, v in theta.items())
    return dict(cache.remember(("theta_scale", kinds), find))


def _declared(owner: UpdateRule | InnerObjective, theta: Theta) -> Theta:
    name, said = f"{type(owner).__name__}.theta_scale", cast("object", owner.theta_scale())
    if not is_dict(said):
        raise ValueError(f"{name} must return a dict of scales by name, got {type(said).__name__}")
    unknown = [k for k in said if k not in theta]
    if unknown:
        raise ValueError(
            f"{name} names {unknown}, of which there is no meta-parameter{nearest(str(unknown[0]), theta)} (there are "
            f"{[*theta]}); name what its init_theta returns"
        )
    return {k: _checked(f"{name}[{k!r}]", scale, theta[k]) for k, scale in said.items()}


def _checked(what: str, scale: Any, like: Tensor) -> Tensor:
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    tensor = isinstance(scale, Tensor) and (scale.is_floating_point() and scale.shape in (like.shape, ()))
    if not number and not tensor:
        got = f"{scale.dtype} of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else repr(scale)
        raise ValueError(
            f"{what} is {got}; return a number, or a floating-point tensor of its shape, {tuple(like.shape)}"
        )
    found = torch.as_tensor(scale).detach().to(dtype=like.dtype, device=like.device)
    if not bool(((found > 0) & found.isfinite()).all()):
        raise ValueError(
            f"{what} must be positive and finite in {like.dtype}, got {scale!r}: it is how large a step of size one "
            "is; leave the name out for 1, and keep what is not to move out of theta"
        )
    return found


class ThetaItself:
    """Marks a meta-optimizer to which a gradient is a distance in theta, so that a scale would change what it does."""

    param_groups: list[dict[str, Any]]

    def taken_as_theta(self) -> list[Tensor]:
        """Return the tensors that must be theta's own: all that it moves, by default."""
        return [p for group in self.param_groups for p in group["params"]]


@final
class Scaled:
    """Theta as a meta-optimizer is handed it: ``phi = theta / scale``.

    Theta stays the master: phi is put where theta is before each step. An entry whose scale is 1 is its own phi.

    Args:
        theta: leaves, which are moved in place.
        scale: one for each, broadcastable to it.

    Attributes:
        phi: what to make the meta-optimizer of.
    """

    def __init__(self, theta: Theta, scale: Theta) -> None:
        self._theta, self._scale = theta, {k: s for k, s in scale.items() if not bool((s == 1).all())}
        scaled = {k: (theta[k].detach() / s).requires_grad_() for k, s in self._scale.items()}
        self.phi: Theta = {**theta, **scaled}

    @property
    def tensors(self) -> NamedTensors:
        """Phi as a list that knows its names."""
        return NamedTensors(self.phi)

    def require_movable(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError where ``optimizer`` is one of theta itself and would be handed something else."""
        taken = {id(p) for p in optimizer.taken_as_theta()} if isinstance(optimizer, ThetaItself) else set[int]()
        wrong = [k for k in self._scale if id(self.phi[k]) in taken]
        if wrong:
            raise ValueError(
                f"{type(optimizer).__name__} takes gradients for distances in theta itself, but the rule or the inner "
                f"objective says that {wrong} have a theta_scale, and what moves is theta / scale; give these to "
                "another meta-optimizer by PerName, or have no scales"
            )

    def gradients(self, grads: Theta) -> Theta:
        """Return the gradient with respect to phi of what has the gradient ``grads`` with respect to theta."""
        return {k: g * self._scale[k] if k in self._scale else g for k, g in grads.items()}

    def move(self, step: Callable[[], Any]) -> None:
        """Let ``step`` move phi from where theta is, and take theta along."""
        before = {k: self._theta[k].detach() / s for k, s in self._scale.items()}
        with torch.no_grad():
            for k, phi in before.items():
                self.phi[k].copy_(phi)
        step()
        with torch.no_grad():
            for k, s in self._scale.items():
                self._theta[k].add_(s * (self.phi[k] - before[k]))
