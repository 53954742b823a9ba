"""Sequences of convex losses whose optima lie around one centre."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, streams

Shape: TypeAlias = Literal["distance", "quadratic"]


@final
@dataclass(frozen=True)
class Clusters(TaskFamily):
    """``num_losses`` convex losses a task, one an inner step, with optima within ``radius`` of a centre of all tasks.

    A task's own point is ``c = centre + radius u`` with u uniform in the unit ball and centre the vector of length
    ``distance`` whose entries are equal; its losses stand around ``c_i = c + noise N(0, I) / sqrt(dim)``. With
    ``shape="distance"`` they are ``sqrt(width² + ‖x − c_i‖²) − width``, which is convex, 1-Lipschitz and smooth; with
    "quadratic" ``½‖x − c_i‖²``. The loss of step i is number i modulo ``num_losses``; the "valid" split has fresh ones.
    Parameters: ``x`` (dim,), from the origin. A batch is ``{"point": (dim,)}``.

    Args:
        dim: of ``x``.
        num_losses: m, of a task.
        shape: "distance" or "quadratic".
        distance: of the centre from the origin.
        radius: of the cluster; 0 makes all tasks one.
        noise: about how far a task's losses have their minima from its own point; 0 repeats one loss.
        width: over which "distance" is rounded off, positive.
        dtype: "float32" or "float64"; by default torch's default dtype when tasks are sampled.
        meta_split: changes nothing, as every split is the same distribution: sample with other generators.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> family = Clusters(num_losses=16, radius=0.25)
    """

    dim: int = 5
    num_losses: int = 10
    shape: Shape = "distance"
    distance: float = 1.0
    radius: float = 0.25
    noise: float = 0.0
    width: float = 0.1
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"

    def __post_init__(self) -> None:
        for option in ("dim", "num_losses"):
            arguments.require_count(option, getattr(self, option))
        arguments.require_choice("shape", self.shape, Shape)
        for option in ("distance", "radius", "noise", "width"):
            arguments.require_number(option, getattr(self, option), least=0)
        if self.width == 0:
            raise ValueError("width=0 leaves a corner, where the loss has no gradient; pass a small positive width")
        arguments.require_common(self.dtype, self.meta_split)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw each task's points (num_tasks, 2, num_losses, dim): those of the train and of the valid split."""
        direction = streams.normal((num_tasks, self.dim), generator)
        share = torch.rand((num_tasks, 1), generator=generator, dtype=torch.float64, device=generator.device)
        own = direction / tree.row_lengths(direction)[:, None] * share ** (1 / self.dim)
        own = self.distance / math.sqrt(self.dim) + self.radius * own
        around = streams.normal((num_tasks, 2, self.num_losses, self.dim), generator) / math.sqrt(self.dim)
        points = own[:, None, None] + self.noise * around
        return tree.to({"points": points}, None, arguments.resolve_dtype(self.dtype))

    def init_params(self, tasks: Tasks) -> Params:
        """Start at the origin."""
        return {"x": torch.zeros_like(tasks["points"][:, 0, 0])}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the step's own loss."""
        return {"point": tasks["points"][:, int(split == "valid"), step % self.num_losses]}

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return x − c_i (dim,)."""
        return params["x"] - batch["point"]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the loss around the batch's point."""
        squared = self.outputs(params, batch).square().sum()
        if self.shape == "quadratic":
            return 0.5 * squared
        return (self.width**2 + squared).sqrt() - self.width
