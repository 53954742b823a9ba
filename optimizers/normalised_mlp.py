"""The normalised rule with a small network for every coordinate: 130 numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

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
from learnedopt.optimizers.kernels.normalised_kernel import NormalisedKernel
from learnedopt.optimizers.kernels.normalised_native import MLP


@final
@dataclass(frozen=True)
class NormalisedMLP(UpdateRule):
    """``Normalised`` with ``d e^s`` in every coordinate's bracket, where ``(d, s)`` is what a network says of it.

    That is::

        (d, s) = output tanh(hidden features + bias) + bias

    The features are those of ``optimizers.bases.frame_features``. The output's weights start at 0, so that the rule
    starts as ``Normalised``. A coordinate that never had a gradient gets nothing from the network.

    Args:
        lr: where ``exp(log_rate)`` starts.
        hidden: units.

    Theta: that of ``Normalised``; ``hidden/weight`` (hidden, 10), ``hidden/bias`` (hidden,), ``output/weight``
    (2, hidden), ``output/bias`` (2,). State: ``Memory``.

    Raises:
        TypeError, ValueError: ``lr`` is not a positive number, or ``hidden`` no positive integer.
    """

    lr: float = 0.02
    hidden: int = 8

    reads_horizon = True

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "lr", self.lr, 1e-12, math.inf)
        require_count("hidden", self.hidden, least=1)

    @property
    def kernel(self) -> NormalisedKernel:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """The compiled step."""
        return NormalisedKernel(MLP, self.hidden)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the hand-designed start, and draw the hidden layer from N(0, 1 / features)."""
        device, inputs = generator.device, NUM_ROWS + NUM_CLOCKS
        return {
            **normalised_frame.init_theta(self.lr, device),
            "hidden/weight": torch.randn(self.hidden, inputs, generator=generator, device=device) / math.sqrt(inputs),
            "hidden/bias": torch.zeros(self.hidden, device=device),
            "output/weight": torch.zeros(2, self.hidden, device=device),
            "output/bias": torch.zeros(2, device=device),
        }

    def theta_scale(self) -> dict[str, float | Tensor]:
        """Return how far each kind of number moves in a step of size one."""
        network = {"hidden/weight": 0.15, "hidden/bias": 0.15, "output/weight": 0.06, "output/bias": 0.06}
        # Half as far as alone: with a network in it, the frame's own numbers are what first makes long runs chaotic.
        halved = {name: 0.5 * scale for name, scale in normalised_frame.theta_scale().items()}
        return {**halved, **network}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Memory]:
        """Start where the parameters are."""
        return params, frame.start(params)

    def update(  # pyright: ignore[reportIncompatibleMethodOverride] - as rules that read the horizon have it
        self, theta: Theta, grads: Params, state: Memory, params: Params, loss: Tensor, *, progress: Tensor
    ) -> tuple[Params, Memory]:
        """Move by the bracket and what the network adds to it."""
        theta = frame.in_dtype(theta, params)

        def added(moments: Moments, mean: Tensor, at: Tensor, layout: Layout) -> Tensor:
            weight = theta["hidden/weight"]
            rows, clocks = frame_features.rows(moments, mean, at, layout), frame_features.clocks(progress, state.step)
            # The clocks are the same for all coordinates, so they are a part of the bias.
            bias = theta["hidden/bias"] + weight[:, NUM_ROWS:] @ clocks
            units = torch.addmm(bias[:, None], weight[:, :NUM_ROWS], rows).tanh()
            direction, size = torch.addmm(theta["output/bias"][:, None], theta["output/weight"], units).unbind(0)
            return frame_features.alive(moments) * direction * size.exp()

        return normalised_frame.step(theta, grads, state, params, progress, added)
