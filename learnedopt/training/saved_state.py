"""What a checkpoint's values must be, beside their shapes, so that a training can go on from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from learnedopt.core.tree import Theta
from learnedopt.training.steadying import Steadied


def require_progress(counts: Mapping[str, Any], best_theta: Any, theta: Theta) -> None:
    """Raise TypeError or ValueError unless counts are such as a training leaves, and the best theta is one.

    Args:
        counts: how far it has come; ``best_value`` is a number, the others are counts.
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
    if best_theta is not None:
        _require_theta("best_theta", best_theta, theta)


def require_steadied(steadied: Steadied, theta: Theta) -> None:
    """Raise TypeError or ValueError unless these are an average of theta and numbers."""
    if steadied.average is not None:
        _require_theta("the average of theta", steadied.average, theta)
    if steadied.mean_loss is not None:
        _require_number("mean_loss", steadied.mean_loss)
    _require_number("lowest_mean", steadied.lowest_mean)
    if type(steadied.num_rollbacks) is not int or steadied.num_rollbacks < 0:
        raise ValueError(f"num_rollbacks is {steadied.num_rollbacks!r}, which is no count")


def require_state(saved: Any, of_scheduler: Any, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Raise TypeError or ValueError unless what was saved has the form of the states of these two."""
    here = optimizer.state_dict()
    groups = zip(saved["param_groups"], here["param_groups"], strict=True)
    for group, own in groups:
        if group["params"] != own["params"]:
            raise ValueError(f"a group of the meta-optimizer has the parameters {group['params']}, not {own['params']}")
        _require_alike("the meta-optimizer's", group, own)
    known = {index for group in here["param_groups"] for index in group["params"]}
    for index, state in saved["state"].items():
        if index not in known or not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
            raise ValueError(f"the meta-optimizer's state has an entry for {index!r}, of which there is no parameter")
    if (of_scheduler is None) != (scheduler is None):
        raise ValueError("it was written with a scheduler, or without one, unlike the present training")
    if scheduler is not None:
        own = scheduler.state_dict()
        if unknown := sorted(k for k in of_scheduler if k not in own and not k.startswith("_")):
            raise ValueError(f"the scheduler's state has {unknown}, which the present one has not")
        _require_alike("the scheduler's", of_scheduler, own)


def _require_alike(whose: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError where there are numbers in one, or so many of them, that are not in the other."""
    for name in own.keys() & saved.keys():
        if not _alike(saved[name], own[name]):
            raise ValueError(f"{whose} {name} is {saved[name]!r} on file, and {own[name]!r} here")


def _alike(saved: Any, own: Any) -> bool:
    if isinstance(own, tuple | list):
        same = isinstance(saved, tuple | list) and len(saved) == len(own)
        return same and all(_alike(a, b) for a, b in zip(saved, own, strict=True))
    return _is_number(saved) or not _is_number(own)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or math.isnan(value):
        raise ValueError(f"{name} is {value!r}, which is no number")


def _require_theta(name: str, saved: Any, theta: Theta) -> None:
    here = {k: (v.shape, v.dtype) for k, v in theta.items()}
    if not isinstance(saved, dict) or {k: (v.shape, v.dtype) for k, v in saved.items()} != here:
        raise ValueError(f"{name} is no theta of this rule")
