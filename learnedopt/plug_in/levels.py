"""What losses in a row say: their mean, how sure it is, and where they are going."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple


class Level(NamedTuple):
    """What losses in a row say: their mean, its variance, their slope a step."""

    mean: float
    variance: float
    slope: float

    def ahead(self, steps: float) -> float:
        """Return the mean so many steps later, were the losses to go on falling; where they rise, the mean."""
        return self.mean + min(self.slope, 0.0) * steps


def level(losses: Sequence[float]) -> Level:
    """Return the level of two losses or more.

    The variance is that of differences of neighbours, halved: they see the noise of minibatches, and hardly the trend.
    A millionth of the mean is noise in any case.
    """
    n = len(losses)
    mean, middle = sum(losses) / n, (n - 1) / 2
    spread = sum((i - middle) ** 2 for i in range(n))
    slope = sum((i - middle) * x for i, x in enumerate(losses)) / spread
    noise = sum((b - a) ** 2 for a, b in itertools.pairwise(losses)) / (2 * (n - 1)) + (1e-6 * mean) ** 2
    return Level(mean, noise / n, slope)


def error(a: Level, b: Level) -> float:
    """Return the standard error of the difference of two means."""
    return math.sqrt(a.variance + b.variance)
