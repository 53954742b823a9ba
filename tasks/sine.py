"""Regression of sine waves from a few points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias, cast, final

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core import tree
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, initial_params, streams

Protocol: TypeAlias = Literal["meta-sgd", "maml"]
_AMPLITUDES, _PHASES, _FREQUENCIES, _INPUTS = (0.1, 5.0), (0.0, math.pi), (0.8, 1.2), (-5.0, 5.0)


@final
@dataclass(frozen=True)
class Sine(TaskFamily):
    """Regression of ``A·sin(ω·x + φ)`` by a multi-layer perceptron with ReLU: the mean squared error over the points.

    Amplitudes A are U[0.1, 5], phases φ U[0, π], inputs x U[-5, 5]. The support set (split "train") and the query set
    ("valid") are different points of the same wave, the same at every step. Parameters: ``layer0.weight`` (hidden[0],
    1), ``layer0.bias``, ... as ``nn.Linear`` has them. A batch is ``{"inputs": (points, 1), "targets": (points, 1)}``.

    Args:
        protocol: "meta-sgd" draws frequencies ω from U[0.8, 1.2] (Li et al. 2017, section 4.1); "maml" has ω = 1, and
            its wave is ``A·sin(x − φ)`` (Finn et al. 2017, section 5.1).
        shots: points of the support set.
        queries: points of the query set.
        hidden: the widths of the hidden layers.
        dtype: "float32" or "float64"; by default torch's default dtype when tasks are sampled.
        meta_split: changes nothing, as every split is the same distribution: sample with other generators.
        init_seed: all tasks start at the point that this seed draws; None lets each task draw its own.
        init_std: draws the weights from N(0, init_std²), cut off at two standard deviations, and sets the biases to 0,
            as the published code of MAML does with 0.01; None draws as ``nn.Linear`` does.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> tasks = Sine(shots=5).sample(2, torch.Generator().manual_seed(0))
        >>> Sine(shots=5).batch(tasks, 0, "train")["targets"].shape
        torch.Size([2, 5, 1])
    """

    protocol: Protocol = "meta-sgd"
    shots: int = 10
    queries: int = 10
    hidden: tuple[int, ...] = (40, 40)
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"
    init_seed: int | None = 0
    init_std: float | None = None

    def __post_init__(self) -> None:
        arguments.require_choice("protocol", self.protocol, Protocol)
        arguments.require_count("shots", self.shots)
        arguments.require_count("queries", self.queries)
        if not isinstance(cast("object", self.hidden), tuple):
            raise ValueError(f"hidden={self.hidden!r} is not a tuple of widths; pass one such as (40, 40)")
        for i, width in enumerate(self.hidden):
            arguments.require_count(f"hidden[{i}]", width)
        arguments.require_common(self.dtype, self.meta_split)
        arguments.require_seed("init_seed", self.init_seed)
        if self.init_std is not None:
            arguments.require_number("init_std", self.init_std)
            if self.init_std <= 0:
                raise ValueError(f"init_std={self.init_std!r} is a standard deviation and must be positive")

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw the waves, and the points of both sets."""

        def uniform(interval: tuple[float, float], *shape: int) -> Tensor:
            low, high = interval
            drawn = torch.rand(num_tasks, *shape, generator=generator, dtype=torch.float64, device=generator.device)
            return low + (high - low) * drawn

        amplitude, phase = uniform(_AMPLITUDES, 1, 1), uniform(_PHASES, 1, 1)
        frequency = uniform(_FREQUENCIES, 1, 1)
        if self.protocol == "maml":
            frequency, phase = torch.ones_like(frequency), -phase
        inputs = uniform(_INPUTS, self.shots + self.queries, 1)
        points = {"inputs": inputs, "targets": amplitude * torch.sin(frequency * inputs + phase)}
        tasks = {
            "train": {k: v[:, : self.shots] for k, v in points.items()},
            "valid": {k: v[:, self.shots :] for k, v in points.items()},
        }
        seeds = streams.sample_seeds(num_tasks, generator)
        return {"seed": seeds, **tree.to(tasks, None, arguments.resolve_dtype(self.dtype))}

    def init_params(self, tasks: Tasks) -> Params:
        """Draw the start, one for all tasks or one a task, as ``init_seed`` says."""
        shapes = {f"layer{i}": (b, a) for i, (a, b) in enumerate(pairwise((1, *self.hidden, 1)))}
        std = self.init_std
        layers = [
            initial_params.layer(name, shape) if std is None else initial_params.small_layer(name, shape, std)
            for name, shape in shapes.items()
        ]
        return initial_params.draw(sum(layers, ()), tasks["seed"], self.init_seed, tasks["train"]["inputs"].dtype)

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return all points of the split."""
        return tasks[split]

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the predictions (points, 1)."""
        hidden = batch["inputs"]
        for i in range(len(self.hidden)):
            hidden = functional.linear(hidden, params[f"layer{i}.weight"], params[f"layer{i}.bias"]).relu()
        last = len(self.hidden)
        return functional.linear(hidden, params[f"layer{last}.weight"], params[f"layer{last}.bias"])

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the mean squared error."""
        return (self.outputs(params, batch) - batch["targets"]).square().mean()
