"""Try a module's loss out on one task: what a call draws, writes, keeps and computes again, found by doing it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from learnedopt.core import tree
from learnedopt.core.tree import Params, Tree
from learnedopt.tasks.modules import torch_errors
from learnedopt.tasks.modules.stateless import Stateless
from learnedopt.tasks.modules.structure import named_parts, place

_RECOMPUTES = (
    "its forward is computed again on the way back (torch.utils.checkpoint, or a function that does the same), and "
    "would then read other weights than the task's; call it without checkpointing, and let the estimator recompute "
    "instead: Unrolled(num_steps, segment=...)"
)


class Trial(NamedTuple):
    """One task's loss, computed on copies of everything."""

    call: Stateless
    loss_fn: Callable[[Any, Any], Any]
    params: Params
    inputs: Tree
    targets: Any

    def values(self) -> dict[str, Tensor]:
        """Return copies of all tensors of the module; the trained ones are leaves."""
        found = {k: v.detach().clone() for k, v in self.call.values(self.params).items()}
        return {k: v.requires_grad_() if k in self.params else v for k, v in found.items()}

    def run(self, values: dict[str, Tensor]) -> tuple[Any, Any]:
        """Return outputs and loss."""
        outputs = self.call(values, _copy(self.inputs))
        return outputs, self.loss_fn(outputs, _copy(self.targets))


def faults(trial: Trial, *, second_derivatives: bool) -> list[str]:
    """Say what makes the loss no pure function with gradients of its own; nothing that it is given changes.

    Args:
        trial: on concrete tensors, not under vmap.
        second_derivatives: whether they will be taken.
    """
    call = trial.call
    with torch.inference_mode(False), torch.enable_grad(), _randomness_put_back(), call.left_alone():
        values, kept, drawn = trial.values(), _kept(call.module), _random_state()
        versions = {name: v._version for name, v in values.items()}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outputs, loss = trial.run(values)
        if any("None of the inputs have requires_grad=True" in str(w.message) for w in caught):
            return [_RECOMPUTES]
        found = [_who_draws(trial)] if _random_state() != drawn else []
        found += _written(trial, values, versions)
        if not found and not _agree(outputs, trial.run(values)[0]):
            found = [
                "its forward keeps what a later call reads (an attribute, a generator of its own): called twice on the "
                "same inputs it returns different outputs; make it a function of parameters and inputs"
            ]
    found += [
        f"{place(call.module, name)} puts tensors into its {attribute!r}, which would grow and keep their graph alive; "
        "return them from forward, or leave that out"
        for name, attribute in sorted(_kept(call.module).keys() - kept.keys())
    ]
    if found or not isinstance(loss, Tensor) or not loss.requires_grad or not loss.is_floating_point():
        return found
    with torch.inference_mode(False), torch.enable_grad(), call.left_alone():
        return _faults_on_the_way_back(trial, second_derivatives=second_derivatives)


def _written(trial: Trial, values: dict[str, Tensor], versions: dict[str, int]) -> list[str]:
    """Name what forward has written to: an average that stands still at the start still counts."""
    module, given = trial.call.module, trial.call.values(trial.params)
    changed = [k for k, v in given.items() if values[k]._version != versions[k] or not _equal(values[k], v)]
    buffers = dict(module.named_buffers())
    return [
        f"{place(module, name.rpartition('.')[0])} writes to {'its buffer' if name in buffers else 'the parameter'} "
        f"{name!r} in forward, so that one task's loss would change another's; switch that off (eval(), "
        "momentum=0.0), or compute it from the inputs each time"
        for name in changed
    ]


def _faults_on_the_way_back(trial: Trial, *, second_derivatives: bool) -> list[str]:
    nowhere = {k: torch.full_like(p, torch.nan) for k, p in trial.params.items()}
    try:
        found = _gradient(trial, nowhere)
        grads = found if _finite(found) else None
    except RuntimeError as error:
        if "torch.utils.checkpoint" in str(error):
            return [_RECOMPUTES]
        grads = None
    if grads is None:  # Was it the weights that the module held, or are gradients not finite, or not there, anyhow?
        grads = _gradient(trial, trial.values())
        if _finite(grads):
            return [_RECOMPUTES]
    sparse = sorted(k for k, g in grads.items() if g.layout is not torch.strided)
    if sparse:
        return [f"the gradient of {sparse[0]!r} is sparse, and rules take dense ones; pass sparse=False"]
    if second_derivatives:
        try:
            _gradient(trial, {}, twice=True)
        except RuntimeError as error:
            words = torch_errors.advice(error)
            if words is None:
                raise
            return [words]
    return []


def _gradient(trial: Trial, held: Params, *, twice: bool = False) -> Params:
    """Return the gradient that is found while the module holds other weights than those of the forward pass."""
    values = trial.values()
    loss = trial.run(values)[1].sum()
    leaves = {k: values[k] for k in trial.params}

    def back() -> Params:
        wanted = list(leaves.values())
        found: list[Tensor | None] = [*torch.autograd.grad(loss, wanted, create_graph=twice, allow_unused=True)]
        if twice:
            total = torch.stack([g.sum() for g in found if g is not None]).sum()
            if total.requires_grad:
                torch.autograd.grad(total, wanted, allow_unused=True)
        return {k: g for k, g in zip(leaves, found, strict=True) if g is not None}

    return trial.call.holding(held, back)


def _finite(grads: Params) -> bool:
    return all(bool((g.coalesce().values() if g.is_sparse else g).isfinite().all()) for g in grads.values())


def _who_draws(trial: Trial) -> str:
    """Name the innermost layer in which the global generators move."""
    before: list[Any] = []
    found: list[nn.Module] = []

    def enter(part: nn.Module, args: Any) -> None:
        before.append(_random_state())

    def leave(part: nn.Module, args: Any, outputs: Any) -> None:
        if before.pop() != _random_state():
            found.append(part)

    parts = {part: name for name, part in named_parts(trial.call.module)}
    handles = [h for part in parts for h in (part.register_forward_pre_hook(enter), part.register_forward_hook(leave))]
    try:
        trial.run(trial.values())
    finally:
        for handle in handles:
            handle.remove()
    where = f"{place(trial.call.module, parts[found[0]])} draws" if found else "loss_fn draws"
    return (
        f"{where} random numbers (dropout, noise, layers made inside forward), so that the loss would differ from one "
        "call to the next; switch it off (p=0, eval()), or let data return the numbers as inputs"
    )


def _kept(module: nn.Module) -> dict[tuple[str, str], None]:
    """Return the attributes, as (part, attribute), whose containers hold tensors with a graph."""
    return {
        (name, attribute): None
        for name, part in named_parts(module)
        for attribute, value in vars(part).items()
        if attribute not in ("_parameters", "_buffers", "_modules") and isinstance(value, list | dict | tuple)
        and any(isinstance(x, Tensor) and x.grad_fn is not None for x in pytree.tree_leaves(value))
    }  # fmt: skip


def _random_state() -> list[Any]:
    """Return the state of the global generators, in a form that can be compared."""
    name, keys, *rest = np.random.get_state()
    accelerators = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [
        random.getstate(), (name, np.asarray(keys).tobytes(), *rest),
        *[state.numpy().tobytes() for state in (torch.get_rng_state(), *accelerators)],
    ]  # fmt: skip


@contextmanager
def _randomness_put_back() -> Generator[None, None, None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerators = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if accelerators is not None:
            torch.cuda.set_rng_state_all(accelerators)


def _copy(tensors: Tree) -> Tree:
    return tree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, tensors)


def _agree(found: Any, expected: Any) -> bool:
    """Whether trees have equal tensors: the same bits, or, on a device that sums in any order, nearly so."""
    pairs = list(zip(tree.leaves(found), tree.leaves(expected), strict=True))
    return all(_equal(a, b) or _near(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _near(a: Tensor, b: Tensor) -> bool:
    if not a.is_cuda or a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
        return False
    a, b = a.detach(), b.detach()
    size = float(b.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(a, b, rtol=0.0, atol=size * torch.finfo(a.dtype).eps ** 0.5, equal_nan=True)
