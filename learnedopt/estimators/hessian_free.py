"""An inner solver of second order: Newton directions by conjugate gradient, and a line search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, detach, join
from learnedopt.core.counts import require_count
from learnedopt.core.execution import TaskMap
from learnedopt.core.inner import InnerLoop
from learnedopt.core.tree import Params, Theta
from learnedopt.estimators.linear_solvers import ConjugateGradient
from learnedopt.estimators.systems import OptimalitySystem


@final
@dataclass(frozen=True)
class HessianFree:
    """Minimise the inner objective by Newton-CG (Martens 2010; Nocedal and Wright 2006, algorithm 7.1).

    An ``inner`` solver of ``Implicit``, as iMAML's Hessian-free variant has it (Rajeswaran et al. 2019): each inner
    step is one Newton step, on that step's train batch. Its direction solves ``H d = -gradient`` by Hessian-vector
    products; its length is halved until the objective falls by ``decrease`` times what its slope promises (Armijo).
    Every task has its own coefficients, stops and lengths.

    Where the objective is not convex, conjugate gradient stops before the first direction that does not curve upwards,
    with what it has found by then, and with the steepest descent at the first iteration (Steihaug 1983): a direction
    of descent in either case. A task of which no length is accepted stays where it is for that step, so that no step
    raises a task's objective by more than round-off.

    Args:
        num_cg_iterations: of a Newton step, at most.
        max_backtracks: halvings of a step's length, at most.
        decrease: what part of the promised decrease is enough, in (0, 1/2); above that Newton steps are refused.

    The rule gives the start; its ``update`` is not called, and its state stays as it begun.

    Raises:
        ValueError: the inner objective is the family's loss alone, whose minimum theta does not move.

    Example:
        >>> loop = InnerLoop(family, make("maml", template=template), inner_objective=Proximal(template, 2.0))
        >>> estimator = Implicit(num_steps=5, inner=HessianFree(num_cg_iterations=10))
    """

    num_cg_iterations: int = 10
    max_backtracks: int = 10
    decrease: float = 1e-4

    def __post_init__(self) -> None:
        require_count("num_cg_iterations", self.num_cg_iterations, least=1)
        require_count("max_backtracks", self.max_backtracks)
        if not 0 < self.decrease < 0.5:
            raise ValueError(f"decrease={self.decrease!r} is a part of the promised decrease; pass one in (0, 0.5)")

    def __call__(self, loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> Carry:
        """Return the carry after ``num_steps`` Newton steps, without a graph; a fresh carry is begun first."""
        require_count("num_steps", num_steps)
        if loop.inner_objective.is_task_loss:
            raise ValueError(
                "HessianFree minimises the inner objective, and theta moves no minimum of the family's loss; pass "
                "one that theta enters, such as inner_objective=Proximal(template, 2.0), or take the rule's steps"
            )
        theta = tree.detach(theta)
        chunks: list[Carry] = []
        for chunk in loop.split(detach(loop.begin(theta, carry))):
            start = chunk
            for _ in range(num_steps):
                chunk = self._step(loop, theta, start, chunk)
            chunks.append(chunk)
        return join(chunks)

    def _step(self, loop: InnerLoop, theta: Theta, start: Carry, at: Carry) -> Carry:
        # At the next step's count, so that the system is that of this step's batch.
        at = at._replace(step=at.step + 1)
        system = OptimalitySystem(loop, theta, start, at)
        downhill = -tree.ravel(system.grads).detach()
        solver = ConjugateGradient(self.num_cg_iterations, truncate=True)
        direction = solver.solve(system.operator, downhill).x
        # Round-off may turn a direction that is all but level: such a task descends along its gradient.
        direction = torch.where(((direction * downhill).sum(1) < 0)[:, None], downhill, direction)
        return at._replace(params=self._search(loop, theta, at, direction, downhill))

    def _search(self, loop: InnerLoop, theta: Theta, at: Carry, direction: Tensor, downhill: Tensor) -> Params:
        """Return the parameters after each task's longest acceptable step along its row of ``direction``."""
        batch = loop.batch(at.tasks, at.step - 1, "train")
        ways = dict(zip(at.params, tree.unravel(direction, list(at.params.values())), strict=True))
        before = _objective(loop, theta, at.params, batch)
        promised = (direction * downhill).sum(1)
        # Close to a minimum the decrease is lost in the objective's round-off, while the step is still right.
        noise = torch.finfo(before.dtype).eps * before.abs()
        length, accepted = torch.ones_like(before), torch.zeros_like(before, dtype=torch.bool)
        for _ in range(self.max_backtracks + 1):
            trial = {k: p + _each(length, p) * ways[k] for k, p in at.params.items()}
            enough = _objective(loop, theta, trial, batch) <= before - self.decrease * length * promised + noise
            accepted = accepted | enough  # what is not finite is never enough
            if accepted.all():
                break
            length = torch.where(accepted, length, 0.5 * length)
        return {k: torch.where(_each(accepted, p), p + _each(length, p) * ways[k], p) for k, p in at.params.items()}


def _objective(loop: InnerLoop, theta: Theta, params: Params, batch: tree.Tree) -> Tensor:
    """Return each task's inner objective (num_tasks,), without a graph."""
    task_map = TaskMap(tree.size(params))

    def loss(theta: Theta, params: Params, batch: tree.Tree) -> Tensor:
        return loop.inner_objective.loss(theta, loop.family, params, batch)

    with torch.no_grad():
        return task_map.rebatch(task_map.apply_theta(loss, theta, task_map.unbatch(params), task_map.unbatch(batch)))


def _each(numbers: Tensor, like: Tensor) -> Tensor:
    """Return one number a task (num_tasks,), shaped to go with ``like`` (num_tasks, ...) and in its dtype."""
    shaped = numbers.reshape(-1, *[1] * (like.ndim - 1))
    return shaped if shaped.dtype is torch.bool else shaped.to(like.dtype)
