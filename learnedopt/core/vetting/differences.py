"""Is a loss's gradient its derivative, and is that gradient's own derivative right? Answered by differences.

They are taken in float64, to which everything that the loss reads is promoted, at a generic point: the tensors are
moved by a hundredth of their size, so that no kink (a ReLU of exactly 0, |x| at 0) and no layer of zeros lies there. A
derivative is called wrong only where differences of several step sizes agree with each other and not with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnedopt.core import mixed_mode, tree
from learnedopt.core.tree import Params
from learnedopt.core.vetting.double import WIDER, InDouble
from learnedopt.core.vetting.findings import first_line

Loss = Callable[[Params], Tensor]
"""Of named tensors: one task's parameters, and theta where the loss may read it."""

_MOVE = 0.01  # of a tensor's size
# Relative to a tensor's size. A kink between the two points spoils a difference of gradients whatever the step: those
# steps are so short that none lies there. The last ones show what a loss that rounds to float32 inside hides.
_STEPS = {torch.float64: (1e-6, 1e-5, 1e-3), torch.float32: (1e-2, 3e-2, 1e-1)}
_STEPS_OF_GRADIENTS = (1e-8, 1e-7, 1e-3)
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 0.05}
_ROUNDING = 16.0  # units of eps that a loss or a gradient is uncertain by
_MOST_NAMED = 64  # parameters that are tried one by one for the message


class Verdict(NamedTuple):
    """``right`` is True, False, or None where it could not be told; ``reason`` in words, with numbers."""

    right: bool | None
    reason: str
    error: Exception | None = None


class Point(NamedTuple):
    """Where a loss is differentiated: its tensors by name and their sizes; its value and gradient there."""

    loss: Loss
    at: Params
    sizes: dict[str, float]
    value: Tensor
    grads: Params

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the loss."""
        return self.value.dtype


def generic_point(loss: Loss, tensors: Params, *, create_graph: bool) -> Point | Exception:
    """Return where to differentiate, or why it cannot be done: a FloatingPointError where all is not finite.

    Tried are float64 and, where that fails, the tensors' own precision; each moved to a generic point, then as it is.
    """
    failure: Exception = FloatingPointError("the loss or its gradient is not finite")
    sizes, narrow = _sizes(tensors), any(x.dtype in WIDER for x in tensors.values())
    for promote in (True, False) if narrow else (False,):
        for move in (_MOVE, 0.0):
            mode = InDouble if promote else nullcontext

            def moded(at: Params, mode: Callable[[], Any] = mode) -> Tensor:
                with mode():
                    return loss(at)

            try:
                start = {k: x.double() if promote else x for k, x in tensors.items()}
                at = _moved(start, _directions(start, sizes, seed=1), move)
                value, leaves, grads = value_and_gradient(moded, at, create_graph=create_graph)
            except Exception as error:  # noqa: BLE001 - the next attempt may serve, and else it is reported
                failure = error
                continue
            if value.isfinite() and all(g.isfinite().all() for g in grads.values()):
                return Point(moded, leaves, sizes, value, grads)
            failure = FloatingPointError("the loss or its gradient is not finite")
    return failure


def value_and_gradient(loss: Loss, at: Params, *, create_graph: bool = False) -> tuple[Tensor, Params, Params]:
    """Return the loss's value, the leaves that it was given, and its gradient with respect to them."""
    leaves = {k: x.detach().clone().requires_grad_() for k, x in at.items()}
    value = loss(leaves)
    grads = torch.autograd.grad(value, list(leaves.values()), create_graph=create_graph, materialize_grads=True)
    return value, leaves, dict(zip(leaves, grads, strict=True))


def judge_gradient(point: Point) -> Verdict:
    """Compare the gradient with differences of the loss along one random direction, along three in float32."""
    if point.dtype not in _STEPS:
        return Verdict(None, f"it could not be told: a loss in {point.dtype} is too coarse for differences")
    verdict = _along(point, _directions(point.at, point.sizes, seed=2))
    for seed in (5, 6) if point.dtype is torch.float32 else ():
        if verdict.right:
            verdict = _along(point, _directions(point.at, point.sizes, seed))
    return verdict


def _along(point: Point, direction: Params) -> Verdict:
    products = {k: g.detach() * direction[k] for k, g in point.grads.items()}
    slope = torch.stack([x.sum() for x in products.values()]).sum()
    spread = math.sqrt(sum(x.square().sum().item() for x in products.values()))
    floor = _ROUNDING * torch.finfo(point.dtype).eps * abs(point.value.item())
    tolerance = _TOLERANCE[point.dtype]
    right, found = _decide(
        [slope],
        _loss_difference(point, direction),
        _STEPS[point.dtype],
        tolerance,
        lambda step: floor / step + tolerance * spread,
    )
    numbers = f"along a random direction the gradient gives {slope.item():.6g}, differences of losses "
    numbers += f"{found[0].item():.6g}, in {str(point.dtype).removeprefix('torch.')}"
    if right is False:
        numbers += _worst_parameters(point, direction, products)
    elif right is None:
        numbers += "; it could not be told, as differences of several sizes disagree: the loss is kinked or coarse"
    return Verdict(right, numbers)


def judge_second_derivatives(
    point: Point, *, mixed_plans: dict[Hashable, Any] | None, moving: Sequence[str]
) -> Verdict:
    """Compare the product of the second derivatives and one random direction with differences of gradients.

    Args:
        point: with a graph of its gradient.
        mixed_plans: what mixed mode has found out about the loss, to take it so; None: reverse mode over reverse mode.
        moving: the names of the parameters, whose gradient is what the inner steps take.
    """
    direction = {k: x for k, x in _directions(point.at, point.sizes, seed=3).items() if k in moving}
    try:
        if mixed_plans is not None:
            product = _mixed_product(point, direction, mixed_plans)
        else:
            product = _product(point, direction)
    except Exception as error:  # noqa: BLE001 - reported: what torch cannot do here it cannot do in an estimate
        return Verdict(False, f"torch cannot take them: {first_line(error)}", error)
    if point.dtype is not torch.float64:
        return _judge_symmetry(point, direction, product)
    names = list(product)
    sizes = [point.sizes[k] for k in names]
    here = [s * point.grads[k].detach() for s, k in zip(sizes, names, strict=True)]
    floor = _ROUNDING * torch.finfo(point.dtype).eps * _length(here)

    def difference(step: float) -> tuple[list[Tensor], list[Tensor]]:
        beside = _gradients_beside(point, direction, step)
        ahead, behind = ([s * grads[k] for s, k in zip(sizes, names, strict=True)] for grads in beside)
        return _halves(ahead, here, behind, step)

    claimed = [s * product[k].detach() for s, k in zip(sizes, names, strict=True)]
    right, found = _decide(claimed, difference, _STEPS_OF_GRADIENTS, _TOLERANCE[point.dtype], lambda h: floor / h)
    errors = [float(tree.length(c - d)) for c, d in zip(claimed, found, strict=True)]
    worst = errors.index(max(errors))
    size = float(tree.length(found[worst]))
    numbers = f"times a random direction they are off by {errors[worst]:.2g} of {size:.2g} at {names[worst]!r}"
    if right is None:
        numbers += "; it could not be told, as differences of several sizes disagree: the gradient jumps or is coarse"
    return Verdict(right, numbers)


def _decide(
    claimed: Sequence[Tensor],
    difference: Callable[[float], tuple[list[Tensor], list[Tensor]]],
    steps: Sequence[float],
    tolerance: float,
    slack: Callable[[float], float],
) -> tuple[bool | None, list[Tensor]]:
    """Return whether tensors equal a difference, None where that cannot be told, and the first difference."""
    seen: list[tuple[list[Tensor], list[Tensor]]] = []
    for step in steps:
        central, bend = difference(step)
        seen.append((central, bend))
        allowed = [
            tolerance * max(float(tree.length(c)), float(tree.length(d))) + slack(step)
            for c, d in _pairs(claimed, central)
        ]
        if all(float(tree.length(c - d)) <= a for (c, d), a in zip(_pairs(claimed, central), allowed, strict=True)):
            return True, central
    (first, bend), (second, _), (last, _) = seen
    off = _distance(claimed, first)
    steady = _distance(first, second) <= 0.2 * off
    kink = _length(bend) > 0.2 * off  # ahead and behind differ: the point itself is one
    # Equal values ahead and behind at short steps alone: the loss rounds inside.
    coarse = _length(first) == 0.0 and _distance(claimed, last) <= 0.5 * off
    veto = coarse or kink or _distance(claimed, last) <= 0.1 * off
    return (False if steady and not veto and math.isfinite(off) else None), first


def _loss_difference(point: Point, direction: Params) -> Callable[[float], tuple[list[Tensor], list[Tensor]]]:
    def difference(step: float) -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            ahead, behind = (point.loss(_moved(point.at, direction, s * step)).detach() for s in (1, -1))
        return _halves([ahead], [point.value.detach()], [behind], step)

    return difference


def _halves(
    ahead: Sequence[Tensor], here: Sequence[Tensor], behind: Sequence[Tensor], step: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the central difference, and half of what the differences ahead and behind differ by."""
    central = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
    bend = [((a - h) - (h - b)) / (2 * step) for a, h, b in zip(ahead, here, behind, strict=True)]
    return central, bend


def _gradients_beside(point: Point, direction: Params, step: float) -> tuple[Params, Params]:
    ahead, behind = (value_and_gradient(point.loss, _moved(point.at, direction, s * step))[2] for s in (1, -1))
    return ahead, behind


def _product(point: Point, direction: Params) -> Params:
    along = [(point.grads[k] * v).sum() for k, v in direction.items() if point.grads[k].requires_grad]
    if not along:  # a loss that is linear in its parameters
        return {k: torch.zeros_like(x) for k, x in point.at.items()}
    found = torch.autograd.grad(
        torch.stack(along).sum(), list(point.at.values()), materialize_grads=True, retain_graph=True
    )
    return dict(zip(point.at, found, strict=True))


def _mixed_product(point: Point, direction: Params, plans: dict[Hashable, Any]) -> Params:
    leaves = {k: x.detach().requires_grad_() for k, x in point.at.items()}
    params, theta = ({k: x for k, x in leaves.items() if (k in direction) is own} for own in (True, False))
    _, grads = mixed_mode.value_and_gradient(lambda params, theta: point.loss(params | theta), params, theta, plans)
    along = torch.stack([(g * direction[k]).sum() for k, g in zip(params, grads, strict=True)]).sum()
    if not along.requires_grad:  # a loss that is linear in its parameters
        return {k: torch.zeros_like(x) for k, x in leaves.items()}
    found = torch.autograd.grad(along, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def _judge_symmetry(point: Point, direction: Params, product: Params) -> Verdict:
    """Second derivatives are symmetric: what can be asked where float64 cannot be had, and kinks do not disturb it."""
    if point.dtype is not torch.float32:
        return Verdict(None, f"a gradient in {point.dtype} is too coarse to be compared")
    other = {k: v for k, v in _directions(point.at, point.sizes, seed=4).items() if k in direction}
    back = _product(point, other)
    terms = [other[k] * product[k] for k in direction], [v * back[k] for k, v in direction.items()]
    first, second = (sum(float(x.sum()) for x in each) for each in terms)
    spread = max(math.sqrt(sum(float(x.square().sum()) for x in each)) for each in terms)
    words = f"in float32, u·Hv is {first:.4g} and v·Hu {second:.4g} for random u and v"
    return Verdict(abs(first - second) <= 0.05 * max(abs(first), abs(second), spread), words)


def _worst_parameters(point: Point, direction: Params, products: Params) -> str:
    """Say of which parameters the gradient is wrong, each tried along its own part of the direction."""
    step, tolerance = _STEPS[point.dtype][0], _TOLERANCE[point.dtype]
    errors: dict[str, tuple[float, str]] = {}
    for name in list(point.at)[:_MOST_NAMED]:
        central, _ = _loss_difference(point, {name: direction[name]})(step)
        slope, found = float(products[name].sum()), float(central[0])
        if abs(slope - found) > tolerance * (abs(slope) + abs(found) + float(tree.length(products[name]))):
            errors[name] = (abs(slope - found), f"{name!r} ({slope:.4g} for {found:.4g})")
    worst = sorted(errors.values(), reverse=True)[:3]
    return f"; most wrong is that of {', '.join(text for _, text in worst)}" if worst else ""


def _directions(like: Params, sizes: dict[str, float], seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        k: sizes[k] * torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.device, x.dtype)
        for k, x in like.items()
    }


def _moved(at: Params, direction: Params, step: float) -> Params:
    return {k: x.detach() + step * direction[k] if k in direction else x.detach() for k, x in at.items()}


def _sizes(tensors: Params) -> dict[str, float]:
    """Return each tensor's root mean square; of a tensor of zeros that of all, and 1 where all are zeros."""
    # On the CPU, since not every device has float64.
    wide = {k: x.detach().to("cpu", torch.float64) for k, x in tensors.items() if x.numel()}
    squares = {k: wide[k].square().mean().item() if k in wide else 0.0 for k in tensors}
    overall = math.sqrt(sum(squares.values()) / max(sum(s > 0 for s in squares.values()), 1)) or 1.0
    return {k: math.sqrt(s) if s > 0 else overall for k, s in squares.items()}


def _pairs(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(a, b, strict=True))


def _length(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tree.length(x)) ** 2 for x in tensors))


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return _length([x - y for x, y in _pairs(a, b)])
