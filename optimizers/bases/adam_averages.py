"""What Adam and its kin share: the ranges of their hyperparameters, and the memory that they start with."""

from __future__ import annotations

from typing import Any

import torch

from learnedopt.core.tree import Params
from learnedopt.optimizers.bases.hand_designed import DECAY_RATE, NOT_NEGATIVE
from learnedopt.optimizers.bases.precision import wide_dtype, zeros

RANGES: dict[str, tuple[float, float]] = {
    "lr": NOT_NEGATIVE,
    "beta1": DECAY_RATE,
    "beta2": DECAY_RATE,
    "eps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
}


def start(params: Params) -> dict[str, Any]:
    """Return zero averages ``mean`` and ``square``, as the parameters, and ``step``, a scalar zero."""
    first = next(iter(params.values()))
    step = torch.zeros((), dtype=wide_dtype(first), device=first.device)
    return {"mean": zeros(params), "square": zeros(params), "step": step}
