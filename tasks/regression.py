"""Linear regression from few points, ill-conditioned by design."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, streams


@final
@dataclass(frozen=True)
class LinearRegression(TaskFamily):
    """Linear regression with a chosen condition number: ``½ mean (a·w − t)²`` over the points.

    Inputs a are N(0, diag λ) with λ falling geometrically from 1 to 1/condition_number; targets are ``t = a·w* +
    noise·N(0, 1)`` for true weights w* from N(mean_weight, 1), so that tasks have a mean which a learned start can
    find; those after the first ``num_relevant`` are 0, which a learned regularization can find. The Hessian is the
    points' own second moment ``AᵀA/num_train``, whose condition number is larger than λ's for few points, and infinite
    for fewer points than dimensions. Parameters: ``weight`` (dim,). A batch is ``{"inputs": (points, dim), "targets":
    (points,)}``, the same at every step; the splits are different points.

    Args:
        dim: of the inputs.
        num_train: points of the "train" split.
        num_valid: points of the "valid" split.
        condition_number: largest over smallest eigenvalue of the inputs' covariance, at least 1.
        noise: the standard deviation of the targets' noise.
        mean_weight: the mean of every true weight.
        start_scale: the standard deviation of the starting point's entries; 0 starts at the origin.
        dtype: "float32" or "float64"; by default torch's default dtype when tasks are sampled.
        meta_split: changes nothing, as every split is the same distribution: sample with other generators.
        num_relevant: how many of the true weights are not 0, the same ones in every task; by default all.

    Raises:
        ValueError: an option is out of its range.
    """

    dim: int = 10
    num_train: int = 20
    num_valid: int = 20
    condition_number: float = 100.0
    noise: float = 0.1
    mean_weight: float = 1.0
    start_scale: float = 0.0
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"
    num_relevant: int | None = None

    def __post_init__(self) -> None:
        for option in ("dim", "num_train", "num_valid"):
            arguments.require_count(option, getattr(self, option))
        arguments.require_number("condition_number", self.condition_number, least=1)
        arguments.require_number("noise", self.noise, least=0)
        arguments.require_number("mean_weight", self.mean_weight)
        arguments.require_number("start_scale", self.start_scale, least=0)
        arguments.require_common(self.dtype, self.meta_split)
        if self.num_relevant is not None:
            arguments.require_count("num_relevant", self.num_relevant)
            if self.num_relevant > self.dim:
                raise ValueError(f"num_relevant={self.num_relevant} of dim={self.dim} weights; pass at most that many")
        if self.dim == 1 and self.condition_number != 1:
            raise ValueError(f"condition_number={self.condition_number!r}: in one dimension it is 1; pass that")

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw the points of both splits and the starting point."""
        num_points = self.num_train + self.num_valid
        true = self.mean_weight + streams.normal((num_tasks, self.dim, 1), generator)
        if self.num_relevant is not None:
            true[:, self.num_relevant :] = 0
        inputs = streams.normal((num_tasks, num_points, self.dim), generator)
        spectrum = self.condition_number ** -torch.linspace(0, 1, self.dim, dtype=torch.float64)
        inputs = inputs * spectrum.sqrt().to(inputs.device)
        targets = (inputs @ true).squeeze(-1) + self.noise * streams.normal((num_tasks, num_points), generator)
        start = self.start_scale * streams.normal((num_tasks, self.dim), generator)
        tasks = {
            "train": {"inputs": inputs[:, : self.num_train], "targets": targets[:, : self.num_train]},
            "valid": {"inputs": inputs[:, self.num_train :], "targets": targets[:, self.num_train :]},
            "start": start,
        }
        return tree.to(tasks, None, arguments.resolve_dtype(self.dtype))

    def init_params(self, tasks: Tasks) -> Params:
        """Start at the task's own starting point."""
        return {"weight": tasks["start"].clone()}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return all points of the split."""
        return tasks[split]

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the predictions (points,)."""
        return batch["inputs"] @ params["weight"]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return half the mean squared error, whose Hessian is the inputs' second moment."""
        return 0.5 * (self.outputs(params, batch) - batch["targets"]).square().mean()
