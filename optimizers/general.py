"""One rule, untuned, for nets it never saw: relative steps by kind and place of tensors, orthogonalised matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from learnedopt.core.modes import taking_tangents
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases import frame
from learnedopt.optimizers.bases.frame import TINY, Decays, Memory, Moments
from learnedopt.optimizers.bases.joined import ALL, Layout
from learnedopt.optimizers.bases.kinds import kinds_of
from learnedopt.optimizers.bases.newton_schulz import fast_dtype, orthogonalised_all
from learnedopt.optimizers.bases.places import Places
from learnedopt.optimizers.bases.precision import wide_dtype
from learnedopt.optimizers.kernels.general_kernel import GeneralKernel


class GeneralMemory(NamedTuple):
    """What the rule keeps of a task."""

    frame: Memory
    length: Tensor
    """The logarithm of the run's number of steps over 150, a scalar."""


@final
@dataclass(frozen=True)
class General(UpdateRule):
    """Momenta over learned powers of second moments, and orthogonalised, with steps that fit a tensor's kind and place.

    Per step and tensor, with gradient g at y, progress p of T steps, averages m1, m2 of g and v of g², corrected::

        u    = (mix0 g + mix1 m1 + mix2 m2) (v + mean(v) e^eps)^(-a / 2) mean(v)^(-(1 - a) / 2),    a = power
        u   <- u + s (e^q orthogonalised(e0 g + e1 m1 + e2 m2) - u)                                  for matrices
               s = sigmoid(share) by kind,    q = size0 + size1 ln(fan_in / 64) + size2 ln(fan_out / 64)
        step = exp(log_rate + schedule(p) + kind_rate + fan ln(fan_in / 64) + depth (d - 1/2)        (both: matrices)
                   + entries (ln RMS(z) + 2.5) + length0 ln(T / 150))
        z   <- z - step (u + e^weight_decay z)                                              (the decay: of matrices)
        x   <- x + (1 + r) / (n + r) (z - x),    y = z + b (x - z),    r = e^averaging0 - 1,  b = sigmoid(averaging1)

    m2 and v keep sigmoid(decay + length1 ln(T / 150)) in a step, m1 sigmoid(decay). d is a matrix's place in the net, 0
    for the first and 1 for the last. Four Newton-Schulz steps orthogonalise (Jordan et al. 2024, Muon), to a root mean
    square of 1; convolutions are matrices (out, in · height · width), embeddings are, too. ``entries`` is one number
    for matrices and one for the rest.

    Args:
        orthogonalise: whether matrices are; without it, s is 0 and the three numbers of it are not in theta.
        bfloat16: whether they are in products of bfloat16, where the device has instructions for them and no derivative
            is recorded or taken. A step of large matrices takes a fraction of the time, and is off by a few percent.

    Theta, 42 numbers: ``log_rate`` (), ``schedule`` (7,), ``kind_rate`` (7,): first, middle and last matrix, hidden
    bias, last bias, gain, embedding; ``fan`` (), ``depth`` (), ``entries`` (2,), ``length`` (2,), ``decay`` (3,),
    ``power`` (), ``eps`` (), ``mix`` (3,), ``weight_decay`` (), ``averaging`` (2,); ``share`` (4,): first, middle and
    last matrix, embedding; ``orthogonal_mix`` (3,), ``size`` (3,). State: ``GeneralMemory``.

    Raises:
        TypeError: an option is neither True nor False.
    """

    orthogonalise: bool = True
    bfloat16: bool = False

    reads_horizon = True

    def __post_init__(self) -> None:
        for name in ("orthogonalise", "bfloat16"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} is neither True nor False")

    @property
    def kernel(self) -> GeneralKernel:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """The compiled step."""
        return GeneralKernel(self)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the start by hand: an Adam with a warm-up, a decay, averaged iterates, and a little of Muon."""
        theta = {name: torch.tensor(value, device=generator.device) for name, value in _START.items()}
        return theta if self.orthogonalise else {k: v for k, v in theta.items() if k not in _ORTHOGONAL}

    def theta_scale(self) -> dict[str, float | Tensor]:
        """Return how far each kind of number moves in a step of size one."""
        scale: dict[str, float | Tensor] = {name: torch.tensor(value) for name, value in _SCALE.items()}
        return scale if self.orthogonalise else {k: v for k, v in scale.items() if k not in _ORTHOGONAL}

    def init(self, theta: Theta, params: Params) -> tuple[Params, GeneralMemory]:
        """Start where the parameters are, for 150 steps."""
        first = next(iter(params.values()))
        return params, GeneralMemory(frame.start(params), first.new_zeros((), dtype=wide_dtype(first)))

    def init_for(self, theta: Theta, params: Params, horizon: Tensor) -> tuple[Params, GeneralMemory]:
        """Start where the parameters are, for a run of ``horizon`` steps."""
        return params, GeneralMemory(frame.start(params), (horizon / 150).log().to(wide_dtype(horizon)))

    def update(  # pyright: ignore[reportIncompatibleMethodOverride] - as rules that read the horizon have it
        self, theta: Theta, grads: Params, state: GeneralMemory, params: Params, loss: Tensor, *, progress: Tensor
    ) -> tuple[Params, GeneralMemory]:
        """Move every tensor by its step."""
        theta, kinds, layout = frame.in_dtype(theta, params), kinds_of(params), Layout(params)
        longer = theta["length"][1] * state.length
        decays = Decays(theta["decay"][0], theta["decay"][1] + longer, theta["decay"][2] + longer)
        tensors, memory = frame.moments(layout.join(grads), layout.join_memory(state.frame), decays)
        blend, power = theta["averaging"][1].sigmoid(), theta["averaging"][0].exp() - 1
        joined, moments = layout.join(params), tensors[ALL]
        at = frame.iterates(joined, memory, blend)[ALL]
        rate = theta["log_rate"] + frame.schedule(theta["schedule"], progress) + theta["length"][0] * state.length
        ranks = [params[name].ndim for name in kinds]
        places = Places([*kinds.values()], ranks, at.dtype, at.device)
        steps = (rate + places.log_steps(theta, layout.means(at * at))).exp()
        decayed = steps * places.matrices * theta["weight_decay"].exp()
        share, size = places.shares(theta) if self.orthogonalise else (torch.zeros_like(steps), steps)
        each = torch.stack([layout.means(moments.square), decayed, steps * (1 - share), steps * share * size])
        mean, decayed, plain, turned = layout.spread(each).unbind()
        z = at - decayed * at - plain * _normalised(theta, moments, mean)
        if self.orthogonalise and any(p.ndim >= 2 for p in params.values()):
            z = z - turned * self._turned(theta, moments, params, layout)
        deltas, memory = frame.looked_at(joined, {ALL: z}, memory, blend, power)
        return layout.split(deltas, params), state._replace(frame=layout.split_memory(memory, state.frame))

    def _turned(self, theta: Theta, moments: Moments, params: Params, layout: Layout) -> Tensor:
        """Return the orthogonalised directions of matrices, and zeros of vectors, (coordinates,)."""
        mixed = layout.pieces(frame.mixture(theta["orthogonal_mix"], moments))
        matrices = {name: x for name, x in mixed.items() if params[name].ndim >= 2}
        found = orthogonalised_all(matrices, dtype=self.products(moments.grad))
        turned = {name: found[name] if name in found else torch.zeros_like(x) for name, x in mixed.items()}
        return layout.join(turned)[ALL]

    def products(self, like: Tensor) -> torch.dtype | None:
        """Return the dtype of Newton-Schulz's products on a tensor's device; None for the tensor's own."""
        exact = not self.bfloat16 or torch.is_grad_enabled() or taking_tangents()
        return None if exact else fast_dtype(like.device)


def _normalised(theta: Theta, moments: Moments, mean: Tensor) -> Tensor:
    power, mean = theta["power"], mean + TINY
    square = moments.square + mean * theta["eps"].exp()
    scale = (-0.5 * (power * square.log() + (1 - power) * mean.log())).exp()
    return frame.mixture(theta["mix"], moments) * scale


_ORTHOGONAL = ("share", "orthogonal_mix", "size")
_START: dict[str, float | list[float]] = {
    "log_rate": -3.9,
    "schedule": [-0.62, 0.38, 0.28, 0.3, -0.04, -1.06, -1.56],
    "kind_rate": [0.0, 0.0, 0.0, -0.3, -0.3, -0.3, 0.0],
    "fan": 0.0,
    "depth": 0.0,
    "entries": [0.3, 0.0],
    "length": [-0.2, 0.3],
    "decay": [1.6, 2.75, 2.5],
    "power": 1.0,
    "eps": -7.0,
    "mix": [0.25, 0.75, 0.0],
    "weight_decay": -8.0,
    "averaging": [0.0, -0.55],
    "share": [-3.0, -2.0, -3.0, -3.0],
    "orthogonal_mix": [0.25, 0.75, 0.0],
    "size": [0.0, 0.0, 0.0],
}
_SCALE: dict[str, float | list[float]] = {
    "log_rate": 0.2,
    "schedule": 0.25,
    "kind_rate": 0.25,
    "fan": 0.15,
    "depth": 0.2,
    "entries": 0.15,
    "length": [0.15, 0.2],
    "decay": 0.4,
    "power": 0.15,
    "eps": 0.5,
    "mix": 0.15,
    "weight_decay": 0.7,
    "averaging": [0.4, 0.5],
    "share": 0.5,
    "orthogonal_mix": 0.15,
    "size": [0.2, 0.15, 0.15],
}
