"""Can forward mode go through a loop's step, and is it right there? Asked once a loop, before its first estimate.

Forward mode over reverse mode has no formula for some operations of torch, and silently a wrong one for others. So one
step of up to two tasks is taken with tangents along a random direction of theta, parameters and state, and compared
with what reverse mode over reverse mode, the way of the plain tape, says about the same step and direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Tape, detach, narrow
from learnedopt.core.execution import TaskMap
from learnedopt.core.inner import InnerLoop
from learnedopt.core.inner_gradient import step_gradient
from learnedopt.core.task import Batch
from learnedopt.core.tree import Params, Theta
from learnedopt.execution.tangents import Tangents, floating, push

WRONG_AT_POINTS = frozenset({"LinalgVectorNorm", "Norm", "Dist", "Sinc", "LinalgPinv"})
"""Operations by their names in torch's graphs whose gradient has wrong tangents, without an error, at special points:
zeros, matrices that have lost rank (torch 2.13). No comparison elsewhere could tell."""
WRONG = frozenset({
    "LinalgDet", "LinalgSlogdet", "LinalgSolveEx", "TriangularSolve", "CholeskyInverse", "ScatterReduce",
})  # fmt: skip
"""Those that torch 2.13 gets wrong anywhere, the first three for several tasks together: what is found to differ is
laid at their door."""
INSTEAD = {
    "MseLoss": "(outputs - targets).square().mean()",
    "HuberLoss": "the same from torch.where",
    "LinalgVectorNorm": "x.square().sum().sqrt(), or the square itself where that is meant",
    "Norm": "x.square().sum().sqrt(), or the square itself where that is meant",
    "Dist": "(x - y).square().sum().sqrt(), or the square itself where that is meant",
}
"""What to write in their place."""

_IN_DOUBLE = 1e-10  # relative to the sum of the terms' sizes: far above rounding, far below any wrong formula


class _Step(NamedTuple):
    """One step of up to two tasks: what goes into it and comes out of it, each by name, and the inner loss's graph."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    operations: set[str]
    """Of the loss, by their names in torch's graph."""
    own: list[str]
    """Of the step, those of a user's own: ``torch.autograd.Function``."""


def require_forward_mode(loop: InnerLoop, theta: Theta, carry: Carry) -> None:
    """Raise ValueError, which names what is in the way, unless forward mode goes through a step and is right there."""
    if "forward mode" in loop.cache:
        return
    theta, few = tree.detach(theta), narrow(carry, 0, min(2, tree.size(carry.params)))
    begun = detach(loop.begin(theta, loop.split(few)[0]))
    # A point on the way has no special values, such as a memory of zeros.
    ahead = loop.run(theta, begun, 1, Tape.NONE).end
    point = ahead if all(x.isfinite().all() for x in tree.leaves((ahead.params, floating(ahead.state)))) else begun
    recorded = _record(loop, theta, point)
    untrusted = sorted(recorded.operations & WRONG_AT_POINTS)
    if untrusted:
        why = "has silently wrong tangents at special points (zeros, matrices that have lost rank)"
        raise ValueError(_refusal(loop, f"the gradient of {', '.join(untrusted)} {why}", untrusted))
    generator = torch.Generator().manual_seed(0)
    along = {k: _random_like(x, generator) for k, x in recorded.inputs.items()}
    try:
        found = _pushed(loop, theta, point, along)
    except RuntimeError as error:
        known = sorted(recorded.operations & INSTEAD.keys())
        raise ValueError(_refusal(loop, _what_failed(error, recorded.own, known), known)) from error
    wrong = _differing(recorded, found, along, generator)
    if wrong:
        raise ValueError(_refusal(loop, _what_differs(wrong, recorded.operations, tree.size(point.params)), ()))
    if all(x.isfinite().all() for x in found.values()):  # else it said nothing, and is asked again
        loop.cache.put("forward mode", True)


def _record(loop: InnerLoop, theta: Theta, point: Carry) -> _Step:
    """Take the step with the plain tape."""
    task_map = TaskMap(tree.size(point.params))
    leaves, build = tree.flatten(point.state)
    with torch.enable_grad():
        theta, params = ({k: x.detach().requires_grad_() for k, x in named.items()} for named in (theta, point.params))
        leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in leaves]
        state = build(leaves)
        batch = task_map.unbatch(loop.batch(point.tasks, point.step, "train"))
        unbatched = task_map.unbatch(params)
        found = step_gradient(loop.family, loop.inner_objective, task_map, theta, unbatched, batch, Tape.FULL)
        after = loop.move(task_map, theta, found.grads, task_map.unbatch(state), found.params, found.loss)

        def told_loss(theta: Theta, params: Params, batch: Batch) -> Tensor:
            return loop.inner_objective.loss(theta, loop.family, params, batch)

        told = task_map.apply(told_loss, (theta,), unbatched, batch)
    inputs = {f"theta {k!r}": x for k, x in theta.items()} | _named(params, state)
    outputs = {"the outer loss": found.outer} | _named(*after)
    own = sorted(k for k, of_user in _operations([*outputs.values()]).items() if of_user)
    return _Step(inputs, outputs, {*_operations([told])}, own)


def _named(params: Any, state: Any) -> dict[str, Tensor]:
    named = {f"parameter {k!r}": x for k, x in params.items()}
    return named | {f"tensor {i} of the state": x for i, x in enumerate(floating(state))}


def _pushed(loop: InnerLoop, theta: Theta, point: Carry, along: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tangents of the step's outputs along one direction, given twice, as more than one will be."""
    own = {k: torch.stack([along[f"theta {k!r}"]] * 2) for k in theta}
    names = _named(point.params, point.state)
    twice = [torch.stack([along[name]] * 2, 1) for name in names]
    count = len(point.params)
    tangents = Tangents(dict(zip(point.params, twice[:count], strict=True)), tuple(twice[count:]))
    with torch.no_grad():
        pushed = push(loop, theta, own, point, tangents, 1)
    moved = _named(pushed.tangents.params, ()) | {
        f"tensor {i} of the state": x for i, x in enumerate(pushed.tangents.state)
    }
    return {"the outer loss": pushed.of_losses[0, :, 1]} | {k: x[:, 1] for k, x in moved.items()}


def _differing(
    recorded: _Step, found: dict[str, Tensor], along: dict[str, Tensor], generator: torch.Generator
) -> list[str]:
    """Return the names of the outputs whose tangents differ from reverse mode's; [] after one product where none.

    Where both say "not a number" nothing is silent: that is no difference.
    """
    weights = {k: _random_like(x, generator) for k, x in found.items()}
    if _agree(recorded, found, along, weights):
        return []
    return [k for k in found if not _agree(recorded, {k: found[k]}, along, {k: weights[k]}, nan_is_equal=True)]


def _agree(
    recorded: _Step, found: dict[str, Tensor], along: dict[str, Tensor], weights: dict[str, Tensor], *,
    nan_is_equal: bool = False,
) -> bool:  # fmt: skip
    """Whether <w, J d> by forward mode equals <J' w, d> by reverse mode, up to what rounding explains."""
    pairs = [(recorded.outputs[k], w) for k, w in weights.items() if recorded.outputs[k].requires_grad]
    inputs = list(recorded.inputs.values())
    pulled: Sequence[Tensor | None] = [None] * len(inputs)
    if pairs:
        outputs, cotangents = zip(*((x, w.reshape(x.shape)) for x, w in pairs), strict=True)
        pulled = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, retain_graph=True)
    forward = [(weights[k] * t).double() for k, t in found.items()]
    reverse = [(g * d).double() for g, d in zip(pulled, along.values(), strict=True) if g is not None]
    a, b = (sum(float(x.sum()) for x in terms) for terms in (forward, reverse))
    size = sum(float(x.abs().sum()) for x in (*forward, *reverse))
    if a == b or (nan_is_equal and not math.isfinite(a) and not math.isfinite(b)):
        return True
    coarsest = max((x.dtype for x in found.values()), key=lambda dtype: torch.finfo(dtype).eps)
    return abs(a - b) <= (_IN_DOUBLE if coarsest is torch.float64 else torch.finfo(coarsest).eps ** 0.5) * size


def _operations(tensors: Sequence[Tensor]) -> dict[str, bool]:
    """Return the operations in a graph by name, such as ``LinalgDet``; True for those of a user's own."""
    seen: set[Any] = set()
    waiting = [x.grad_fn for x in tensors]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    seen = {x for x in seen if "Backward" in x.name()}  # and no leaves
    return {x.name().split("Backward")[0]: isinstance(x, BackwardCFunction) for x in seen}


def _what_failed(error: RuntimeError, own: list[str], known: list[str]) -> str:
    said = str(error).strip().splitlines()[0].rstrip(".")
    named = ", ".join(own or known)
    return f"torch has no forward derivative of it{f' ({named})' if named else ''}: {type(error).__name__}: {said}"


def _what_differs(names: list[str], operations: set[str], num_tasks: int) -> str:
    suspects = sorted(operations & WRONG)
    cause = f"torch gets that of {', '.join(suspects)} wrong" if suspects else (
        "a part that is held fixed in one mode alone, a wrong derivative of a custom function or of torch's own, in "
        f"{', '.join(sorted(operations))}"
    )  # fmt: skip
    alone = "; for several tasks together at least: try Execution(chunk_size=1)" if num_tasks > 1 else ""
    return f"the tangents of {', '.join(names)} are not those of reverse mode: {cause}{alone}"


def _refusal(loop: InnerLoop, why: str, names: Sequence[str]) -> str:
    hints = "; ".join(f"in place of {name} write {INSTEAD[name]}" for name in names if name in INSTEAD)
    use = f"{hints[:1].upper() + hints[1:]}, or use" if hints else "Use"
    return (
        f"ForwardMode cannot go through a step of {type(loop.rule).__name__} on {type(loop.family).__name__}: {why}. "
        f"{use} Unrolled, which needs reverse mode alone, or evolution strategies (EvolutionStrategies, PersistentES), "
        "which need no derivative"
    )


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device=x.device, dtype=x.dtype)
