"""The normalised rule with a small LSTM for every coordinate: 886 numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from learnedopt.core.counts import require_count
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases import frame, frame_features, normalised_frame
from learnedopt.optimizers.bases.frame import Memory, Moments
from learnedopt.optimizers.bases.frame_features import NUM_CLOCKS, NUM_ROWS
from learnedopt.optimizers.bases.hand_designed import check_number
from learnedopt.optimizers.bases.joined import Layout
from learnedopt.optimizers.bases.precision import dtype_of
from learnedopt.optimizers.kernels.normalised_kernel import NormalisedKernel
from learnedopt.optimizers.kernels.normalised_native import LSTM


class LSTMMemory(NamedTuple):
    """What the rule keeps of a task."""

    frame: Memory
    hidden: Tensor
    """(units, coordinates of all tensors), in their order."""
    cell: Tensor
    """The same of the cells."""


@final
@dataclass(frozen=True)
class NormalisedLSTM(UpdateRule):
    """``Normalised`` with ``d e^s`` in every coordinate's bracket, where ``(d, s)`` is read off a coordinatewise LSTM.

    The coordinatewise LSTM of Andrychowicz et al. (2016), one layer of it, in the frame that keeps its meta-gradients
    small: it sees the features of ``optimizers.bases.frame_features`` in place of one raw gradient. The read-out starts
    at 0, so that the rule starts as ``Normalised``. A coordinate that never had a gradient gets nothing from it.

    Args:
        lr: where ``exp(log_rate)`` starts.
        units: of the LSTM.

    Theta: that of ``Normalised``; ``input/weight`` (4 units, 10), ``recurrent/weight`` (4 units, units), ``bias``
    (4 units,), gates in the order input, forget, candidate, output; ``output/weight`` (2, units), ``output/bias`` (2,).
    State: ``LSTMMemory``.

    Raises:
        TypeError, ValueError: ``lr`` is not a positive number, or ``units`` no positive integer.
    """

    lr: float = 0.02
    units: int = 10

    reads_horizon = True

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "lr", self.lr, 1e-12, math.inf)
        require_count("units", self.units, least=1)

    @property
    def kernel(self) -> NormalisedKernel:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """The compiled step."""
        return NormalisedKernel(LSTM, self.units)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the hand-designed start, and draw the LSTM from normal distributions, with its gates half open."""
        device, inputs, units = generator.device, NUM_ROWS + NUM_CLOCKS, self.units

        def normal(std: float, *shape: int) -> Tensor:
            return std * torch.randn(*shape, generator=generator, device=device)

        bias = normal(0.3, 4 * units)
        bias[units : 2 * units] += 1.0  # memories last from the start
        return {
            **normalised_frame.init_theta(self.lr, device),
            "input/weight": normal(1.5 / math.sqrt(inputs), 4 * units, inputs),
            "recurrent/weight": normal(0.7 / math.sqrt(units), 4 * units, units),
            "bias": bias,
            "output/weight": torch.zeros(2, units, device=device),
            "output/bias": torch.zeros(2, device=device),
        }

    def theta_scale(self) -> dict[str, float | Tensor]:
        """Return how far each kind of number moves in a step of size one."""
        network = {"input/weight": 0.15, "recurrent/weight": 0.1, "bias": 0.1, "output/weight": 0.06}
        halved = {name: 0.5 * scale for name, scale in normalised_frame.theta_scale().items()}
        return {**halved, **network, "output/bias": 0.06}

    def init(self, theta: Theta, params: Params) -> tuple[Params, LSTMMemory]:
        """Start where the parameters are, with a state of zeros."""
        first, size = next(iter(params.values())), sum(p.numel() for p in params.values())
        nothing = torch.zeros(self.units, size, dtype=dtype_of(params), device=first.device)
        return params, LSTMMemory(frame.start(params), nothing, nothing.clone())

    def update(  # pyright: ignore[reportIncompatibleMethodOverride] - as rules that read the horizon have it
        self, theta: Theta, grads: Params, state: LSTMMemory, params: Params, loss: Tensor, *, progress: Tensor
    ) -> tuple[Params, LSTMMemory]:
        """Move by the bracket and what the LSTM adds to it."""
        theta = frame.in_dtype(theta, params)
        after: list[Tensor] = []

        def added(moments: Moments, mean: Tensor, at: Tensor, layout: Layout) -> Tensor:
            rows = frame_features.rows(moments, mean, at, layout)
            clocks = frame_features.clocks(progress, state.frame.step)
            hidden, cell = (x.to(rows.dtype) for x in (state.hidden, state.cell))  # a model may change its type midway
            after.extend(_cell(theta, rows, clocks, hidden, cell))
            read = torch.addmm(theta["output/bias"][:, None], theta["output/weight"], after[0])
            direction, size = read.unbind(0)
            return frame_features.alive(moments) * direction * size.exp()

        deltas, memory = normalised_frame.step(theta, grads, state.frame, params, progress, added)
        return deltas, LSTMMemory(memory, *after)


def _cell(theta: Theta, rows: Tensor, clocks: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next state of all coordinates' LSTM."""
    weight = theta["input/weight"]
    bias = theta["bias"] + weight[:, NUM_ROWS:] @ clocks  # the same for all coordinates
    gates = torch.addmm(bias[:, None], weight[:, :NUM_ROWS], rows)
    gates = torch.addmm(gates, theta["recurrent/weight"], hidden)
    opened, kept, candidate, shown = gates.chunk(4, dim=0)
    cell = kept.sigmoid() * cell + opened.sigmoid() * candidate.tanh()
    return shown.sigmoid() * cell.tanh(), cell
