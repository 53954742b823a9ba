"""Prediction with expert advice: linear losses on the simplex, with the same experts good in most tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments


@final
@dataclass(frozen=True)
class Experts(TaskFamily):
    """Linear losses ``⟨costs_i, x⟩`` of a distribution x over experts, with costs in [0, 1]: one an inner step.

    In each task one expert is good: its costs are uniform in [0, 1 - gap], the others' in [0, 1]. Expert k (from 0) is
    the good one with a probability in proportion to ``concentration^k``: the smaller, the more alike are the tasks.
    The loss of step i is number i modulo ``num_losses``; the "valid" split has fresh ones of the same good expert.
    Parameters: ``x`` (num_experts,), from the uniform distribution. A batch is ``{"costs": (num_experts,)}``.

    Args:
        num_experts: of ``x``.
        num_losses: m, of a task.
        concentration: in (0, 1]; 1 makes all experts equally often the good one.
        gap: by how much the good one's largest cost is below 1, in [0, 1].
        dtype: "float32" or "float64"; by default torch's default dtype when tasks are sampled.
        meta_split: changes nothing, as every split is the same distribution: sample with other generators.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> family = Experts(num_experts=10, concentration=0.3)
    """

    num_experts: int = 10
    num_losses: int = 10
    concentration: float = 0.5
    gap: float = 0.5
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"

    def __post_init__(self) -> None:
        for option in ("num_experts", "num_losses"):
            arguments.require_count(option, getattr(self, option))
        for option in ("concentration", "gap"):
            arguments.require_number(option, getattr(self, option), least=0)
            if getattr(self, option) > 1:
                raise ValueError(f"{option}={getattr(self, option)!r} is above 1, of which no more than all can be")
        if self.concentration == 0:
            raise ValueError("concentration=0 leaves one expert; pass a small positive number")
        arguments.require_common(self.dtype, self.meta_split)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw each task's good expert, and the costs (num_tasks, 2, num_losses, num_experts) of both splits."""
        shape = (num_tasks, 2, self.num_losses, self.num_experts)
        weights = self.concentration ** torch.arange(self.num_experts, dtype=torch.float64, device=generator.device)
        good = torch.multinomial(weights, num_tasks, replacement=True, generator=generator)
        costs = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        is_good = torch.nn.functional.one_hot(good, self.num_experts).bool()
        costs = torch.where(is_good[:, None, None], (1 - self.gap) * costs, costs)
        return tree.to({"costs": costs}, None, arguments.resolve_dtype(self.dtype))

    def init_params(self, tasks: Tasks) -> Params:
        """Start at the uniform distribution."""
        return {"x": torch.full_like(tasks["costs"][:, 0, 0], 1 / self.num_experts)}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the step's costs."""
        return {"costs": tasks["costs"][:, int(split == "valid"), step % self.num_losses]}

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the distribution (num_experts,)."""
        return params["x"]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the expected cost."""
        return (batch["costs"] * params["x"]).sum()
