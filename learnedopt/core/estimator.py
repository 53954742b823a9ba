"""How the meta-gradient is found: the interface of all estimators, and the checks that they share.

The checks run once per loop, before its first inner step, and answer the questions whose wrong answer would otherwise
be a silent zero or a silent scale: is the objective a mean over tasks, and does every meta-parameter reach it?
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from learnedopt.core import checks, shares, tree
from learnedopt.core.carry import Carry, Rollout, Tape, detach, narrow
from learnedopt.core.containers import is_tuple
from learnedopt.core.estimate import Estimate
from learnedopt.core.execution import TaskMap
from learnedopt.core.inner import InnerLoop, InnerSolver
from learnedopt.core.inner_gradient import step_gradient
from learnedopt.core.objective import MetaObjective, TaskMean, read_directly
from learnedopt.core.rule import State
from learnedopt.core.task import Batch, Tasks
from learnedopt.core.tree import Params, Theta
from learnedopt.core.vetting import vet
from learnedopt.core.vetting.purity import graph_leaves


class Recording(NamedTuple):
    """What an estimate holds of the inner loop while it back-propagates: the tape of its last ``num_steps`` steps.

    With ``segment`` only so many steps at a time, and where each segment begins. ``goes_on``: whether each chunk's end
    is kept until all chunks are done. ``whole`` makes an estimator that records so many steps at once.
    """

    num_steps: int
    tape: Tape
    whole: Callable[[int], GradientEstimator]
    segment: int | None = None
    goes_on: bool = False


class GradientEstimator(ABC):
    """An estimator of the gradient of a meta-objective with respect to theta.

    To use one, call ``start`` and ``estimate``. One's own defines ``estimate``; all other members have an answer that
    serves where its carry is a ``Carry``, or made of some, and it draws nothing.
    """

    inner: InnerSolver | None = None
    """What solves the inner problem in place of the rule's own steps; validation and evaluation take it too."""

    renews_tasks: ClassVar[bool] = False
    """Whether it draws fresh tasks by itself, so that its carries go on where an episode ends."""

    @property
    def takes_second_derivatives(self) -> bool:
        """Whether estimates take second derivatives of the inner objective; they are vetted where it may be so."""
        return True

    @property
    def recording(self) -> Recording | None:
        """What it records, from which its memory is predicted; None where memory does not grow with its steps."""
        return None

    @abstractmethod
    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Any) -> Estimate:
        """Run the inner loop from ``carry`` and return the objective and its gradient, a mean over the tasks."""

    def start(self, loop: InnerLoop, theta: Theta, tasks: Tasks, generator: torch.Generator) -> Any:
        """Return the carry of a fresh episode: any pytree of tensors and numbers that the estimator owns.

        A ``Carry`` by default. ``generator`` is for an estimator that draws numbers of its own, into its carry.
        """
        return loop.start(tasks)

    def forms(self, loop: InnerLoop, theta: Theta, carry: Any) -> list[Any]:
        """Return carries of every structure that one may come to have which starts as ``carry``, of the same tasks.

        A checkpoint's is compared with them: classes, keys, lengths of tuples, types, and shapes but for the number of
        tasks; where all of them have None there may be anything. By default those of a ``Carry``, as it is and begun;
        of another nest none, which says that nothing is known of it: only the ``Carry``s in it are compared.
        """
        return [carry, loop.begin(theta, carry)] if isinstance(carry, Carry) else []

    def require_carry(self, theta: Theta, carry: Any) -> None:  # noqa: B027 - by default nothing is known of it
        """Raise TypeError or ValueError where a carry is none of this estimator's, as far as it can be told at once."""

    def count_tasks(self, carry: Any) -> int:
        """Return of how many tasks a carry is."""
        return shares.count(carry, type(self).__name__)

    def narrow(self, carry: Any, start: int, stop: int) -> Any:
        """Return the carry of tasks ``start`` to ``stop - 1`` alone; ``join`` puts such shares together again.

        The mean of the shares' estimates, weighted by their numbers of tasks, must be the estimate of all: what is
        drawn for a task must not depend on which share it lies in. By default ``Carry``s are cut, and numbers are taken
        to be of all tasks; ValueError where the carry holds anything else, or the estimate is not such a mean.
        """
        return shares.take(carry, start, stop, type(self).__name__)

    def join(self, carries: Sequence[Any]) -> Any:
        """Return the carry of all tasks of these shares, in this order; some of the tasks may be missing."""
        return shares.put_together(carries, type(self).__name__)

    @property
    def num_parts(self) -> int:
        """Into how many parts a single task's estimate can be cut: perturbation pairs, for one. 1 where it cannot."""
        return 1

    def narrow_parts(self, carry: Any, start: int, stop: int) -> Any:
        """Return the carry of one task with parts ``start`` to ``stop - 1`` of its estimate alone.

        The mean of the parts' estimates, weighted by ``info["num_tasks"]``, must be the task's: what part of the task
        each is a mean over, 0 where it is not finite.
        """
        raise shares.Indivisible(f"an estimate of {type(self).__name__} of a single task cannot be cut")

    def join_parts(self, carries: Sequence[Any]) -> Any:
        """Return the carry of all parts of a task, from its parts in order."""
        raise shares.Indivisible(f"an estimate of {type(self).__name__} of a single task cannot be cut")

    def is_part(self, carry: Any) -> bool:
        """Return whether a carry is one of ``narrow_parts``."""
        return False

    def standing(self, loop: InnerLoop, carry: Any) -> list[tuple[InnerLoop, Carry, int | None]]:
        """Return the inner loops as they stand, and how many steps an estimate takes from there (None: not known), for
        whoever looks for what is wrong with a task. By default the ``Carry``s in the carry."""
        return [(loop, each, None) for each in shares.carries_in(carry)]


def as_leaves(theta: Theta) -> Theta:
    """Return theta's values as leaves of a new graph.

    Raises:
        ValueError: there are none, or one is not of real floating-point numbers.
    """
    if not theta:
        raise ValueError(
            "theta is empty: neither rule nor inner objective has meta-parameters, so there is nothing to differentiate"
        )
    checks.require_real(theta)
    return {k: v.detach().requires_grad_() for k, v in theta.items()}


def check_loop(loop: InnerLoop, theta: Theta, carry: Carry, *, second_derivatives: bool) -> None:
    """Vet a loop once, before its first estimate: is what it differentiates a function, and differentiated right?

    Raises:
        ValueError: as ``InnerLoop.begin``; what was found, and what to do. ``Execution(vet=False)`` leaves vetting out.
    """
    theta = tree.detach(theta)
    loop.check_start(theta, carry)
    vetted = ("vetted", True) in loop.cache or ("vetted", second_derivatives) in loop.cache
    if vetted or not loop.execution.vet:
        return

    def look(*two: int) -> None:
        at = loop.begin(theta, narrow(carry, *two))
        if second_derivatives:  # what the family itself says comes first: it may name the layer
            batch = loop.batch(at.tasks, at.step, "train")
            checks.require_faultless(loop.family, at.params, batch, second_derivatives=True)
        vet(loop, theta, at, second_derivatives=second_derivatives)

    checks.on_finite_tasks(tree.size(carry.params), look)
    loop.cache.put(("vetted", second_derivatives), True)


def call_objective(
    objective: Callable[[InnerLoop, Theta, Rollout], object], loop: InnerLoop, theta: Theta, rollout: Rollout
) -> tuple[Tensor, Carry | None]:
    """Return the objective's scalar, and the carry that training goes on from where it names one."""
    result = objective(loop, theta, rollout)
    value, carry = result if is_tuple(result) else (result, None)
    if not isinstance(value, Tensor) or value.ndim:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"a meta-objective must return a scalar tensor, got {got}; take the mean over tasks")
    return value, carry


def check_objective(
    loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry, num_steps: int, *,
    end_only: bool = False, from_start: bool = True,
) -> None:  # fmt: skip
    """Check once that the objective can be read of this loop, that it is a mean over tasks and, for ``end_only``, that
    it reads the end alone.

    Without ``from_start`` the start lies before what is recorded, and an objective that reads it is refused as well.

    The objective is called on stand-in rollouts of two tasks that stay where they start, with falling losses.

    Raises:
        ValueError: it is no mean over tasks, it reads the losses along the way under ``end_only``, what it says to read
            of theta is not there, or what its own ``check`` finds.
    """
    name = getattr(objective, "__name__", type(objective).__name__)
    if isinstance(objective, type) or not callable(objective):
        raise TypeError(
            f"the objective {objective!r} cannot be called on rollouts; pass an instance, such as FinalLoss()"
        )
    if isinstance(objective, TaskMean):
        if end_only and not objective.end_only:
            raise ValueError(_reads_path(name))
        if not loop.cache.seen(objective, "own check", num_steps):
            read_directly(objective, theta)
            objective.check(loop, theta, carry, num_steps)
            loop.cache.saw(objective, "own check", num_steps)
        return
    if loop.cache.seen(objective, num_steps, end_only, from_start):
        return
    theta = tree.detach(theta)
    begun = loop.begin(theta, narrow(carry, 0, min(2, tree.size(carry.params))))
    start_losses = loop.losses(theta, begun, "train").detach()
    fall = torch.linspace(1.0, 0.5, num_steps, dtype=start_losses.dtype, device=start_losses.device)
    spread = torch.linspace(1.0, 2.0, len(start_losses), dtype=fall.dtype, device=fall.device)  # starts may be alike
    losses = (fall[:, None] * start_losses * spread).requires_grad_()
    first, last = (0, 1), (tree.size(begun.params) - 1, tree.size(begun.params))
    values: list[Tensor] = []
    starts: list[Tensor] = []
    with torch.enable_grad():
        for picks in ([first, last], [first], [last]):
            part = tree.concatenate([tree.narrow((begun.tasks, begun.params, begun.state), *pick) for pick in picks])
            part_losses = torch.cat([losses[:, slice(*pick)] for pick in picks], dim=1)
            stand_in = Carry(part[0], part[1], part[2], begun.step)
            start = stand_in._replace(params={k: p.detach().clone().requires_grad_() for k, p in part[1].items()})
            starts += start.params.values()
            rollout = Rollout(start, stand_in._replace(step=begun.step + num_steps), part_losses)
            values.append(call_objective(objective, loop, theta, rollout)[0])
    found: list[float] = tree.numbers(torch.stack([value.detach() for value in values]))
    both, *alone = found
    eps = max(torch.finfo(x.dtype).eps for x in (losses, values[0]) if x.is_floating_point())
    tolerance = eps**0.5 * max(map(abs, (both, *alone)))
    if abs(both - sum(alone) / 2) > tolerance:  # False for what is not finite, of which nothing can be said
        raise ValueError(
            f"the objective {name} is not a mean over tasks: on two tasks it gives {both:.6g}, on each alone "
            f"{alone[0]:.6g} and {alone[1]:.6g}; take the mean over the tasks' dimension"
        )
    if (end_only or not from_start) and values[0].requires_grad:
        through: list[Tensor | None] = [*torch.autograd.grad(values[0], starts, allow_unused=True, retain_graph=True)]
        if any(g is not None for g in through):
            raise ValueError(
                f"{name} reads the rollout's start, through which no gradient flows here; use an objective of the end, "
                "such as FinalLoss, or Unrolled"
            )
    if end_only and values[0].requires_grad:
        along: list[Tensor | None] = [*torch.autograd.grad(values[0], losses, allow_unused=True)]
        if along[0] is not None:
            raise ValueError(_reads_path(name))
    loop.cache.saw(objective, num_steps, end_only, from_start)


def _reads_path(name: str) -> str:
    return (
        f"only the solution of the inner problem counts here, but {name} reads the losses along the way; use an "
        "objective of the end, such as FinalLoss, or an unrolled estimator"
    )


def check_paths(
    loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int, tape: Tape, *, from_start: bool = True,
    objective: MetaObjective | None = None,
) -> list[str]:  # fmt: skip
    """Check that every meta-parameter can reach the parameters at the end, by the structure of the rule alone.

    What ``objective`` says it reads from theta itself has a path whatever the rule is.

    The rule is run for a few updates of one task on stand-in gradients; the family is called only where theta may enter
    the inner objective.

    Args:
        from_start: whether the graph reaches back to the start, or covers only the last ``num_steps`` steps.

    Returns:
        The names that enter through the start alone, where the carry is past it: their gradient is zero in this window.

    Raises:
        ValueError: a meta-parameter has no path to the objective.
    """
    read = frozenset[str]() if objective is None else frozenset(read_directly(objective, theta))
    key = ("paths", carry.state is None, num_steps, tape, from_start, read)
    if key not in loop.cache:
        few = min(num_steps, 3)  # by the third update of most rules whatever enters a state has come out of it
        fresh = _reached(loop, theta, carry, few, tape, through_start=from_start)
        if theta.keys() - fresh - read and num_steps > few:
            fresh = _reached(loop, theta, carry, num_steps, tape, through_start=from_start)
        lost = sorted(theta.keys() - fresh - read)
        if lost:
            raise ValueError(no_path(lost, f"{num_steps} recorded inner steps with the {tape.value} tape"))
        begun = fresh if carry.state is None else _reached(loop, theta, carry, few, tape, through_start=False)
        loop.cache.put(key, sorted(fresh - begun - read))
    return loop.cache.get(key)


def no_path(names: Sequence[str], how: str) -> str:
    """Return the message for meta-parameters that cannot reach the objective."""
    return (
        f"the meta-parameters {list(names)} have no path to the objective through {how}, so their meta-gradient would "
        "be a silent zero; take more steps, choose another tape or estimator, or fix them instead of learning them "
        "(an objective that reads them from theta itself says so in reads_theta)"
    )


def _reached(
    loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int, tape: Tape, *, through_start: bool
) -> set[str]:
    """Return the meta-parameters that reach the parameters at the end, or the outer loss directly, of one task."""
    leaves = as_leaves(theta)
    one = narrow(detach(carry), 0, 1)
    with torch.enable_grad():
        params, state = loop.init_task(leaves, tree.squeeze(one.params))
        if not through_start:
            params, state = tree.detach(params), tree.detach(state)
        batch = None if loop.inner_objective.is_task_loss else tree.squeeze(loop.batch(one.tasks, one.step, "train"))
        total = torch.zeros(())
        _refuse_captured(loop, leaves, tree.detach(params), tree.detach(state))
        for _ in range(num_steps):
            params = {k: p if p.requires_grad else p.requires_grad_() for k, p in params.items()}
            stand_in, outer = _stand_ins(loop, leaves, params, batch, tape)
            total = total + outer
            loss = next(iter(params.values())).new_ones(())
            params, state = loop.move(TaskMap(1), leaves, stand_in, state, params, loss)
        total = sum((p.sum() for p in params.values()), total)
        if not loop.inner_objective.reads_task_loss:
            total = total + loop.inner_objective.outer_loss(leaves, loop.family, params, batch)
        if not total.requires_grad:
            return set()
        grads: list[Tensor | None] = [*torch.autograd.grad(total, list(leaves.values()), allow_unused=True)]
    return {k for k, g in zip(leaves, grads, strict=True) if g is not None}


def _refuse_captured(loop: InnerLoop, leaves: Theta, params: Params, state: State) -> None:
    """Raise ValueError where an update reaches a tensor that requires a gradient and is not theta's."""
    ones = {k: torch.ones_like(p) for k, p in params.items()}
    moved = loop.move(TaskMap(1), leaves, ones, state, params, next(iter(ones.values())).new_ones(()))
    mine = {id(x) for x in leaves.values()}
    reached = [leaf for x in tree.leaves(moved) if x.requires_grad for leaf in graph_leaves(x)]
    strange = sorted({tuple(x.shape) for x in reached if id(x) not in mine})
    if strange:
        raise ValueError(
            f"an update of {type(loop.rule).__name__} reaches tensors of shapes {strange} that require a gradient and "
            "are not theta's, so that what they would learn is lost silently; put them into theta (init_theta), or "
            "detach() them"
        )


def _stand_ins(loop: InnerLoop, theta: Theta, params: Params, batch: Batch, tape: Tape) -> tuple[Params, Tensor]:
    """Return gradients of one, with theta's part of the inner objective's own added, and the outer loss where theta may
    enter it: the family itself is called for an inner objective other than its loss alone."""
    ones = {k: torch.ones_like(p) for k, p in params.items()}
    if loop.inner_objective.is_task_loss:
        return ones, torch.zeros(())
    found = step_gradient(loop.family, loop.inner_objective, TaskMap(1), theta, params, batch, tape)
    grads = {k: 1.0 + found.grads[k] for k in params} if tape is Tape.FULL else ones
    return grads, torch.zeros(()) if loop.inner_objective.reads_task_loss else found.outer
