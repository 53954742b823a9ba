"""The inner gradient without a graph: the parameters and theta alone are kept, and the way back computes it again.

A gradient that is recorded keeps the graph of the loss and of its backward pass. Here, where cotangents ``v`` of the
losses and ``c`` of the gradient arrive, the cotangents of all that the losses ``L`` read,

    (d_x, d_theta) (v L + <c, d_x L>),

are ONE forward-mode pass of ``(x, theta) -> (d_x wL, d_theta wL)`` along ``(c, 0)`` in ``(x, theta)`` and ``v`` in the
tasks' weights ``w = 1``, by the symmetry of second derivatives (MixFlow-MG, Kemaev et al. 2025). The order reverse over
forward is never used: torch gets it wrong, silently, for normalisation layers.

Forward mode over reverse mode fails for some operations of torch and is silently wrong through others, at all points or
at special ones. So a loss is tried once, at its first call: where the two modes do not agree, it is differentiated by
reverse mode over reverse mode instead. The result is that of the plain tape either way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from learnedopt.core import tree
from learnedopt.core.tree import Params, Theta

logger: logging.Logger = logging.getLogger("learnedopt")

_UNTRUSTED = {
    "LinalgDet", "LinalgSlogdet", "LinalgSolveEx", "TriangularSolve", "CholeskyInverse", "ScatterReduce",
    # at special points alone: zeros, and matrices that have lost rank
    "Prod", "Cumprod", "LinalgVectorNorm", "Norm", "Dist", "Sinc", "LinalgPinv",
    # fails for one task's mean, and ends the process under a TorchDispatchMode, such as the one that measures memory
    "MseLoss",
}  # fmt: skip
"""Operations by their names in torch's graphs whose gradient has wrong tangents, without an error (torch 2.13).

Some of them since their backward pass, where no graph is asked for, goes through saved factors that have no tangents.
"""


class Plan(NamedTuple):
    """What the first call of a loss found out, about its inputs in order: parameters that it reads, then theta.

    ``theta``: the names of what they depend on of it. ``by_values``, ``by_grads``: which inputs the losses and the
    gradients depend on; the latter is None where no second derivative exists to tell. ``constant``: the gradients that
    have no graph. ``reason``: why forward mode over reverse mode does not serve, None where it does.
    """

    theta: tuple[str, ...]
    by_values: frozenset[int]
    by_grads: frozenset[int] | None
    constant: frozenset[int]
    reason: str | None


Losses = Callable[[Sequence[Tensor]], Tensor]
"""The losses (num_tasks,), or () of one task, as a function of the inputs in the plan's order."""


def value_and_gradient(
    losses: Callable[[Params, Theta], Tensor], params: Params, theta: Theta, plans: dict[Hashable, Plan]
) -> tuple[Tensor, list[Tensor]]:
    """Return ``losses(params, theta)``, one number a task, and the gradient of their sum with respect to ``params``.

    Both are differentiable once, with respect to ``params`` and the values of ``theta`` that require a gradient. They
    depend on what they depend on under the plain tape, so that what has no path to an objective has none here.

    Args:
        losses: of tasks that do not interact. It is called again on the way back, so it must be a function of its
            arguments alone, and reads nothing else that is to be differentiated.
        params: batched, or one task's.
        theta: shared by the tasks, or batched; whatever ``losses`` takes.
        plans: what first calls of THESE losses found, by the kind of the call; the caller keeps it.

    Raises:
        ValueError: the losses differ between two calls with the same arguments.
    """
    at, fixed = {k: p.detach().requires_grad_() for k, p in params.items()}, tree.detach(theta)
    with torch.enable_grad():
        values = losses(at, fixed)
        found: list[Tensor | None] = [*torch.autograd.grad(values.sum(), list(at.values()), allow_unused=True)]
    values = values.detach()
    read = [k for k, g in zip(params, found, strict=True) if g is not None]
    learned = {k: x for k, x in theta.items() if x.requires_grad}
    rest = tree.detach(params)

    def of(names: Sequence[str]) -> Losses:
        def call(inputs: Sequence[Tensor]) -> Tensor:
            these, those = inputs[: len(read)], inputs[len(read) :]
            # Starting from all keeps the order of both dicts.
            return losses(rest | dict(zip(read, these, strict=True)), fixed | dict(zip(names, those, strict=True)))

        return call

    shapes = tuple((k, params[k].shape[values.ndim :]) for k in read)
    key = (values.ndim, values.dtype, values.device, shapes, tuple(learned))
    if key not in plans:
        inputs = [params[k] for k in read] + list(learned.values())
        plan = _plan(of(list(learned)), inputs, list(learned), values)
        if plan.reason and plan.reason not in {other.reason for other in plans.values()}:
            logger.warning(
                "mixed_mode: this loss is differentiated by reverse mode over reverse mode, with the same result, "
                "holding the graph of one inner step at a time: %s",
                plan.reason,
            )
        plans[key] = plan
    plan = plans[key]

    grads = {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(rest.items(), found, strict=True)}
    inputs = [params[k] for k in read] + [learned[k] for k in plan.theta]
    arguments = (of(plan.theta), plan, (values, *(grads[k] for k in read)), *inputs)
    # torch gives it no types.
    applied = cast("tuple[Tensor, ...]", _Gradient.apply(*arguments))  # pyright: ignore[reportUnknownMemberType]
    values, *through = applied
    return values, list((grads | dict(zip(read, through, strict=True))).values())


class _Gradient(torch.autograd.Function):
    """Hand on values and gradients that were found without a graph; find them again when their cotangents arrive."""

    @staticmethod
    def forward(ctx: Any, losses: Losses, plan: Plan, found: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.losses, ctx.plan = losses, plan
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(found[1 + i] for i in plan.constant))
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's decorator loses the arguments' names
        ctx: Any, of_values: Tensor | None, *of_grads: Tensor | None
    ) -> tuple[Any, ...]:
        mode = _reverse_over_reverse if ctx.plan.reason else _forward_over_reverse
        found = mode(ctx.losses, ctx.saved_tensors, of_values, of_grads)
        if ctx.plan.by_grads is not None:
            reached = ctx.plan.by_values if of_values is not None else frozenset[int]()
            if any(c is not None for c in of_grads):
                reached = reached | ctx.plan.by_grads
            # No cotangent in place of zeros, as on the plain tape: a path that does not exist must be seen.
            found = [x if i in reached else None for i, x in enumerate(found)]
        return None, None, None, *found


def _forward_over_reverse(
    losses: Losses, inputs: Sequence[Tensor], of_values: Tensor | None, of_grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    inputs = [_own(x).requires_grad_() for x in inputs]
    params, theta = inputs[: len(of_grads)], inputs[len(of_grads) :]
    along = [torch.zeros_like(p) if c is None else c.contiguous() for p, c in zip(params, of_grads, strict=True)]
    with torch.enable_grad(), forward_ad.dual_level():
        duals = [*(_dual(p, c) for p, c in zip(params, along, strict=True)), *theta]
        values = losses(duals)
        ones = torch.ones_like(_parts(values)[0].detach())
        weights = _dual(ones, torch.zeros_like(ones) if of_values is None else of_values.contiguous())
        grads = torch.autograd.grad(values, duals, weights, materialize_grads=True)
        tangents = [_parts(g)[1] for g in grads]
    return [torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True)]


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    return forward_ad.make_dual(primal, tangent)  # pyright: ignore[reportUnknownMemberType] - torch gives it no types


def _parts(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    return forward_ad.unpack_dual(dual)  # pyright: ignore[reportUnknownMemberType] - torch gives it no types


def _reverse_over_reverse(
    losses: Losses, inputs: Sequence[Tensor], of_values: Tensor | None, of_grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = _recorded(losses, inputs, len(of_grads))
    return _pull(outputs, inputs, (of_values, *of_grads))


def _recorded(losses: Losses, inputs: Sequence[Tensor], num_params: int) -> list[Tensor]:
    """Return the losses and their gradient with respect to the parameters, with the graph of the plain tape."""
    with torch.enable_grad():
        values = losses(inputs)
        grads = torch.autograd.grad(values.sum(), list(inputs[:num_params]), create_graph=True, materialize_grads=True)
    return [values, *grads]


def _pull(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], *, keep: bool = False
) -> list[Tensor | None]:
    """Return the cotangents of the inputs, None for those that no output with a cotangent depends on."""
    pairs = [(x, c) for x, c in zip(outputs, cotangents, strict=True) if c is not None and x.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    along, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(along, list(inputs), weights, allow_unused=True, retain_graph=keep))


def _plan(losses: Losses, inputs: Sequence[Tensor], names: Sequence[str], values: Tensor) -> Plan:
    """Try the loss once in both modes, along a random direction."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    num_params = len(inputs) - len(names)
    again, *grads = outputs = _recorded(losses, inputs, num_params)
    eps = torch.finfo(values.dtype).eps
    if not torch.allclose(again, values, rtol=eps**0.5, atol=0.0, equal_nan=True):
        first, second = tree.numbers(values), tree.numbers(again)
        raise ValueError(
            f"the loss gives {first} and then {second} for the same arguments, but mixed_mode=True "
            "calls it again on the way back; take randomness (dropout, noise) and memory out of it, or leave mixed_mode"
        )
    operations = _operations(again)
    constant = frozenset(i for i, g in enumerate(grads) if not g.requires_grad)
    generator = torch.Generator().manual_seed(0)
    of_values, *of_grads = [_random_like(x, generator) for x in outputs]
    by_values = _pull(outputs, inputs, [of_values] + [None] * num_params, keep=True)
    try:
        by_grads = _pull(outputs, inputs, [None, *of_grads])
    except RuntimeError as error:
        reason = f"torch has no second derivative of it ({_first_line(error)}), which the plain tape needs as well"
        return Plan(tuple(names), _present(by_values), None, constant, reason)
    del outputs, grads, again
    expected = [_sum(x, g, h) for x, g, h in zip(inputs, by_values, by_grads, strict=True)]
    reason = _reason(losses, inputs, of_values, of_grads, expected, operations)
    # Theta that neither reaches stays outside, as a constant.
    used = [i for i in range(len(inputs)) if i < num_params or by_values[i] is not None or by_grads[i] is not None]
    kept = tuple(names[i - num_params] for i in used if i >= num_params)
    return Plan(kept, _present([by_values[i] for i in used]), _present([by_grads[i] for i in used]), constant, reason)


def _reason(
    losses: Losses, inputs: Sequence[Tensor], of_values: Tensor, of_grads: Sequence[Tensor], expected: Sequence[Tensor],
    operations: set[str],
) -> str | None:  # fmt: skip
    """Return why forward mode over reverse mode does not serve, None where it does."""
    untrusted = sorted(operations & _UNTRUSTED)
    if untrusted:
        return f"torch's forward mode over reverse mode cannot be trusted with {', '.join(untrusted)}"
    try:
        found = _forward_over_reverse(losses, inputs, of_values, of_grads)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"torch's forward mode fails in it ({_first_line(error)})"
    off = max(_off(x, y, expected) for x, y in zip(found, expected, strict=True))
    if off <= 1.0:
        return None
    return (
        f"its forward mode over reverse mode gives other second derivatives ({off:.1g} times what rounding explains): "
        "a torch.no_grad() inside, which does not stop forward mode, a custom gradient, or a wrong one of torch's"
    )


def _off(found: Tensor | None, expected: Tensor, all_expected: Sequence[Tensor]) -> float:
    """Return the largest error of a tensor in units of what rounding explains; infinity for what is not finite."""
    if found is None or not found.numel():
        return 0.0
    eps, largest = torch.finfo(expected.dtype).eps, max(x.abs().max().item() for x in all_expected if x.numel())
    allowed = eps**0.5 * expected.abs().max().item() + 100 * eps * largest
    error = (found - expected).abs().max().item()
    if error == 0.0:
        return 0.0
    return error / allowed if allowed > 0.0 and math.isfinite(error + allowed) else math.inf


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _operations(output: Tensor) -> set[str]:
    """Return the names of the operations in a tensor's graph, such as ``LinalgDet``."""
    seen: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return {node.name().split("Backward")[0] for node in seen}


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator).to(device=x.device, dtype=x.dtype)


def _sum(like: Tensor, *terms: Tensor | None) -> Tensor:
    return sum((x for x in terms if x is not None), torch.zeros_like(like.detach()))


def _present(found: Sequence[Tensor | None]) -> frozenset[int]:
    return frozenset(i for i, x in enumerate(found) if x is not None)


def _own(p: Tensor) -> Tensor:
    """Return the tensor without its graph; a copy where it repeats entries, as tangents cannot."""
    repeats = any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True))
    return p.detach().clone(memory_format=torch.contiguous_format) if repeats else p.detach()
