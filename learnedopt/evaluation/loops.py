"""The inner loops that are evaluated."""

from __future__ import annotations

from learnedopt.core.execution import Execution
from learnedopt.core.inner import InnerLoop
from learnedopt.core.inner_objective import InnerObjective, TaskLoss
from learnedopt.core.rule import UpdateRule
from learnedopt.core.task import TaskFamily


def make_loop(
    family: TaskFamily, rule: UpdateRule, execution: Execution, inner_objective: InnerObjective | None = None
) -> InnerLoop:
    """Return the loop of an inner objective, None for the task's loss."""
    if inner_objective is None or isinstance(inner_objective, TaskLoss):
        return InnerLoop(family, rule, execution)
    return InnerLoop(family, rule, execution, inner_objective=inner_objective)  # pyright: ignore[reportCallIssue]
