"""Checks of the arguments of inner objectives and of the batches that they read, as errors that say what to do."""

from __future__ import annotations

import math
from typing import Any, get_args

from torch import Tensor

from learnedopt.core.containers import is_mapping
from learnedopt.core.task import Batch
from learnedopt.core.tree import Params


def require_number(owner: str, option: str, value: object) -> None:
    """Raise unless ``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {option}={value!r} is a {type(value).__name__}; pass a number")
    if not math.isfinite(value):
        raise ValueError(f"{owner}: {option}={value!r} cannot be used; pass a finite number")


def require_count(owner: str, option: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner}: {option}={value!r} is not a count; pass an integer of at least 1")


def require_choice(owner: str, option: str, value: object, choices: Any) -> None:
    """Raise ValueError unless ``value`` is one of the strings of ``choices``, a Literal type."""
    if value not in get_args(choices):
        raise ValueError(f"{owner}: {option}={value!r} is none of {', '.join(map(repr, get_args(choices)))}")


def require_template(owner: str, template: object) -> None:
    """Raise ValueError unless ``template`` is a dict of floating-point tensors."""
    if is_mapping(template) and template:
        wrong = [k for k, v in template.items() if not isinstance(v, Tensor) or not v.is_floating_point()]
        if not wrong:
            return
        got = f"a dict whose {wrong} are no floating-point tensors"
    else:
        got = "an empty one" if is_mapping(template) else type(template).__name__
    raise ValueError(
        f"{owner}: template must be one task's parameters, a dict of floating-point tensors by name, got {got}; take "
        "it from family.init_params(tasks), without the leading dimension of tasks"
    )


def require_like(owner: str, template: Params, params: Params) -> None:
    """Raise ValueError unless the parameters have the template's names and shapes."""
    expected, found = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (template, params))
    if expected != found:
        raise ValueError(
            f"{owner} was made for parameters {expected}, the task's are {found}; build it with a template of this "
            "family"
        )


def entry(owner: str, batch: Batch, key: str, what: str) -> Tensor:
    """Return the tensor ``batch[key]``; raise ValueError where the batch has none, saying ``what`` it would be."""
    value = batch.get(key) if is_mapping(batch) else None
    if isinstance(value, Tensor):
        return value
    got = f"a dict with the keys {list(batch)}" if is_mapping(batch) else f"a {type(batch).__name__}"
    if is_mapping(batch) and key in batch:
        got = f"a {type(value).__name__} there"
    raise ValueError(
        f"{owner} reads batch[{key!r}], {what}, but the family's batch is {got}; have family.batch return a dict with "
        f"a tensor {key!r} in it"
    )
