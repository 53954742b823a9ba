"""One bad task does not cost the meta-batch: an estimate over the tasks that are finite, and which are not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from learnedopt.core.carry import narrow
from learnedopt.core.estimator import Estimate, GradientEstimator
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import MetaObjective
from learnedopt.core.shares import Indivisible, carries_in
from learnedopt.core.tree import Theta
from learnedopt.training import meta_batch
from learnedopt.training.faults import Fault, first_fault

FAILED = "failed_tasks"
"""What ``info`` calls the number of tasks of a meta-batch that have failed, now or earlier in the episode."""


class Failure(NamedTuple):
    """A task that is not finite: its position in the meta-batch, and where that shows first."""

    position: int
    fault: Fault


class Found(NamedTuple):
    """An estimate over the tasks that are finite.

    Args:
        estimate: their mean; where none is finite, or tasks cannot be told apart, one that is not finite either.
        weight: over how many tasks it is a mean, a part of one for parts of its estimate: 0 where none is finite, all
            of them where they cannot be told apart, so that no mean with it is finite.
        places: the positions in the meta-batch of the tasks that its carry is of; an estimator that leaves tasks out by
            itself keeps them there.
        failures: the tasks that have failed now.
    """

    estimate: Estimate
    weight: float
    places: tuple[int, ...]
    failures: list[Failure]


class Remaining(NamedTuple):
    """The carry of what is left of a meta-batch, and the positions of its tasks there."""

    carry: Any
    places: tuple[int, ...]


def remaining(carry: Any, places: tuple[int, ...], num_tasks: int) -> Any:
    """Return what a training keeps of its meta-batch between estimates: the carry itself while all tasks are there."""
    return carry if carry is None or len(places) == num_tasks else Remaining(carry, places)


def opened(kept: Any, num_tasks: int) -> tuple[Any, tuple[int, ...]]:
    """Return the carry that was kept, and the positions of its tasks."""
    return (kept.carry, kept.places) if isinstance(kept, Remaining) else (kept, tuple(range(num_tasks)))


@dataclass(frozen=True)
class _Asked:
    estimator: GradientEstimator
    loop: InnerLoop
    theta: Theta
    objective: MetaObjective
    apart: bool


def estimate_finite(
    estimator: GradientEstimator, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Any,
    places: Sequence[int], *, micro_batch: int | None = None, apart: bool = True,
) -> Found:  # fmt: skip
    """Estimate over the tasks whose loss and gradient are finite; the others' carry is dropped.

    An estimate that is finite costs nothing more. One that is not is taken apart: each part is estimated again, and
    again in parts where it is not finite, down to single tasks. Parts are single tasks at once where the loop runs one
    at a time, and halves where it runs them together. What comes out equals the estimate of a meta-batch of the finite
    tasks alone, up to rounding. It is a function of its arguments: so ranks may each call it with their own share, and
    take the mean of what they find, weighted by ``weight``.

    Args:
        estimator: estimates, and says which share of a carry is whose.
        loop: the loop.
        theta: the loop's, leaves.
        objective: the objective.
        carry: of a meta-batch, or of a share or what is left of it.
        places: the positions of its tasks in the meta-batch.
        micro_batch: how many tasks are estimated at once, in which case memory is theirs; None for all.
        apart: without it, an estimate that is not finite is returned as it is.

    Returns:
        What was found. The estimate's ``info["failed_tasks"]``, there where any has failed, counts those of
        ``failures`` and those that the estimator itself leaves out.

    Raises:
        Indivisible: there is a ``micro_batch``, and the estimator's meta-batches cannot be estimated in shares.
    """
    asked, places = _Asked(estimator, loop, theta, objective, apart), tuple(places)
    if micro_batch is None or len(places) <= micro_batch:
        return _of_share(asked, carry, places)
    bounds = meta_batch.bounds(len(places), -(-len(places) // micro_batch))
    return _in_shares(asked, carry, places, bounds)


def _of_share(asked: _Asked, carry: Any, places: tuple[int, ...]) -> Found:
    estimate = asked.estimator.estimate(asked.loop, asked.theta, asked.objective, carry)
    info = dict(estimate.info)
    left_out, weight = info.pop("failed", []), info.pop("num_tasks", len(places))
    whole = Found(estimate._replace(info=info), len(places), places, [])
    # Of 0 the estimator itself has left out all tasks, and knows when they return. Of a part alone nobody knows whether
    # its task has failed.
    if estimate.finite or not weight or asked.estimator.is_part(carry):
        return whole._replace(weight=weight, failures=[_failure(asked, carry, i, places) for i in left_out])
    if not asked.apart:
        return whole
    if len(places) == 1:
        return Found(estimate, 0.0, (), [Failure(places[0], _fault(asked, carry, estimate))])
    try:
        return _in_shares(asked, carry, places, _halves_or_singles(asked, len(places)))
    except Indivisible:
        return whole


def _in_shares(asked: _Asked, carry: Any, places: tuple[int, ...], bounds: list[tuple[int, int]]) -> Found:
    shares = [asked.estimator.narrow(carry, *each) for each in bounds]
    found = [_of_share(asked, share, places[slice(*each)]) for share, each in zip(shares, bounds, strict=True)]
    return together(asked.estimator, found)


def together(estimator: GradientEstimator, found: Sequence[Found]) -> Found:
    """Return what was found in shares of a meta-batch as one, the shares' carries joined."""
    failures = [failure for each in found for failure in each.failures]
    kept = [each for each in found if each.places] or [*found[:1]]
    weights = [each.weight for each in kept]
    estimate = meta_batch.weighted_mean(estimator, [each.estimate for each in kept], weights)
    num_failed = sum(each.estimate.info.get(FAILED, len(each.failures)) for each in found)
    info = estimate.info | ({FAILED: num_failed} if num_failed else {})
    places = tuple(place for each in kept for place in each.places)
    return Found(estimate._replace(info=info), sum(weights), places, failures)


def _halves_or_singles(asked: _Asked, num_tasks: int) -> list[tuple[int, int]]:
    # Where tasks run one by one, each alone costs no more than all of them once again.
    at_once = asked.loop.execution.chunk_size
    together = at_once is None and next(iter(asked.theta.values())).is_cuda
    return meta_batch.bounds(num_tasks, 2 if together or (at_once or 1) > 1 else num_tasks)


def _failure(asked: _Asked, carry: Any, i: int, places: tuple[int, ...]) -> Failure:
    """Return one that the estimator itself has found and left out."""
    try:
        alone = carry if len(places) == 1 else asked.estimator.narrow(carry, i, i + 1)
    except Indivisible:
        alone = [narrow(each, i, i + 1) for each in carries_in(carry)]
    return Failure(places[i], _fault(asked, alone, None))


def _fault(asked: _Asked, carry: Any, estimate: Estimate | None) -> Fault:
    return first_fault(asked.estimator, asked.loop, asked.theta, carry, estimate)
