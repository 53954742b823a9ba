"""A rule of 24 numbers whose steps are normalised: the frame in which long meta-gradients behave."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases import frame
from learnedopt.optimizers.bases.frame import Memory
from learnedopt.optimizers.bases.hand_designed import check_number
from learnedopt.optimizers.bases.normalised_frame import init_theta, step, theta_scale
from learnedopt.optimizers.kernels.normalised_kernel import NormalisedKernel


@final
@dataclass(frozen=True)
class Normalised(UpdateRule):
    """Momenta over learned roots of second moments, on a learned schedule of the horizon, with an averaged iterate.

    Per step and tensor, with gradient g at y, progress p, averages m1, m2 of g and v of g² corrected for their start::

        bracket = (mix0 g + mix1 m1 + mix2 m2) / D + e^weight_decay z
        D       = v^(norm0 / 2) (row col / mean v)^(norm1 / 2) (mean v)^(norm2 / 2),    row, col: means of v
        z      <- z - exp(log_rate + schedule(p) + kind_rate) bracket
        x      <- x + (1 + r) / (n + r) (z - x),    y = z + b (x - z),    r = e^averaging0 - 1,  b = sigmoid(averaging1)

    ``schedule`` is linear between values at p = 0, .04, .12, .3, .6, .85 and 1; ``kind_rate`` is by kind of tensor:
    first matrix (embeddings, too), hidden biases and gains, later matrices (the only one, too), the last bias. Of a
    tensor that is no matrix the middle factor of D is v, too.

    Args:
        lr: where ``exp(log_rate)`` starts.

    Theta: ``log_rate`` (), ``schedule`` (7,), ``kind_rate`` (4,), ``decay`` (3,), logits of how much m1, m2 and v keep,
    ``mix`` (3,), ``norm`` (3,), ``weight_decay`` (), a logarithm, ``averaging`` (2,). It starts as an Adam with a
    warm-up, a decay and averaged iterates. State: ``Memory``.

    Raises:
        TypeError, ValueError: ``lr`` is not a positive number.

    Example:
        >>> rule = Normalised()
        >>> sum(value.numel() for value in rule.init_theta(torch.Generator()).values())
        24
    """

    lr: float = 0.02

    reads_horizon = True

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "lr", self.lr, 1e-12, math.inf)

    @property
    def kernel(self) -> NormalisedKernel:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """The compiled step."""
        return NormalisedKernel()

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the hand-designed start."""
        return init_theta(self.lr, generator.device)

    def theta_scale(self) -> dict[str, float | Tensor]:
        """Return how far each kind of number moves in a step of size one."""
        return theta_scale()

    def init(self, theta: Theta, params: Params) -> tuple[Params, Memory]:
        """Start where the parameters are."""
        return params, frame.start(params)

    def update(  # pyright: ignore[reportIncompatibleMethodOverride] - as rules that read the horizon have it
        self, theta: Theta, grads: Params, state: Memory, params: Params, loss: Tensor, *, progress: Tensor
    ) -> tuple[Params, Memory]:
        """Move by the bracket alone."""
        return step(frame.in_dtype(theta, params), grads, state, params, progress)
