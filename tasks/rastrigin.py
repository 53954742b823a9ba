"""Least squares under waves: a function with a minimum in every valley of them."""

from __future__ import annotations

import math
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
class Rastrigin(TaskFamily):
    """``½‖Ax − b‖² − height·cᵀcos(2πx) + height·dim``, one of the problems of Open-L2O (Chen et al. 2022).

    The entries of A (dim, dim), b and c are from N(0, 1); with A = I, b = 0 and c = 1 it is Rastrigin's function but
    for the half. It may be negative, as entries of c may be larger than 1. Parameters: ``x`` (dim,). A batch is
    ``{"A": (dim, dim), "b": (dim,), "c": (dim,)}``, the same at every step and for both splits.

    Args:
        dim: of x.
        height: of the waves, α in the paper.
        start_scale: the standard deviation of the starting point's entries; 0 starts at the origin.
        dtype: "float32" or "float64"; by default torch's default dtype when tasks are sampled.
        meta_split: changes nothing, as every split is the same distribution: sample with other generators.

    Raises:
        ValueError: an option is out of its range.
    """

    dim: int = 10
    height: float = 10.0
    start_scale: float = 1.0
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"

    def __post_init__(self) -> None:
        arguments.require_count("dim", self.dim)
        arguments.require_number("height", self.height, least=0)
        arguments.require_number("start_scale", self.start_scale, least=0)
        arguments.require_common(self.dtype, self.meta_split)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw A, b, c and the starting point."""
        drawn = streams.normal((num_tasks, self.dim, self.dim + 3), generator)
        matrix, (b, c, start) = drawn[..., : self.dim].contiguous(), drawn[..., self.dim :].contiguous().unbind(-1)
        tasks = {"A": matrix, "b": b, "c": c, "start": self.start_scale * start}
        return tree.to(tree.tree_map(torch.clone, tasks), None, arguments.resolve_dtype(self.dtype))

    def init_params(self, tasks: Tasks) -> Params:
        """Start at the task's own starting point."""
        return {"x": tasks["start"].clone()}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the function itself."""
        return {name: tasks[name] for name in ("A", "b", "c")}

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return Ax (dim,)."""
        return batch["A"] @ params["x"]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the function's value."""
        waves = batch["c"] @ (2 * math.pi * params["x"]).cos()
        return 0.5 * (self.outputs(params, batch) - batch["b"]).square().sum() + self.height * (self.dim - waves)
