"""The coordinatewise LSTM optimizer of Andrychowicz et al. (2016)."""

# The compiled step at the end is the rule's other half.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnedopt.core.rule import Kernel, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases import cells
from learnedopt.optimizers.bases.precision import wide_dtype
from learnedopt.optimizers.kernels import lstm_kernel

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
            return (2 * torch.rand(shape, generator=generator, device=generator.device) - 1) * bound

        theta = {}
        for layer in range(1, self.num_layers + 1):
            inputs = self.hidden_size if layer > 1 else 1 if self.preprocess_factor is None else 2
            theta[f"lstm{layer}/weight"] = uniform(4 * self.hidden_size, inputs + self.hidden_size)
            theta[f"lstm{layer}/bias"] = uniform(4 * self.hidden_size)
        return {**theta, "readout/weight": uniform(1, self.hidden_size), "readout/bias": uniform(1)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start where the parameters are, with zero states in the dtype that theta is computed in."""
        num_coordinates = sum(p.numel() for p in params.values())
        dtype, device = wide_dtype(theta["readout/weight"]), next(iter(params.values())).device
        zeros = torch.zeros(self.hidden_size, num_coordinates, dtype=dtype, device=device)
        return params, {name: zeros.clone() for name in self._state_names}

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Apply the network to all coordinates at once."""
        flat = torch.cat([g.reshape(-1) for g in grads.values()]).to(wide_dtype(theta["readout/weight"]))
        out, new_state = self._network(theta, self._inputs(flat), state)
        return self._deltas(out, grads), new_state

    @property
    def kernel(self) -> Compiled:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """The compiled step and its adjoint."""
        return Compiled(self)

    @property
    def _theta_names(self) -> list[str]:
        layers = range(1, self.num_layers + 1)
        return [*(f"lstm{i}/{kind}" for i in layers for kind in ("weight", "bias")), "readout/weight", "readout/bias"]

    @property
    def _state_names(self) -> list[str]:
        return [f"{kind}{i}" for i in range(1, self.num_layers + 1) for kind in "hc"]

    def _side_by_side(self, state: State, dtype: torch.dtype) -> list[Tensor]:
        """Return batched states as (hidden_size, num_tasks * num_coordinates): coordinates do not interact."""
        return [state[k].to(dtype).movedim(1, 0).reshape(self.hidden_size, -1) for k in self._state_names]

    def _inputs(self, flat: Tensor) -> Tensor:
        """Return (..., inputs, num_coordinates) for gradients (..., num_coordinates)."""
        return flat.unsqueeze(-2) if self.preprocess_factor is None else preprocess(flat, self.preprocess_factor)

    def _network(self, theta: Theta, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the read-out (num_coordinates,) and the new state."""
        theta, state = ({k: v.to(inputs.dtype) for k, v in tensors.items()} for tensors in (theta, state))
        if lstm_kernel.computed_dtype(inputs, theta, state) is not None:
            states = [state[k] for k in self._state_names]
            out, new = lstm_kernel.step([theta[k] for k in self._theta_names], inputs, states)
            return out, dict(zip(self._state_names, new, strict=True))
        new_state: dict[str, Tensor] = {}
        signal = inputs
        for layer in range(1, self.num_layers + 1):
            h, c = cells.lstm(
                theta[f"lstm{layer}/weight"], theta[f"lstm{layer}/bias"], signal, state[f"h{layer}"], state[f"c{layer}"]
            )
            new_state[f"h{layer}"], new_state[f"c{layer}"] = h, c
            signal = h
        return torch.addmm(theta["readout/bias"][:, None], theta["readout/weight"], signal).squeeze(0), new_state

    def _deltas(self, out: Tensor, grads: Params) -> Params:
        pieces = torch.split(self.output_scale * out, [g.numel() for g in grads.values()])
        return {k: piece.reshape(g.shape).to(g.dtype) for (k, g), piece in zip(grads.items(), pieces, strict=True)}


@final
@dataclass(frozen=True)
class Compiled(Kernel):
    """The LSTM's step in place and its adjoint, where there are compiled ones; its ``update`` uses them by itself."""

    rule: LSTM

    def update_in_place(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> Params | None:
        """Write the new state over the old, to the same bits; None where no compiled step serves."""
        rule = self.rule
        flat = torch.cat([g.reshape(-1) for g in grads.values()]).to(wide_dtype(theta["readout/weight"]))
        if lstm_kernel.computed_dtype(flat, theta, state) != flat.dtype:
            return None
        if any(h.dtype != flat.dtype or not h.is_contiguous() for h in state.values()):
            return None
        weights, states = [theta[k].to(flat.dtype) for k in rule._theta_names], [state[k] for k in rule._state_names]
        factor = rule.preprocess_factor
        inputs = flat.unsqueeze(0) if factor is None else preprocess_without_graph(flat, factor)
        out = lstm_kernel.step_in_place(weights, inputs, states)
        pieces = torch.split(out.mul_(rule.output_scale), [g.numel() for g in grads.values()])
        return {k: piece.view(g.shape).to(g.dtype) for (k, g), piece in zip(grads.items(), pieces, strict=True)}

    def adjoint(
        self, theta: Theta, grads: Tensor, state: State, cotangents: Tensor, end: State | None, with_state: bool = True
    ) -> tuple[Theta, State | None] | None:
        """Back-propagate through a window of steps, a block of coordinates at a time."""
        rule = self.rule
        dtype = lstm_kernel.computed_dtype(grads.to(wide_dtype(theta["readout/weight"])), theta, state, end or {})
        if dtype is None:
            return None
        num_steps, num_tasks, num_coordinates = grads.shape
        x = rule._inputs(grads.to(dtype).reshape(num_steps, -1))
        d_out = rule.output_scale * cotangents.to(dtype).reshape(num_steps, -1)
        weights, states = [theta[k].to(dtype) for k in rule._theta_names], rule._side_by_side(state, dtype)
        d_end = None if end is None else rule._side_by_side(end, dtype)
        d_theta, d_states, _ = lstm_kernel.adjoint(weights, x, states, d_out, d_end, with_states=with_state)
        of_theta = {k: d.to(theta[k].dtype) for k, d in zip(rule._theta_names, d_theta, strict=True)}
        if d_states is None:
            return of_theta, None
        d_states = [torch.unflatten(d, 1, (num_tasks, num_coordinates)).movedim(1, 0) for d in d_states]
        return of_theta, {k: d.to(state[k].dtype) for k, d in zip(rule._state_names, d_states, strict=True)}


def preprocess(grads: Tensor, factor: float) -> Tensor:
    """Return the two inputs (..., 2, num_coordinates) for gradients (..., num_coordinates): scale and direction."""
    # Below exp(-factor) the first is -1 and the second follows the gradient; above, the second is its sign. Clamping
    # keeps the logarithm, whose derivative is infinite at 0, away from there.
    first = grads.abs().clamp(min=math.exp(-factor)).log() / factor
    second = (math.exp(factor) * grads).clamp(-1.0, 1.0)
    return torch.stack([first, second], dim=-2)


@torch.no_grad()
def preprocess_without_graph(grads: Tensor, factor: float) -> Tensor:
    """Return the same bits as ``preprocess`` for gradients (num_coordinates,), with no memory but what is returned."""
    inputs = grads.new_empty(2, grads.numel())
    torch.abs(grads, out=inputs[0]).clamp_(min=math.exp(-factor)).log_().div_(factor)
    torch.mul(grads, math.exp(factor), out=inputs[1]).clamp_(-1.0, 1.0)
    return inputs
