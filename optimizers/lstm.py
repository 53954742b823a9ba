"""The coordinatewise LSTM optimizer of Andrychowicz et al. (2016)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnedopt.rule import UpdateRule
from learnedopt.tree import Params, Theta

State = dict[str, Tensor]


@final
@dataclass(frozen=True)
class LSTM(UpdateRule):
    """An LSTM that sees one coordinate's gradient and returns that coordinate's update.

    Weights are shared by all coordinates; each coordinate has hidden states of its own. Per step and coordinate,

        u, h = m(preprocess(g), h),    delta = output_scale * u

    (section 2.1 of the paper). Different weights for different tensors are the ``partition`` rule's business.

    Args:
        hidden_size: units a layer.
        num_layers: stacked layers.
        preprocess_factor: p of the paper's appendix A: ``(log|g| / p, sign g)`` where ``|g| >= exp(-p)``, else
            ``(-1, exp(p) g)``. The paper uses 10, its public code 5. None feeds the gradient as it is.
        output_scale: factor on the read-out. A well-known reproduction uses 0.1, the paper's public code 0.01.

    Theta: ``lstm<i>/weight`` (4 hidden_size, inputs + hidden_size) with gates in the order input, forget, output,
    candidate, ``lstm<i>/bias`` (4 hidden_size,), ``readout/weight`` (1, hidden_size), ``readout/bias`` (1,).
    State: ``h<i>`` and ``c<i>``, each (hidden_size, num_coordinates).
    """

    hidden_size: int = 20
    num_layers: int = 2
    preprocess_factor: float | None = 10.0
    output_scale: float = 0.1

    coordinatewise = True

    def __post_init__(self) -> None:
        if self.hidden_size < 1 or self.num_layers < 1:
            raise ValueError(f"hidden_size={self.hidden_size} and num_layers={self.num_layers} must be at least 1")
        if not (self.preprocess_factor is None or self.preprocess_factor > 0) or not self.output_scale > 0:
            raise ValueError(
                f"preprocess_factor={self.preprocess_factor} and output_scale={self.output_scale} must be positive"
            )

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Draw every entry from U(-1/sqrt(hidden_size), 1/sqrt(hidden_size))."""
        bound = 1 / math.sqrt(self.hidden_size)

        def uniform(*shape: int) -> Tensor:
            return (2 * torch.rand(shape, generator=generator) - 1) * bound

        theta = {}
        for layer in range(1, self.num_layers + 1):
            inputs = self.hidden_size if layer > 1 else 1 if self.preprocess_factor is None else 2
            theta[f"lstm{layer}/weight"] = uniform(4 * self.hidden_size, inputs + self.hidden_size)
            theta[f"lstm{layer}/bias"] = uniform(4 * self.hidden_size)
        return {**theta, "readout/weight": uniform(1, self.hidden_size), "readout/bias": uniform(1)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start where the parameters are, with zero states in theta's dtype."""
        num_coordinates = sum(p.numel() for p in params.values())
        weight, device = theta["readout/weight"], next(iter(params.values())).device
        names = [f"{kind}{layer}" for layer in range(1, self.num_layers + 1) for kind in "hc"]
        zeros = torch.zeros(self.hidden_size, num_coordinates, dtype=weight.dtype, device=device)
        return params, {name: zeros.clone() for name in names}

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Apply the network to all coordinates at once."""
        flat = torch.cat([g.reshape(-1) for g in grads.values()]).to(theta["readout/weight"].dtype)
        signal = flat.unsqueeze(0) if self.preprocess_factor is None else preprocess(flat, self.preprocess_factor)
        new_state = {}
        for layer in range(1, self.num_layers + 1):
            h, c = _cell(
                theta[f"lstm{layer}/weight"], theta[f"lstm{layer}/bias"], signal, state[f"h{layer}"], state[f"c{layer}"]
            )
            new_state[f"h{layer}"], new_state[f"c{layer}"] = h, c
            signal = h
        out = torch.addmm(theta["readout/bias"][:, None], theta["readout/weight"], signal).squeeze(0)
        pieces = (self.output_scale * out).split([g.numel() for g in grads.values()])
        deltas = {k: piece.reshape(g.shape).to(g.dtype) for (k, g), piece in zip(grads.items(), pieces, strict=True)}
        return deltas, new_state


def preprocess(grads: Tensor, factor: float) -> Tensor:
    """Return the two inputs (2, num_coordinates) for gradients (num_coordinates,): scale and direction, both O(1)."""
    magnitude = grads.abs()
    large = magnitude >= math.exp(-factor)
    # The logarithm's derivative is infinite at 0, so it only ever sees magnitudes that it is used for.
    log = torch.where(large, magnitude, 1.0).log() / factor
    first = torch.where(large, log, -1.0)
    second = torch.where(large, grads.sign(), math.exp(factor) * grads)
    return torch.stack([first, second])


def _cell(weight: Tensor, bias: Tensor, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM cell (Hochreiter and Schmidhuber 1997, with forget gate) on (features, num_coordinates).

    Coordinates are the last dimension, so that each gate is a contiguous block of rows.
    """
    gates = torch.addmm(bias[:, None], weight, torch.cat([x, h]))
    i, f, o = gates[: 3 * h.shape[0]].sigmoid().chunk(3)
    c = f * c + i * gates[3 * h.shape[0] :].tanh()
    return o * c.tanh(), c
