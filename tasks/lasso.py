"""Least squares with a penalty on the absolute values of its weights."""

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
class Lasso(TaskFamily):
    """``½‖Ax − b‖² + strength·‖x‖₁``, one of the problems of Open-L2O (Chen et al. 2022).

    The entries of A (num_rows, dim) are from N(0, 1), and ``b = Ax* + noise·N(0, 1)`` for true weights x* of which each
    is from N(0, 1) with probability ``density``, else 0. Parameters: ``x`` (dim,). A batch is ``{"A": (num_rows, dim),
    "b": (num_rows,)}``, the same at every step and for both splits. At an entry of x that is 0 the derivative of its
    absolute value is taken to be 0.

    Args:
        num_rows: of A; fewer than ``dim`` leave the weights to the penalty.
        dim: of x.
        strength: of the penalty.
        density: the share of true weights that are not 0, from 0 to 1.
        noise: the standard deviation of the noise on b.
        start_scale: the standard deviation of the starting point's entries; 0 starts at the origin.
        dtype: "float32" or "float64"; by default torch's default dtype when tasks are sampled.
        meta_split: changes nothing, as every split is the same distribution: sample with other generators.

    Raises:
        ValueError: an option is out of its range.
    """

    num_rows: int = 5
    dim: int = 10
    strength: float = 0.005
    density: float = 0.3
    noise: float = 0.0
    start_scale: float = 1.0
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"

    def __post_init__(self) -> None:
        arguments.require_count("num_rows", self.num_rows)
        arguments.require_count("dim", self.dim)
        for option in ("strength", "density", "noise", "start_scale"):
            arguments.require_number(option, getattr(self, option), least=0)
        if self.density > 1:
            raise ValueError(f"density={self.density!r} is no share of the weights; pass a number from 0 to 1")
        arguments.require_common(self.dtype, self.meta_split)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw A, b and the starting point."""
        matrix = streams.normal((num_tasks, self.num_rows, self.dim), generator)
        true = streams.normal((num_tasks, self.dim, 1), generator)
        chance = torch.rand(true.shape, generator=generator, dtype=true.dtype, device=true.device)
        noise = self.noise * streams.normal((num_tasks, self.num_rows), generator)
        targets = (matrix @ (true * (chance < self.density))).squeeze(-1) + noise
        start = self.start_scale * streams.normal((num_tasks, self.dim), generator)
        return tree.to({"A": matrix, "b": targets, "start": start}, None, arguments.resolve_dtype(self.dtype))

    def init_params(self, tasks: Tasks) -> Params:
        """Start at the task's own starting point."""
        return {"x": tasks["start"].clone()}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the function itself."""
        return {"A": tasks["A"], "b": tasks["b"]}

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return Ax (num_rows,)."""
        return batch["A"] @ params["x"]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the penalised half sum of squares."""
        return 0.5 * (self.outputs(params, batch) - batch["b"]).square().sum() + self.strength * params["x"].abs().sum()
