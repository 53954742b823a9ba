"""Celo (Moudgil, Knyazev, Lajoie and Belilovsky 2025), as its authors' files have it, as an update rule.

The formulas and the format are those of the authors' public JAX implementation and of its optimizer states' files,
``theta.state``, which are theirs: no such file comes with this library. ``load`` reads one that you have::

    rule, theta = load("theta.state")
    optimizer = LearnedOptimizer(model.parameters(), (rule, theta), num_steps=1000)    # and step(loss=loss)

Importing this module registers the rules as "celo" and "celo-adam", so that ``learnedopt.save`` can write them and,
with ``--import learnedopt.bridges.celo``, ``learnedopt evaluate`` can read what it wrote.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from learnedopt.bridges import celo_features, celo_schedule, flax_file
from learnedopt.bridges.celo_features import Tracks
from learnedopt.bridges.celo_schedule import NUM_FEATURES, ScheduleMemory
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta

_CLIP = 1_000.0
"""Gradients are clipped to it, each coordinate by itself."""
_STEP = 1e-3
"""Factor on every step, and on the logarithm of the network's magnitudes."""
_FIRST, _SECOND, _EPS = 0.9, 0.999, 1e-8
"""Of Celo-Adam: what the averages of gradients and of their squares keep, and what joins the root."""
_UNITS = 64
"""Of the schedule's layers and its LSTM, in the files."""
_HIDDEN = (4, 4)
"""Of the network's two layers, in the files."""
_INPUTS = sum(celo_features.WIDTHS)


class CeloMemory(NamedTuple):
    """What Celo keeps of a run."""

    schedule: ScheduleMemory
    tracks: dict[str, Tracks]
    """Means of gradients, by parameter."""


class CeloAdamMemory(NamedTuple):
    """What Celo-Adam keeps of a run."""

    schedule: ScheduleMemory
    mean: Params
    """Averages of gradients, as the parameters, not corrected for their start at 0."""
    square: Params
    """The same of their squares."""


@dataclass(frozen=True)
class _Scheduled(UpdateRule):
    """A rule whose steps are multiplied by Celo's schedule."""

    reads_horizon = True

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Draw weights from N(0, 1 / inputs), biases and the LSTM's start at 0: none of the published numbers."""
        theta: Theta = {}
        for name, shape in self._shapes().items():
            matrix = name.endswith("/weight")
            drawn = torch.randn(shape, generator=generator, device=generator.device)
            theta[name] = drawn / math.sqrt(shape[0]) if matrix else torch.zeros_like(drawn)
        return theta

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        """Refuse: without the horizon the schedule has no time scales."""
        raise ValueError(f"{type(self).__name__} cannot start without the number of steps; it is begun by init_for")

    def init_for(self, theta: Theta, params: Params, horizon: Tensor) -> tuple[Params, Any]:
        """Start where the parameters are, for a run of ``horizon`` steps, with nothing seen of it."""
        dtype = _dtype(params)
        return params, self._begun(celo_schedule.start(theta, horizon, dtype), params)

    @abstractmethod
    def _begun(self, schedule: ScheduleMemory, params: Params) -> Any:
        """Return the first state."""

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "mix/weight": (NUM_FEATURES, _UNITS), "mix/bias": (_UNITS,),
            "input/weight": (NUM_FEATURES, _UNITS), "input/bias": (_UNITS,),
            "lstm/weight": (2 * _UNITS, 4 * _UNITS), "lstm/bias": (4 * _UNITS,),
            "rate/weight": (_UNITS,), "rate/bias": (),
            "start/hidden": (_UNITS,), "start/cell": (_UNITS,),
        }  # fmt: skip


@final
@dataclass(frozen=True)
class Celo(_Scheduled):
    """A small network for every coordinate, and a learned schedule that reads the losses.

    Per step and tensor x with gradient g, clipped to 1,000 in each coordinate, at updates taken t of T::

        (d, s) = MLP(the 29 features of ``celo_features.features``, each over its root mean square in the tensor)
        delta = -1e-3 rate d e^(s / 1000) sqrt(mean(x^2) + 1e-9)
        rate  = e^(w h + b) / 10,    h = LSTM(tanh(10 (t / T - times)), where the running means of the loss are)

    The second phase of Celo's meta-training, whose schedule is on. The LSTM is one for all tensors: what it reads is
    the same for each. Past T, t / T stays 1, where the authors' goes on.

    Theta: ``mlp0/weight`` (29, 4), ``mlp1/weight`` (4, 4), ``mlp2/weight`` (4, 2) and their ``bias``; of the schedule,
    ``mix``, ``input`` (18, 64), ``lstm`` (128, 256), ``rate`` (64,) and their ``bias``, ``start/hidden`` and
    ``start/cell`` (64,). State: ``CeloMemory``. The loss is needed.

    Of two axes of equal length, rows are counted along the later one; the authors' code leaves that to NumPy's sort,
    which need not be stable.
    """

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        sizes = (_INPUTS, *_HIDDEN, 2)
        layers = {f"mlp{i}/weight": pair for i, pair in enumerate(itertools.pairwise(sizes))}
        biases = {f"mlp{i}/bias": (size,) for i, size in enumerate(sizes[1:])}
        return {**layers, **biases, **super()._shapes()}

    def _begun(self, schedule: ScheduleMemory, params: Params) -> CeloMemory:
        return CeloMemory(schedule, {k: celo_features.start(p, _wide_dtype(p)) for k, p in params.items()})

    def update(  # pyright: ignore[reportIncompatibleMethodOverride] - as rules that read the horizon have it
        self, theta: Theta, grads: Params, state: CeloMemory, params: Params, loss: Tensor, *, progress: Tensor
    ) -> tuple[Params, CeloMemory]:
        """Move every coordinate by the network's direction, at the schedule's rate."""
        theta = {k: x.to(state.schedule.means.dtype) for k, x in theta.items()}
        rate, schedule = celo_schedule.rate(theta, state.schedule, loss, progress)
        deltas: Params = {}
        tracks: dict[str, Tracks] = {}
        for name, param in params.items():
            grad, x = grads[name].to(_wide_dtype(param)).clamp(-_CLIP, _CLIP), param.to(_wide_dtype(param))
            tracks[name] = celo_features.tracked(state.tracks[name], grad)
            rows = celo_features.normalised(celo_features.features(x, grad, tracks[name]))
            direction, size = _network(theta, rows).unbind(1)
            scale = (x.square().mean() + 1e-9).sqrt() * _STEP
            step = rate.to(x.dtype) * scale * direction * (size * _STEP).exp()
            deltas[name] = -step.reshape(x.shape).to(param.dtype)
        return deltas, CeloMemory(schedule, tracks)


@final
@dataclass(frozen=True)
class CeloAdam(_Scheduled):
    """Adam at the rate of Celo's learned schedule, trained for it: the paper's Celo-Adam.

        delta = -1e-3 rate (m / (1 - 0.9^t)) / (sqrt(v / (1 - 0.999^t) + 1e-10) + 1e-8)

    with gradients clipped to 1,000 in each coordinate, t the updates taken with this one, and ``rate`` as in ``Celo``.
    Theta: the schedule's part of Celo's. State: ``CeloAdamMemory``. The loss is needed.
    """

    def _begun(self, schedule: ScheduleMemory, params: Params) -> CeloAdamMemory:
        mean, square = ({k: torch.zeros_like(p, dtype=_wide_dtype(p)) for k, p in params.items()} for _ in range(2))
        return CeloAdamMemory(schedule, mean, square)

    def update(  # pyright: ignore[reportIncompatibleMethodOverride] - as rules that read the horizon have it
        self, theta: Theta, grads: Params, state: CeloAdamMemory, params: Params, loss: Tensor, *, progress: Tensor
    ) -> tuple[Params, CeloAdamMemory]:
        """Move every coordinate as Adam does, at the schedule's rate."""
        theta = {k: x.to(state.schedule.means.dtype) for k, x in theta.items()}
        rate, schedule = celo_schedule.rate(theta, state.schedule, loss, progress)
        deltas: Params = {}
        mean: Params = {}
        square: Params = {}
        for name, param in params.items():
            grad = grads[name].to(_wide_dtype(param)).clamp(-_CLIP, _CLIP)
            mean[name] = _FIRST * state.mean[name] + (1 - _FIRST) * grad
            square[name] = _SECOND * state.square[name] + (1 - _SECOND) * grad * grad
            corrections = [(1 - keep**schedule.step).to(grad.dtype) for keep in (_FIRST, _SECOND)]
            root = (square[name] / corrections[1] + 1e-10).sqrt() + _EPS
            deltas[name] = (-rate.to(grad.dtype) * _STEP * mean[name] / corrections[0] / root).to(param.dtype)
        return deltas, CeloAdamMemory(schedule, mean, square)


def load(path: str | Path, sha256: str | None = None) -> tuple[UpdateRule, Theta]:
    """Return ``(rule, theta)`` of a file ``theta.state`` of Celo or Celo-Adam, as the authors publish them.

    Weights that their code never uses are left out: a layer whose output is overwritten, the controls of an
    interpolation between one network, the network's third output.

    Args:
        path: the file.
        sha256: of the file, where it is known: nothing in the file itself tells damage.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, of another optimizer or other sizes, or has another SHA-256.

    Example:
        >>> rule, theta = load("theta.state")
        >>> learnedopt.save("celo.safetensors", rule, theta)
    """
    found = flax_file.read(path, sha256)
    rule = Celo() if "ff_mod_stack" in found else CeloAdam()
    try:
        theta = _schedule_of(found)
        if isinstance(rule, Celo):
            theta = {**_network_of(found), **theta}
        wanted = rule._shapes()  # pyright: ignore[reportPrivateUsage] - a class of this very file
        got = {k: tuple(x.shape) for k, x in theta.items()}
        wrong = {k: got[k] for k in wanted if got[k] != wanted[k]}
    except Exception as error:  # anything may lie where weights should be
        raise ValueError(
            f"{path} is a file of flax, but not of Celo or Celo-Adam: {type(error).__name__} {error} where their "
            f"weights should be; it holds {list(found)}. VeLO, Celo2 and the other optimizers of their repository are "
            "not read"
        ) from error
    if wrong:
        raise ValueError(
            f"{path} has weights of other shapes than the published ones: {wrong} instead of "
            f"{ {k: wanted[k] for k in wrong} }; it is of another optimizer or of other sizes"
        )
    return rule, {k: theta[k].float().contiguous() for k in wanted}


def _schedule_of(found: dict[str, Any]) -> Theta:
    layers, begun = found["rnn_params"], found["lstm_init_state"]
    names = {"mix": "linear_1", "input": "linear_2", "lstm": "rnn/linear"}
    theta = {f"{ours}/{kind}": layers[theirs][kind[0]] for ours, theirs in names.items() for kind in ("weight", "bias")}
    rate = {"rate/weight": layers["step_size"]["w"].squeeze(1), "rate/bias": layers["step_size"]["b"].squeeze(0)}
    return {**theta, **rate, **{f"start/{k}": begun[k].squeeze(0) for k in ("hidden", "cell")}}


def _network_of(found: dict[str, Any]) -> Theta:
    layers = {k: x.squeeze(0) for k, x in found["ff_mod_stack"]["~"].items()}
    first = torch.cat([layers[f"w0__{i}"] for i in range(len(celo_features.WIDTHS))])
    theta = {"mlp0/weight": first, "mlp1/weight": layers["w1"], "mlp2/weight": layers["w2"][:, :2]}
    return {**theta, "mlp0/bias": layers["b0"], "mlp1/bias": layers["b1"], "mlp2/bias": layers["b2"][:2]}


def _network(theta: Theta, rows: Tensor) -> Tensor:
    """Return the network's two outputs for every row of features, in their dtype."""
    for i in range(3):
        weight, bias = (theta[f"mlp{i}/{kind}"].to(rows.dtype) for kind in ("weight", "bias"))
        rows = rows @ weight + bias
        rows = torch.relu(rows) if i < 2 else rows
    return rows


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _dtype(params: Params) -> torch.dtype:
    """Return the dtype of what belongs to no parameter alone: the widest of theirs, float32 at least."""
    found = torch.float32
    for p in params.values():
        found = torch.promote_types(found, p.dtype)
    return found


def _register() -> None:
    from learnedopt.optimizers import register

    register("celo", Celo)
    register("celo-adam", CeloAdam)


_register()
