"""Solvers of a task's convex losses together: the best point in hindsight, and the regularised leader."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, detach
from learnedopt.core.counts import require_count
from learnedopt.core.inner import InnerLoop
from learnedopt.core.tree import Params, Theta

Projection = Callable[[Params], Params]
"""Takes ONE task's parameters to the closest point of a convex set; ``Ball``, ``Box`` and ``Simplex`` are some."""


class Learner(Protocol):
    """What is asked of ``MirrorDescent``, which lives in a room that this one does not import."""

    @property
    def geometry(self) -> Any:
        """With ``divergence``, ``to_dual``, ``from_dual`` and ``flat``."""
        ...

    @property
    def lipschitz(self) -> float:
        """G."""
        ...

    @property
    def radius(self) -> float:
        """D, where it is a constant."""
        ...

    @property
    def learns_radius(self) -> bool:
        """Whether it is theta's."""
        ...

    def step_size(self, radius: Any) -> Any:
        """Return eta."""
        ...


def sum_of_losses(loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> Callable[[Params], Tensor]:
    """Return the function from batched parameters to ``Σ_{i < num_steps} l_{carry.step + i}``, one sum a task.

    The losses are the outer losses on the train batches of so many steps from the carry's on.
    """
    if not loop.inner_objective.reads_task_loss:
        loop.require_theta(theta)  # one for all tasks
    if num_steps == 0:
        return lambda params: torch.stack([0.0 * p.reshape(p.shape[0], -1).sum(1) for p in params.values()]).sum(0)
    batches = [loop.batch(carry.tasks, carry.step + i, "train") for i in range(num_steps)]
    together = tree.tree_map(lambda *each: torch.stack(each, dim=1), *batches)

    def one_task(theta: Theta, params: Params, batches: tree.Tree) -> Tensor:
        def loss(batch: tree.Tree) -> Tensor:
            return loop.inner_objective.outer_loss(theta, loop.family, params, batch)

        return torch.func.vmap(loss)(batches).sum()

    return lambda params: loop.over_tasks(one_task, (tree.detach(theta),), params, together)


def begun(loop: InnerLoop, theta: Theta, carry: Carry) -> Carry:
    """Return the carry without a graph, a fresh one begun first."""
    # A begun one asks nothing of theta, of which there may be one for each task.
    return detach(carry if carry.state is not None else loop.begin(theta, carry))


@final
@dataclass(frozen=True)
class Rows:
    """A carry's parameters as rows (num_tasks, dim), and functions of ONE task's parameters on such rows."""

    loop: InnerLoop
    carry: Carry

    def here(self) -> Tensor:
        """Return the carry's own."""
        return self.of(self.carry.params)

    def of(self, params: Params) -> Tensor:
        """Return batched parameters as rows."""
        return tree.ravel([params[k].detach() for k in self.carry.params])

    def params(self, rows: Tensor) -> Params:
        """Return rows as batched parameters."""
        return dict(zip(self.carry.params, tree.unravel(rows, [*self.carry.params.values()]), strict=True))

    def map(self, fn: Projection, rows: Tensor) -> Tensor:
        """Return the rows of what ``fn`` makes of each task's parameters."""
        return tree.ravel(list(self.loop.over_tasks(fn, (), self.params(rows)).values()))

    def gradient(self, total: Callable[[Params], Tensor], rows: Tensor) -> Tensor:
        """Return the gradient of a sum a task (num_tasks,)."""
        with torch.enable_grad():
            at = rows.detach().requires_grad_()
            return torch.autograd.grad(total(self.params(at)).sum(), at)[0]

    def moved(self, rows: Tensor, num_steps: int) -> Carry:
        """Return the carry with parameters from rows, so many steps on."""
        return self.carry._replace(params=self.params(rows.detach()), step=self.carry.step + num_steps)


class _Problem(NamedTuple):
    """What is minimised: its gradient at rows, and the projection of each row onto the set."""

    gradient: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class ProjectedGradient:
    """``argmin Σ_i l_i(x) + strength/2 ‖x − center‖²`` over a convex set, for convex and smooth losses.

    Accelerated projected gradient (Beck and Teboulle 2009) that starts its momentum again where it leads uphill
    (O'Donoghue and Candès 2015), with steps found by backtracking; it ends where the mean loss's projected gradient is
    shorter than ``tolerance``. Each task is solved for itself.

    Args:
        onto: the set; None for the whole space, where losses may have no minimum.
        max_iterations: after which the search is given up.
        tolerance: by default ``eps^0.75`` of the parameters' dtype: 2e-12 in float64.

    Raises:
        ValueError: from a call, a task's minimum was not reached: there may be none.
    """

    onto: Projection | None = None
    max_iterations: int = 5000
    tolerance: float | None = None

    def __post_init__(self) -> None:
        require_count("max_iterations", self.max_iterations, least=1)
        if self.onto is not None and not callable(self.onto):
            raise TypeError(f"onto={self.onto!r} is no projection; pass Ball(radius), Box(low, high) or Simplex()")
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance={self.tolerance!r} must be positive and finite, or None")

    def __call__(
        self, loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int, strength: Any = 0.0, center: Any = None
    ) -> Carry:
        """Return the carry at the minimum, ``num_steps`` steps on, without a graph.

        ``strength`` is a number or one a task (num_tasks,); ``center`` batched parameters, by default the carry's.
        """
        rows = Rows(loop, begun(loop, theta, carry))
        losses, start = sum_of_losses(loop, theta, rows.carry, num_steps), rows.here()
        middle = start if center is None else rows.of(center)
        pull = torch.as_tensor(strength, dtype=start.dtype, device=start.device).detach().reshape(-1, 1)
        scale = 1.0 / max(num_steps, 1)  # of a mean loss, so that one tolerance serves all numbers of steps

        def gradient(x: Tensor) -> Tensor:
            return scale * (rows.gradient(losses, x) + pull * (x - middle))

        def project(x: Tensor) -> Tensor:
            return x if self.onto is None else rows.map(self.onto, x)

        problem = _Problem(gradient, project)
        tolerance = self.tolerance or torch.finfo(start.dtype).eps ** 0.75
        found, gap = _accelerated(problem, problem.project(start), tolerance, self.max_iterations)
        require_solved(self, gap, tolerance)
        return rows.moved(found, num_steps)


def _accelerated(problem: _Problem, start: Tensor, tolerance: float, max_iterations: int) -> tuple[Tensor, Tensor]:
    """Return the minima (num_tasks, dim), and the lengths of the projected gradients there."""
    x = y = start
    at_y, momentum = problem.gradient(y), start.new_ones(len(start), 1)
    curvature = _first_curvature(problem, y, at_y)
    gap = torch.full_like(curvature, math.inf)
    for _ in range(max_iterations):
        x_new, curvature, now = _backtracked(problem, y, at_y, curvature, tolerance)
        done = gap <= tolerance  # once found, a minimum stays as it is, whatever the other tasks need
        x_new, gap = torch.where(done, x, x_new), torch.where(done, gap, now)
        if bool((gap <= tolerance).all()):
            return x_new, gap.squeeze(1)
        uphill = ((y - x_new) * (x_new - x)).sum(1, keepdim=True) > 0
        grown = torch.where(uphill, 1.0, 0.5 * (1 + (1 + 4 * momentum.square()).sqrt()))
        y = x_new + torch.where(uphill, 0.0, (momentum - 1) / grown) * (x_new - x)
        x, momentum, at_y = x_new, grown, problem.gradient(y)
    return x, gap.squeeze(1)


def _first_curvature(problem: _Problem, y: Tensor, at_y: Tensor) -> Tensor:
    """Return how the gradient turns along itself, at each row; backtracking asks for more where that is too little."""
    square = at_y.square().sum(1, keepdim=True)
    turned = ((at_y - problem.gradient(y - at_y)) * at_y).sum(1, keepdim=True)
    along = turned / torch.where(square > 0, square, 1.0)
    return torch.where(along > torch.finfo(y.dtype).eps, along, 1.0)  # linear losses turn nowhere: any step will do


def _backtracked(
    problem: _Problem, y: Tensor, at_y: Tensor, curvature: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's step to the set, the curvature that allows it, and the length of the projected gradient."""
    for _ in range(200):
        x = problem.project(y - at_y / curvature)
        step = x - y
        gap = curvature * tree.row_lengths(step)[:, None]
        # By gradients, whose differences keep their digits close to a minimum, where those of losses lose theirs.
        curved = ((problem.gradient(x) - at_y) * step).sum(1, keepdim=True)
        fits = (curved <= curvature * step.square().sum(1, keepdim=True)) | (gap <= tolerance)
        if bool(fits.all()):
            return x, curvature, gap
        curvature = torch.where(fits, curvature, 2 * curvature)
    raise ValueError(
        "no step along the gradient is short enough: the losses are not smooth there, or not finite; check data and "
        "loss, or round its corners off"
    )


def require_solved(solver: object, gap: Tensor, tolerance: float) -> None:
    """Raise ValueError where a task's projected gradient is still longer than allowed."""
    open_ones = tree.numbers(torch.nonzero(~(gap <= tolerance)).flatten())
    if open_ones:
        raise ValueError(
            f"{type(solver).__name__} found no minimum of the losses of {len(open_ones)} of {len(gap)} tasks (number "
            f"{open_ones[0]} the first): the projected gradient of the mean loss is still {float(gap.max()):.2g}. The "
            "losses may have none, as logistic ones of separable data do: keep the parameters in a set "
            "(onto=Ball(...)), or add a penalty (strength=...); else allow more iterations"
        )
