"""A loop whose batches are handed to it: what a family does to make them is then no part of what is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from learnedopt.core.inner import InnerLoop
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params


class _GivenBatches(TaskFamily):
    """A family whose batches come from ``source``."""

    def __init__(self, family: TaskFamily, source: Callable[[Tasks, int, Split], Batch]) -> None:
        self.family, self.source = family, source

    def __getattr__(self, name: str) -> Any:  # what an inner objective may know of the family
        return getattr(self.family, name)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        return self.family.sample(num_tasks, generator)

    def init_params(self, tasks: Tasks) -> Params:
        return self.family.init_params(tasks)

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        return self.source(tasks, step, split)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.family.loss(params, batch)

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        return self.family.outputs(params, batch)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        return self.family.metrics(params, batch)


def with_batches(loop: InnerLoop, source: Callable[[Tasks, int, Split], Batch]) -> InnerLoop:
    """Return the loop with batches from ``source``."""
    return loop.on(_GivenBatches(loop.family, source))
