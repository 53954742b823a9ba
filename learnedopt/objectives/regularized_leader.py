"""Follow the regularised leader on the true losses, as an inner solver."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry
from learnedopt.core.counts import require_count
from learnedopt.core.inner import InnerLoop
from learnedopt.core.tree import Theta
from learnedopt.objectives.convex import (
    Learner,
    ProjectedGradient,
    Projection,
    Rows,
    begun,
    require_solved,
    sum_of_losses,
)


@final
@dataclass(frozen=True)
class FollowTheRegularizedLeader:
    """``argmin_x Σ_{i < n} l_i(x) + B(x, phi) / eta`` after n steps, phi the carry's parameters.

    An inner solver, exact where ``MirrorDescent`` linearises the losses. It is also the regularised solution of a batch
    of losses (FLI-batch of Balcan, Khodak and Talwalkar 2019).

    Args:
        learner: ``MirrorDescent``, whose geometry and step size these are; theta's radius where it has learned one.
        onto: the set that the Euclidean leader is kept in; the entropic one is on the simplex.
        max_iterations: after which the search is given up.
        tolerance: of the mean loss's gradient, see ``ProjectedGradient``.

    Raises:
        TypeError: the learner is no ``MirrorDescent``.
        ValueError: a set for the entropic leader; from a call, theta has no radius, or the minimum was not reached.

    Example:
        >>> solve = FollowTheRegularizedLeader(MirrorDescent(radius=0.5, num_steps=16), onto=Ball(1.0))
        >>> leader = solve(loop, theta, loop.begin(theta, carry), 16)
    """

    learner: Learner
    onto: Projection | None = None
    max_iterations: int = 5000
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.learner, "step_size") or not hasattr(self.learner, "geometry"):
            raise TypeError(f"learner={self.learner!r} has no geometry and step size; pass MirrorDescent(...)")
        require_count("max_iterations", self.max_iterations, least=1)
        if not self.learner.geometry.flat and self.onto is not None:
            raise ValueError(
                f"onto={self.onto!r} with {self.learner.geometry}: that leader stays in its domain; pass no set"
            )
        ProjectedGradient(self.onto, self.max_iterations, self.tolerance)  # which asks the rest

    def __call__(self, loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> Carry:
        """Return the carry at the leader of the next ``num_steps`` losses, without a graph."""
        carry = begun(loop, theta, carry)
        eta = self.learner.step_size(radius_of(self.learner, theta))
        if self.learner.geometry.flat:
            solver = ProjectedGradient(self.onto, self.max_iterations, self.tolerance)
            return solver(loop, theta, carry, num_steps, strength=1 / eta)
        return self._mirrored(loop, theta, carry, num_steps, eta)

    def _mirrored(self, loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int, eta: Any) -> Carry:
        """Descend by Bregman proximal gradient steps, relative to the geometry (Bauschke, Bolte and Teboulle 2017).

        A step is ``argmin_x <g, x> + B(x, phi)/eta + L B(x, x_k)``: exact at once for linear losses, with L = 0.
        """
        rows, geometry = Rows(loop, carry), self.learner.geometry
        losses, x = sum_of_losses(loop, theta, carry, num_steps), rows.here()
        pull = (1 / torch.as_tensor(eta, dtype=x.dtype, device=x.device)).detach().expand(len(x)).reshape(-1, 1)
        anchor = dual = rows.map(geometry.to_dual, x)
        curvature, at_x, gap = torch.zeros_like(pull), rows.gradient(losses, x), torch.full_like(pull, torch.inf)
        tolerance = self.tolerance or torch.finfo(x.dtype).eps ** 0.75
        for _ in range(self.max_iterations):
            goal = (pull * anchor + curvature * dual - at_x) / (pull + curvature)
            x_new = rows.map(geometry.from_dual, goal)
            dual_new, at_new, step = rows.map(geometry.to_dual, x_new), rows.gradient(losses, x_new), x_new - x
            gap = (pull + curvature) * tree.row_lengths(step)[:, None] / max(num_steps, 1)
            curved, allowed = ((end * step).sum(1, keepdim=True) for end in (at_new - at_x, dual_new - dual))
            fits = (curved <= curvature * allowed) | (gap <= tolerance)
            curvature = torch.where(fits, curvature, torch.maximum(2 * curvature, pull))
            x, dual = torch.where(fits, x_new, x), torch.where(fits, dual_new, dual)
            at_x = torch.where(fits, at_new, at_x)
            if bool((gap <= tolerance).all()):
                break
        require_solved(self, gap.squeeze(1), tolerance)
        return rows.moved(x, num_steps)


def radius_of(learner: Learner, theta: Theta) -> Any:
    """Return the learner's radius: a constant, or what theta has under a name that ends in it.

    Raises:
        ValueError: theta has none, or several.
    """
    return find_radius(theta, "*radius") if learner.learns_radius else learner.radius


def find_radius(theta: Theta, pattern: str) -> Tensor:
    """Return the one meta-parameter that matches ``pattern``, positive; ValueError otherwise."""
    names = [name for name in theta if fnmatchcase(name, pattern)]
    if len(names) != 1:
        raise ValueError(
            f"theta has {names or 'nothing'} where one radius is wanted ({pattern!r} among {list(theta)}); learn it: "
            'MirrorDescent(learn=("radius",))'
        )
    radius = theta[names[0]]
    if not bool((radius > 0).all()):
        raise ValueError(
            f"the radius {names[0]!r} is {float(radius.min()):g} and must be positive; what moves it must keep it so, "
            "as GuessAndGrow does"
        )
    return radius
