"""A meta-batch in shares: its estimate is the mean of the shares' estimates, weighted by their numbers of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from learnedopt.core import shares
from learnedopt.core.estimator import Estimate, GradientEstimator

COUNTS = ("compile_seconds", "dropped", "clipped", "instead", "failed_tasks")
"""Of what estimators report beside the mean: what adds up over shares, as every whole number does."""
WORST = ("residual", "iterations", "stationarity", "not_finite")
"""What is the worst over tasks, or counts what all shares see: pairs."""
OF_ALL = ("variance", "gradient_variance")
"""What the shares' own say nothing of: the variance over pairs of the mean over all tasks."""


def bounds(num_tasks: int, num_shares: int) -> list[tuple[int, int]]:
    """Return where each of the shares of a meta-batch starts and stops: as even as can be, the first ones larger.

    Raises:
        ValueError: there are more shares than tasks.
    """
    if not 1 <= num_shares <= num_tasks:
        raise ValueError(
            f"a meta-batch of {num_tasks} tasks cannot be cut into {num_shares} shares: each needs a task at least; "
            "take more tasks (num_tasks), or fewer shares"
        )
    return [shares.even(num_tasks, num_shares, index) for index in range(num_shares)]


def join(estimator: GradientEstimator, carries: Sequence[Any]) -> Any:
    """Return the carry of all shares, in this order; None where their episode is over."""
    if all(carry is None for carry in carries):
        return None
    if any(carry is None for carry in carries):
        raise ValueError(
            f"the episode of {type(estimator).__name__} is over for some of its tasks and goes on for others: a "
            "meta-batch in shares must end at one time; estimate all tasks at once"
        )
    return carries[0] if len(carries) == 1 else estimator.join(carries)


def weighted_mean(estimator: GradientEstimator, estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Return the estimate of all shares, ``sum w_i estimate_i / sum w_i``, with their carries joined.

    Args:
        estimator: theirs.
        estimates: of the shares, in the order of their tasks.
        weights: how many tasks each is a mean over; one of 0 says nothing, and its carry goes on. Where all are 0, the
            mean is the first estimate.
    """
    if len(estimates) == 1:
        return estimates[0]
    carry, total = join(estimator, [each.carry for each in estimates]), sum(weights)
    if not total:
        return estimates[0]._replace(carry=carry)
    parts = [weight / total for weight in weights if weight]
    told = [each for each, weight in zip(estimates, weights, strict=True) if weight]
    loss = mean_of([each.loss for each in told], parts)
    grads = {k: mean_of([each.grads[k] for each in told], parts) for k in told[0].grads}
    return Estimate(loss, grads, carry, mean_info([each.info for each in told], parts))


def mean_of(values: Sequence[Tensor], parts: Sequence[float]) -> Tensor:
    """Return ``sum parts_i values_i``."""
    found = parts[0] * values[0]
    for part, x in zip(parts[1:], values[1:], strict=True):
        found += part * x.to(found)
    return found


def mean_info(infos: Sequence[dict[str, Any]], parts: Sequence[float]) -> dict[str, Any]:
    """Return what the shares' estimates report, as one.

    Whole numbers are added up; other numbers, and the curve of ``losses`` where all have one of a length, are means;
    ``zero_gradient`` is what all name. ``COUNTS``, ``WORST`` and ``OF_ALL`` are exceptions. Anything else is left out.
    """
    found: dict[str, Any] = {}
    for key in dict.fromkeys(k for info in infos for k in info):
        values = [info[key] for info in infos if key in info]
        everywhere = len(values) == len(infos)
        if key == "zero_gradient":
            named: list[set[str]] = [{*info.get(key, ())} for info in infos]
            names = named[0].intersection(*named[1:])
            found |= {key: sorted(names)} if names else {}
        elif key == "losses":
            if everywhere and len({x.shape for x in values}) == 1:
                found[key] = mean_of(values, parts)
        elif key in OF_ALL or any(isinstance(x, bool) or not isinstance(x, int | float) for x in values):
            continue
        elif key in WORST:
            found[key] = max(values)
        elif key in COUNTS or all(isinstance(x, int) for x in values):
            found[key] = sum(values)
        elif everywhere:
            found[key] = sum(part * x for part, x in zip(parts, values, strict=True))
    return found
