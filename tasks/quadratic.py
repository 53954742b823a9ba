"""Random quadratic functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, streams

Distribution: TypeAlias = Literal["gaussian", "uniform"]


@final
@dataclass(frozen=True)
class Quadratic(TaskFamily):
    """Random quadratics ``f(x) = ‖Wx − y‖²``, a sum over the entries (Andrychowicz et al. 2016, section 3.1).

    Parameters: ``x`` (dim,). A batch is ``{"W": (dim, dim), "y": (dim,)}``, the same at every step and split.

    Args:
        dim: of ``x`` and ``y``.
        distribution: of the entries of W and y, independent: "gaussian" is N(0, 1), "uniform" is U[0, 1].
        start_scale: the standard deviation of the starting point's entries; 0 starts at the origin.
        dtype: "float32" or "float64"; by default torch's default dtype when tasks are sampled.
        meta_split: changes nothing, as every split is the same distribution: sample with other generators.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> family = Quadratic(dim=2)
        >>> tasks = family.sample(3, torch.Generator().manual_seed(0))
        >>> family.init_params(tasks)["x"].shape
        torch.Size([3, 2])
    """

    dim: int = 10
    distribution: Distribution = "gaussian"
    start_scale: float = 0.0
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"

    def __post_init__(self) -> None:
        arguments.require_count("dim", self.dim)
        arguments.require_choice("distribution", self.distribution, Distribution)
        arguments.require_number("start_scale", self.start_scale, least=0)
        arguments.require_common(self.dtype, self.meta_split)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw W (num_tasks, dim, dim), y and start, both (num_tasks, dim)."""
        entries = (num_tasks, self.dim, self.dim + 1)
        if self.distribution == "gaussian":
            drawn = streams.normal(entries, generator)
        else:
            drawn = torch.rand(entries, generator=generator, dtype=torch.float64, device=generator.device)
        start = self.start_scale * streams.normal((num_tasks, self.dim), generator)
        tasks = {"W": drawn[..., :-1].contiguous(), "y": drawn[..., -1].contiguous(), "start": start}
        return tree.to(tasks, None, arguments.resolve_dtype(self.dtype))

    def init_params(self, tasks: Tasks) -> Params:
        """Start at the task's own starting point."""
        return {"x": tasks["start"].clone()}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the function itself."""
        return {"W": tasks["W"], "y": tasks["y"]}

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return Wx (dim,)."""
        return batch["W"] @ params["x"]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return ‖Wx − y‖²."""
        return (self.outputs(params, batch) - batch["y"]).square().sum()
