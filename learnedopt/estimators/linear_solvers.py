"""Iterative solvers for the linear systems of implicit differentiation.

A system is given as a function on matrices (num_tasks, dim) that applies each task's own operator to its own row; rows
never mix, and every task has step sizes and residuals of its own. Iteration counts are fixed in advance and finished
tasks are masked, so that nothing waits for a value on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.counts import require_count

Operator = Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    """``x`` (num_tasks, dim), the relative residual ``|b - A x| / |b|`` (num_tasks,), and iterations (num_tasks,)."""

    x: Tensor
    residual: Tensor
    iterations: Tensor


class LinearSolver(ABC):
    """Solves ``A x = b`` for every task."""

    needs_symmetry: bool = False
    """Whether the method is only right for a symmetric operator."""
    on_step_map: bool = False
    """Whether the method needs the operator in the form ``I - M`` of a step map, whose powers of M it sums."""

    @abstractmethod
    def solve(self, operator: Operator, rhs: Tensor) -> Solution:
        """Return the solution for the right-hand sides ``rhs`` (num_tasks, dim)."""


@final
@dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    """Conjugate gradient (Hestenes and Stiefel 1952) from zero, for symmetric positive definite operators.

    In exact arithmetic it ends after as many iterations as the operator has distinct eigenvalues. The residual is
    the one that the iteration carries along, which spares a product; below the square root of the precision, where
    rounding may have parted it from the true one, it is computed anew.

    Args:
        num_iterations: at most so many; a task stops earlier where its residual reaches round-off.
        damping: solves ``(A + damping I) x = b``, which trades bias for conditioning. The residual reported is that of
            the damped system.
        truncate: for an operator that may be indefinite: a task stops before the first direction p along which
            ``p^T A p`` is not positive, with its x of then, or with ``b`` where that is the first (Steihaug 1983).
    """

    num_iterations: int
    damping: float = 0.0
    truncate: bool = False

    needs_symmetry = True

    def __post_init__(self) -> None:
        require_count("num_iterations", self.num_iterations, least=1)
        if not self.damping >= 0:
            raise ValueError(f"damping={self.damping!r} must not be negative: it would make the operator less definite")

    def solve(self, operator: Operator, rhs: Tensor) -> Solution:
        """Iterate on all tasks together, each with its own coefficients."""
        x, r, p = torch.zeros_like(rhs), rhs, rhs
        rr = _dot(r, r)
        floor = (torch.finfo(rhs.dtype).eps ** 2) * rr
        iterations, stopped = torch.zeros_like(rr), torch.zeros_like(rr, dtype=torch.bool)
        for i in range(self.num_iterations):
            # What is not finite stays active: its solution is NaN, not 0.
            active = ~((rr <= floor) & rr.isfinite()) & ~stopped
            if not active.any():
                break
            ap = torch.add(operator(p), p, alpha=self.damping)
            pap = _dot(p, ap)
            if self.truncate:
                level = active & (pap <= torch.finfo(pap.dtype).eps * tree.row_lengths(p) * tree.row_lengths(ap))
                if i == 0:
                    x, r = torch.where(level[:, None], rhs, x), torch.where(level[:, None], rhs - ap, r)
                active, stopped = active & ~level, stopped | level
            # Finished tasks divide by one instead of by a vanished number, and do not move.
            alpha = torch.where(active, rr / torch.where(active, pap, 1.0), 0.0)
            x, r = torch.addcmul(x, alpha[:, None], p), torch.addcmul(r, alpha[:, None], ap, value=-1)
            new_rr = _dot(r, r)
            beta = torch.where(active, new_rr / torch.where(active, rr, 1.0), 0.0)
            p = torch.addcmul(r, beta[:, None], p)
            rr, iterations = new_rr, iterations + active
        residual = _relative(r, rhs)
        if (residual < torch.finfo(rhs.dtype).eps ** 0.5).any():
            residual = _relative(rhs - operator(x) - self.damping * x, rhs)
        return Solution(x, residual, iterations)


@final
@dataclass(frozen=True)
class Neumann(LinearSolver):
    """Truncated Neumann series ``sum_{k<K} M^k b`` for ``(I - M) x = b`` (Lorraine et al. 2020, with M the step map).

    It converges where M contracts. On a quadratic, K terms equal back-propagation through the last K steps.

    Args:
        num_terms: K, at least 1.
        step_size: sums the series for ``M = I - step_size A``, times ``step_size``, on any operator ``A``; by default
            the operator is the rule's own step map.
    """

    num_terms: int
    step_size: float | None = None

    def __post_init__(self) -> None:
        require_count("num_terms", self.num_terms, least=1)
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(
                f"step_size={self.step_size!r} must be positive: it takes the place of an inner learning rate"
            )

    @property
    def on_step_map(self) -> bool:  # type: ignore[override]
        """Without a step size of its own the series runs over the rule's steps."""
        return self.step_size is None

    def solve(self, operator: Operator, rhs: Tensor) -> Solution:
        """Sum the terms."""
        scale = 1.0 if self.step_size is None else self.step_size
        term = total = rhs * scale
        for _ in range(self.num_terms - 1):
            term = term - scale * operator(term)
            total = total + term
        iterations = torch.full((rhs.shape[0],), float(self.num_terms), dtype=rhs.dtype, device=rhs.device)
        return Solution(total, _relative(rhs - operator(total), rhs), iterations)


@final
@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Generalised minimal residual (Saad and Schultz 1986) without restarts, for any non-singular operator.

    Args:
        num_iterations: at most so many; memory holds one vector per iteration and task.
        tolerance: relative residual at which it stops once every task is below it.
    """

    num_iterations: int = 50
    tolerance: float = 1e-12

    def __post_init__(self) -> None:
        require_count("num_iterations", self.num_iterations, least=1)
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance={self.tolerance!r} is a relative residual and cannot be negative")

    def solve(self, operator: Operator, rhs: Tensor) -> Solution:
        """Build one Arnoldi basis a task, and minimise the residual over it by Givens rotations."""
        num_tasks, dim = rhs.shape
        norm = tree.row_lengths(rhs)
        steps = min(self.num_iterations, dim)
        basis = [_safe_divide(rhs, norm)]
        rotations: list[tuple[Tensor, Tensor]] = []
        triangle, target = rhs.new_zeros(num_tasks, steps, steps), rhs.new_zeros(num_tasks, steps + 1)
        target[:, 0] = norm
        residual, iterations = torch.where(norm == 0, 0.0, torch.ones_like(norm)), torch.zeros_like(norm)
        for j in range(steps):
            column, direction = _orthogonalise(operator(basis[j]), basis)
            basis.append(direction)
            triangle[:, : j + 1, j], rotation = _rotate(column, rotations)
            rotations.append(rotation)
            cos, sin = rotation
            target[:, j], target[:, j + 1] = cos * target[:, j], -sin * target[:, j]
            iterations = iterations + (residual > self.tolerance)
            residual = _safe_scalar(target[:, j + 1].abs(), norm)
            if not (residual > self.tolerance).any():
                break
        used = len(rotations)
        y = _back_substitute(triangle[:, :used, :used], target[:, :used])
        x = torch.einsum("jnd,nj->nd", torch.stack(basis[:used]), y)
        return Solution(x, _relative(rhs - operator(x), rhs), iterations)


def _orthogonalise(w: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the coefficients (num_tasks, len(basis) + 1) of ``w`` on the basis and beyond, and the new direction."""
    total = w.new_zeros(w.shape[0], len(basis) + 1)
    for _ in range(2):  # a second pass keeps the basis orthogonal to round-off
        for i, q in enumerate(basis):
            h = _dot(q, w)
            total[:, i] += h
            w = w - h[:, None] * q
    length = tree.row_lengths(w)
    # Where the basis is complete, what is left is round-off: end it there instead of normalising noise.
    noise = 1e2 * torch.finfo(w.dtype).eps * tree.row_lengths(total)
    total[:, -1] = torch.where(length <= noise, 0.0, length)
    return total, torch.where((length <= noise)[:, None], 0.0, _safe_divide(w, length))


def _rotate(column: Tensor, rotations: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Apply the earlier rotations to a column (num_tasks, n + 1), and the one that brings its last entry to zero.

    Returns the first n entries, and the new rotation's cosine and sine.
    """
    entries = list(column.unbind(1))
    for i, (cos, sin) in enumerate(rotations):
        entries[i], entries[i + 1] = cos * entries[i] + sin * entries[i + 1], cos * entries[i + 1] - sin * entries[i]
    length = torch.hypot(entries[-2], entries[-1])
    cos = torch.where(length == 0, 1.0, entries[-2] / torch.where(length == 0, 1.0, length))
    sin = _safe_scalar(entries[-1], length)
    return torch.stack([*entries[:-2], length], dim=1), (cos, sin)


def _back_substitute(triangle: Tensor, target: Tensor) -> Tensor:
    """Solve upper triangular systems (num_tasks, n, n); a vanished pivot's unknown, which nothing fixes, is 0."""
    pivots = triangle.diagonal(dim1=1, dim2=2).abs()
    vanished = pivots <= 1e2 * torch.finfo(triangle.dtype).eps * pivots.amax(dim=1, keepdim=True)
    safe = triangle + torch.diag_embed(vanished.to(triangle.dtype))
    right = torch.where(vanished, 0.0, target)
    # torch gives it no types.
    solve = cast("Callable[..., Tensor]", torch.linalg.solve_triangular)  # pyright: ignore[reportUnknownMemberType]
    return solve(safe, right[:, :, None], upper=True).squeeze(-1)


def asymmetry(operator: Operator, like: Tensor) -> Tensor:
    """Return ``|<a, M b> - <b, M a>|`` relative to its terms (num_tasks,), for one random pair of vectors."""
    generator = torch.Generator(device=like.device).manual_seed(0)
    a, b = (torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device) for _ in range(2))
    ma, mb = operator(a), operator(b)
    sizes = tree.row_lengths(a) * tree.row_lengths(mb) + tree.row_lengths(b) * tree.row_lengths(ma)
    return (_dot(a, mb) - _dot(b, ma)).abs() / sizes


def _dot(a: Tensor, b: Tensor) -> Tensor:
    # torch gives it no types.
    return torch.linalg.vecdot(a, b)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _relative(residual: Tensor, rhs: Tensor) -> Tensor:
    return _safe_scalar(tree.row_lengths(residual), tree.row_lengths(rhs))


def _safe_scalar(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is 0: a zero right-hand side is solved by zero; what is not finite stays NaN."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _safe_divide(a: Tensor, b: Tensor) -> Tensor:
    return _safe_scalar(a, b[:, None])
