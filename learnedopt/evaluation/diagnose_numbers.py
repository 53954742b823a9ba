"""Bias, variance and cosines of gradients against exact ones on the same tasks, with errors by the jackknife."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Truth(NamedTuple):
    """The exact gradients of batches, and what their mean is worth.

    ``norm`` is the length of the gradient's mean, without what noise adds to it (0 where noise explains all of it);
    ``uncertainty`` the standard error of that mean over ``norm``. ``mean_length`` and ``median_length`` are of single
    batches: they differ where a few outweigh all others.
    """

    norm: float
    uncertainty: float
    mean_length: float
    median_length: float
    num_batches: int
    num_not_finite: int
    seconds: float

    @property
    def known(self) -> bool:
        """Whether the mean is told from nothing: its standard error is below half its length."""
        return self.uncertainty < UNCERTAIN

    @property
    def unit(self) -> float:
        """What errors are shown in: the true length or, where that is not known, the median one of a batch."""
        return self.norm if self.known else self.median_length


class Accuracy(NamedTuple):
    """What batches of estimates tell, squares relative to the square of ``Truth.unit``.

    ``bias_squared`` is unbiased, so that it may be below 0, and ``bias_error`` its standard error. ``variance`` is that
    of one estimate, its trace. ``error = max(bias_squared, 0) + variance * cost``; ``left_out`` are the errors without
    each batch in turn, from which errors of two estimators are told apart.
    ``cosine`` is of single estimates to the mean of the exact gradients of OTHER batches: mean, lower quartile, median,
    upper quartile. ``cosine_of_mean`` is of their mean to that of the exact gradients of the same batches.
    """

    bias_squared: float
    bias_error: float
    variance: float
    error: float
    left_out: tuple[float, ...]
    cosine: tuple[float, float, float, float]
    cosine_of_mean: float


UNCERTAIN = 0.5
LEAST = 3  # batches: a standard error by leaving one out needs two others


def truth_of(exact: Tensor, seconds: float) -> Truth:
    """Summarise exact gradients (num_batches, num_entries); those not finite are counted and left out."""
    finite = exact[exact.isfinite().all(1)]
    count, lost = len(finite), len(exact) - len(finite)
    if count < 2:
        return Truth(math.nan, math.nan, math.nan, math.nan, len(exact), lost, seconds)
    gram = finite @ finite.T
    lengths = gram.diagonal().sqrt()
    squared, spread = _mean_squared(gram), _trace(gram)
    norm = math.sqrt(max(squared, 0.0))
    uncertainty = math.sqrt(spread / count) / norm if norm > 0 else math.inf
    return Truth(norm, uncertainty, float(lengths.mean()), _quantile(lengths, 0.5), len(exact), lost, seconds)


def accuracy_of(found: Tensor, exact: Tensor, unit: float, cost: float) -> Accuracy:
    """Compare estimates (num_batches, num_entries) with exact gradients, of which the first are of the same batches.

    What the two differ by on the same tasks is bias and the estimator's own noise alone, so that chance in the tasks is
    not called bias. With d the differences, ``|mean d|^2`` less what their variance adds to it is the mean of ``d_i .
    d_j`` over all pairs.

    Args:
        found: all finite, at least three.
        exact: all finite, (at least num_batches, num_entries).
        unit: a length, positive, whose square squares are taken relative to.
        cost: of one estimate, in units of the compute that is spent.
    """
    count, square = len(found), unit * unit
    own = exact[:count]
    differences = found - own
    bias, noise = differences @ differences.T / square, found @ found.T / square

    def error(kept: Tensor) -> float:
        b, n = bias[kept][:, kept], noise[kept][:, kept]
        return max(_mean_squared(b), 0.0) + _trace(n) * cost

    everyone = torch.arange(count)
    others = (exact.sum(0) - own) / (len(exact) - 1)
    cosines = torch.nn.functional.cosine_similarity(found, others, dim=1, eps=0.0)
    return Accuracy(
        _mean_squared(bias),
        spread(_without_each(lambda kept: _mean_squared(bias[kept][:, kept]), count)),
        _trace(noise),
        error(everyone),
        _without_each(error, count),
        (float(cosines.mean()), _quantile(cosines, 0.25), _quantile(cosines, 0.5), _quantile(cosines, 0.75)),
        float(torch.nn.functional.cosine_similarity(found.mean(0), own.mean(0), dim=0, eps=0.0)),
    )


def _mean_squared(gram: Tensor) -> float:
    """Return the squared length of the mean of n vectors, without what their variance adds, from their products."""
    n = len(gram)
    return float(gram.sum() - gram.diagonal().sum()) / (n * (n - 1))


def _trace(gram: Tensor) -> float:
    """Return the trace of the covariance of n vectors, from their products."""
    n = len(gram)
    return max(float(gram.diagonal().sum() - gram.sum() / n) / (n - 1), 0.0)


def _without_each(statistic: Callable[[Tensor], float], count: int) -> tuple[float, ...]:
    """Return a statistic of ``count`` draws without each of them in turn."""
    everyone = torch.arange(count)
    return tuple(statistic(everyone[everyone != i]) for i in range(count))


def spread(left_out: Sequence[float]) -> float:
    """Return the standard error of a statistic by the jackknife (Efron and Stein 1981), from those without each."""
    count = len(left_out)
    mean = sum(left_out) / count
    return math.sqrt((count - 1) / count * sum((x - mean) ** 2 for x in left_out))


def _quantile(values: Tensor, q: float) -> float:
    return float(values.double().quantile(q))
