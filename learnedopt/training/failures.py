"""What a training tells of tasks that have failed: how many, which, where that showed first, and at what theta."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, final

from learnedopt.core import tree
from learnedopt.core.inner import InnerLoop
from learnedopt.core.tree import Theta
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


def out_of_range(loop: InnerLoop, theta: Theta) -> str:
    """Say which of the rule's meta-parameters have left their range; nothing where none has."""
    found = loop.rule.theta_faults(loop.rule_theta(tree.detach(theta)))
    return "; ".join(f"{name} {said}" for name, said in found.items())


@final
class Failures:
    """Names the failures of a training.

    ``last`` says the latest ones, for a message, and ``outside`` what ``out_of_range`` said at that meta-step's theta.

    Args:
        renews: whether the estimator draws its tasks itself, so that nobody else counts their episodes.
        warns: whether this process is the one that warns of the first ones.
    """

    def __init__(self, renews: bool = False, *, warns: bool = True) -> None:
        self.last, self.outside, self._renews = "", "", renews
        self._warns = warns

    def told(self, failures: Sequence[Failure], num_failed: float, episode: int, outside: str = "") -> dict[str, Any]:
        """Return what the metrics of a meta-step say: how many tasks its meta-batch lacks, and which have failed now.

        Nothing where none has. The first ones are warned of.
        """
        self.last: str = ""
        self.outside: str = outside
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
                "Tasks have failed, and are left out of the meta-gradient%s. Named is what was not finite first in "
                "each.%s Later failures are in the metrics (failed_tasks, failed), not here",
                self.last, f" Theta has left its range: {outside}." if outside else "",
            )  # fmt: skip
        return {FAILED: num_failed, "failed": "; ".join(words)}
