"""Whether a rule that says ``coordinatewise`` keeps to it.

No finite number of calls proves that coordinates do not interact. What is tried: gradients over twelve orders of
magnitude, of which the other coordinates' alone are masked or scaled, in several steps, at the theta that is used; on a
few coordinates beside others and without them, and on the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.execution.flat_state import NAME

MAGNITUDES = (1e-6, 1e-3, 1.0, 1e3, 1e6)  # of gradients: a bound on a norm lies somewhere
CHANGES = (0.0, 1e-6, 1e6)  # of the other coordinates' gradients
FACTORS = (1.0, -0.5, 2.0)  # of the gradients of successive steps
FEW = (0.4, 0.9, -0.03, 0.2, 1.2, -1.5, -0.6, 0.07)


def require_apart(rule: UpdateRule, theta: Theta, params: Params) -> None:
    """Raise ValueError where coordinates of one task's ``params`` interact: every other one is changed, half are not.

    It takes four updates of one task.
    """
    size, like = sum(p.numel() for p in params.values()), next(iter(params.values()))
    count = torch.arange(size, device=like.device)
    watched = count % 2 == 0
    change = torch.where(watched, 1.0, torch.where(count % 4 == 1, CHANGES[0], CHANGES[-1]))
    with torch.no_grad():
        whole = _moves(rule, theta, params, _split(_spread(like, size), params), FACTORS[:2])
        changed = _moves(rule, theta, params, _split(change * _spread(like, size), params), FACTORS[:2])
    _require_same(rule, whole, changed, watched, exact=True)


def require_few_apart(rule: UpdateRule, theta: Theta, like: Tensor) -> None:
    """Raise ValueError where eight coordinates, as one flat parameter of the kind of ``like``, interact."""
    base = torch.tensor(FEW, device=like.device)
    params = {NAME: base.flip(0).to(like.dtype)}
    watched = torch.arange(len(base), device=like.device) % 2 == 0

    def moves(grads: Tensor, keep: Tensor) -> list[Tensor]:
        return _moves(rule, theta, {NAME: params[NAME][keep]}, {NAME: grads[keep].to(like.dtype)}, FACTORS)

    everything = torch.ones_like(watched)
    with torch.no_grad():
        for grads in (magnitude * base for magnitude in MAGNITUDES):
            whole = moves(grads, everything)
            for change in CHANGES:
                beside = moves(torch.where(watched, grads, change * grads), everything)
                _require_same(rule, whole, beside, watched, exact=True)
            _require_same(rule, [move[watched] for move in whole], moves(grads, watched), exact=False)


def tells_tensors_apart(rule: UpdateRule, theta: Theta, params: Params) -> bool:
    """Whether a rule moves parameters of one dtype otherwise than the same coordinates as one flat parameter.

    A rule that does not take the flat one, as its theta is under the names of tensors, tells them apart, too: what it
    raises for another reason, it raises on the parameters themselves.
    """
    values = list(params.values())
    grads = _spread(values[0], sum(p.numel() for p in values)).to(values[0].dtype)
    with torch.no_grad():
        expected = _moves(rule, theta, params, _split(grads, params), FACTORS[:2])
        try:
            found = _moves(rule, theta, {NAME: torch.cat([p.reshape(-1) for p in values])}, {NAME: grads}, FACTORS[:2])
        except (KeyError, ValueError, RuntimeError):
            return True
    return not all(_same(*pair, exact=False) for pair in zip(found, expected, strict=True))


def _spread(like: Tensor, size: int) -> Tensor:
    """Return gradients (size,) of both signs and of changing magnitude, on the device of ``like``."""
    count = torch.arange(size, device=like.device)
    return (1.3 * count + 0.4).cos() * 10.0 ** (count % 5 - 2)


def _split(grads: Tensor, params: Params) -> Params:
    pieces = torch.split(grads, [p.numel() for p in params.values()])
    return {k: g.reshape(p.shape).to(p.dtype) for (k, p), g in zip(params.items(), pieces, strict=True)}


def _moves(rule: UpdateRule, theta: Theta, params: Params, grads: Params, factors: Sequence[float]) -> list[Tensor]:
    """Return each step's deltas, of all parameters side by side, at fixed parameters."""
    params, state = rule.init(theta, params)
    loss = next(iter(params.values())).new_tensor(0.7)
    moves: list[Tensor] = []
    for factor in factors:
        deltas, state = rule.update(theta, {k: factor * g for k, g in grads.items()}, state, params, loss)
        moves.append(torch.cat([deltas[k].reshape(-1) for k in params]))
    return moves


def _require_same(
    rule: UpdateRule, whole: list[Tensor], other: list[Tensor], watched: Tensor | None = None, *, exact: bool
) -> None:
    pairs = [(a, b) if watched is None else (a[watched], b[watched]) for a, b in zip(whole, other, strict=True)]
    if not all(_same(a, b, exact=exact) for a, b in pairs):
        raise ValueError(
            f"{type(rule).__name__} says coordinatewise = True, but its coordinates interact: some moved otherwise "
            "when the gradients of others alone were changed, as under a norm of all of them; meta-gradients would be "
            "those of another rule. Leave coordinatewise at False, or let each coordinate move by itself"
        )


def _same(a: Tensor, b: Tensor, *, exact: bool) -> bool:
    """Whether two moves agree but for rounding; sums in another order differ by more than the same ones."""
    eps = torch.finfo(a.dtype).eps
    finite = a[a.isfinite()].abs()
    scale = float(finite.amax()) if finite.numel() else 0.0
    allowed = scale * (8 * eps if exact else max(1e-4, 8 * eps))
    return bool(torch.isclose(a, b, rtol=0, atol=allowed, equal_nan=True).all())
