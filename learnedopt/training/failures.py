"""What a training tells of tasks that have failed: how many, which, and where that showed first."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, final

from learnedopt.training.isolation import FAILED, Failure

logger: logging.Logger = logging.getLogger(__name__)
SHOWN = 5
"""How many failures a message names; the metrics have all of them."""


def require_share(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a share below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(
            f"{name}={value!r} is no share of the tasks of a meta-batch that may fail: pass a number of at least 0, "
            "with which a meta-step is skipped for a single one, and below 1, such as 0.5"
        )


@final
class Failures:
    """Names the failures of a training; ``last`` says the latest ones, for a message.

    Args:
        renews: whether the estimator draws its tasks itself, so that nobody else counts their episodes.
        warns: whether this process is the one that warns of the first ones.
    """

    def __init__(self, renews: bool = False, *, warns: bool = True) -> None:
        self.last, self._renews = "", renews
        self._warns = warns

    def told(self, failures: Sequence[Failure], num_failed: float, episode: int) -> dict[str, Any]:
        """Return what the metrics of a meta-step say: how many tasks its meta-batch lacks, and which have failed now.

        Nothing where none has. The first ones are warned of.
        """
        self.last: str = ""
        if not num_failed:
            return {}
        of = "" if self._renews else f" of episode {episode}"
        words = [f"task {each.position}{of}: {each.fault}" for each in failures]
        if not words:
            return {FAILED: num_failed}
        more = f"; and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
        self.last = f" ({'; '.join(words[:SHOWN])}{more})"
        if self._warns:
            self._warns = False
            logger.warning(
                "Tasks have failed, and are left out of the meta-gradient%s. Not finite first is what is named. "
                "Later ones are in the metrics alone (failed_tasks, failed).", self.last,
            )  # fmt: skip
        return {FAILED: num_failed, "failed": "; ".join(words)}
