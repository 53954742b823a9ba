"""Meta-gradients of the inner solution by the implicit function theorem, whatever path led there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Rollout, detach, narrow
from learnedopt.core.counts import require_count
from learnedopt.core.estimator import (
    Estimate,
    GradientEstimator,
    as_leaves,
    call_objective,
    check_loop,
    check_objective,
    no_path,
)
from learnedopt.core.inner import InnerLoop, InnerSolver, solve_inner
from learnedopt.core.modes import recording_gradients
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Theta
from learnedopt.core.user_warning import warn_user
from learnedopt.estimators.linear_solvers import ConjugateGradient, LinearSolver, Solution, asymmetry
from learnedopt.estimators.solution import does_not_move, is_stationary_point, require_solution_moves
from learnedopt.estimators.systems import OptimalitySystem, PublishedSystem, StepMapSystem, System
from learnedopt.execution.allocator import keep_freed_memory
from learnedopt.execution.programs import say_why_not


class ConvergenceWarning(UserWarning):
    """The inner problem was not solved, so its implicit gradient is that of another point."""


@final
@dataclass(frozen=True)
class Implicit(GradientEstimator):
    """The gradient of the inner problem's solution (iMAML, Rajeswaran et al. 2019; Bai et al. 2019 for fixed points).

    Where theta enters an inner objective L that the rule descends to a stationary point, the solution satisfies
    ``grad L = 0``, and with H its Hessian the meta-gradient is ``-u^T d grad L/d theta`` with ``H u = d objective/d
    params``. Otherwise, and where the rule ends at a fixed point that is not stationary (at a bound, say), it is the
    fixed point of the step map ``z -> Phi(z, theta)`` on ``z = (params, state)``, and the meta-gradient is
    ``u^T d Phi/d theta`` with ``(I - dPhi/dz)^T u = (d objective/d params, 0)``. ``Neumann`` without a step size always
    takes the step map, which has the same solution. Both are taken on the train batch of the last step.

    Memory does not grow with ``num_steps`` nor with the solver's iterations (GMRES: one vector each).

    Args:
        num_steps: inner steps.
        solver: ``ConjugateGradient``, ``Neumann`` or ``GMRES``; conjugate gradient refuses a non-symmetric system.
        inner: solves the inner problem, ``(loop, theta, carry, num_steps) -> Carry``; it need not be differentiable.
            By default the rule's own steps. ``HessianFree`` is one.
        tolerance: relative stationarity above which a ``ConvergenceWarning`` is given.
        operator: "exact", or "published": that of iMAML's published code, ``2 u + H_loss u / (strength + 10)`` where
            the start's gradient has ``u + H_loss u / strength``; a biased gradient, for rules with one strength.

    ``info`` holds the worst over tasks of ``residual`` (of the linear system, relative), ``iterations`` and
    ``stationarity``: the norm of grad L against its two terms' (with a penalty) or that at the start, or the last
    step's length against the first's; ``zero_gradient``: entries of a learned start that the solution forgets, while
    others (the body of ``anil``) do move it.

    Raises:
        ValueError: the objective reads the losses along the way; a meta-parameter does not move the solution, as a
            learning rate does not; the step map counts its steps and so has no fixed point; the system is not symmetric
            under conjugate gradient; the published operator is asked for without a proximal term of one strength.
    """

    num_steps: int
    solver: LinearSolver = field(default_factory=lambda: ConjugateGradient(10))
    inner: InnerSolver | None = None
    tolerance: float = 1e-3
    operator: Literal["exact", "published"] = "exact"

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps)
        if not isinstance(cast("object", self.solver), LinearSolver):
            raise TypeError(
                f"solver={self.solver!r} is no LinearSolver; pass ConjugateGradient(10), Neumann(10) or GMRES(50)"
            )
        if not self.tolerance > 0:
            raise ValueError(f"tolerance={self.tolerance!r} is a relative stationarity and must be positive")
        if self.operator not in ("exact", "published"):
            raise ValueError(f'operator={self.operator!r} is neither "exact" nor "published"')
        if self.operator == "published" and self.solver.on_step_map:
            raise ValueError(
                f'operator="published" takes the place of a Hessian, but {self.solver!r} works on the step map; pass '
                "ConjugateGradient(5)"
            )

    @recording_gradients
    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry) -> Estimate:
        """Solve the inner problem without a graph, then one linear system per task."""
        keep_freed_memory()
        if loop.execution.compile:
            say_why_not(loop, "an implicit meta-gradient is a linear solve, of which each product is one call")
        check_loop(loop, theta, carry, second_derivatives=True)
        check_objective(loop, theta, objective, carry, self.num_steps, end_only=True)
        fixed, leaves = tree.detach(theta), as_leaves(theta)
        stationary = self._is_stationary_point(loop, fixed, narrow(carry, 0, 1))
        forgotten = require_solution_moves(loop, fixed, carry, objective, stationary=stationary)

        num_tasks = tree.size(carry.params)
        total, read = torch.zeros(()), set[str]()
        sums: Theta = {}
        reports: list[tuple[Tensor, Tensor, Tensor]] = []
        curves: list[Tensor] = []
        kinds: list[type[System]] = []
        still: list[set[str] | None] = []
        for fresh in loop.split(carry):
            chunk = detach(loop.begin(fixed, fresh))
            weight = tree.size(chunk.params) / num_tasks
            rollout = solve_inner(loop, fixed, chunk, self.num_steps, self.inner)
            system = self._system(loop, leaves, chunk, rollout.end, stationary=stationary)
            value, grads, solution, direct = self._differentiate(loop, leaves, objective, rollout, system, fresh)
            read |= direct
            kinds.append(type(system))
            still.append(self._vanishing(loop, system))
            for k, g in grads.items():
                sums[k] = sums[k] + weight * g if k in sums else weight * g
            total = total + weight * value
            reports.append((solution.residual, solution.iterations, system.stationarity()))
            curves.append(weight * rollout.losses.mean(1))
        self._refuse_vanishing(loop, still, kinds[-1], read)
        residual, iterations, stationarity = (float(torch.cat(found).max()) for found in zip(*reports, strict=True))
        info: dict[str, Any] = {
            "residual": residual,
            "iterations": int(iterations),
            "stationarity": stationarity,
            "losses": torch.stack(curves).sum(0),
        }
        if forgotten:
            info["zero_gradient"] = forgotten
        self._warn(info)
        return Estimate(total, sums, None, info)

    def _is_stationary_point(self, loop: InnerLoop, theta: Theta, carry: Carry) -> bool:
        if self.operator == "published":
            if loop.inner_objective.penalty is None:
                raise ValueError(
                    f'operator="published" is that of a proximal term, but {type(loop.inner_objective).__name__} has '
                    "no penalty; use InnerLoop(..., inner_objective=Proximal(template, strength))"
                )
            return True
        if self.solver.on_step_map:
            return False
        return loop.cache.remember("rests", lambda: is_stationary_point(loop, theta, loop.begin(theta, carry)))

    def _system(self, loop: InnerLoop, leaves: Theta, start: Carry, end: Carry, *, stationary: bool) -> System:
        """Return the system of what the end solves.

        A rule that descends may end where the gradient is not zero: at a bound, or where part of the parameters is not
        moved. Then the end is a fixed point of the step map alone.
        """
        if self.operator == "published":
            return PublishedSystem(loop, leaves, start, end)
        if not stationary:
            return StepMapSystem(loop, leaves, start, end)
        system = OptimalitySystem(loop, leaves, start, end)
        if self.inner is None and not self._converged(system):
            fixed_point = StepMapSystem(loop, leaves, start, end)
            if self._converged(fixed_point):
                return fixed_point
        return system

    def _converged(self, system: System) -> bool:
        return bool((system.stationarity() <= self.tolerance).all())

    def _differentiate(
        self, loop: InnerLoop, leaves: Theta, objective: MetaObjective, rollout: Rollout, system: System, fresh: Carry
    ) -> tuple[Tensor, Theta, Solution, set[str]]:
        """Return the objective, its gradient, the system's solution, and which of theta the objective itself reads."""
        with torch.enable_grad():
            params = {k: p.detach().requires_grad_() for k, p in system.end.params.items()}
            end = system.end._replace(params=params)
            value, _ = call_objective(objective, loop, leaves, rollout._replace(end=end))
            wanted = [*params.values(), *leaves.values()]
            found: list[Tensor | None] = [None] * len(wanted)
            if value.requires_grad:
                found = [*torch.autograd.grad(value, wanted, allow_unused=True)]
        read = {k for k, g in zip(leaves, found[len(params) :], strict=True) if g is not None}
        if all(g is None for g in found[: len(params)]) and leaves.keys() - read:
            name, lost = getattr(objective, "__name__", type(objective).__name__), sorted(leaves.keys() - read)
            raise ValueError(no_path(lost, f"the solution, which the objective {name} does not read"))
        cotangents = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
        of_params, direct = cotangents[: len(params)], cotangents[len(params) :]
        rhs = system.right_hand_side(of_params)
        if self.solver.needs_symmetry and not system.symmetric:  # each time: it depends on theta
            _require_symmetry(system, rhs)
        # The objective is a mean over the chunk's tasks, so the systems' right-hand sides carry that factor already.
        solution = self.solver.solve(system.operator, rhs)
        grads = {k: d + g for (k, g), d in zip(system.pull_back(solution.x).items(), direct, strict=True)}
        of_start = system.of_start(solution.x, of_params)
        if of_start is not None and fresh.state is None:
            for k, g in _through_start(loop, leaves, fresh, of_start).items():
                grads[k] = grads[k] + g
        return value.detach(), grads, solution, read

    def _vanishing(self, loop: InnerLoop, system: System) -> set[str] | None:
        """Return what does not move a chunk's solution; None where it has not converged: nothing is known then."""
        if ("vanishing", type(system)) in loop.cache or not self._converged(system):
            return None
        return set(system.vanishing())

    def _refuse_vanishing(
        self, loop: InnerLoop, still: list[set[str] | None], system: type[System], read: set[str]
    ) -> None:
        """Judge once, over the whole meta-batch: what moves the solution of one task alone does move solutions.

        What the objective itself reads has a gradient all the same.
        """
        judged = [names for names in still if names is not None]
        if len(judged) < len(still):
            return
        everywhere = judged[0].intersection(*judged[1:])
        if not everywhere:
            loop.cache.put(("vanishing", system), True)
        elif everywhere - read:
            everywhere -= read
            why = "its effect on a step vanishes with the step, within the stationarity error"
            raise ValueError(does_not_move(sorted(everywhere), why))

    def _warn(self, info: dict[str, Any]) -> None:
        if not info["stationarity"] <= self.tolerance:
            warn_user(
                f"the inner problem has not converged after {self.num_steps} steps: stationarity "
                f"{info['stationarity']:.1e} (tolerance {self.tolerance:.0e}), linear residual {info['residual']:.1e} "
                f"after {info['iterations']} iterations; the implicit meta-gradient is inexact by about as much. Take "
                "more steps, or smaller ones where it diverges",
                ConvergenceWarning,
            )
        elif math.isfinite(self.tolerance) and not info["residual"] <= 1.0:
            warn_user(
                "the linear system of the implicit meta-gradient is not solved: relative residual "
                f"{info['residual']:.1e} after {info['iterations']} iterations, more than that of no solution at all. "
                "It is singular, or needs more iterations: take more, or a damping, or an objective with one minimum",
                ConvergenceWarning,
            )


def _require_symmetry(system: System, rhs: Tensor) -> None:
    skew = float(asymmetry(system.operator, rhs).max())
    if skew > torch.finfo(rhs.dtype).eps ** 0.5:
        raise ValueError(
            f"conjugate gradient needs a symmetric system, but this rule's step map is not: <a, M b> and <b, M a> "
            f"differ by {skew:.1e}, relative; use GMRES(...) or Neumann(...)"
        )


def _through_start(loop: InnerLoop, leaves: Theta, fresh: Carry, cotangents: list[Tensor]) -> Theta:
    """Return the gradient of theta through the starting parameters of a chunk of tasks."""
    with torch.enable_grad():
        start = loop.begin(leaves, fresh).params
    pairs = [(p, c) for p, c in zip(start.values(), cotangents, strict=True) if p.requires_grad]
    if not pairs:
        return {}
    outputs, given = zip(*pairs, strict=True)
    found: list[Tensor | None] = [*torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True)]
    return {k: g for k, g in zip(leaves, found, strict=True) if g is not None}
