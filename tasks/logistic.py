"""Logistic regression on Gaussian data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core import tree
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, streams


@final
@dataclass(frozen=True)
class LogisticRegression(TaskFamily):
    """Binary logistic regression: mean of ``log(1 + exp(z)) − t·z`` over the points, ``z = a·w``.

    A task draws true weights w* from N(0, I), inputs a from N(0, I) and labels t from a coin of probability
    σ(a·w*). There is no penalty on w: few points may be separable, and the loss then has no minimum but with the
    penalty of an inner objective. Parameters: ``weight`` (dim,). A batch is
    ``{"inputs": (points, dim), "targets": (points,)}``
    with labels 0.0 and 1.0, the same at every step; the splits are different points.

    Args:
        dim: of the inputs.
        num_train: points of the "train" split.
        num_valid: points of the "valid" split.
        start_scale: the standard deviation of the starting point's entries; 0 starts at the origin.
        dtype: "float32" or "float64"; by default torch's default dtype when tasks are sampled.
        meta_split: changes nothing, as every split is the same distribution: sample with other generators.

    Raises:
        ValueError: an option is out of its range.
    """

    dim: int = 5
    num_train: int = 20
    num_valid: int = 20
    start_scale: float = 0.0
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"

    def __post_init__(self) -> None:
        for option in ("dim", "num_train", "num_valid"):
            arguments.require_count(option, getattr(self, option))
        arguments.require_number("start_scale", self.start_scale, least=0)
        arguments.require_common(self.dtype, self.meta_split)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw the points of both splits and the starting point."""
        num_points = self.num_train + self.num_valid
        true = streams.normal((num_tasks, self.dim, 1), generator)
        inputs = streams.normal((num_tasks, num_points, self.dim), generator)
        coin = torch.rand((num_tasks, num_points), generator=generator, dtype=torch.float64, device=generator.device)
        targets = (coin < (inputs @ true).squeeze(-1).sigmoid()).double()
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
        """Return the logits (points,)."""
        return batch["inputs"] @ params["weight"]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood."""
        return functional.binary_cross_entropy_with_logits(self.outputs(params, batch), batch["targets"])

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Return the share of labels that are predicted right."""
        logits = self.outputs(params, batch)
        return {"accuracy": ((logits > 0) == (batch["targets"] > 0.5)).to(logits.dtype).mean()}
