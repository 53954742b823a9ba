"""What a meta-training ends with."""

from __future__ import annotations

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
        best = f"The best theta so far (validation {self.result.best_value:.6g}) is in {path}"
        return TrainingDiverged(f"{self}. {best}", self.result)


def diverged(result: TrainingResult, num_in_a_row: int, why: str, last: str, outside: str = "") -> TrainingDiverged:
    """Return the error of a training of which so many meta-steps in a row were skipped, the last one for ``last``.

    ``outside`` says which meta-parameters had left their range.
    """
    advice = (
        "Lower the meta-learning rate, set max_grad_norm, shorten the unroll, or, where theta is perturbed, lower sigma"
    )
    if outside:
        advice = (
            f"Theta had left its range: {outside}. Learn that on a scale which it cannot leave (Reparametrized, with "
            "log or logit), leave it out of what the rule learns (learn=), or lower the meta-learning rate"
        )
    return TrainingDiverged(
        f"{num_in_a_row} meta-gradients in a row were {why} (meta-step {result.meta_step}, {result.num_skipped} "
        f"skipped in all): theta cannot move. Of the last one, {last}. {advice}",
        result,
    )
