"""What a checkpoint's values must be, beside their shapes, so that a training can go on from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from learnedopt.core.containers import is_dict
from learnedopt.core.tree import Theta
from learnedopt.training.steadying import Steadied


def require_progress(counts: Mapping[str, Any], saved: Any, best_theta: Any, theta: Theta) -> None:
    """Raise TypeError or ValueError unless counts are such as a training leaves, and both thetas are one.

    Args:
        counts: how far it has come; ``best_value`` is a number, the others are counts.
        saved: a theta.
        best_theta: a theta, or None.
        theta: one of the same rule.
    """
    for name, value in counts.items():
        if name == "best_value":
            _require_number(name, value)
        elif type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}, which is no count")
    if not counts["skips_in_a_row"] <= counts["num_skipped"] <= counts["meta_step"]:
        raise ValueError(f"of {counts['meta_step']} meta-steps, {counts['num_skipped']} were skipped")
    _require_theta("theta", saved, theta)
    if best_theta is not None:
        _require_theta("best_theta", best_theta, theta)


def require_steadied(steadied: Steadied, averaged: bool, theta: Theta) -> None:
    """Raise TypeError or ValueError unless these are numbers and, where theta is ``averaged``, its average."""
    if (steadied.average is None) == averaged:
        raise ValueError(f"there is {'no' if averaged else 'an'} average of theta, unlike in the present training")
    if steadied.average is not None:
        _require_theta("the average of theta", steadied.average, theta)
    if steadied.mean_loss is not None:
        _require_number("mean_loss", steadied.mean_loss)
    _require_number("lowest_mean", steadied.lowest_mean)
    if type(steadied.num_rollbacks) is not int or steadied.num_rollbacks < 0:
        raise ValueError(f"num_rollbacks is {steadied.num_rollbacks!r}, which is no count")


def _require_number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or math.isnan(value):
        raise ValueError(f"{name} is {value!r}, which is no number")


def _require_theta(name: str, saved: Any, theta: Theta) -> None:
    here = {k: (v.shape, v.dtype) for k, v in theta.items()}
    tensors = is_dict(saved) and all(isinstance(v, Tensor) for v in saved.values())
    if not tensors or {k: (v.shape, v.dtype) for k, v in saved.items()} != here:
        raise ValueError(f"{name} is no theta of this rule")
    if unfit := [k for k, v in saved.items() if not bool(v.isfinite().all())]:
        raise ValueError(f"{name} has {unfit}, which are not finite: no meta-step leaves such a theta")
