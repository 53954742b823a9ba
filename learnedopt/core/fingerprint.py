"""Which theta of which rule this is: a short word for both."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor

from learnedopt.core.containers import is_list_or_tuple, is_mapping
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Theta

DIGITS = 16


def fingerprint(rule: UpdateRule, theta: Theta) -> str:
    """Return 16 hexadecimal digits that two optimizers share if, and but for chance only if, they step alike.

    They are of SHA-256 over the rule's class and options, and over the names, shapes and values of ``theta``. Values
    are read as float64, so that a theta has one fingerprint on every device and in every type that holds it exactly. Of
    tensors among the options, such as a template, only shapes count: what was learned of them is in ``theta``. A rule
    that is no dataclass has no options that could be known, and counts with its class; a function counts with its name.

    Example:
        >>> fingerprint(*learnedopt.load("lstm-mnist")) == fingerprint(*learnedopt.load("lstm-quadratic"))
        False
    """
    digest = hashlib.sha256()
    for word in words(rule):
        digest.update(f"{len(word)}:{word}".encode())  # the length, so that no two lists of words run into one
    for name in sorted(theta):
        value = theta[name].detach().to("cpu", torch.float64).contiguous()
        digest.update(f"{len(name)}:{name}{tuple(value.shape)}".encode())
        digest.update(value.numpy().astype("<f8").tobytes())
    return digest.hexdigest()[:DIGITS]


def words(option: Any) -> Iterator[str]:
    """Say an option as a list of words, each structure with the number of its parts."""
    if isinstance(option, Tensor):
        yield f"tensor {tuple(option.shape)}"
    elif isinstance(option, Enum):
        yield f"{type(option).__name__}.{option.name}"
    elif isinstance(option, type | FunctionType | BuiltinFunctionType):
        yield f"{option.__module__}.{option.__qualname__}"
    elif dataclasses.is_dataclass(option):
        parts = {field.name: getattr(option, field.name) for field in dataclasses.fields(option) if field.init}
        yield type(option).__name__
        yield from words(parts)
    elif is_mapping(option):
        yield f"mapping {len(option)}"
        for key in sorted(option, key=str):  # in files the order of keys need not be what it was
            yield str(key)
            yield from words(option[key])
    elif is_list_or_tuple(option):  # files know lists only
        yield f"sequence {len(option)}"
        for part in option:
            yield from words(part)
    elif option is None or isinstance(option, bool | str | torch.dtype):
        yield repr(option)
    elif isinstance(option, int | float):
        yield repr(float(option))  # 1 is 1.0
    else:
        yield type(option).__name__
