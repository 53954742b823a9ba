"""Whatever torch's grad mode and inference mode are outside: what the engine needs is set inside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
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
    ``torch.set_float32_matmul_precision("high")`` allows TF32 in both.
    """
    if not torch.cuda.is_initialized() or torch.get_float32_matmul_precision() != "highest":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    try:
        before = cudnn.allow_tf32
    except RuntimeError:  # set by what torch 2.9 has in its place, which this flag cannot say
        parts = (cudnn.conv, cudnn.rnn)
        kept = [part.fp32_precision for part in parts]
        settings = [(part, "fp32_precision", "ieee", own) for part, own in zip(parts, kept, strict=True)]
    else:
        settings = [(cudnn, "allow_tf32", False, before)]
    try:
        for part, name, own, _ in settings:
            setattr(part, name, own)
        yield
    finally:
        for part, name, _, before in settings:
            setattr(part, name, before)


def taking_tangents() -> bool:
    """Whether forward-mode derivatives are being taken: a compiled function without them has to stand back then."""
    # torch has neither a public name nor a type for it, and its compiler meets this line.
    return forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportUnknownVariableType]


def _ordinary(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x
