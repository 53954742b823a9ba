"""What vetting calls: a loop's losses, on copies of what they are given: nothing of the caller's is at risk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.checks import NotFinite
from learnedopt.core.task import Batch, Tasks
from learnedopt.core.tree import Params, Theta

if TYPE_CHECKING:
    from learnedopt.core.carry import Carry
    from learnedopt.core.inner import InnerLoop

Loss = Callable[[Theta, Params, Batch], Tensor]
"""Of ONE task."""


@dataclass(frozen=True)
class Case:
    """One or two tasks of a loop, batched; their batch is that of the carry's step, on the "train" split.

    ``together``: whether the loop runs the two at once.
    """

    loop: InnerLoop
    theta: Theta
    tasks: Tasks
    params: Params
    batch: Batch
    step: int
    together: bool

    @property
    def num_tasks(self) -> int:
        """One or two."""
        return tree.size(self.params)

    def of_task(self, i: int) -> tuple[Params, Batch]:
        """Return one task's parameters and batch (views)."""
        params, batch = (tree.squeeze(tree.narrow(x, i, i + 1)) for x in (self.params, self.batch))
        return params, batch


def case_of(loop: InnerLoop, theta: Theta, carry: Carry) -> Case:
    """Copy the first two tasks of a begun carry, and theta; ask the family for their batch."""
    count = min(2, tree.size(carry.params))
    tasks, params = tree.tree_map(_own, tree.narrow((carry.tasks, carry.params), 0, count))
    two = carry._replace(tasks=tasks, params=params, state=())
    # Not detached: whether the batch has a graph is one of the questions.
    batch = tree.tree_map(lambda x: x.clone(), loop.batch(tasks, carry.step, "train"))
    together = count > 1 and len(loop.split(two)) == 1
    return Case(loop, tree.tree_map(_own, theta), tasks, params, batch, carry.step, together)


def _own(x: Any) -> Any:
    # The clone of a tensor that was made under inference_mode is an ordinary one.
    return x.clone().detach() if isinstance(x, Tensor) else x


def losses_of(loop: InnerLoop) -> dict[str, Loss]:
    """Return by name what the inner steps descend and, where it is another function, what the outer level reads."""
    objective, family = loop.inner_objective, loop.family

    def descended(theta: Theta, params: Params, batch: Batch) -> Tensor:
        return objective.loss(theta, family, params, batch)

    def read(theta: Theta, params: Params, batch: Batch) -> Tensor:
        return objective.outer_loss(theta, family, params, batch)

    return {"inner loss": descended, "outer loss": read} if not objective.is_task_loss else {"loss": descended}


def call_number(loss: Callable[[Theta, Params, Batch], object], theta: Theta, params: Params, batch: Batch) -> Tensor:
    """Call a loss of one task.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is no scalar.
        NotFinite: it is not finite.
    """
    value = loss(theta, params, batch)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the loss of one task must be a scalar tensor, got a {type(value).__name__}; do not call item()"
        )
    if value.ndim:
        raise ValueError(f"the loss of one task must be a scalar, got shape {tuple(value.shape)}; use mean() or sum()")
    if not torch.isfinite(value):
        raise NotFinite(f"the loss is {value.item()} at the start; check data and initialisation")
    return value
