"""What the inner steps descend, and what the outer level reads: pure functions that theta may enter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnedopt.core.task import Batch, TaskFamily
from learnedopt.core.tree import Params, Theta


class Penalty(ABC):
    """A term of theta and the parameters alone that an inner objective adds to the family's loss."""

    @abstractmethod
    def value(self, theta: Theta, params: Params) -> Tensor:
        """Return the scalar of ONE task; pure, and under vmap as well."""

    def gradient(self, theta: Theta, params: Params) -> Params:
        """Optional: the gradient of ``value`` at ``params`` in closed form, differentiable once more.

        It spares each inner step a second back-propagation.
        """
        raise NotImplementedError(f"{type(self).__name__} has no gradient in closed form")

    @property
    def has_gradient(self) -> bool:
        """Whether ``gradient`` is defined."""
        return type(self).gradient is not Penalty.gradient


class InnerObjective(ABC):  # noqa: B024 - both losses have a default
    """What the inner steps descend, with the loop's ``theta`` (the rule's and its own, one dict) passed in explicitly.

    Both losses see ONE task, are pure, and must work under ``torch.func.vmap``. By default each is the family's loss.

    Example:
        >>> class Ridge(InnerObjective):
        ...     def init_theta(self, generator):
        ...         return {"log_decay": torch.tensor(-3.0)}
        ...     def loss(self, theta, family, params, batch):
        ...         squares = sum(p.square().sum() for p in params.values())
        ...         return family.loss(params, batch) + theta["log_decay"].exp() * squares
        >>> loop = InnerLoop(family, rule, inner_objective=Ridge())
    """

    penalty: Penalty | None = None
    """Optional, in place of a ``loss`` of one's own: a term that is added to the family's loss.

    The engine then evaluates the family's loss once, for what is descended and what is read."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Draw the meta-parameters of its own that meta-training starts from; none by default."""
        return {}

    def theta_scale(self) -> dict[str, float | Tensor]:
        """Say how large a step of size one is for each meta-parameter of its own; see ``UpdateRule.theta_scale``."""
        return {}

    def loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Batch) -> Tensor:
        """Return the scalar that the inner steps descend, on the "train" split."""
        value = family.loss(params, batch)
        return value if self.penalty is None else value + self.penalty.value(theta, params)

    def outer_loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Batch) -> Tensor:
        """Return the scalar that meta-objectives read, on either split."""
        return family.loss(params, batch)

    @property
    def descends_task_loss(self) -> bool:
        """Whether the inner steps descend the family's loss, and the penalty where there is one."""
        return getattr(self.loss, "__func__", None) is InnerObjective.loss

    @property
    def reads_task_loss(self) -> bool:
        """Whether the outer loss is the family's."""
        return getattr(self.outer_loss, "__func__", None) is InnerObjective.outer_loss

    @property
    def is_task_loss(self) -> bool:
        """Whether both losses are the family's, and nothing else."""
        return self.descends_task_loss and self.reads_task_loss and self.penalty is None


@final
@dataclass(frozen=True)
class TaskLoss(InnerObjective):
    """The family's own loss, inside and outside."""
