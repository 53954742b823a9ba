"""What a meta-training ends with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from learnedopt.core.tree import Theta


class TrainingResult(NamedTuple):
    """What a meta-training ends with: the last theta, the best by validation (the last without one), and counts.

    ``best_value`` is infinite where no validation was finite.
    """

    theta: Theta
    best_theta: Theta
    best_value: float
    meta_step: int
    num_skipped: int


class TrainingDiverged(RuntimeError):
    """Too many meta-steps in a row were skipped; ``result`` is what the training had come to, theta finite."""

    def __init__(self, message: str, result: TrainingResult) -> None:
        super().__init__(message)
        self.result = result

    def naming(self, path: Path) -> TrainingDiverged:
        """Return the error with a message that says where the best theta so far is."""
        value = self.result.best_value
        how = f"validation {value:.6g}" if math.isfinite(value) else "no validation was finite"
        return TrainingDiverged(f"{self}. The best theta so far ({how}) is in {path}", self.result)
