"""The compiled step of the rule ``general``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from learnedopt.core.rule import State
from learnedopt.core.tree import Theta
from learnedopt.optimizers.bases.frame import TINY, Memory
from learnedopt.optimizers.bases.kinds import TensorKind
from learnedopt.optimizers.bases.newton_schulz import orthogonalised
from learnedopt.optimizers.bases.places import Places
from learnedopt.optimizers.kernels import newton_schulz_native
from learnedopt.optimizers.kernels.frame_kernel import FrameKernel, Step
from learnedopt.optimizers.kernels.normalised_native import Shapes

if TYPE_CHECKING:
    from learnedopt.optimizers.general import General


@final
@dataclass(frozen=True)
class GeneralKernel(FrameKernel):
    """The step of ``General``: Newton-Schulz stands between the two passes over memory."""

    rule: General

    def memory(self, state: State) -> Memory:
        """Return the frame's part."""
        return state.frame

    def after(self, state: State, memory: Memory, states: Sequence[Tensor]) -> State:
        """Put the frame's part back."""
        return state._replace(frame=memory, length=state.length.expand(memory.step.shape))

    def decays(self, theta: Theta, state: State) -> Tensor:
        """Return those of theta, moved by the run's length."""
        longer = (theta["length"][..., 1] * state.length).unsqueeze(-1)
        first, others = theta["decay"][..., :1], theta["decay"][..., 1:]
        others = others + longer
        return torch.cat([first.expand(*others.shape[:-1], 1), others], -1)

    def along(self, theta: Theta) -> Tensor | None:
        """Return theta's weights of what is orthogonalised."""
        return theta["orthogonal_mix"] if self.rule.orthogonalise else None

    def orthogonaliser(self, buffers: Sequence[Tensor]) -> Callable[[], None]:
        """Orthogonalise as the rule does: small matrices in C, large ones by torch's products."""
        exact = self.rule.products(buffers[0]) is None
        small = [exact and newton_schulz_native.serves(buffer) for buffer in buffers]
        own = newton_schulz_native.Orthogonaliser([b for b, is_small in zip(buffers, small, strict=True) if is_small])
        others = [b for b, is_small in zip(buffers, small, strict=True) if not is_small]

        def orthogonalise() -> None:
            own()
            for buffer in others:
                buffer.copy_(orthogonalised(buffer, dtype=self.rule.products(buffer)))

        return orthogonalise

    def constants(self, step: Step) -> Sequence[Tensor | float]:
        """Return what makes the compiled bracket the one that ``General`` states."""
        theta = {name: value.unsqueeze(-1) for name, value in step.theta.items() if value.ndim == len(step.lanes)}
        places = _places(step.kinds, step.cut.shapes, step.progress.dtype)
        nothing = torch.zeros_like(places.matrices)
        share, size = places.shares(step.theta) if self.rule.orthogonalise else (nothing, nothing)
        eps, power = theta["eps"].exp(), theta["power"]
        rate = theta["log_rate"] + (step.theta["length"][..., 0] * step.state.length).unsqueeze(-1)
        return (
            0.0,
            eps,
            eps * TINY,
            -0.5 * (1 - power),
            0.0,
            places.entries(step.theta),
            rate + places.log_rates(step.theta),
            -0.5 * power,
            1 - share,
            theta["weight_decay"].exp() * places.matrices,
            share * size,
        )


@functools.lru_cache(maxsize=256)
def _places(kinds: tuple[TensorKind, ...], shapes: Shapes, dtype: torch.dtype) -> Places:
    return Places(kinds, [len(shape) for shape in shapes], dtype)
