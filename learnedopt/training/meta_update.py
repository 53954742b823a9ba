"""How theta moves: by a meta-optimizer, on the scales of its entries, and a learning-rate schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar, final

import torch
from torch import Tensor

from learnedopt.core.clipping import Norm, clip, norm_of
from learnedopt.core.named_tensors import NamedTensors
from learnedopt.core.theta_scale import Scaled
from learnedopt.core.tree import Theta

_Stepped = TypeVar("_Stepped", torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


@final
class MetaUpdate:
    """What moves theta: its meta-optimizer is handed ``phi = theta / scale``, and gradients with respect to it.

    Args:
        theta: leaves, which are moved in place.
        scale: of each entry, see ``InnerLoop.theta_scale``.
        meta_optimizer: makes any ``torch.optim.Optimizer`` from phi, a list of tensors with ``names``.
        scheduler: makes a learning-rate scheduler from the meta-optimizer, stepped after each of its steps; or None.

    Raises:
        ValueError: one of them needs more at a step than a step, as LBFGS does, or the meta-optimizer is one of theta
            itself and there are scales.
    """

    def __init__(
        self,
        theta: Theta,
        scale: Theta,
        meta_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None,
    ) -> None:
        self._theta, self._scaled, self._make = theta, Scaled(theta, scale), (meta_optimizer, scheduler)
        self.meta_optimizer: torch.optim.Optimizer
        self.scheduler: torch.optim.lr_scheduler.LRScheduler | None
        self.meta_optimizer, self.scheduler = self._made(self._scaled.tensors)
        self._scaled.require_movable(self.meta_optimizer)

    def anew(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
        """Return both made again, of copies of phi as it is, whose gradients are ones."""
        copies = {k: x.detach().clone().requires_grad_() for k, x in self._scaled.phi.items()}
        for x in copies.values():
            x.grad = torch.ones_like(x)
        return self._made(NamedTensors(copies))

    def _made(self, tensors: NamedTensors) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
        meta_optimizer, scheduler = self._make
        made = _stepped_plainly(meta_optimizer(tensors))
        return made, _stepped_plainly(scheduler(made)) if scheduler else None

    def gradients(self, grads: Theta) -> tuple[Theta, Norm]:
        """Return the gradient with respect to phi, and its length, of one with respect to theta."""
        found = self._scaled.gradients(grads)
        return found, norm_of(found)

    def apply(self, grads: Theta, norm: Norm, max_grad_norm: float | None) -> bool:
        """Move theta along a gradient with respect to phi, scaled down to the length ``max_grad_norm``.

        A step that leaves theta not finite, as steps in float16 may, is undone: theta is where it was, the
        meta-optimizer forgets what it remembers, and the schedule waits. Return whether theta has moved.
        """
        before = {k: x.detach().clone() for k, x in self._theta.items()}
        for k, g in clip(grads, norm, max_grad_norm).items():
            self._scaled.phi[k].grad = g
        self._scaled.move(self.meta_optimizer.step)
        if not all(bool(x.isfinite().all()) for x in self._theta.values()):
            with torch.no_grad():
                for k, x in self._theta.items():
                    x.copy_(before[k])
            self.meta_optimizer.state.clear()
            return False
        if self.scheduler:
            self.scheduler.step()
        return True


def undone(theta: Theta) -> str:
    """Say why a step was undone."""
    dtypes = ", ".join(sorted({str(x.dtype) for x in theta.values()}))
    return f"theta ({dtypes}) was not finite after it, so that the step was undone; keep theta in float32"


def _stepped_plainly(thing: _Stepped) -> _Stepped:
    """Return ``thing``, refusing what ``step()`` alone cannot step: closures and metrics are not at hand."""
    needed = [k for k, p in inspect.signature(thing.step).parameters.items() if p.default is p.empty]
    if needed:
        raise ValueError(
            f"{type(thing).__name__}.step needs {', '.join(needed)}, which meta-training cannot give; choose another, "
            "such as torch.optim.Adam or CosineAnnealingLR"
        )
    return thing
