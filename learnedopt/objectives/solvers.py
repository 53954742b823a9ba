"""Where the sum of a task's losses is least: the solver of the targets that are solutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, detach
from learnedopt.core.counts import require_count
from learnedopt.core.inner import InnerLoop
from learnedopt.core.task import Batch
from learnedopt.core.tree import Params, Theta

DECREASE = 1e-4  # what part of the decrease that its slope promises a step must bring
MAX_HALVINGS = 30
LONG = 1e-3  # what part of the whole way a step is that does not come to rest
MAX_DIM = 4096  # parameters of a task: its Hessian is dense, and is decomposed


class _Point(NamedTuple):
    """Of every task: where it stands (num_tasks, dim), and the sum's value, gradient and Hessian there."""

    x: Tensor
    value: Tensor
    gradient: Tensor
    hessian: Tensor


@final
@dataclass(frozen=True)
class SumOfLossesSolver:
    """Damped Newton with dense Hessians, all tasks at once (Nocedal and Wright 2006, section 3.4).

    Finds of each task the x where ``sum_i l_i(x) + strength / 2 |x - center|^2`` is least, ``l_i`` the outer loss on
    the train batch of step ``carry.step + i``, i below ``num_steps``. Where the curvature is negative, its size is
    taken. A direction that is flat where the solver starts is left alone: of many minimisers it takes the one straight
    ahead, as that of an underdetermined least-squares problem nearest to the start.

    A task is solved by the step of which the full Newton step is shorter than ``sqrt(eps) (1 + |x|)``, which leaves
    an error of about eps: not by a small gradient, which separable classes have as well, ever further away.

    Args:
        max_iterations: Newton steps, at most.

    Raises:
        ValueError: a task has no minimiser, as far as the iterates show (they run away, the sum falls along a flat
            direction, or comes to rest at a saddle); it has too many parameters; the batches differ in shape.

    Example:
        >>> target = BestInHindsight(SumOfLossesSolver(), num_steps=10)
    """

    max_iterations: int = 100

    def __post_init__(self) -> None:
        require_count("max_iterations", self.max_iterations, least=1)

    def __call__(
        self, loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int, strength: float = 0.0,
        center: Params | None = None,
    ) -> Carry:  # fmt: skip
        """Return the carry at the solution, without a graph; a fresh carry is begun first."""
        require_count("num_steps", num_steps, least=1)
        theta = tree.detach(theta)
        start = detach(loop.begin(theta, carry))
        total = _Sum(loop, theta, start, num_steps, strength, start.params if center is None else center)
        x = tree.ravel(list(start.params.values()))
        found = self._minimised(total, x)
        params = dict(zip(start.params, tree.unravel(found, list(start.params.values())), strict=True))
        return start._replace(params=params)

    def _minimised(self, total: _Sum, x: Tensor) -> Tensor:
        first = at = total.at(x)
        free = _curved(at.hessian)
        floor = _floor(first.hessian)
        solved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        length = torch.zeros_like(at.value)
        for _ in range(self.max_iterations):
            step, curvature = _newton_step(at, free)
            before, length = length, tree.row_lengths(step)
            away = torch.maximum(before, length) > LONG * tree.row_lengths(at.x - x)
            _refuse(~solved & (curvature < floor) & away, at, first, length, "x runs away to where nothing curves")
            # The step that shows convergence is taken: what is left after it is its square.
            last = length <= torch.finfo(x.dtype).eps ** 0.5 * (1 + tree.row_lengths(at.x))
            moved = torch.where(last[:, None], at.x + step, _searched(total, at, step))
            moved = torch.where(solved[:, None], at.x, moved)
            solved, at = solved | last, total.at(moved)
            if solved.all():
                break
        _refuse(~solved, at, first, length, f"Newton's method has not come to rest after {self.max_iterations} steps")
        _refuse_flat(at, free, first, length)
        return at.x


class _Sum:
    """The sum of losses of every task as a function of one matrix (num_tasks, dim)."""

    def __init__(
        self, loop: InnerLoop, theta: Theta, start: Carry, num_steps: int, strength: float, center: Params
    ) -> None:
        self.loop, self.theta, self.strength = loop, theta, strength
        self.like = {k: p[:1] for k, p in start.params.items()}
        self.center = tree.ravel([center[k].detach() for k in start.params])
        dim = self.center.shape[1]
        if dim > MAX_DIM:
            raise ValueError(
                f"SumOfLossesSolver holds a task's whole Hessian, and these tasks have {dim} parameters, more than "
                f"{MAX_DIM}; pass a solver of your own, (loop, theta, carry, num_steps, strength, center) -> Carry"
            )
        steps = range(start.step, start.step + num_steps)
        self.batches = _stacked([loop.batch(start.tasks, step, "train") for step in steps])

    def of_one(self, x: Tensor, center: Tensor, batches: Batch) -> Tensor:
        """Return the sum of ONE task at ``x`` (dim,)."""
        params = dict(zip(self.like, tree.unravel(x[None], list(self.like.values())), strict=True))
        params = tree.squeeze(params)

        def loss(batch: Batch) -> Tensor:
            return self.loop.inner_objective.outer_loss(self.theta, self.loop.family, params, batch)

        losses = torch.func.vmap(loss)(batches)
        return losses.sum() + 0.5 * self.strength * (x - center).square().sum()

    def values(self, x: Tensor) -> Tensor:
        """Return the sum of each task (num_tasks,)."""
        with torch.no_grad():
            return self.loop.over_tasks(self.of_one, (), x, self.center, self.batches)

    def at(self, x: Tensor) -> _Point:
        """Return value, gradient and Hessian of each task."""

        def all_of_one(x: Tensor, center: Tensor, batches: Batch) -> tuple[Tensor, Tensor, Tensor]:
            def gradient(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                slope, value = torch.func.grad_and_value(self.of_one)(x, center, batches)
                return slope, (slope, value)

            # Reverse over reverse: torch's forward mode errs through some operations.
            hessian, (slope, value) = torch.func.jacrev(gradient, has_aux=True)(x)
            return value, slope, (hessian + hessian.mT) / 2

        with torch.no_grad():
            return _Point(x, *self.loop.over_tasks(all_of_one, (), x, self.center, self.batches))


def _stacked(batches: Sequence[Batch]) -> Batch:
    """Return the batches of all steps as one tree, with the steps as the second dimension."""
    try:
        return tree.tree_map(lambda *each: torch.stack(each, dim=1), batches[0], *batches[1:])
    except RuntimeError as error:
        raise ValueError(
            f"SumOfLossesSolver evaluates the losses of all steps together, but the batches of {len(batches)} steps "
            f"differ in shape ({error}); pass a solver of your own, or make them alike"
        ) from error


def _floor(hessian: Tensor) -> Tensor:
    """Return the curvature (num_tasks,) below which round-off hides it."""
    return hessian.shape[-1] * 100 * torch.finfo(hessian.dtype).eps * _largest(hessian)


def _curved(hessian: Tensor) -> Tensor:
    """Return the projection (num_tasks, dim, dim) onto the directions that are not flat."""
    values, vectors = _eigen(hessian)
    kept = vectors * (values.abs() > _floor(hessian)[:, None]).to(vectors.dtype)[:, None, :]
    return kept @ vectors.mT


# torch.linalg has no types: what is used of it stands here once, and with its own.
def _largest(matrices: Tensor) -> Tensor:
    """Return the largest singular value (num_tasks,) of each matrix."""
    return torch.linalg.matrix_norm(matrices, 2)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _eigen(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return each symmetric matrix's eigenvalues (num_tasks, dim), ascending, and eigenvectors, in columns."""
    return torch.linalg.eigh(matrices)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _eigenvalues(matrices: Tensor) -> Tensor:
    """Return each symmetric matrix's eigenvalues (num_tasks, dim), ascending."""
    return torch.linalg.eigvalsh(matrices)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _newton_step(at: _Point, free: Tensor) -> tuple[Tensor, Tensor]:
    """Return each task's full step (num_tasks, dim) within the directions that were not flat at the start, and the
    least size of curvature (num_tasks,) there."""
    dim = at.x.shape[1]
    flat = torch.eye(dim, dtype=at.x.dtype, device=at.x.device) - free
    scale = at.hessian.abs().amax((1, 2))[:, None, None]
    # Flat directions get a curvature of their own, apart from all others, and no slope.
    values, vectors = _eigen(free @ at.hessian @ free + torch.where(scale > 0, scale, 1.0) * flat)
    slope = free @ at.gradient[:, :, None]
    along = (vectors.mT @ slope).squeeze(2)
    sizes = values.abs()
    # A curvature of exactly zero would not show in which direction to go: descend along the slope there.
    step = -along / torch.where(sizes > 0, sizes, 1.0)
    return (vectors @ step[:, :, None]).squeeze(2), sizes.amin(1)


def _searched(total: _Sum, at: _Point, step: Tensor) -> Tensor:
    """Return each task's point after the longest halving of its step that brings enough; itself where none does."""
    promised = -(step * at.gradient).sum(1)
    noise = 4 * torch.finfo(at.value.dtype).eps * at.value.abs()
    length, found = torch.ones_like(at.value), at.x
    open_ = torch.ones_like(at.value, dtype=torch.bool)
    for _ in range(MAX_HALVINGS):
        trial = at.x + length[:, None] * step
        enough = open_ & (total.values(trial) <= at.value - DECREASE * length * promised + noise)
        found, open_ = torch.where(enough[:, None], trial, found), open_ & ~enough
        if not open_.any():
            break
        length = 0.5 * length
    return found


def _refuse_flat(at: _Point, free: Tensor, first: _Point, length: Tensor) -> None:
    """Refuse what came to rest where it is no minimum: on a slope along a flat direction, or at a saddle."""
    eps = torch.finfo(at.x.dtype).eps ** 0.5
    scale = torch.maximum(*(point.hessian.abs().amax((1, 2)) for point in (at, first)))
    slope = tree.row_lengths(at.gradient - (free @ at.gradient[:, :, None]).squeeze(2))
    sloping = slope > eps * scale * (1 + tree.row_lengths(at.x))
    _refuse(sloping, at, first, length, "their losses go on falling along a direction without curvature")
    lowest = _eigenvalues(at.hessian)[:, 0]
    _refuse(lowest < -eps * scale, at, first, length, "Newton's method came to rest at a saddle of their losses")


def _refuse(which: Tensor, at: _Point, first: _Point, length: Tensor, what: str) -> None:
    if not which.any():
        return
    tasks = tree.numbers(which.nonzero().flatten())
    far, begun, last = (
        [f"{float(x):.3g}" for x in found[which]]
        for found in (tree.row_lengths(at.x), tree.row_lengths(first.x), length)
    )
    raise ValueError(
        f"the sum of losses has no minimiser that can be found in the tasks {tasks} of these {len(which)}: {what} "
        f"(|x| went from {begun} to {far}, the last step's length was {last}). The losses of separable classes, for "
        "one, fall for ever as x grows. Add a penalty: RegularizedSolution(solver, num_steps, strength), or an "
        "outer_loss with one; or pass a solver that keeps x within bounds"
    )
