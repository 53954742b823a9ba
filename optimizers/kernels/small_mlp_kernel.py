"""The step of the rule small-mlp as one compiled C function for all tensors of all lanes, on a CPU and without a graph.

A lane is one particle: its own weights, parameters, gradients and memories, any of which all lanes may share.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnedopt.core.modes import taking_tangents
from learnedopt.optimizers.kernels import native
from learnedopt.optimizers.kernels.lanes import array, contiguous, expanded

_SOURCE = Path(__file__).with_name("small_mlp_kernel.c")
_REALS = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
_SHARE = 16384  # coordinates below which another thread costs more than it brings


class Network(NamedTuple):
    """The rule's constants."""

    widths: tuple[int, ...]
    """Inputs, clocks included, then the units of each layer."""
    step_scale: float
    exp_scale: float
    eps: float
    decays: tuple[float, ...]
    time_scales: tuple[float, ...]


class Tensors(NamedTuple):
    """What a step reads; the parameters' order is the same in the last three."""

    step: Tensor
    theta: list[Tensor]
    """Weight and bias of each layer."""
    grads: list[Tensor]
    params: list[Tensor]
    averages: list[Tensor]


def serves(tensors: Tensors) -> bool:
    """Return whether there is a compiled step for such tensors here: plain, no graph, one dtype, a CPU."""
    if torch.is_grad_enabled() or taking_tangents() or torch.compiler.is_compiling():
        return False
    dtype = tensors.step.dtype
    if dtype not in native.NAMES or any(t.dtype != dtype or t.device.type != "cpu" for t in _flat(tensors)):
        return False
    return native.plain(_flat(tensors)) and native.library(_SOURCE, *native.NAMES[dtype]) is not None


def step(network: Network, tensors: Tensors) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the new step counter, parameters and averages; under any nesting of ``torch.func.vmap`` in one call."""
    return _parts(_Step.apply(network, 0, *_flat(tensors)), len(tensors.params))


def step_of_lanes(network: Network, tensors: Tensors, num_dims: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the same for tensors with ``num_dims`` leading dimensions of lanes each, which broadcast.

    Two levels of ``torch.func.vmap`` take longer than the step itself where tensors are small, and are saved here.
    """
    _, flat = expanded(_flat(tensors), num_dims)
    return _parts(_Step.forward(network, num_dims, *flat), len(tensors.params))


class _Step(torch.autograd.Function):
    """Every tensor has ``num_dims`` leading dimensions, of the lanes; those that all lanes share are expanded."""

    @staticmethod
    def forward(network: Network, num_dims: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        first = 1 + 2 * (len(network.widths) - 1)
        count = (len(tensors) - first) // 3
        shapes = [t.shape[num_dims:] for t in tensors]
        _require_shapes(network, shapes, shapes[first + count : first + 2 * count])
        inputs = [contiguous(t, num_dims) for t in tensors]
        written = [inputs[0], *inputs[first + count :]]
        outputs = [torch.empty(t.shape, dtype=t.dtype) for t in written]
        numels = [shape.numel() for shape in shapes[first : first + count]]
        _run(network, tensors[0].shape[:num_dims], numels, [*inputs, *outputs])
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise NotImplementedError("the compiled step of small-mlp has no derivatives; SmallMLP.update has all of them")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], network: Network, num_dims: int, *tensors: Tensor) -> Any:
        size = info.batch_size
        lanes = [
            t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        outputs = _Step.apply(network, num_dims + 1, *lanes)
        return outputs, (0,) * len(outputs)


def _parts(outputs: Sequence[Tensor], count: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return outputs[0], [*outputs[1 : 1 + count]], [*outputs[1 + count :]]


def _run(network: Network, lanes: Sequence[int], numels: list[int], data: list[Tensor]) -> None:
    """Call the C function on the lanes, in as many shares as there are threads and work for them."""
    dtype, num_lanes = data[0].dtype, torch.Size(lanes).numel()
    real, num_dims = _REALS[dtype], len(lanes)
    constants = [network.step_scale, network.exp_scale, network.eps, *network.decays, *network.time_scales]
    arguments = (
        num_dims,
        array(ctypes.c_long, lanes),
        array(ctypes.c_void_p, [t.data_ptr() for t in data]),
        array(ctypes.c_long, [stride for t in data for stride in t.stride()[:num_dims]]),
        len(numels),
        array(ctypes.c_long, numels),
        len(network.decays),
        len(network.widths) - 1,
        array(ctypes.c_int, network.widths),
        len(network.time_scales),
        array(real, constants),
    )
    function = native.library(_SOURCE, *native.NAMES[dtype]).step  # pyright: ignore[reportOptionalMemberAccess]

    def share(first: int) -> int:
        return function(ctypes.c_long(first), ctypes.c_long(min(first + size, num_lanes)), *arguments)

    count = max(1, min(torch.get_num_threads(), num_lanes, num_lanes * sum(numels) // _SHARE))
    size = -(-num_lanes // count)
    starts = range(0, num_lanes, size)
    if len(starts) == 1:
        failed = share(0)
    else:
        with ThreadPoolExecutor(len(starts)) as pool:
            failed = any(pool.map(share, starts))
    if failed:
        raise MemoryError(
            "the compiled step of small-mlp found no memory for its scratch space; take a smaller network"
        )


def _require_shapes(network: Network, found: Sequence[Sequence[int]], params: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where C would read past a tensor's end: its lanes are not of these shapes."""
    layers = zip(network.widths, network.widths[1:], strict=False)
    theta = [shape for inputs, units in layers for shape in ((units, inputs), (units,))]
    expected = [(), *theta, *params, *params, *((len(network.decays), *shape) for shape in params)]
    wrong = [(tuple(a), tuple(b)) for a, b in zip(found, expected, strict=True) if tuple(a) != tuple(b)]
    if wrong:
        raise ValueError(
            f"a step of small-mlp was given a tensor of shape {wrong[0][0]} where {wrong[0][1]} was expected; theta "
            "and state must be this rule's own, made by init_theta and init for these parameters"
        )


def _flat(tensors: Tensors) -> list[Tensor]:
    return [tensors.step, *tensors.theta, *tensors.grads, *tensors.params, *tensors.averages]
