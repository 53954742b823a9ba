"""What the plug-in is given: the rule, and parameters with names and groups; errors that say what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from learnedopt.core import checks, tree
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params
from learnedopt.plug_in import shards

FOREIGN = {"betas", "capturable", "differentiable", "eps", "foreach", "fused", "maximize", "momentum", "weight_decay"}
"""Options that groups of other optimizers have, and that a learned rule could only ignore."""


class Member(NamedTuple):
    """A parameter, the name by which the rule knows it, and the group whose ``lr`` applies to it."""

    name: str
    param: Tensor
    group: dict[str, Any]


class Layout(NamedTuple):
    """How a rule's state lies in ``Optimizer.state``: the key of each leaf, and what makes a tree of the leaves."""

    keys: tuple[str, ...]
    rebuild: Callable[[Sequence[Any]], State]


def require_group(group: dict[str, Any], names: list[str]) -> None:
    """Raise TypeError or ValueError for a group's options, parameters or names that a learned rule cannot take."""
    foreign = sorted(k for k in FOREIGN & group.keys() if group[k])
    if foreign:
        raise TypeError(f"a parameter group sets {foreign}, which a learned rule does not have; drop them, or set lr")
    if not float(group["lr"]) >= 0:
        raise ValueError(f"lr={group['lr']!r} must not be negative: it is a factor on an update that is learned")
    for param in group["params"]:
        if not param.is_floating_point():
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is {param.dtype}; learned rules move real floating-point "
                "numbers: represent complex ones by torch.view_as_real"
            )
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(
            f"the parameter names {twice} occur more than once; give each parameter a name of its own, such as "
            "named_parameters() of one module that holds all of them"
        )


def require_start(rule: UpdateRule, start: Params) -> None:
    """Raise ValueError with what the rule says is wrong with a start; and where names come from, if there are none."""
    try:
        checks.require_start(rule, tree.unsqueeze(start))
    except ValueError as error:
        if list(start) != [str(i) for i in range(len(start))]:
            raise
        raise ValueError(f"{error}. The parameters were given without names: pass model.named_parameters()") from error


def values_of(members: list[Member], whole: bool = False) -> Params:
    """Return the parameters' values by name, without a graph: what lies here, or ``whole`` tensors."""
    return {m.name: shards.seen(m.param.detach(), whole) for m in members}


def common_device(params: Params) -> torch.device:
    """Return the one device of the parameters; ValueError where they lie on several."""
    devices = {p.device for p in params.values()}
    if len(devices) > 1:
        raise ValueError(
            f"the parameters lie on {sorted(map(str, devices))}, but a rule sees all of them at once; move them to one "
            "device, or make an optimizer for each"
        )
    return devices.pop()


def scalar_loss(loss: Any, device: torch.device) -> Tensor:
    """Return the loss as a 0-d tensor on a device; ValueError where it is no scalar."""
    loss = torch.as_tensor(loss).detach()
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}, but must be a scalar; reduce it with mean()")
    return loss.reshape(()).to(device)


def leaves_by_path(state: State) -> dict[str, Any]:
    """Return a state's leaves by the path to each."""
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(state)[0]}


def name_of(rule: UpdateRule) -> str:
    """Return what messages call a rule."""
    return type(rule).__name__


def unknown_names(rule: UpdateRule, params: Params, error: KeyError) -> str:
    """Return the message for parameters that a rule does not know by name."""
    return (
        f"{name_of(rule)} has nothing under {error}; the parameters are called {list(params)}: pass "
        "model.named_parameters() of a model with the names that the rule was made for"
    )


def shapes(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a dict holds, () of what has none."""
    return {k: tuple(getattr(x, "shape", ())) for k, x in values.items()}
