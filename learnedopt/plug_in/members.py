"""What the plug-in is given: the rule, and parameters with names and groups; errors that say what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from learnedopt.core import checks, tree
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params
from learnedopt.plug_in import shards

FOREIGN = {"betas", "capturable", "differentiable", "eps", "foreach", "fused", "maximize", "momentum", "weight_decay"}
"""Options that groups of other optimizers have, and that a rule could only ignore."""


class Member(NamedTuple):
    """A parameter, the name by which the rule knows it, and the group whose ``lr`` applies to it."""

    name: str
    param: Tensor
    group: dict[str, Any]


def members_of(groups: list[dict[str, Any]]) -> list[Member]:
    """Return the parameters of all groups that a rule can move; without names they are called by their number.

    Numbers that are no floats have no gradients and stay as they are; so do lazy parameters, until they have a shape.
    """
    members: list[Member] = []
    number = 0
    for group in groups:
        names = group.get("param_names") or map(str, range(number, number + len(group["params"])))
        number += len(group["params"])
        members += [
            Member(name, p, group)
            for name, p in zip(names, group["params"], strict=True)
            if not is_lazy(p) and p.is_floating_point()
        ]
    return members


def require_group(group: dict[str, Any], names: list[str], options: Collection[str] = ("lr",)) -> None:
    """Raise TypeError or ValueError for a group's options, parameters or names that an optimizer cannot take.

    Args:
        group: the group.
        names: of all parameters.
        options: that the optimizer's groups have.
    """
    foreign = sorted(k for k in (FOREIGN - set(options)) & group.keys() if group[k])
    if foreign:
        raise TypeError(
            f"a parameter group sets {foreign}, which this optimizer does not have; drop them, it has "
            f"{', '.join(options)}"
        )
    if not float(group["lr"]) >= 0:
        raise ValueError(f"lr={group['lr']!r} must not be negative: it is a factor on an update that is learned")
    if not float(group.get("weight_decay", 0.0)) >= 0:
        raise ValueError(
            f"weight_decay={group['weight_decay']!r} must not be negative: it is a share that is taken off"
        )
    for param in group["params"]:
        if param.is_complex():
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


def values_of(members: list[Member], gather: bool = False) -> Params:
    """Return the parameters' values by name, without a graph: what lies on this process or, gathered, all of each."""
    return {m.name: shards.seen(m.param.detach(), gather) for m in members}


def common_device(params: Params) -> torch.device:
    """Return the one device of the parameters; ValueError where they lie on several."""
    devices = {p.device for p in params.values()}
    if len(devices) > 1:
        raise ValueError(
            f"the parameters lie on {sorted(map(str, devices))}, but a rule sees all of them at once; move them to one "
            "device, or make an optimizer for each"
        )
    return devices.pop()


def gradients_of(members: list[Member], gather: bool = False) -> Params:
    """Return the gradients by name, as ``values_of``, zeros where there is none; ValueError for one that is sparse."""
    grads: Params = {}
    for name, param, _ in members:
        grad = param.grad
        if grad is not None and grad.layout is not torch.strided:
            raise ValueError(
                f"the gradient of {name!r} is sparse ({grad.layout}), and a learned rule moves every coordinate; "
                "build the layer with sparse=False, or give its parameters another optimizer"
            )
        grad = torch.zeros_like(param) if grad is None else grad
        grads[name] = shards.seen(grad.detach(), gather, param)
    return grads


def factors_of(members: list[Member]) -> dict[str, float]:
    """Return by what each parameter's update is multiplied; 0 where there is no gradient."""
    return {name: 0.0 if param.grad is None else float(group["lr"]) for name, param, group in members}


def saved_indices(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[Tensor, Any]:
    """Return under which index of a state dict each parameter's entry is, by its position; fewer where they differ."""
    indices = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in groups for p in group["params"]]
    return dict(zip(params, indices, strict=False))


def scalar_loss(loss: Any, device: torch.device) -> Tensor:
    """Return the loss as a 0-d tensor on a device; ValueError where it is no scalar."""
    loss = shards.gathered(torch.as_tensor(loss).detach())
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}, but must be a scalar; reduce it with mean()")
    return loss.reshape(()).to(device)


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
