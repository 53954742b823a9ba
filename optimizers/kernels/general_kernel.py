"""The compiled step of the rule ``general``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from learnedopt.core.rule import State
from learnedopt.core.tree import Theta
from learnedopt.optimizers.bases import frame
from learnedopt.optimizers.bases.frame import TINY, Memory
from learnedopt.optimizers.bases.kinds import TensorKind
from learnedopt.optimizers.bases.newton_schulz import orthogonalised
from learnedopt.optimizers.bases.places import Places
from learnedopt.optimizers.kernels.frame_kernel import Factors, FrameKernel, Step
from learnedopt.optimizers.kernels.normalised_native import Shapes, Sums

if TYPE_CHECKING:
    from learnedopt.optimizers.general import General


@final
@dataclass(frozen=True)
class GeneralKernel(FrameKernel):
    """The step of ``General``: Newton-Schulz, in torch, stands between the two passes over memory."""

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

    def orthogonalised(self, stacked: Tensor) -> Tensor:
        """Orthogonalise as the rule does."""
        return orthogonalised(stacked, dtype=self.rule.products(stacked))

    def tensor_numbers(self, step: Step, sums: Sums, scale: Tensor) -> tuple[Sequence[Tensor], Factors | None]:
        """Return what makes the compiled bracket the one that ``General`` states."""
        theta = {name: value.unsqueeze(-1) for name, value in step.theta.items() if value.ndim == len(step.lanes)}
        places, numels = _places(step.kinds, step.cut.shapes, scale.dtype)
        mean = sums.square * scale / numels + TINY
        nothing = torch.zeros_like(mean)
        share, size = places.shares(step.theta) if self.rule.orthogonalise else (nothing, nothing)
        factor = mean ** (-0.5 * (1 - theta["power"])) * (1 - share)
        numbers = (
            mean * theta["eps"].exp(),
            -0.5 * theta["power"],
            factor,
            theta["weight_decay"].exp() * places.matrices,
            (self._log_rate(step) + places.log_steps(step.theta, sums.iterate / numels)).exp(),
            share * size,
            nothing,
            nothing,
        )
        return numbers, None

    def _log_rate(self, step: Step) -> Tensor:
        theta = step.theta
        rate = theta["log_rate"] + frame.schedule(theta["schedule"], step.progress)
        return (rate + theta["length"][..., 0] * step.state.length).unsqueeze(-1)


@functools.lru_cache(maxsize=256)
def _places(kinds: tuple[TensorKind, ...], shapes: Shapes, dtype: torch.dtype) -> tuple[Places, Tensor]:
    """Return the tensors' places, and how many entries each has."""
    numels = torch.tensor([torch.Size(shape).numel() for shape in shapes], dtype=dtype)
    return Places(kinds, [len(shape) for shape in shapes], dtype), numels
