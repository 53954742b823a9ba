"""Call a module with given tensors in place of its own, and leave it as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from learnedopt.core.tree import Params, Tree
from learnedopt.tasks.modules import structure


@final
class Stateless:
    """A module as a pure function of its tensors and inputs.

    Args:
        module: for its structure and constants; calls do not change it.

    Attributes:
        trained: the parameters that require a gradient, detached, by name.
        constants: frozen parameters and buffers by name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.trained: Params = trained(module)
        self.constants: dict[str, Tensor] = constants(module)
        self._parts = list(module.modules())
        for part in self._parts:
            # Weights computed by a hook when the module was built have a graph, and cannot be copied.
            vars(part).update({k: v.detach() for k, v in vars(part).items() if isinstance(v, Tensor) and v.grad_fn})
        self._aliases = _aliases(module)
        # One fast path of attention in eval mode can be neither mapped over tasks nor differentiated.
        attention = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
        self._has_fast_path = any(isinstance(part, attention) and not part.training for part in self._parts)

    def values(self, params: Params) -> dict[str, Tensor]:
        """Return all tensors that the module is called with: ``params``, and constants on their device.

        Constants keep their own dtype, unless parameters come in another dtype than the module's own, as under
        ``Execution(dtype=...)``: then floating-point constants of that same own dtype follow them, and the others stay.
        """
        casts: dict[torch.dtype, torch.dtype] = {}
        for name, p in params.items():
            own = self.trained[name].dtype if name in self.trained else p.dtype
            if p.dtype is not own:
                casts[own] = p.dtype
        values = dict(params)
        if self.constants:
            device = next(iter(params.values())).device
            values |= {k: c.to(device=device, dtype=casts.get(c.dtype)) for k, c in self.constants.items()}
        return values

    def __call__(self, values: dict[str, Tensor], inputs: Tree) -> Any:
        """Return the module's outputs.

        Args:
            values: of ``values``; what forward assigns to a name is found there afterwards.
            inputs: a tuple is passed as positional arguments and a dict as keyword arguments where forward accepts
                them so, and anything else as one argument.
        """
        # A tensor that has several names is listed under each; a module that has several, once: torch puts tensors back
        # in order, and what it found at the second name of one place would be its own.
        for alias, name in self._aliases.items():
            values[alias] = values[name]
        args, kwargs = arguments(self.module.forward, inputs)
        with _fast_path_off() if self._has_fast_path else nullcontext():
            return torch.func.functional_call(self.module, values, args, kwargs, tie_weights=False)

    @contextmanager
    def left_alone(self) -> Generator[None, None, None]:
        """Put plain attributes that forward writes, such as a cache, back at the end."""
        before = [part.__dict__.copy() for part in self._parts]
        try:
            yield
        finally:
            for part, attributes in zip(self._parts, before, strict=True):
                part.__dict__.clear()
                part.__dict__.update(attributes)

    def holding(self, values: dict[str, Tensor], fn: Callable[[], Any]) -> Any:
        """Return ``fn()``, called while the module holds ``values``."""
        named = {f"module.{k}": v for k, v in values.items()}
        named |= {f"module.{alias}": values[k] for alias, k in self._aliases.items() if k in values}
        return torch.func.functional_call(_Around(self.module), named, (fn,), tie_weights=False)


class _Around(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, fn: Callable[[], Any]) -> Any:
        return fn()


def trained(module: nn.Module) -> Params:
    """Return the parameters that require a gradient, detached."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def constants(module: nn.Module) -> dict[str, Tensor]:
    """Return frozen parameters and buffers."""
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return frozen | dict(module.named_buffers())


def arguments(forward: Callable[..., Any], inputs: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments by which ``inputs`` are passed to ``forward``."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    kind = type(cast("object", inputs))
    if kind is tuple:
        args = inputs
    elif kind is dict:
        kwargs = inputs
    else:
        return (inputs,), {}
    try:
        inspect.signature(forward).bind(*args, **kwargs)
    except TypeError:  # it takes the tuple or dict as it is
        return (inputs,), {}
    return args, kwargs


def _aliases(module: nn.Module) -> dict[str, str]:
    """Return the further names of tensors that lie at several places, each with the first name."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for prefix, part in structure.named_parts(module):
        own: list[tuple[str, Tensor]] = [*part.named_parameters(recurse=False, remove_duplicate=False)]
        own += part.named_buffers(recurse=False, remove_duplicate=False)
        for attribute, tensor in own:
            name = f"{prefix}.{attribute}" if prefix else attribute
            if first.setdefault(id(tensor), name) != name:
                found[name] = first[id(tensor)]
    return found


@contextmanager
def _fast_path_off() -> Generator[None, None, None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
