"""What is trained inside: a distribution over optimizees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from learnedopt.core.tree import Params

Tasks: TypeAlias = Any
"""Batched tree of tensors that describes tasks completely, seeds included."""
Batch: TypeAlias = Any
"""Tree of tensors that ``loss`` reads beside the parameters."""
Split: TypeAlias = Literal["train", "valid"]


class TaskFamily(ABC):
    """A distribution over optimizees, given as pure functions.

    *Batched* trees have a leading dimension ``num_tasks``; methods marked "one task" see a single task without it, and
    must work under ``torch.func.vmap``: no ``.item()``, no ``if`` on tensors, no randomness of their own.

    Example:
        >>> class Bowl(TaskFamily):
        ...     def sample(self, num_tasks, generator):
        ...         return {"center": torch.randn(num_tasks, 2, generator=generator)}
        ...     def init_params(self, tasks):
        ...         return {"x": torch.zeros_like(tasks["center"])}
        ...     def batch(self, tasks, step, split):
        ...         return tasks
        ...     def loss(self, params, batch):
        ...         return (params["x"] - batch["center"]).square().sum()
    """

    @abstractmethod
    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw ``num_tasks`` tasks: a batched tree of tensors."""

    @abstractmethod
    def init_params(self, tasks: Tasks) -> Params:
        """Return each task's own starting point, batched; a pure function of ``tasks``."""

    @abstractmethod
    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the data of inner step ``step``, batched; a pure function of its arguments, never under vmap."""

    @abstractmethod
    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the scalar loss of ONE task."""

    @property
    def families(self) -> tuple[TaskFamily, ...]:
        """The families that it is made of, whose tasks may differ in shape; by default itself alone.

        One of several also has ``split``: see ``learnedopt.core.parts.Mixed``.
        """
        return (self,)

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the model's logits or predictions for ONE task; needed by objectives that compare outputs."""
        raise NotImplementedError(
            f"{type(self).__name__} has no outputs; define outputs(params, batch) to compare models by predictions"
        )

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Return scalars worth reporting beside the loss for ONE task, such as the accuracy."""
        return {}

    def faults(self, params: Params, batch: Batch, *, second_derivatives: bool = False) -> list[str]:
        """Say, a sentence each, why the loss of ONE task is not what this contract asks, as far as the family can tell.

        Asked once by a loop before its first step, on concrete tensors and never under vmap; what is said is raised.

        Args:
            params: one task's; must not be changed.
            batch: one task's.
            second_derivatives: whether they will be taken.
        """
        return []
