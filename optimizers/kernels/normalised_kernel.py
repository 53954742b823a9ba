"""The compiled step of the rules ``normalised``, ``normalised-mlp`` and ``normalised-lstm``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnedopt.core.rule import State
from learnedopt.core.tree import Theta
from learnedopt.optimizers.bases import frame_features, normalised_frame
from learnedopt.optimizers.bases.frame import RELATIVE, TINY, Memory
from learnedopt.optimizers.bases.frame_features import NUM_CLOCKS, NUM_ROWS
from learnedopt.optimizers.bases.kinds import TensorKind
from learnedopt.optimizers.kernels.frame_kernel import FrameKernel, Step, Weights
from learnedopt.optimizers.kernels.normalised_native import LSTM, MLP, NO_NET, Net, Shapes


@final
@dataclass(frozen=True)
class NormalisedKernel(FrameKernel):
    """The step of ``Normalised``, and of the rules that add a network to its brackets.

    Args:
        kind: of the network: ``NO_NET``, ``MLP`` or ``LSTM``.
        units: that it has.
    """

    kind: int = NO_NET
    units: int = 0

    with_factors = True

    @property
    def reads_iterates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether there is a network, which sees entries over their root mean square."""
        return self.kind != NO_NET

    def memory(self, state: State) -> Memory:
        """Return the state, or the LSTM's ``frame``."""
        return state.frame if self.kind == LSTM else state

    def after(self, state: State, memory: Memory, states: Sequence[Tensor]) -> State:
        """Return the memory, with the LSTM's new h and c."""
        return state._replace(frame=memory, hidden=states[0], cell=states[1]) if self.kind == LSTM else memory

    def decays(self, theta: Theta, state: State) -> Tensor:
        """Return the three of theta."""
        return theta["decay"]

    def constants(self, step: Step) -> Sequence[Tensor | float]:
        """Return what makes the compiled bracket the one that ``Normalised`` states."""
        theta, matrices = step.theta, _matrices(step.cut.shapes, step.progress.dtype)
        element, factored, whole = (x.unsqueeze(-1) for x in theta["norm"].unbind(-1))
        return (
            RELATIVE,
            RELATIVE,
            TINY,
            -0.5 * (whole - factored * matrices),
            -0.5 * factored,
            0.0,
            theta["log_rate"].unsqueeze(-1) + theta["kind_rate"][..., _rates(step.kinds)],
            -0.5 * (element + factored * (1 - matrices)),
            1.0,
            theta["weight_decay"].exp().unsqueeze(-1),
            0.0,
        )

    def weights(self, step: Step) -> Weights:
        """Return the network with the clocks in its bias."""
        if self.kind == NO_NET:
            return super().weights(step)
        theta, first = step.theta, "hidden" if self.kind == MLP else "input"
        weight = theta[f"{first}/weight"]
        _require_weights(step, self.kind, self.units)
        clocks = frame_features.clocks(*torch.broadcast_tensors(step.progress, step.memory.step)).movedim(0, -1)
        bias = theta["bias" if self.kind == LSTM else "hidden/bias"]
        bias = bias + (weight[..., NUM_ROWS:] @ clocks.unsqueeze(-1)).squeeze(-1)
        recurrent = [theta["recurrent/weight"]] if self.kind == LSTM else []
        states = (step.state.hidden, step.state.cell) if self.kind == LSTM else ()
        tensors = [weight, *recurrent, bias, theta["output/weight"], theta["output/bias"]]
        return Weights(Net(self.kind, self.units, weight.shape[-1]), tensors, states)


@functools.lru_cache(maxsize=256)
def _matrices(shapes: Shapes, dtype: torch.dtype) -> Tensor:
    return torch.tensor([float(len(shape) >= 2) for shape in shapes], dtype=dtype)


@functools.lru_cache(maxsize=256)
def _rates(kinds: tuple[TensorKind, ...]) -> Tensor:
    return torch.tensor([normalised_frame.rate_of(kind.kind) for kind in kinds])


def _require_weights(step: Step, kind: int, units: int) -> None:
    """Raise ValueError where C would read past the end of a weight or of the LSTM's memory."""
    inputs = NUM_ROWS + NUM_CLOCKS
    expected = {"output/weight": (2, units), "output/bias": (2,)}
    if kind == MLP:
        expected |= {"hidden/weight": (units, inputs), "hidden/bias": (units,)}
    else:
        gates = 4 * units
        expected |= {"input/weight": (gates, inputs), "recurrent/weight": (gates, units), "bias": (gates,)}
    tensors = dict(step.theta)
    if kind == LSTM:
        expected |= dict.fromkeys(("hidden", "cell"), (units, sum(step.cut.numels)))
        tensors |= {"hidden": step.state.hidden, "cell": step.state.cell}
    for name, shape in expected.items():
        found = tuple(tensors[name].shape)[-len(shape) :]
        if found != shape:
            raise ValueError(
                f"a step was given {name} of shape {found} where {shape} was expected; theta and state must be this "
                "rule's own, made by init_theta and init for these parameters"
            )
