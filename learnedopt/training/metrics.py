"""What the tracker is told of a meta-step, beside failed tasks and validation."""

from __future__ import annotations

from typing import Any

from learnedopt.core.clipping import Norm
from learnedopt.core.estimator import Estimate


def metrics_of(estimate: Estimate, norm: Norm, seconds: float, num_skipped: int) -> dict[str, Any]:
    """Return the metrics of a meta-step.

    Args:
        estimate: whose loss, inner losses and reported numbers are told.
        norm: of the gradient that the meta-optimizer is handed.
        seconds: that the meta-step took.
        num_skipped: meta-steps skipped so far.
    """
    return {
        "meta_loss": float(estimate.loss),
        "grad_norm": norm.value,
        "step_ms": 1e3 * seconds,
        "skipped": num_skipped,
        "inner_loss": [float(x) for x in estimate.info.get("losses", [])],
        **{k: v for k, v in estimate.info.items() if isinstance(v, int | float)},
    }
