"""What the families' options have in common: which values they take, and errors that say so."""

from __future__ import annotations

import difflib
import math
from typing import Any, Literal, TypeAlias, get_args

import torch

from learnedopt.core.containers import is_tuple

MetaSplit: TypeAlias = Literal["train", "valid", "test"]
"""Which tasks: those to meta-train on, to validate on, or to test on."""
DType: TypeAlias = Literal["float32", "float64"]
"""Of parameters and data; None stands for torch's default dtype."""


def resolve_dtype(name: DType | None) -> torch.dtype:
    """Return the dtype of that name, torch's default for None."""
    return torch.get_default_dtype() if name is None else getattr(torch, name)


def require_choice(option: str, value: Any, valid: Any) -> None:
    """Raise ValueError unless ``value`` is one of the strings of ``valid``, a Literal type; name the nearest."""
    choices = get_args(valid)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
        raise ValueError(f"{option}={value!r} is none of {', '.join(map(repr, choices))}; did you mean {near!r}?")


def require_count(option: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{option}={value!r} is not a count; pass an integer of at least 1")


def require_number(option: str, value: Any, least: float = -math.inf) -> None:
    """Raise ValueError unless ``value`` is a finite number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"{option}={value!r} cannot be used; pass a finite number{bound}")


def require_seed(option: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is None or an integer from 0 on."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63):
        raise ValueError(f"{option}={value!r} is not a seed; pass an integer of at least 0, or None")


def require_common(dtype: Any, meta_split: Any) -> None:
    """Check the options that every family has."""
    require_choice("meta_split", meta_split, MetaSplit)
    if dtype is not None:
        require_choice("dtype", dtype, DType)


def require_widths(option: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a tuple of positive integers."""
    if not is_tuple(value):
        raise ValueError(f"{option}={value!r} is not a tuple of widths; pass one such as (20,) or (40, 40)")
    for i, width in enumerate(value):
        require_count(f"{option}[{i}]", width)
