"""The LSTM's step and its adjoint as Triton kernels, for tensors on a GPU; shapes as in ``lstm_kernel``.

Coordinates do not interact. One program takes a block of them through all layers and, in the adjoint, through all
steps, forwards and back again: a window is one launch. What the way back needs lies in global memory, for as many
coordinates at a time as ``_SCRATCH`` holds; the weights' cotangents are then plain matrix products over these.

Products of float32 are made of three TF32 products each, which tensor cores do to nearly float32's accuracy; float64
is computed as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from learnedopt.optimizers.kernels.lstm_triton_device import _step_kernel, _window_kernel

_SCRATCH = 2**27  # bytes
_STEP_TILE, _WINDOW_TILE = 8192, 4096  # bytes of a quantity of all units of a block: what fits the registers


@torch.no_grad()
def forward(theta: Sequence[Tensor], x: Tensor, states: Sequence[Tensor], new_states: Sequence[Tensor]) -> Tensor:
    """Write the states after one step over ``new_states``, which may be ``states``, and return the read-out.

    Every tensor is contiguous, all are float32 or all float64; x is (num_inputs, num_coordinates).
    """
    num_inputs, n = x.shape
    out, options = x.new_empty(n), _options(states, num_inputs, _STEP_TILE)
    with torch.cuda.device_of(x):
        _step_kernel[(triton.cdiv(n, options["BLOCK"]),)](
            tuple(theta), x, tuple(states), tuple(new_states), out, n, **options
        )
    return out


@torch.no_grad()
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
    hidden, layers = states[0].shape[0], len(states) // 2
    options = _options(states, num_inputs, _WINDOW_TILE)
    # (h or c, layer, unit, coordinate): before the call those of the last states, after it those of the first.
    d_states = x.new_zeros(2, layers, hidden, n) if d_end is None else _by_kind(d_end)
    d_theta, d_x = [torch.zeros_like(w) for w in theta], torch.empty_like(x) if with_inputs else None
    bytes_each = (6 * num_steps + 2) * layers * hidden * x.element_size()
    size = max(1, _SCRATCH // bytes_each // 64) * 64
    for first in range(0, n, size):
        here = slice(first, min(first + size, n))
        m = here.stop - first
        tape = x.new_empty(2, layers, hidden, num_steps + 1, m)
        tape[:, :, :, 0] = _by_kind([h[:, here] for h in states])
        gates = x.new_empty(layers, 4 * hidden, num_steps, m)
        with torch.cuda.device_of(x):
            _window_kernel[(triton.cdiv(m, options["BLOCK"]),)](
                tuple(theta), x[..., here], d_out[:, here], tape[0], tape[1], gates, d_states[0, ..., here],
                d_states[1, ..., here], None if d_x is None else d_x[..., here], n, m, num_steps, **options,
            )  # fmt: skip
        _add_weights(d_theta, x[..., here], d_out[:, here], tape[0], gates)
    # The kernel needs the room in any case.
    found = [d_states[kind, layer] for layer in range(layers) for kind in range(2)] if with_states else None
    return d_theta, found, d_x


def _options(states: Sequence[Tensor], num_inputs: int, tile_bytes: int) -> dict[str, Any]:
    hidden, dtype = states[0].shape[0], states[0].dtype
    units = max(16, triton.next_power_of_2(max(hidden, num_inputs)))
    exact = dtype is torch.float64 or torch.version.hip is not None  # TF32 in three pieces is for CUDA
    return {
        "NUM_INPUTS": num_inputs, "HIDDEN": hidden, "LAYERS": len(states) // 2, "UNITS": units,
        "BLOCK": max(16, min(64, tile_bytes // (units * states[0].element_size()))),
        "PRECISION": "ieee" if exact else "tf32x3", "num_warps": 4 if units <= 64 else 8,
        "num_stages": 3 if units <= 64 else 1,  # of prefetched weights: shared memory holds no more of wide layers
    }  # fmt: skip


def _by_kind(states: Sequence[Tensor]) -> Tensor:
    """Return h1, c1, h2, c2, ... as (2, num_layers, hidden_size, num_coordinates)."""
    return torch.stack([*states[::2], *states[1::2]]).unflatten(0, (2, -1))


def _add_weights(d_theta: list[Tensor], x: Tensor, d_out: Tensor, h: Tensor, d_gates: Tensor) -> None:
    """Add the weights' cotangents from x (num_steps, num_inputs, m), d_out (num_steps, m), h (num_layers, hidden_size,
    num_steps + 1, m) and d_gates (num_layers, 4 hidden_size, num_steps, m)."""
    signal = x.movedim(1, 0).flatten(1)
    for layer, d in enumerate(d_gates.flatten(2)):
        before, after = h[layer, :, :-1].flatten(1), h[layer, :, 1:].flatten(1)
        d_theta[2 * layer] += torch.cat([d @ signal.t(), d @ before.t()], 1)
        d_theta[2 * layer + 1] += d.sum(1)
        signal = after
    d_theta[-2] += d_out.reshape(1, -1) @ signal.t()
    d_theta[-1] += d_out.sum()
