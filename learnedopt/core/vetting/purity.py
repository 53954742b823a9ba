"""Is a loss a function of what it is given, and do tasks not interact?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.execution import TaskMap
from learnedopt.core.tree import Params
from learnedopt.core.vetting import findings
from learnedopt.core.vetting.captured import Watch, find, random_states, seed_everything
from learnedopt.core.vetting.cases import Case, Loss, call_number
from learnedopt.core.vetting.double import promoted
from learnedopt.core.vetting.findings import Finding, first_line

_STRICT = ("parameters", "theta")  # a write to them counts even where it changes nothing this time


def function(case: Case, loss: Loss) -> Iterator[Finding]:
    """Call the loss of the first task, of the last, and of the first again, each under other global seeds."""
    params = [_leaves(case.of_task(i)[0]) for i in range(case.num_tasks)]
    batches = [case.of_task(i)[1] for i in range(case.num_tasks)]
    theta = _leaves(case.theta)
    roots = {"parameters": params, "theta": theta, "batch": case.batch, **_holders(case)}
    watch = Watch(lambda: find(**roots), strict=_STRICT)
    values: list[Tensor] = []
    states: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for i, seed in zip((0, -1, 0), (11, 22, 33), strict=True):
        seed_everything(seed)
        before = random_states(watch.held.generators)
        try:
            values.append(call_number(loss, theta, params[i], batches[i]))
        except Exception as error:  # noqa: BLE001 - a finding: reported, and raised again by vet
            yield Finding(findings.NUMBER, first_line(error), False, error)
            return
        states.append((before, random_states(watch.held.generators)))
    yield Finding(findings.NUMBER, f"it is {values[0].item():.6g}", True)
    written = watch.written()
    answer = f"it writes to {_listed(written)}" if written else f"{len(watch.held.tensors)} tensors are as they were"
    yield Finding(findings.PURE, answer, not written)
    yield _same(values, states)
    known = [*theta.values(), *(x for each in params for x in each.values())]
    yield _closed(values[:2], known, watch.held.tensors)


def _holders(case: Case) -> dict[str, Any]:
    """Return whatever may hold tensors that the loss reads: the family, the inner objective and their methods."""
    family, objective = case.loop.family, case.loop.inner_objective
    methods = {type(family): ("loss", "outputs"), type(objective): ("loss", "outer_loss")}
    names = {f"{kind.__name__}.{m}": getattr(kind, m) for kind, each in methods.items() for m in each}
    return {type(family).__name__: family, type(objective).__name__: objective, **names}


def _leaves(tensors: Params) -> Params:
    return {k: x.detach().clone().requires_grad_(x.is_floating_point() or x.is_complex()) for k, x in tensors.items()}


def _same(values: Sequence[Tensor], states: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> Finding:
    first, again = values[0].detach(), values[2].detach()
    gap = (first - again).abs().item()
    # A generator that the loss seeds itself, to the same state each time, is no randomness.
    drawn = [
        name
        for name in states[0][0]
        if any(before[name] != after[name] for before, after in states)
        and any(after[name] != states[0][1][name] for _, after in states)
    ]
    if drawn:
        answer = f"it draws from {' and '.join(drawn)}: {first.item():.9g}, then {again.item():.9g}"
        return Finding(findings.SAME, answer, False)
    if gap == 0:
        return Finding(findings.SAME, f"{first.item():.9g} both times", True)
    # On a GPU sums of atomic additions come in any order.
    eps = torch.finfo(first.dtype).eps
    if first.device.type != "cpu" and gap <= 100 * eps * first.abs().item():
        return Finding(findings.SAME, f"but for rounding: the kernels' order is not fixed, {gap:.1g} apart", True)
    return Finding(findings.SAME, f"{first.item():.9g} at first, then {again.item():.9g}", False)


def _closed(values: Sequence[Tensor], known: Sequence[Tensor], held: dict[str, Tensor]) -> Finding:
    names = {id(x): name for name, x in held.items()}
    mine = {id(x) for x in known}
    strange = {id(x): x for value in values for x in graph_leaves(value) if id(x) not in mine}
    if not strange:
        return Finding(findings.CLOSED, f"{len(mine)} tensors in all", True)
    found = [f"{names.get(key, 'a tensor')} of shape {tuple(x.shape)}" for key, x in strange.items()]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return Finding(findings.CLOSED, f"the loss reaches {', '.join(found[:3])}{more}, which requires a gradient", False)


def graph_leaves(value: Tensor) -> Iterator[Tensor]:
    """Yield the leaves of a graph that gradients would be accumulated in."""
    seen: set[Any] = set()
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        waiting += [before for before, _ in node.next_functions]


def swapped(case: Case, loss: Loss) -> Finding:
    """Ask for each task's batch alone, the last task first, and compare it, or else its loss."""
    gaps: list[str] = []
    for i in reversed(range(case.num_tasks)):
        seed_everything(44 + i)
        alone = tree.squeeze(case.loop.batch(tree.narrow(case.tasks, i, i + 1), case.step, "train"))
        params, batch = case.of_task(i)
        if _close(alone, batch):
            continue
        with torch.no_grad():
            first, other = (call_number(loss, case.theta, params, x) for x in (batch, alone))
        if not _close(first, other):
            gaps.append(f"task {i} has the loss {first.item():.6g} beside another, and {other.item():.6g} alone")
    what = "each is the same" if case.num_tasks > 1 else "asked twice for its batch, the one task keeps its loss"
    return Finding(findings.SWAPPED, "; ".join(gaps) or what, not gaps)


def _close(a: tree.Tree, b: tree.Tree) -> bool:
    """Return whether trees are equal but for the order of sums."""
    return all(x.shape == y.shape and near(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def near(x: Tensor, y: Tensor, eps: float | None = None) -> bool:
    """Return whether tensors are equal up to the root of ``eps``, by default their dtype's, of the largest entry."""
    if not (x.is_floating_point() or x.is_complex()):
        return torch.equal(x, y)
    if x.numel() == 0:
        return True
    scale = y.detach().abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    return torch.allclose(x, y, rtol=0.0, atol=(eps or torch.finfo(x.dtype).eps) ** 0.5 * scale, equal_nan=True)


def together(case: Case, loss: Loss) -> Finding:
    """Compare losses and gradients of two tasks under vmap with those of each; in float64 where they differ."""

    def losses(params: Params, batch: Any) -> Tensor:
        return TaskMap(case.num_tasks).apply(loss, (case.theta,), params, batch)

    def plain(fn: Callable[..., Tensor], *args: Any) -> Tensor:
        return fn(*args)

    def compare(call: Callable[..., Tensor]) -> float:
        together = _values_and_gradients(lambda p: call(losses, p, case.batch), case.params)
        each = [case.of_task(i) for i in range(case.num_tasks)]
        alone = [_values_and_gradients(lambda p, b=b: call(loss, case.theta, p, b), p) for p, b in each]
        return _largest_gap(together, tree.tree_map(lambda *x: torch.stack(x), *alone), case.params)

    try:
        eps = torch.finfo(next(iter(case.params.values())).dtype).eps
        gap = compare(plain)
        if not gap <= 4 * eps**0.5:
            gap, eps = compare(promoted), torch.finfo(torch.float64).eps
    except Exception as error:  # noqa: BLE001 - a finding: what fails here fails in a run
        return Finding(findings.TOGETHER, first_line(error), False, error)
    return Finding(findings.TOGETHER, f"they differ by {gap:.1g} of the gradient's length", gap <= 4 * eps**0.5)


def _values_and_gradients(losses: Callable[[Params], Tensor], params: Params) -> tuple[Tensor, Params]:
    leaves = _leaves(params)
    values = losses(leaves)
    grads = torch.autograd.grad(values.sum(), list(leaves.values()), materialize_grads=True)
    return values.detach(), dict(zip(leaves, grads, strict=True))


def _largest_gap(a: tuple[Tensor, Params], b: tuple[Tensor, Params], params: Params) -> float:
    """Return the largest difference of losses, and of gradients times the size of their parameters; relative."""

    def wide(x: Tensor) -> Tensor:
        return x.detach().to("cpu", torch.float64)  # which not every device has

    sizes = {k: wide(p).square().mean().sqrt().clamp(min=1e-30) for k, p in params.items()}
    expected = [sizes[k] * wide(g) for k, g in b[1].items()]
    errors = [sizes[k] * wide(a[1][k]) - x for k, x in zip(b[1], expected, strict=True)]
    slopes, whole = (tree.length(torch.stack([tree.length(x) for x in each])) for each in (errors, expected))
    gap, size = (wide(a[0]) - wide(b[0])).abs().max(), wide(b[0]).abs().max()
    return max((error / of.clamp(min=1e-300)).item() for error, of in ((slopes, whole), (gap, size)))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
