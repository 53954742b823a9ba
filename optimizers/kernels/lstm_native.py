"""The LSTM's step and its adjoint as one compiled C function each, for tensors on a CPU.

Shapes are those of ``lstm_kernel``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnedopt.optimizers.kernels import native

_SOURCE = Path(__file__).with_name("lstm_kernel.c")
_SHARE = 16384  # coordinates below which another thread costs more than it brings


def is_there(dtype: torch.dtype) -> bool:
    """Whether the functions are or can be compiled for float32 or float64; why not is logged."""
    return native.library(_SOURCE, *native.NAMES[dtype]) is not None


def forward(theta: Sequence[Tensor], x: Tensor, states: Sequence[Tensor], new_states: Sequence[Tensor]) -> Tensor:
    """Write the states after one step over ``new_states``, which may be ``states``, and return the read-out.

    Every tensor is contiguous, all are float32 or all float64; x is (num_inputs, num_coordinates).
    """
    num_inputs, n = x.shape
    out = x.new_empty(n)
    call = _function("forward", x.dtype)

    def share(first: int, last: int) -> tuple[int, None]:
        failed = call(
            *map(ctypes.c_long, (first, last, n)), num_inputs, states[0].shape[0], len(states) // 2, _pointers(theta),
            _pointer(x), _pointers(states), _pointers(new_states), _pointer(out),
        )  # fmt: skip
        return failed, None

    _shared(share, n)
    return out


def adjoint(
    theta: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    d_out: Tensor,
    d_end: Sequence[Tensor] | None,
    with_inputs: bool,
    with_states: bool,
) -> tuple[list[Tensor], list[Tensor] | None, Tensor | None]:
    """Back-propagate through a window of steps; arguments and results are those of ``lstm_kernel.adjoint``.

    Every tensor is contiguous, all are float32 or all float64.
    """
    num_steps, num_inputs, n = x.shape
    hidden = states[0].shape[0]
    d_states = [torch.empty_like(h) for h in states] if with_states else None
    d_x = torch.empty_like(x) if with_inputs else None
    call = _function("adjoint", x.dtype)

    def share(first: int, last: int) -> tuple[int, list[Tensor]]:
        d_theta = [torch.zeros_like(w) for w in theta]
        failed = call(
            *map(ctypes.c_long, (first, last, n)), num_steps, num_inputs, hidden, len(states) // 2, _pointers(theta),
            _pointer(x), _pointers(states), _pointer(d_out), None if d_end is None else _pointers(d_end),
            _pointers(d_theta), None if d_states is None else _pointers(d_states),
            None if d_x is None else _pointer(d_x),
        )  # fmt: skip
        return failed, d_theta

    shares = _shared(share, n)
    return [torch.stack(parts).sum(0) for parts in zip(*shares, strict=True)], d_states, d_x


def _shared(share: Callable[[int, int], tuple[int, Any]], n: int) -> list[Any]:
    """Call ``share(first, last)`` on as many pieces of n coordinates as there are threads and work for them."""
    count = max(1, min(torch.get_num_threads(), n // _SHARE))
    size = -(-n // count // 64) * 64 or 64  # whole blocks
    bounds = [(first, min(first + size, n)) for first in range(0, n, size)] or [(0, 0)]
    if len(bounds) == 1:
        results = [share(*pair) for pair in bounds]
    else:
        with ThreadPoolExecutor(len(bounds)) as pool:
            results = list(pool.map(lambda pair: share(*pair), bounds))
    if any(failed for failed, _ in results):
        raise MemoryError("the LSTM's kernel found no memory for its scratch space; take shorter windows")
    return [found for _, found in results]


def _function(name: str, dtype: torch.dtype) -> Any:
    return getattr(native.library(_SOURCE, *native.NAMES[dtype]), name)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
