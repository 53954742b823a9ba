"""Whatever torch's grad mode and inference mode are outside: what the engine needs is set inside."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
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
            with whole_float32():
                return method(*args, **options)
        recording = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(recording), whole_float32():
            args, options = tree.tree_map(_ordinary, (args, options))
            return method(*args, **options)

    return run  # pyright: ignore[reportReturnType]


def recording_gradients(method: Method) -> Method:
    """Run a method outside of inference mode and with gradients recorded, also under ``torch.no_grad()``."""

    @functools.wraps(method)
    def run(*args: Any, **options: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad(), whole_float32():
            args, options = tree.tree_map(_ordinary, (args, options))
            return method(*args, **options)

    return run  # pyright: ignore[reportReturnType]


@contextmanager
def whole_float32() -> Generator[None]:
    """Let convolutions on a GPU multiply float32 numbers whole, as torch by default lets matrix products.

    torch's own default rounds the inputs of cuDNN's convolutions to TF32, 10 bits: a meta-gradient of a small
    convolutional net is then off by 1 to 20 %, and one by conjugate gradients says little.
    ``torch.set_float32_matmul_precision("high")`` allows TF32 in both, as does ``torch.backends.fp32_precision``.
    """
    if not torch.cuda.is_initialized() or _products_in_tf32():
        yield
        return
    _whole.enter()
    try:
        yield
    finally:
        _whole.leave()


def _products_in_tf32() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by what torch 2.9 has in its place, of which this function cannot tell
        products: Any = torch.backends.cuda.matmul
        return products.fp32_precision == "tf32"


class _Whole:
    """Counts who is inside, in all threads: the settings are the process's. The first sets them, the last undoes it."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: list[tuple[Any, str, Any]] = []

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                found = _settings()
                self._before = [(part, name, getattr(part, name)) for part, name, _ in found]
                for part, name, own in found:
                    setattr(part, name, own)
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for part, name, before in self._before:
                    setattr(part, name, before)


def _settings() -> list[tuple[Any, str, Any]]:
    """Return whose attribute has to be what."""
    cudnn: Any = torch.backends.cudnn
    inherited = getattr(cudnn, "fp32_precision", "none")  # from torch 2.9 on: what holds where an operation has none
    with suppress(RuntimeError):  # operations were set apart, which the flag for all of them cannot say
        _ = cudnn.allow_tf32
        if inherited != "tf32":
            return [(cudnn, "allow_tf32", False)]
    return [(operation, "fp32_precision", "ieee") for operation in (cudnn.conv, cudnn.rnn)]


_whole = _Whole()


def taking_tangents() -> bool:
    """Whether forward-mode derivatives are being taken: a compiled function without them has to stand back then."""
    # torch has neither a public name nor a type for it, and its compiler meets this line.
    return forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportUnknownVariableType]


def _ordinary(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x
