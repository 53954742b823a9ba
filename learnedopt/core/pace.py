"""How fast a long computation goes, and how much of it is left, in words."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Tells the rate and the time left of a computation in parts, each of about so many runs; now and then.

    Args:
        total: runs that there are about, in all parts.
        report: is told, in one line.
        interval: seconds between two lines, at least.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: float,
        report: Callable[[str], None],
        *,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._report, self._interval, self._clock = total, report, interval, clock
        self._began = self._told = clock()
        self._before = self._part = self._in_part = 0.0

    def begin(self, num_runs: float) -> None:
        """Begin the next part, of about so many runs: what came before counts as it was announced."""
        self._before, self._part, self._in_part = self._before + self._part, num_runs, 0.0

    def found(self, num_runs: float) -> None:
        """Leave runs out that were done before: the rate knows nothing of them."""
        self._total -= num_runs

    def ran(self, what: str, num_runs: float = 1) -> None:
        """Count runs of the part, and tell of them where the last line is old enough."""
        self._in_part += num_runs
        if self._clock() - self._told >= self._interval:
            self._told = self._clock()
            self._report(f"{what}: {self.words()}")

    def words(self) -> str:
        """Return how many runs are done, the rate, and the time left."""
        done = self._before + min(self._in_part, self._part)
        seconds = self._clock() - self._began
        if done == 0 or seconds <= 0:
            return f"0 of about {self._total:.0f} runs"
        left = duration(max(self._total - done, 0) * seconds / done)
        return f"{done:.0f} of about {self._total:.0f} runs, {done / seconds:.3g} a second, about {left} left"


def duration(seconds: float) -> str:
    """Say a time in the units that suit it.

    Example:
        >>> duration(5400)
        '90 min'
    """
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
