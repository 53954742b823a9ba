"""RNNprop: a coordinatewise LSTM that sees Adam's and RMSprop's directions (Lv, Jiang and Li 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnedopt.core.counts import require_count
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases import cells
from learnedopt.optimizers.bases.hand_designed import DECAY_RATE, check_number, sqrt
from learnedopt.optimizers.bases.precision import wide_dtype

State = dict[str, Tensor]


@final
@dataclass(frozen=True)
class RNNprop(UpdateRule):
    """An LSTM that sees one coordinate's normalised gradients and returns where that coordinate goes.

    Lv, Jiang and Li (2017, arXiv:1703.03633), section 4. Weights are shared by all coordinates; each coordinate has
    averages and hidden states of its own. Per step and coordinate, t the updates taken with this one,

        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
        n = 1 / (sqrt(v / (1 - beta2^t)) + eps),    z = (n m / (1 - beta1^t), n g)
        h <- LSTM(ELU(W z + w), h),    delta = step_scale * tanh(R (h, z) + r)

    so that neither the gradient's scale nor any network moves a coordinate by more than ``step_scale``; with equal
    decays the first input is at most 1 in size, the second at most 1 / sqrt(1 - beta2). The paper reads the LSTM alone.
    Here the read-out sees z as well, and starts at zero for all but the first entry of that, which is -1: untrained,
    the rule is Adam with a step of ``step_scale * tanh(n m / (1 - beta1^t))``; the paper's is among those that it can
    become. A coordinate that never had a gradient has zero inputs, and goes where the biases say.

    Args:
        hidden_size: units a layer, and of the projection.
        num_layers: stacked layers.
        step_scale: alpha of the paper, 0.1 there.
        beta1: decay of the average of gradients; 0.95 in the paper.
        beta2: decay of the average of squared gradients; likewise.
        eps: added to the root for stability.

    Theta: ``input/weight`` (hidden_size, 2), ``input/bias`` (hidden_size,); ``lstm<i>/weight`` (4 hidden_size,
    2 hidden_size) with gates in the order input, forget, output, candidate, ``lstm<i>/bias`` (4 hidden_size,);
    ``readout/weight`` (1, hidden_size + 2), ``readout/bias`` (1,).
    State: ``mean`` and ``square`` (num_coordinates,); ``h<i>`` and ``c<i>``, each (hidden_size, num_coordinates);
    ``step``, a scalar.

    Raises:
        TypeError: an option is no number.
        ValueError: an option is out of its range.
    """

    hidden_size: int = 20
    num_layers: int = 2
    step_scale: float = 0.1
    beta1: float = 0.95
    beta2: float = 0.95
    eps: float = 1e-8

    coordinatewise = True

    def __post_init__(self) -> None:
        owner, tiny = type(self).__name__, math.ulp(0.0)
        require_count(f"{owner}: hidden_size", self.hidden_size, least=1)
        require_count(f"{owner}: num_layers", self.num_layers, least=1)
        check_number(owner, "step_scale", self.step_scale, tiny, math.inf)
        check_number(owner, "beta1", self.beta1, *DECAY_RATE)
        check_number(owner, "beta2", self.beta2, *DECAY_RATE)
        check_number(owner, "eps", self.eps, tiny, math.inf)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Draw from U(-1/sqrt(n), 1/sqrt(n)), n 2 for the projection and hidden_size for the LSTM, but the read-out."""
        size, device = self.hidden_size, generator.device

        def uniform(inputs: int, *shape: int) -> Tensor:
            return (2 * torch.rand(shape, generator=generator, device=device) - 1) / math.sqrt(inputs)

        theta = {"input/weight": uniform(2, size, 2), "input/bias": uniform(2, size)}
        for layer in range(1, self.num_layers + 1):
            theta[f"lstm{layer}/weight"] = uniform(size, 4 * size, 2 * size)
            theta[f"lstm{layer}/bias"] = uniform(size, 4 * size)
        readout = torch.zeros(1, size + 2, device=device)
        readout[:, size] = -1.0
        return {**theta, "readout/weight": readout, "readout/bias": torch.zeros(1, device=device)}

    def theta_scale(self) -> dict[str, float | Tensor]:
        """Return the bounds that the weights are drawn from; the read-out moves as the LSTM's."""
        bound = 1 / math.sqrt(self.hidden_size)
        layers = {f"lstm{i}/{kind}": bound for i in range(1, self.num_layers + 1) for kind in ("weight", "bias")}
        inputs = dict.fromkeys(("input/weight", "input/bias"), 1 / math.sqrt(2))
        return {**inputs, **layers, "readout/weight": bound, "readout/bias": bound}

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start where the parameters are, with zero averages and states in the dtype that theta is computed in."""
        dtype, device = wide_dtype(theta["readout/weight"]), next(iter(params.values())).device
        num_coordinates = sum(p.numel() for p in params.values())

        def none(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        layers = range(1, self.num_layers + 1)
        hidden = {f"{kind}{i}": none(self.hidden_size, num_coordinates) for i in layers for kind in "hc"}
        return params, {"mean": none(num_coordinates), "square": none(num_coordinates), **hidden, "step": none()}

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Feed all coordinates through the network at once."""
        dtype = wide_dtype(theta["readout/weight"])
        theta = {name: value.to(dtype) for name, value in theta.items()}
        grad = torch.cat([g.reshape(-1) for g in grads.values()]).to(dtype)
        mean = self.beta1 * state["mean"] + (1 - self.beta1) * grad
        square = self.beta2 * state["square"] + (1 - self.beta2) * grad.square()
        step = state["step"] + 1
        root = sqrt(square / (1 - self.beta2**step)) + self.eps
        inputs = torch.stack([mean / (1 - self.beta1**step) / root, grad / root])
        new = {"mean": mean, "square": square}
        signal = torch.addmm(theta["input/bias"][:, None], theta["input/weight"], inputs)
        signal = torch.nn.functional.elu(signal)
        for i in range(1, self.num_layers + 1):
            weights = theta[f"lstm{i}/weight"], theta[f"lstm{i}/bias"]
            signal, new[f"c{i}"] = cells.lstm(*weights, signal, state[f"h{i}"], state[f"c{i}"])
            new[f"h{i}"] = signal
        seen = torch.cat([signal, inputs])
        out = torch.addmm(theta["readout/bias"][:, None], theta["readout/weight"], seen).squeeze(0)
        pieces = torch.split(self.step_scale * out.tanh(), [g.numel() for g in grads.values()])
        deltas = {k: d.reshape(g.shape).to(g.dtype) for (k, g), d in zip(grads.items(), pieces, strict=True)}
        return deltas, {**{name: new[name] for name in state if name != "step"}, "step": step}
