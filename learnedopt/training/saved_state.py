"""What a checkpoint's values must be, beside their shapes, so that a training can go on from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from learnedopt.core.carry import Carry
from learnedopt.core.shares import carries_in
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


def _require_number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or math.isnan(value):
        raise ValueError(f"{name} is {value!r}, which is no number")


def _require_theta(name: str, saved: Any, theta: Theta) -> None:
    here = {k: (v.shape, v.dtype) for k, v in theta.items()}
    tensors = isinstance(saved, dict) and all(isinstance(v, Tensor) for v in saved.values())
    if not tensors or {k: (v.shape, v.dtype) for k, v in saved.items()} != here:
        raise ValueError(f"{name} is no theta of this rule")
    if unfit := [k for k, v in saved.items() if not bool(v.isfinite().all())]:
        raise ValueError(f"{name} has {unfit}, which are not finite: no meta-step leaves such a theta")
