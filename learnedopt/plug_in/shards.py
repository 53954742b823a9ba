"""Parameters that lie in pieces on several processes: what of them lies here, and how the pieces come together.

Coordinatewise rules move each process's piece by itself; their memory is cut as the parameter is, and kept as a
``DTensor``, so that ``torch.distributed.checkpoint`` can cut it anew for another number of processes. Every other rule
sees whole tensors: parameters, gradients and memory are gathered at each step, all processes compute the same, and each
keeps its own pieces.
"""

from __future__ import annotations

import enum
import inspect
import sys
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

_WHOLE = (Tensor, torch.nn.Parameter)


class Kind(enum.Enum):
    """How a parameter lies."""

    WHOLE = "whole"
    """An ordinary tensor."""
    SHARDED = "sharded"
    """A ``DTensor``, as ``fully_shard`` and ``parallelize_module`` make: it knows its whole shape and its pieces."""
    FLAT = "flat"
    """A piece without a shape, as ``FullyShardedDataParallel`` leaves: a run of coordinates, maybe none."""


def kind_of(param: Tensor) -> Kind | None:
    """Return how a parameter lies; None for a tensor subclass that is not known.

    A subclass of Python's alone, which changes nothing of how torch reads the tensor, is an ordinary tensor.
    """
    if getattr(param, "_fsdp_flattened", False):  # what FullyShardedDataParallel itself asks
        return Kind.FLAT
    if type(param) in _WHOLE or isinstance(param, UninitializedParameter):
        return Kind.WHOLE
    if _is_sharded(param):
        return Kind.SHARDED
    own, ordinary = type(param), torch.nn.Parameter
    untouched = all(
        getattr(own, hook) is getattr(ordinary, hook) for hook in ("__torch_dispatch__", "__torch_function__")
    )
    return Kind.WHOLE if untouched and issubclass(own, ordinary) else None


def require_known(params: Iterable[tuple[str, Tensor]]) -> None:
    """Raise where no rule can move a parameter that lies as this one does.

    Raises:
        TypeError: a parameter is of a tensor subclass that is not known.
        ValueError: it waits to be summed over processes.
    """
    for name, param in params:
        if kind_of(param) is None:
            raise TypeError(
                f"the parameter {name!r} is a {type(param).__module__}.{type(param).__qualname__}, a tensor subclass "
                "that is not known here: its numbers may not lie where a rule would read them. Pass torch.nn.Parameter "
                "or DTensor parameters, and give this one another optimizer"
            )
        placements = getattr(param, "placements", ())
        if any(placement.is_partial() for placement in placements):
            raise ValueError(
                f"the parameter {name!r} is a DTensor with placements {placements}: what is still to be summed over "
                "processes cannot be moved; redistribute it to Shard or Replicate"
            )


def what_is_missing(params: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return why no process can put whole tensors together, or sees only some of them; None where all can be had.

    ``FullyShardedDataParallel`` leaves pieces without their shapes. ``ZeroRedundancyOptimizer`` hands each process some
    of the tensors, and says so nowhere but in who calls: a rule would quietly be another one than in one process.
    """
    for name, param in params:
        if kind_of(param) is Kind.FLAT:
            return f"FullyShardedDataParallel has left of {name!r} a flat piece without its shape"
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = inspect.currentframe()
    frame = None if frame is None else frame.f_back
    while zero is not None and frame is not None:
        if isinstance(frame.f_locals.get("self"), zero.ZeroRedundancyOptimizer):
            return "ZeroRedundancyOptimizer gives each process some of the tensors"
        frame = frame.f_back
    return None


def require_whole_tensors(params: Iterable[tuple[str, Tensor]], rule: str) -> None:
    """Raise ValueError where a rule that reads whole tensors, all of them together, cannot have them."""
    missing = what_is_missing(params)
    if missing is not None:
        raise ValueError(
            f"{rule} reads whole tensors, and may read all of them together, but {missing}; shard the model with "
            "torch.distributed.fsdp.fully_shard, whose parameters keep their shapes, or take a coordinatewise rule"
        )


def require_here(params: Iterable[tuple[str, Tensor]], optimizer: str) -> None:
    """Raise ValueError for parameters that lie in pieces, and an optimizer that does not know what to do with them."""
    for name, param in params:
        if kind_of(param) is not Kind.WHOLE:
            raise ValueError(
                f"{optimizer} learns from whole parameters, and of {name!r} this process has a piece "
                f"({type(param).__name__}, {kind_of(param)}); replicate the model (DistributedDataParallel), or take "
                "LearnedOptimizer with a theta that is learned already"
            )


def local(x: Tensor, param: Tensor | None = None) -> Tensor:
    """Return what of ``x`` lies here, without a copy: ``x`` itself where it is an ordinary tensor.

    Args:
        x: a parameter, a gradient or a leaf of the memory.
        param: the parameter that it must lie like; a gradient that is still to be summed over processes, or lies
            otherwise, is brought there.

    Raises:
        ValueError: the parameter is sharded and ``x`` is not.
    """
    if not _is_sharded(x):
        if param is not None and _is_sharded(param):
            raise ValueError(
                f"a parameter is a DTensor of shape {tuple(param.shape)} and its gradient an ordinary tensor of shape "
                f"{tuple(x.shape)}; which piece that is cannot be told: set a DTensor with the parameter's placements"
            )
        return x
    return _arrived((x if param is None else _placed_as(x, param)).to_local())


def gathered(x: Tensor) -> Tensor:
    """Return the whole of ``x``, the same on all processes; every process of its mesh must ask."""
    return _arrived(x.full_tensor()) if _is_sharded(x) else x


def sharded_like(whole: Tensor, param: Tensor) -> Tensor:
    """Return a tensor ``(*leading, *param.shape)``, the same on all processes, cut as the parameter is.

    Nothing is sent. It is ``whole`` itself where the parameter is an ordinary tensor.
    """
    if not _is_sharded(param):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, _placements(param, whole.ndim - param.ndim))


def joined_like(piece: Tensor, param: Tensor) -> Tensor:
    """Return a DTensor, cut as the parameter is, of which each process has ``piece``.

    That is ``(*leading, *local(param).shape)``. Nothing is sent or copied. It is ``piece`` itself where the
    parameter is an ordinary tensor.
    """
    if not _is_sharded(param):
        return piece
    from torch.distributed.tensor import DTensor

    num_leading = piece.ndim - param.ndim
    shape = torch.Size((*piece.shape[:num_leading], *param.shape))
    stride = torch.empty(shape, device="meta").stride()
    mesh = param.device_mesh
    return DTensor.from_local(piece, mesh, _placements(param, num_leading), run_check=False, shape=shape, stride=stride)


def seen(x: Tensor, gather: bool, param: Tensor | None = None) -> Tensor:
    """Return what a rule sees of a parameter or a gradient: the whole of it, or what lies here.

    A gradient is brought to where its ``param`` lies.
    """
    return gathered(x) if gather else local(x, param)


def own_piece(answered: Tensor, param: Tensor, gather: bool) -> Tensor:
    """Return the piece that lies here of what a rule answered, shaped as what it saw of the parameter."""
    return local(sharded_like(answered, param)) if gather else answered


def kept(leaf: Tensor, param: Tensor, gather: bool) -> Tensor:
    """Return a leaf of a parameter's memory as it is kept: cut as the parameter is, where it has its coordinates.

    Args:
        leaf: ``(*leading, *shape)``, with the shape of what the rule saw of the parameter; else a statistic of it.
        param: the parameter.
        gather: whether the rule saw all of it.

    Raises:
        ValueError: the rule saw a piece, and it cannot be told which of the leaf's dimensions are that piece's.
    """
    if not _is_sharded(param):
        return leaf
    shape = param.shape if gather else local(param).shape
    if _ends_with(leaf, shape):
        return sharded_like(leaf, param) if gather else joined_like(leaf, param)
    if not gather and leaf.numel() > 1:
        raise ValueError(
            f"a rule keeps {tuple(leaf.shape)} of a parameter of which {tuple(shape)} lies here: to be cut as the "
            "parameter is, its memory must end with the parameter's dimensions"
        )
    return leaf


def recalled(leaf: Tensor, param: Tensor, gather: bool) -> Tensor:
    """Return what a rule sees of a leaf that was kept, or that was loaded whole."""
    if not _is_sharded(leaf) and _is_sharded(param) and not gather and _ends_with(leaf, param.shape):
        leaf = sharded_like(leaf, param)
    return seen(leaf, gather)


def all_zero(tensors: Iterable[Tensor]) -> bool:
    """Return whether there is nothing but zeros, in any process's piece: all of them get one answer."""
    return not any(bool(_counted(x)) for x in tensors)


def _counted(x: Any) -> Tensor:
    here = local(x).count_nonzero()
    if not _is_sharded(x):
        return here
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(here, x.device_mesh, [Partial()] * x.device_mesh.ndim, run_check=False).full_tensor()


def _ends_with(leaf: Tensor, shape: torch.Size) -> bool:
    return leaf.ndim >= len(shape) and leaf.shape[leaf.ndim - len(shape) :] == shape


def _is_sharded(x: object) -> TypeGuard[Any]:
    if type(x) in _WHOLE:  # asked of every tensor at every step
        return False
    module = sys.modules.get("torch.distributed.tensor")  # nobody can have one who has not imported it
    return module is not None and isinstance(x, module.DTensor)


def _placed_as(x: Any, param: Any) -> Any:
    return x if x.placements == param.placements else x.redistribute(param.device_mesh, param.placements)


def _placements(param: Any, num_leading: int) -> list[Any]:
    """Return the parameter's placements for a tensor with so many dimensions before the parameter's."""
    if not num_leading:
        return list(param.placements)
    return [p if p.is_replicate() else _moved(p, num_leading) for p in param.placements]


def _moved(placement: Any, by: int) -> Any:
    strided = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(placement.dim + by, **strided)


def _arrived(x: Any) -> Tensor:
    """Return a tensor that a collective has been waited for."""
    return x.wait() if hasattr(x, "trigger_wait") else x
