"""A small network for every coordinate, fed with normalised averages of its gradient: after Metz et al. (2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, cast, final

import torch
from torch import Tensor

from learnedopt.core.counts import require_count
from learnedopt.core.rule import Kernel, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import check_number
from learnedopt.optimizers.bases.precision import wide, wide_dtype
from learnedopt.optimizers.kernels import small_mlp_kernel

TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0, 30_000.0, 100_000.0)
"""Steps on which the network's clocks turn from -1 to 1."""
_READOUT = 0.1
"""How much smaller than the other layers the last one starts."""


class Memory(NamedTuple):
    """What the rule keeps of a task."""

    step: Tensor
    """Updates taken, a scalar."""
    averages: Params
    """Running averages of the gradient, (number of decays, *shape) each, without a correction of their start at 0."""


@final
@dataclass(frozen=True)
class SmallMLP(UpdateRule):
    """A multilayer perceptron that sees one coordinate's gradient, value and memories, and says where it goes.

    After Metz et al. (2019, arXiv:1810.10180), section on the architecture, and the form of it in their later work
    (2020, arXiv:2009.11243). Weights are shared by all coordinates. Per step, tensor x with gradient g, and decay b:

        m_b <- b m_b + (1 - b) g
        z = (g, x, m_b ...),  each over sqrt(its mean square over the tensor + eps)
        clocks = tanh(t / s - 1)  for the eleven scales s of 1, 3, 10, ..., 100,000 steps,  t the updates before this
        (direction, magnitude) = MLP(z, clocks),    delta = -step_scale * direction * exp(exp_scale * magnitude)

    with ReLU between the layers. The norms couple the coordinates of a tensor, so the rule is not coordinatewise; eps
    under the root keeps derivatives finite where a tensor has no gradient at all, and makes its features 0.

    Args:
        decays: of the averages, each in [0, 1).
        hidden: units of each hidden layer. With the defaults there are 202 weights.
        step_scale: factor on the updates; 1e-3 after the public code.
        exp_scale: factor on the magnitude; likewise.
        eps: joins the mean squares; 1e-5 after the public code.

    Theta: ``layer<i>/weight`` (units, inputs), the first layer's inputs being gradient, value, averages, clocks, and
    ``layer<i>/bias`` (units,); the last layer has two units.
    State: ``step`` and ``averages``, see ``Memory``.

    Raises:
        TypeError: an option is no number, or no tuple of them.
        ValueError: an option is out of its range.
    """

    decays: tuple[float, ...] = (0.5, 0.9, 0.99, 0.999)
    hidden: tuple[int, ...] = (10,)
    step_scale: float = 1e-3
    exp_scale: float = 1e-3
    eps: float = 1e-5

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if not (isinstance(cast("object", self.decays), tuple) and isinstance(cast("object", self.hidden), tuple)):
            raise TypeError(f"{owner}: decays={self.decays!r} and hidden={self.hidden!r} must both be tuples")
        for decay in self.decays:
            check_number(owner, "decays", decay, 0.0, 1.0)
        for width in self.hidden:
            require_count(f"{owner}: hidden", width, least=1)
        tiny = math.ulp(0.0)
        check_number(owner, "step_scale", self.step_scale, tiny, math.inf)
        check_number(owner, "exp_scale", self.exp_scale, 0.0, math.inf)
        check_number(owner, "eps", self.eps, tiny, math.inf)

    @property
    def widths(self) -> tuple[int, ...]:
        """The network's inputs, then the units of each layer."""
        return (2 + len(self.decays) + len(TIME_SCALES), *self.hidden, 2)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Draw weights from N(0, 1 / inputs), those of the last layer a tenth as large; biases start at 0.

        The first updates are then far smaller than ``step_scale``: a random network's are noise in random directions.
        """
        theta: Theta = {}
        device, last = generator.device, len(self.widths) - 2
        for i, (inputs, units) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            scale = (_READOUT if i == last else 1.0) / math.sqrt(inputs)
            theta[f"layer{i}/weight"] = scale * torch.randn(units, inputs, generator=generator, device=device)
            theta[f"layer{i}/bias"] = torch.zeros(units, device=device)
        return theta

    def init(self, theta: Theta, params: Params) -> tuple[Params, Memory]:
        """Start where the parameters are, with zero averages."""
        first, count = next(iter(params.values())), len(self.decays)
        step = torch.zeros((), dtype=wide_dtype(first), device=first.device)
        return params, Memory(step, {k: p.new_zeros((count, *p.shape), dtype=wide_dtype(p)) for k, p in params.items()})

    def update(self, theta: Theta, grads: Params, state: Memory, params: Params, loss: Tensor) -> tuple[Params, Memory]:
        """Feed all coordinates of all tensors through the network together."""
        averages: Params = {}
        features: list[Tensor] = []
        for name, grad in grads.items():
            averages[name] = self._averaged(wide(grad), state.averages[name])
            features.append(self._features(wide(grad), wide(params[name]), averages[name]))
        rows = torch.cat(features, dim=1)
        direction, magnitude = self._network(theta, rows, state.step).unbind(0)
        flat = -self.step_scale * direction * (self.exp_scale * magnitude).exp()
        pieces = torch.split(flat, [g.numel() for g in grads.values()])
        deltas = {k: d.reshape(g.shape).to(g.dtype) for (k, g), d in zip(grads.items(), pieces, strict=True)}
        return deltas, Memory(state.step + 1, averages)

    @property
    def kernel(self) -> Compiled:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """The compiled step."""
        return Compiled(self)

    def _averaged(self, grad: Tensor, averages: Tensor) -> Tensor:
        decays = torch.tensor(self.decays, dtype=grad.dtype, device=grad.device).reshape(-1, *(1,) * grad.ndim)
        return decays * averages + (1 - decays) * grad

    def _features(self, grad: Tensor, param: Tensor, averages: Tensor) -> Tensor:
        """Return the network's inputs of one tensor, (features, num_coordinates), without the clocks."""
        rows = torch.cat([grad.reshape(1, -1), param.reshape(1, -1), averages.reshape(len(self.decays), grad.numel())])
        return rows * (rows.square().mean(dim=1, keepdim=True) + self.eps).rsqrt()

    def _network(self, theta: Theta, rows: Tensor, step: Tensor) -> Tensor:
        """Return direction and magnitude, (2, num_coordinates)."""
        theta = {name: value.to(rows.dtype) for name, value in theta.items()}
        scales = torch.tensor(TIME_SCALES, dtype=rows.dtype, device=rows.device)
        weight = theta["layer0/weight"]
        # The clocks are the same for all coordinates, so they are a part of the first layer's bias.
        bias = theta["layer0/bias"] + weight[:, rows.shape[0] :] @ (step.to(rows.dtype) / scales - 1).tanh()
        signal = torch.addmm(bias[:, None], weight[:, : rows.shape[0]], rows)
        for i in range(1, len(self.widths) - 1):
            signal = torch.addmm(theta[f"layer{i}/bias"][:, None], theta[f"layer{i}/weight"], signal.relu())
        return signal


@final
@dataclass(frozen=True)
class Compiled(Kernel):
    """The step in C for tensors on a CPU, in one dtype, where no derivative is recorded; see ``small_mlp_kernel``."""

    rule: SmallMLP

    def step(
        self, theta: Theta, grads: Params, state: Memory, params: Params, loss: Tensor
    ) -> tuple[Params, Memory] | None:
        """Take a step in two passes over memory; None where the compiled step does not serve."""
        tensors = self._tensors(theta, grads, state, params)
        if not small_mlp_kernel.serves(tensors):
            return None
        return self._named(params, *small_mlp_kernel.step(self._network, tensors))

    def step_of_lanes(
        self, theta: Theta, grads: Params, state: Memory, params: Params, loss: Tensor, num_dims: int
    ) -> tuple[Params, Memory] | None:
        """Take the steps of all lanes in one call."""
        tensors = self._tensors(theta, grads, state, params)
        if not small_mlp_kernel.serves(tensors):
            return None
        return self._named(params, *small_mlp_kernel.step_of_lanes(self._network, tensors, num_dims))

    @property
    def _network(self) -> small_mlp_kernel.Network:
        rule = self.rule
        return small_mlp_kernel.Network(
            rule.widths, rule.step_scale, rule.exp_scale, rule.eps, rule.decays, TIME_SCALES
        )

    def _tensors(self, theta: Theta, grads: Params, state: Memory, params: Params) -> small_mlp_kernel.Tensors:
        weights = [theta[f"layer{i}/{kind}"] for i in range(len(self.rule.widths) - 1) for kind in ("weight", "bias")]
        return small_mlp_kernel.Tensors(
            state.step, weights, *([each[name] for name in params] for each in (grads, params, state.averages))
        )

    def _named(
        self, params: Params, step: Tensor, moved: list[Tensor], averages: list[Tensor]
    ) -> tuple[Params, Memory]:
        return dict(zip(params, moved, strict=True)), Memory(step, dict(zip(params, averages, strict=True)))
