"""The compiled step of the rule ``general``."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from learnedopt.core.rule import State
from learnedopt.core.tree import Theta
from learnedopt.optimizers.bases import frame, frame_features
from learnedopt.optimizers.bases.frame import TINY, Memory
from learnedopt.optimizers.bases.kinds import TensorKind
from learnedopt.optimizers.bases.newton_schulz import orthogonalised
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
        several = {name: value for name, value in step.theta.items() if name not in theta}
        places = _places(self.rule, step.kinds, step.cut.shapes, scale.dtype)
        mean = sums.square * scale / places.numels + TINY
        share, size = self._share(several, places)
        factor = mean ** (-0.5 * (1 - theta["power"])) * (1 - share)
        nothing = torch.zeros_like(mean)
        numbers = (
            mean * theta["eps"].exp(),
            -0.5 * theta["power"],
            factor,
            theta["weight_decay"].exp() * places.matrices,
            (self._log_rate(step) + self._log_step(theta, several, places, sums)).exp(),
            share * size,
            nothing,
            nothing,
        )
        return numbers, None

    def _log_rate(self, step: Step) -> Tensor:
        theta = step.theta
        rate = theta["log_rate"] + frame.schedule(theta["schedule"], step.progress)
        return (rate + theta["length"][..., 0] * step.state.length).unsqueeze(-1)

    def _log_step(self, theta: Theta, several: Theta, places: _Places, sums: Sums) -> Tensor:
        entries = several["entries"].flip(-1)[..., places.is_matrix]
        size = 0.5 * (sums.iterate / places.numels + frame_features.FLOOR**2).log() + 2.5
        of_matrix = theta["fan"] * places.inputs + theta["depth"] * (places.depths - 0.5)
        return several["kind_rate"][..., places.rates] + entries * size + places.matrices * of_matrix

    def _share(self, several: Theta, places: _Places) -> tuple[Tensor, Tensor]:
        """Return how much of each tensor's direction is orthogonal, and that part's size."""
        if not self.rule.orthogonalise:
            return torch.zeros(()), torch.zeros(())
        size = several["size"].unsqueeze(-2)
        size = size[..., 0] + size[..., 1] * places.inputs + size[..., 2] * places.outputs
        return several["share"][..., places.shares].sigmoid() * places.matrices, size.exp()


class _Places:
    """What the rule reads of kinds and shapes, a number for every tensor."""

    def __init__(self, rule: General, kinds: tuple[TensorKind, ...], shapes: Shapes, dtype: torch.dtype) -> None:
        matrices = [len(shape) >= 2 for shape in shapes]
        self.numels = torch.tensor([torch.Size(shape).numel() for shape in shapes], dtype=dtype)
        self.matrices = torch.tensor(matrices, dtype=dtype)
        self.is_matrix = torch.tensor(matrices, dtype=torch.int64)
        self.rates = torch.tensor([rule.rate_of(kind) for kind in kinds])
        self.shares = torch.tensor([rule.share_of(kind) for kind in kinds])
        self.inputs = torch.tensor([math.log(max(kind.fan_in, 1) / 64) for kind in kinds], dtype=dtype)
        self.outputs = torch.tensor([math.log(max(kind.fan_out, 1) / 64) for kind in kinds], dtype=dtype)
        self.depths = torch.tensor([kind.depth for kind in kinds], dtype=dtype)


@functools.lru_cache(maxsize=256)
def _places(rule: General, kinds: tuple[TensorKind, ...], shapes: Shapes, dtype: torch.dtype) -> _Places:
    return _Places(rule, kinds, shapes, dtype)
