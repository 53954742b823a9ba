"""Meta-gradients of the inner solution by the implicit function theorem, whatever path led there."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.checks import require_count
from learnedopt.core.estimator import Estimate, GradientEstimator, as_leaves, call_objective, check_objective, no_path
from learnedopt.core.inner import Carry, InnerLoop, InnerSolver, Rollout, detach, narrow, solve_inner
from learnedopt.core.objective import MetaObjective
from learnedopt.core.tree import Theta
from learnedopt.estimators.linear_solvers import ConjugateGradient, LinearSolver, Solution, asymmetry
from learnedopt.estimators.systems import (
    OptimalitySystem,
    PublishedSystem,
    StepMapSystem,
    System,
    does_not_move,
    require_solution_moves,
)
from learnedopt.execution import compiled
from learnedopt.execution.allocator import keep_freed_memory


class ConvergenceWarning(UserWarning):
    """The inner problem was not solved, so its implicit gradient is that of another point."""


@final
@dataclass(frozen=True)
class Implicit(GradientEstimator):
    """The gradient of the inner problem's solution (iMAML, Rajeswaran et al. 2019; Bai et al. 2019 for fixed points).

    Where the rule has a regularizer the solution satisfies ``grad(loss + regularizer) = 0``, and with H its Hessian the
    meta-gradient is ``-u^T d grad(loss + regularizer)/d theta`` with ``H u = d objective/d params``. Otherwise it is
    the fixed point of the step map ``z -> Phi(z, theta)`` on ``z = (params, state)``, and the meta-gradient is
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
    ``stationarity``: the norm of grad(loss + regularizer) against its two terms', or the last step's length against the
    first's.

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
        if not isinstance(self.solver, LinearSolver):
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

    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: Carry) -> Estimate:
        """Solve the inner problem without a graph, then one linear system per task."""
        if loop.execution.compile:
            compiled.say_why_not(loop, "an implicit meta-gradient is a linear solve, of which each product is one call")
        keep_freed_memory()
        fixed = tree.detach(theta)
        loop.vet(fixed, carry)
        one = loop.begin(fixed, narrow(carry, 0, 1))
        leaves = as_leaves(theta)
        system_type = self._system_type(loop)
        check_objective(loop, theta, objective, carry, self.num_steps, end_only=True)
        require_solution_moves(loop, fixed, one, system_type)

        num_tasks = tree.size(carry.params)
        total, sums, reports, curves = torch.zeros(()), {}, [], []
        for fresh in loop.split(carry):
            chunk = detach(loop.begin(fixed, fresh))
            weight = tree.size(chunk.params) / num_tasks
            rollout = solve_inner(loop, fixed, chunk, self.num_steps, self.inner)
            system = system_type(loop, leaves, chunk, rollout.end)
            value, grads, solution = self._differentiate(loop, leaves, objective, rollout, system)
            self._refuse_vanishing(loop, system)
            for k, g in grads.items():
                sums[k] = sums[k] + weight * g if k in sums else weight * g
            total = total + weight * value
            reports.append((solution.residual, solution.iterations, system.stationarity()))
            curves.append(weight * rollout.losses.mean(1))
        residual, iterations, stationarity = (float(torch.cat(found).max()) for found in zip(*reports, strict=True))
        info = {
            "residual": residual,
            "iterations": int(iterations),
            "stationarity": stationarity,
            "losses": torch.stack(curves).sum(0),
        }
        self._warn(info)
        return Estimate(total, sums, None, info)

    def _system_type(self, loop: InnerLoop) -> type[System]:
        if self.operator == "published":
            if not loop.rule.has_regularizer:
                raise ValueError(
                    f'operator="published" is that of a proximal term, but {type(loop.rule).__name__} has no '
                    "regularizer; use imaml"
                )
            return PublishedSystem
        return OptimalitySystem if loop.rule.has_regularizer and not self.solver.on_step_map else StepMapSystem

    def _differentiate(
        self, loop: InnerLoop, leaves: Theta, objective: MetaObjective, rollout: Rollout, system: System
    ) -> tuple[Tensor, Theta, Solution]:
        with torch.enable_grad():
            params = {k: p.detach().requires_grad_() for k, p in system.end.params.items()}
            end = system.end._replace(params=params)
            value, _ = call_objective(objective, loop, leaves, rollout._replace(end=end))
            wanted = [*params.values(), *leaves.values()]
            found = [None] * len(wanted)
            if value.requires_grad:
                found = torch.autograd.grad(value, wanted, allow_unused=True)
        if all(g is None for g in found[: len(params)]):
            name = getattr(objective, "__name__", type(objective).__name__)
            raise ValueError(no_path(sorted(leaves), f"the solution, which the objective {name} does not read"))
        pulls = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
        rhs = system.right_hand_side(pulls[: len(params)])
        if self.solver.needs_symmetry and not system.symmetric:  # each time: it depends on theta
            skew = float(asymmetry(system.operator, rhs).max())
            if skew > torch.finfo(rhs.dtype).eps ** 0.5:
                raise ValueError(
                    f"conjugate gradient needs a symmetric system, but this rule's step map is not: <a, M b> and "
                    f"<b, M a> differ by {skew:.1e}, relative; use GMRES(...) or Neumann(...)"
                )
        # The objective is a mean over the chunk's tasks, so the systems' right-hand sides carry that factor already.
        solution = self.solver.solve(system.operator, rhs)
        direct = pulls[len(params) :]
        return (
            value.detach(),
            {k: d + g for (k, g), d in zip(system.pull_back(solution.x).items(), direct, strict=True)},
            solution,
        )

    def _refuse_vanishing(self, loop: InnerLoop, system: System) -> None:
        """Check once, at the first solution that has converged: of any other point nothing can be said."""
        if "vanishing" in loop.vetted or not float(system.stationarity().max()) <= self.tolerance:
            return
        still = system.vanishing()
        if still:
            why = "its effect on a step vanishes with the step, within the stationarity error"
            raise ValueError(does_not_move(still, why))
        loop.vetted["vanishing"] = True

    def _warn(self, info: dict[str, Any]) -> None:
        if not info["stationarity"] <= self.tolerance:
            warnings.warn(
                f"the inner problem has not converged after {self.num_steps} steps: stationarity "
                f"{info['stationarity']:.1e} (tolerance {self.tolerance:.0e}), linear residual {info['residual']:.1e} "
                f"after {info['iterations']} iterations; the implicit meta-gradient is inexact by about as much. Take "
                "more steps, or smaller ones where it diverges",
                ConvergenceWarning,
                stacklevel=3,
            )
