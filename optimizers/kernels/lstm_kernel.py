"""The LSTM's step and its adjoint as one compiled function each: C for tensors on a CPU, Triton for those on a GPU.

Everywhere ``theta`` is the list weight, bias of each layer, then those of the read-out; ``states`` the list h1, c1, h2,
c2, ..., each (hidden_size, num_coordinates); ``x`` the inputs (num_inputs, num_coordinates); all of one dtype.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from learnedopt.core.modes import taking_tangents
from learnedopt.optimizers.kernels import lstm_native, native

logger: logging.Logger = logging.getLogger("learnedopt")

# bfloat16 is computed in float32: the sums over units would lose most of its eight bits.
_COMPUTED = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}


def computed_dtype(inputs: Tensor, *others: Mapping[str, Tensor]) -> torch.dtype | None:
    """Return the dtype in which the kernel would compute, or None where it cannot serve, as in forward mode.

    Args:
        inputs: its own dtype and device say which.
        others: theta and states, of which nothing but subclasses of tensors matters: they have no pointer to read.
    """
    dtype = _COMPUTED.get(inputs.dtype)
    if dtype is None or torch.compiler.is_compiling() or taking_tangents():
        return None
    if not native.plain([inputs, *(x for tensors in others for x in tensors.values())]):
        return None
    return dtype if _kernels(inputs.device.type, dtype) is not None else None


def step(theta: Sequence[Tensor], x: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the read-out (num_coordinates,) and the new states; differentiable once, and under ``torch.func.vmap``."""
    out, *new_states = _Step.apply(len(states), x, *states, *theta)
    return out, new_states


def step_in_place(theta: Sequence[Tensor], x: Tensor, states: Sequence[Tensor]) -> Tensor:
    """Write the new states over ``states``, which must be contiguous, and return the read-out."""
    return _forward(_packed(theta), x.contiguous(), states, states)


def adjoint(
    theta: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    d_out: Tensor,
    d_end: Sequence[Tensor] | None,
    *,
    with_inputs: bool = False,
    with_states: bool = True,
) -> tuple[list[Tensor], list[Tensor] | None, Tensor | None]:
    """Back-propagate through a window of steps from ``states``; the forward pass is recomputed block by block.

    Args:
        theta: the weights.
        x: inputs of all steps (num_steps, num_inputs, num_coordinates).
        states: before the first step.
        d_out: cotangents of the read-outs (num_steps, num_coordinates).
        d_end: cotangents of the last states; None for zeros.
        with_inputs: whether the inputs' cotangents are wanted.
        with_states: whether the first states' cotangents are wanted.

    Returns:
        The cotangents of theta, of the first states, and of the inputs (None for what is not wanted).
    """
    d_end = None if d_end is None else _packed(d_end)
    kernels = _kernels(x.device.type, x.dtype)
    return kernels.adjoint(
        _packed(theta), x.contiguous(), _packed(states), d_out.contiguous(), d_end, with_inputs, with_states
    )


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(num_states: int, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        states = [h.contiguous() for h in tensors[:num_states]]
        new_states = [torch.empty_like(h) for h in states]
        return _forward(_packed(tensors[num_states:]), x.contiguous(), states, new_states), *new_states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        num_states, x, *tensors = inputs
        ctx.num_states = num_states
        ctx.save_for_backward(x, *tensors)
        ctx.set_materialize_grads(True)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        d_x, *others = _StepAdjoint.apply(ctx.num_states, ctx.needs_input_grad[1], *cotangents, *ctx.saved_tensors)
        return None, d_x if ctx.needs_input_grad[1] else None, *others

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], num_states: int, *tensors: Tensor) -> tuple[Any, Any]:
        dims, size = in_dims[1:], info.batch_size
        lanes, theta_dims = tensors[: 1 + num_states], dims[1 + num_states :]
        if any(dim is not None for dim in theta_dims):  # every lane has weights of its own
            return _one_by_one(lambda *each: _Step.apply(num_states, *each), tensors, dims, size)
        # Coordinates do not interact, so those of all lanes stand side by side.
        wide = [_side_by_side(t, d, size) for t, d in zip(lanes, dims, strict=False)]
        out, *states = _Step.apply(num_states, *wide, *tensors[1 + num_states :])
        return (out.unflatten(0, (size, -1)), *(h.unflatten(1, (size, -1)) for h in states)), (0, *(1,) * num_states)


class _StepAdjoint(torch.autograd.Function):
    """A function of its own, because transforms of ``torch.func`` call backward passes on tensors of their own."""

    @staticmethod
    def forward(num_states: int, with_inputs: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        d_out, *others = tensors
        d_new, x, states = others[:num_states], others[num_states], others[num_states + 1 : 2 * num_states + 1]
        theta = others[2 * num_states + 1 :]
        d_theta, d_states, d_x = adjoint(
            theta, x.unsqueeze(0), states, d_out.unsqueeze(0), d_new, with_inputs=with_inputs
        )
        return x.new_zeros(0) if d_x is None else d_x.squeeze(0), *(d_states or ()), *d_theta

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise NotImplementedError(
            f"the LSTM's compiled step has first derivatives only; set {native.SWITCH}=0 in the environment for the "
            "form in pure torch, which has all of them"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], num_states: int, with_inputs: bool, *tensors: Tensor) -> Any:
        def one(*each: Tensor) -> tuple[Tensor, ...]:
            return _StepAdjoint.apply(num_states, with_inputs, *each)

        return _one_by_one(one, tensors, in_dims[2:], info.batch_size)


def _one_by_one(
    fn: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor], dims: Sequence[int | None], size: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    lanes = [[t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)] for i in range(size)]
    stacked = tuple(map(torch.stack, zip(*(fn(*lane) for lane in lanes), strict=True)))
    return stacked, (0,) * len(stacked)


def _side_by_side(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    moved = tensor.unsqueeze(1).expand(-1, size, -1) if dim is None else tensor.movedim(dim, 1)
    return moved.reshape(moved.shape[0], -1)


def _forward(theta: Sequence[Tensor], x: Tensor, states: Sequence[Tensor], new_states: Sequence[Tensor]) -> Tensor:
    return _kernels(x.device.type, x.dtype).forward(theta, x, states, new_states)


def _kernels(device_type: str, dtype: torch.dtype) -> Any:
    """Return the module with ``forward`` and ``adjoint`` for such tensors, or None."""
    if device_type == "cpu":
        return lstm_native if lstm_native.is_there(dtype) else None
    return _triton_kernels() if device_type == "cuda" else None


@functools.cache
def _triton_kernels() -> Any:
    if os.environ.get(native.SWITCH) == "0":
        logger.info("%s=0: the LSTM on GPUs is left to pure torch", native.SWITCH)
        return None
    try:
        from learnedopt.optimizers.kernels import lstm_triton
    except ImportError as error:
        logger.warning("the LSTM runs on GPUs in pure torch, slower: %s. Install triton 3.5 or newer", error)
        return None
    return lstm_triton


def _packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]
