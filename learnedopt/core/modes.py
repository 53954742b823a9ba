"""Whatever torch's grad mode and inference mode are outside: what the engine needs is set inside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from learnedopt.core import tree

Method = TypeVar("Method", bound=Callable[..., Any])


def outside_inference_mode(method: Method) -> Method:
    """Run a method with ordinary tensors: those of ``torch.inference_mode()`` cannot be differentiated later."""

    @functools.wraps(method)
    def run(*args: Any, **options: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return method(*args, **options)
        recording = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(recording):
            args, options = tree.tree_map(_ordinary, (args, options))
            return method(*args, **options)

    return run  # pyright: ignore[reportReturnType]


def recording_gradients(method: Method) -> Method:
    """Run a method outside of inference mode and with gradients recorded, also under ``torch.no_grad()``."""

    @functools.wraps(method)
    def run(*args: Any, **options: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            args, options = tree.tree_map(_ordinary, (args, options))
            return method(*args, **options)

    return run  # pyright: ignore[reportReturnType]


def taking_tangents() -> bool:
    """Whether forward-mode derivatives are being taken: a compiled function without them has to stand back then."""
    # torch has neither a public name nor a type for it, and its compiler meets this line.
    return forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportUnknownVariableType]


def _ordinary(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x
