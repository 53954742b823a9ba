"""What a checkpoint's values must be, beside their shapes, so that a training can go on from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from learnedopt.core.carry import Carry
from learnedopt.core.shares import carries_in
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


def require_carry(carry: Any, begun: Sequence[Carry], kind: type) -> None:
    """Raise ValueError unless the inner loops in a carry are such as begin here.

    Args:
        carry: an estimator's, or None.
        begun: a begun loop of each family; none where the estimator's carries hold no loops.
        kind: the class of what the estimator starts with: one of it may hold no loop, between two episodes.
    """
    found, known = carries_in(carry), [_form(one) for one in begun]
    known += [_form(one._replace(state=None)) for one in begun]
    if carry is not None and begun and not found and type(carry) is not kind:
        raise ValueError("its carry holds no inner loop")
    for one in found:
        if _form(one) not in known:
            raise ValueError("names, shapes or types of an inner loop's tensors are not those that begin here")
        if type(one.step) is not int or one.step < 0:
            raise ValueError(f"an inner loop stands at the step {one.step!r}")


def _form(carry: Carry) -> Any:
    """Return names, types and shapes, but for the number of tasks, of parameters and state."""
    leaves, spec = pytree.tree_flatten((carry.params, carry.state))
    return spec, [(x.dtype, x.shape[1:]) if isinstance(x, Tensor) else type(x) for x in leaves]


def _require_alike(whose: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError where there are numbers in one, or so many of them, that are not in the other."""
    for name in own.keys() & saved.keys():
        if not _alike(saved[name], own[name]):
            raise ValueError(f"{whose} {name} is {saved[name]!r} on file, and {own[name]!r} here")


def _alike(saved: Any, own: Any) -> bool:
    if isinstance(own, list):  # it may have grown
        return isinstance(saved, list)
    if isinstance(own, tuple):
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
