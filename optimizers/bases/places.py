"""What the rule ``general`` makes of tensors' kinds, sizes and places in the net."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from learnedopt.core.tree import Theta
from learnedopt.optimizers.bases.frame_features import FLOOR
from learnedopt.optimizers.bases.kinds import Kind, TensorKind

_RATE_OF = {
    Kind.FIRST: 0, Kind.MIDDLE: 1, Kind.LAST: 2, Kind.HIDDEN_BIAS: 3, Kind.LAST_BIAS: 4, Kind.GAIN: 5,
    Kind.EMBEDDING: 6,
}  # fmt: skip
_SHARE_OF = {Kind.FIRST: 0, Kind.MIDDLE: 1, Kind.LAST: 2, Kind.EMBEDDING: 3}


@final
class Places:
    """A number for every tensor of what the rule reads of it, (tensors,).

    Args:
        kinds: of the tensors.
        ranks: their numbers of dimensions.
        dtype: of the numbers.
        device: where they are wanted.
    """

    def __init__(
        self, kinds: Sequence[TensorKind], ranks: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        def numbers(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        def index(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device)

        self.matrices: Tensor = numbers([float(rank >= 2) for rank in ranks])
        self._entries = index([0 if rank >= 2 else 1 for rank in ranks])
        self._rates = index([_RATE_OF[kind.kind] for kind in kinds])
        self._shares = index([_SHARE_OF.get(kind.kind, 0) for kind in kinds])  # vectors do not read theirs
        self._inputs = numbers([math.log(max(kind.fan_in, 1) / 64) for kind in kinds])
        self._outputs = numbers([math.log(max(kind.fan_out, 1) / 64) for kind in kinds])
        self._depths = numbers([kind.depth - 0.5 for kind in kinds])

    def log_steps(self, theta: Theta, mean_squares: Tensor) -> Tensor:
        """Return what belongs to each tensor of its step's logarithm, (..., tensors).

        ``mean_squares`` (..., tensors) are those of its entries; theta may have as many dimensions in front.
        """
        size = 0.5 * (mean_squares + FLOOR * FLOOR).log() + 2.5
        return self.log_rates(theta) + self.entries(theta) * size

    def log_rates(self, theta: Theta) -> Tensor:
        """Return what does not depend on the entries of it."""
        place = theta["fan"].unsqueeze(-1) * self._inputs + theta["depth"].unsqueeze(-1) * self._depths
        return theta["kind_rate"][..., self._rates] + self.matrices * place

    def entries(self, theta: Theta) -> Tensor:
        """Return what the logarithm of the entries' size is weighted by."""
        return theta["entries"][..., self._entries]

    def shares(self, theta: Theta) -> tuple[Tensor, Tensor]:
        """Return the share of the orthogonalised direction, 0 of vectors, and its size, (..., tensors) both."""
        size = theta["size"].unsqueeze(-2)
        size = size[..., 0] + size[..., 1] * self._inputs + size[..., 2] * self._outputs
        return theta["share"][..., self._shares].sigmoid() * self.matrices, size.exp()
