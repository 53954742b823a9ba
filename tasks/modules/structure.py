"""What a module's layers say about themselves: those that cannot be part of a pure, differentiable loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm


def require_pure(module: nn.Module) -> None:
    """Raise ValueError where a layer draws random numbers, updates statistics or does not give the loss's gradient."""
    for name, p in module.named_parameters():
        if nn.parameter.is_lazy(p):
            raise ValueError(f"parameter {name!r} has no shape yet; call the lazy module once inside build")
        if p.requires_grad and p.is_complex():
            raise ValueError(
                f"parameter {name!r} is complex, and rules move real ones; keep torch.view_as_real(...) of it as the "
                "parameter, and use torch.view_as_complex in forward"
            )
    for name, part in named_parts(module):
        where = place(module, name)
        # Dropout layers, and layers with dropout inside, such as nn.LSTM and nn.MultiheadAttention.
        dropout = nn.modules.dropout._DropoutNd  # pyright: ignore[reportPrivateUsage] - torch has no public one for all
        drops = part.p > 0 if isinstance(part, dropout) else _rate(part) > 0
        if part.training and (drops or isinstance(part, nn.RReLU)):
            raise ValueError(
                f"{where} is active dropout: the loss would draw random numbers of its own; set p=0 or eval()"
            )
        if getattr(part, "track_running_stats", False) and part.training:
            raise ValueError(
                f"{where} updates running statistics, which a pure loss cannot; build it with track_running_stats=False"
            )
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            _require_plain(part, where)


def _require_plain(part: nn.Embedding | nn.EmbeddingBag, where: str) -> None:
    if part.max_norm is not None:
        raise ValueError(
            f"{where} has max_norm={part.max_norm}: its forward would write to the parameters that it is given; leave "
            "it out, and scale rows in forward where they must stay small"
        )
    if not part.weight.requires_grad:
        return
    if part.sparse:
        raise ValueError(f"{where} has sparse=True, and rules take dense gradients; pass sparse=False")
    if part.scale_grad_by_freq:
        raise ValueError(
            f"{where} has scale_grad_by_freq=True: what it gives back is not the gradient of the loss, and "
            "meta-gradients through it are wrong; leave it out"
        )


def require_equal(constants: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Raise ValueError where two builds of a module have different constants."""
    for name, constant in constants.items():
        if not torch.equal(constant, others[name]):
            raise ValueError(
                f"the module's {name!r} is not trained, and differs from one build to the next; make it once, outside "
                "of build, or train it (requires_grad=True)"
            )


def wrong_second_derivatives(module: nn.Module) -> list[str]:
    """Name the layers whose second derivatives torch gets wrong."""
    return [
        f"{place(module, name)} has weight normalisation over dim={dim}, whose second derivatives torch gets wrong; "
        "pass dim=None, write g * v / v.norm() in a parametrization of your own, or take no second derivatives: "
        "tape=Tape.FIRST_ORDER"
        for name, part in named_parts(module)
        for dim in _fused_weight_norms(part)
    ]


def _fused_weight_norms(part: nn.Module) -> Iterator[int]:
    """Yield the dimensions of a layer's weight normalisations by torch's fused operation: the first and the last."""
    # torch has no public way to read them, and does not say all of their types.
    hooked = part._forward_pre_hooks  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportUnknownVariableType]
    registered = cast("dict[int, object]", hooked)
    hooks = [hook for hook in registered.values() if isinstance(hook, WeightNorm)]
    dims = [(hook.dim, getattr(part, f"{hook.name}_v").ndim) for hook in hooks]
    for weights in getattr(part, "parametrizations", {}).values():
        for step in weights:
            if type(step).__name__ == "_WeightNorm":
                dims.append((step.dim, weights.original1.ndim))
    yield from (dim for dim, ndim in dims if dim in (0, ndim - 1))


def named_parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the module itself and all those within it, each with its first name."""
    # torch gives it no types.
    return module.named_modules()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def place(module: nn.Module, name: str) -> str:
    """Return how a part is named in messages."""
    return f"module {name or 'itself'!r} ({type(module.get_submodule(name)).__name__})"


def _rate(part: nn.Module) -> float:
    rate = getattr(part, "dropout", 0.0)
    return rate if isinstance(rate, int | float) else 0.0
