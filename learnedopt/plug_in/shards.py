"""Parameters that lie in pieces on several processes: what of them lies here, and how the pieces come together.

Coordinatewise rules move each process's piece by itself; their memory is cut as the parameter is, and kept as a
``DTensor``, so that ``torch.distributed.checkpoint`` can cut it anew for another number of processes. Every other rule
sees whole tensors: parameters, gradients and memory are gathered at each step, all processes compute the same, and each
keeps its own pieces.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable
from typing import Any

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
    own = type(param)
    untouched = own.__torch_dispatch__ is Tensor.__torch_dispatch__ and issubclass(own, torch.nn.Parameter)
    return Kind.WHOLE if untouched and own.__torch_function__ is torch.nn.Parameter.__torch_function__ else None


def require_known(params: Iterable[tuple[str, Tensor]], rule: str, coordinatewise: bool) -> None:
    """Raise where a rule cannot move a parameter that lies as this one does.

    Args:
        params: names and parameters.
        rule: what messages call the rule.
        coordinatewise: whether its coordinates do not interact.

    Raises:
        TypeError: a parameter is of a tensor subclass that is not known.
        ValueError: it is a flat piece and the rule reads whole tensors, or it waits to be summed over processes.
    """
    for name, param in params:
        kind = kind_of(param)
        if kind is None:
            raise TypeError(
                f"the parameter {name!r} is a {type(param).__module__}.{type(param).__qualname__}, a tensor subclass "
                "that is not known here: its numbers may not lie where a rule would read them. Pass torch.nn.Parameter "
                "or DTensor parameters, and give this one another optimizer"
            )
        if kind is Kind.FLAT and not coordinatewise:
            raise ValueError(
                f"{rule} reads tensors as a whole, and FullyShardedDataParallel has left of {name!r} a flat piece "
                "without its shape; shard the model with torch.distributed.fsdp.fully_shard, whose parameters keep "
                "theirs, or take a coordinatewise rule"
            )
        if kind is Kind.SHARDED and any(p.is_partial() for p in param.placements):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(
                f"the parameter {name!r} is a DTensor with placements {param.placements}: what is still to be summed "  # pyright: ignore[reportAttributeAccessIssue]
                "over processes cannot be moved; redistribute it to Shard or Replicate"
            )


def require_all_tensors(rule: str, coordinatewise: bool) -> None:
    """Raise ValueError where an optimizer is made by ``ZeroRedundancyOptimizer`` for a rule that reads more than that.

    It hands every process some of the tensors, and says so nowhere but in who calls: rules that compare tensors would
    quietly be others than in one process.
    """
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe(1)
    while zero is not None and not coordinatewise and frame is not None:
        if isinstance(frame.f_locals.get("self"), zero.ZeroRedundancyOptimizer):
            raise ValueError(
                f"ZeroRedundancyOptimizer gives each process a part of the tensors, and {rule} may read all of them "
                "together; shard the model with torch.distributed.fsdp.fully_shard, or take a coordinatewise rule"
            )
        frame = frame.f_back


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
    sharded: Any = x
    if param is not None and sharded.placements != param.placements:  # pyright: ignore[reportAttributeAccessIssue]
        sharded = sharded.redistribute(param.device_mesh, param.placements)  # pyright: ignore[reportAttributeAccessIssue]
    return _arrived(sharded.to_local())


def gathered(x: Tensor) -> Tensor:
    """Return the whole of ``x``, the same on all processes; every process of its mesh must ask."""
    return _arrived(x.full_tensor()) if _is_sharded(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def sharded_like(whole: Tensor, param: Tensor) -> Tensor:
    """Return a tensor ``(*leading, *param.shape)``, the same on all processes, cut as the parameter is.

    Nothing is sent. It is ``whole`` itself where the parameter is an ordinary tensor.
    """
    if not _is_sharded(param):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = param.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, _placements(param, whole.ndim - param.ndim))


def joined_like(piece: Tensor, param: Tensor) -> Tensor:
    """Return a DTensor of which each process has ``piece``, ``(*leading, *local(param).shape)``, as the parameter is cut.

    Nothing is sent or copied. It is ``piece`` itself where the parameter is an ordinary tensor.
    """
    if not _is_sharded(param):
        return piece
    from torch.distributed.tensor import DTensor

    num_leading = piece.ndim - param.ndim
    shape = torch.Size((*piece.shape[:num_leading], *param.shape))
    stride = torch.empty(shape, device="meta").stride()
    mesh: Any = param.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    return DTensor.from_local(piece, mesh, _placements(param, num_leading), run_check=False, shape=shape, stride=stride)


def seen(x: Tensor, whole: bool, param: Tensor | None = None) -> Tensor:
    """Return what a rule sees of a parameter, a gradient or a leaf of the memory: the whole of it, or what lies here.

    A gradient is brought to where its ``param`` lies.
    """
    return gathered(x) if whole else local(x, param)


def own_piece(answered: Tensor, param: Tensor, whole: bool) -> Tensor:
    """Return the piece that lies here of what a rule answered, shaped as what it saw of the parameter."""
    return local(sharded_like(answered, param)) if whole else answered


def kept(answered: Tensor, param: Tensor, whole: bool) -> Tensor:
    """Return a leaf of the memory as it is kept, cut as the parameter is.

    Args:
        answered: ``(*leading, *shape)``, with the shape of what the rule saw of the parameter.
        param: the parameter.
        whole: whether it saw all of it.
    """
    return sharded_like(answered, param) if whole else joined_like(answered, param)


def _is_sharded(x: Any) -> bool:
    if type(x) in _WHOLE:  # asked of every tensor at every step
        return False
    module = sys.modules.get("torch.distributed.tensor")  # nobody can have one who has not imported it
    return module is not None and isinstance(x, module.DTensor)


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
