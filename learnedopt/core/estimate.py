"""What an estimator returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from learnedopt.core.tree import Theta


class Estimate(NamedTuple):
    """An estimate: ``loss`` the objective (scalar, mean over tasks), ``grads`` its gradient with respect to theta.

    ``carry`` is where the next estimate goes on from, without a graph, or None when the episode is over. ``info`` holds
    what is worth reporting: ``losses`` (num_steps,), the mean inner-loss curve, and what the estimator adds.

    An estimator that leaves tasks out by itself says so in ``info``: ``num_tasks``, over how many tasks the estimate is
    a mean, and ``failed_tasks``, the positions in the carry of those that have newly turned out not to be finite.
    """

    loss: Tensor
    grads: Theta
    carry: Any
    info: dict[str, Any]

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are."""
        return bool(self.loss.isfinite()) and all(bool(g.isfinite().all()) for g in self.grads.values())
