"""What moves theta, by name: torch's optimizers and the online learners of this room."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from learnedopt.core.registry import nearest, nearest_or_all

_TABLE = {
    "adam": "torch.optim:Adam",
    "sgd": "torch.optim:SGD",
    "aruba": "learnedopt.meta_optimizers.aruba:ARUBA",
    "dual-averaging": "learnedopt.meta_optimizers.dual_averaging:DualAveraging",
    "follow-the-leader": "learnedopt.meta_optimizers.follow_the_leader:FollowTheLeader",
}
"""name -> module:class."""


def names() -> list[str]:
    """Return all names."""
    return [*_TABLE]


def make(name: str, **options: Any) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Return what makes the named optimizer from the tensors of theta.

    Args:
        name: one of ``names()``.
        options: its own, such as ``lr``.

    Raises:
        ValueError: the name or an option is unknown.
    """
    kind = factory(name)
    known = [key for key in inspect.signature(kind).parameters if key != "params"]
    for key in options.keys() - set(known):
        raise ValueError(f"the meta-optimizer {name!r} has no option {key!r}{nearest_or_all(key, known)}")
    return functools.partial(kind, **options)


def factory(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the class of that name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in _TABLE:
        raise ValueError(f"there is no meta-optimizer {name!r}{nearest(name, _TABLE)} (known: {', '.join(_TABLE)})")
    module, _, attribute = _TABLE[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
