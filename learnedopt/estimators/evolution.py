"""Meta-gradients by evolution strategies: differences of the objective between perturbed copies of theta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry
from learnedopt.core.counts import require_count
from learnedopt.core.estimator import Estimate, GradientEstimator
from learnedopt.core.inner import InnerLoop
from learnedopt.core.modes import outside_inference_mode
from learnedopt.core.objective import MetaObjective
from learnedopt.core.shares import carries_in, require_bounds, require_parts, require_same
from learnedopt.core.task import Tasks
from learnedopt.core.tree import Theta
from learnedopt.estimators import perturbations
from learnedopt.estimators.finite_tasks import Values, finite_values, report
from learnedopt.estimators.windows import require_windows
from learnedopt.execution import particles
from learnedopt.execution.particles import Particles


class EvolutionCarry(NamedTuple):
    """Where an episode stands, what the next window's perturbations are drawn from, ``seed`` and its number, and the
    first of the pairs to run and the one after the last; None for all."""

    inner: Carry
    seed: int
    window: int
    pairs: tuple[int, int] | None = None  # not in files of before


@final
@dataclass(frozen=True)
class EvolutionStrategies(GradientEstimator):
    """The gradient of the objective smoothed over theta, ``E f(theta + sigma scale n)``, n standard normal.

    Estimated as the mean over pairs of ``n (f(theta + sigma scale n) - f(theta - sigma scale n)) / (2 sigma scale)``
    (Nesterov and Spokoiny 2017; antithetic as in Salimans et al. 2017), with ``scale`` the loop's ``theta_scale``:
    exact on average where f is quadratic, whatever sigma is. Nothing is differentiated, so f may be anything, a step
    function included, and memory does not grow with the steps. Both particles of a pair, and all pairs, see the same
    tasks and batches; all run together (``learnedopt.execution.particles``). A pair costs two forward episodes.

    Args:
        num_steps: inner steps of an episode, or of a window.
        num_pairs: antithetic pairs an estimate.
        sigma: how far theta is perturbed, in units of ``theta_scale``.
        horizon: length of an episode that is cut into windows, a multiple of ``num_steps``; all particles then start
            from where one more of them, at theta itself, has come to. What theta does to later windows is not seen:
            windows are biased as truncated back-propagation is. None for whole episodes.
        ranked: take ranks of the objective in its place; the gradient then has the direction of an ascent in ranks, and
            no scale.

    A pair whose objective is not finite is left out, and counted in ``info["not_finite"]``; so is a task on which no
    pair is finite, see ``Estimate``; where all are, the estimate is not finite. ``loss`` is the mean over particles.
    ``info`` also holds ``inner_steps``, how many were taken of one task; ``variance`` of the estimate by entry, on
    these tasks; and ``gradient_variance``, its sum.

    Raises:
        ValueError: no pairs, a sigma that is not positive, a window that does not divide the horizon; before the first
            step: part of the objective is held fixed, a meta-parameter moves nothing when perturbed.

    Example:
        >>> estimator = EvolutionStrategies(num_steps=100, num_pairs=16, sigma=0.01)
        >>> carry = estimator.start(loop, theta, tasks, torch.Generator().manual_seed(0))
        >>> estimate = estimator.estimate(loop, theta, FinalLoss(), carry)
    """

    num_steps: int
    num_pairs: int
    sigma: float
    horizon: int | None = None
    ranked: bool = False

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps)
        perturbations.require_pairs(self.num_pairs, self.sigma)
        if self.horizon is not None:
            require_windows(self.num_steps, self.horizon)

    @property
    def takes_second_derivatives(self) -> bool:
        """Not even first ones, beyond those of the inner steps."""
        return False

    @outside_inference_mode
    def start(self, loop: InnerLoop, theta: Theta, tasks: Tasks, generator: torch.Generator) -> EvolutionCarry:
        """Return a fresh episode with a seed of its own."""
        return EvolutionCarry(loop.start(tasks), perturbations.draw_seed(generator), 0)

    def forms(self, loop: InnerLoop, theta: Theta, carry: EvolutionCarry) -> list[Any]:
        """Return the carry as it starts, and begun."""
        return [carry, carry._replace(inner=loop.begin(theta, carry.inner))]

    def require_carry(self, theta: Theta, carry: Any) -> None:
        """Raise TypeError where a carry is of another class."""
        if not isinstance(carry, EvolutionCarry):
            raise TypeError(
                "EvolutionStrategies draws its perturbations from a carry of its own, got a "
                f"{type(carry).__name__}; begin an episode with estimator.start(loop, theta, tasks, generator)"
            )

    def narrow(self, carry: EvolutionCarry, start: int, stop: int) -> EvolutionCarry:
        """Return a share of the tasks, which sees the same perturbations."""
        perturbations.require_unranked(self)
        return super().narrow(carry, start, stop)

    @property
    def num_parts(self) -> int:
        """As many as there are pairs."""
        return self.num_pairs

    def narrow_parts(self, carry: EvolutionCarry, start: int, stop: int) -> EvolutionCarry:
        """Return the carry with some of the pairs alone, which are perturbed as they are among all."""
        perturbations.require_unranked(self)
        require_bounds(start, stop, self.num_pairs, "pairs")
        return carry._replace(pairs=(start, stop))

    def join_parts(self, carries: Sequence[EvolutionCarry]) -> EvolutionCarry:
        """Return the carry of all pairs, which start from one place."""
        require_parts([x.pairs for x in carries], self.num_pairs, "EvolutionStrategies")
        require_same("seed, window or step", [(x.seed, x.window, x.inner.step) for x in carries], "EvolutionStrategies")
        return carries[0]._replace(pairs=None)

    def is_part(self, carry: EvolutionCarry) -> bool:
        """Return whether it is of some of the pairs."""
        return carry.pairs is not None

    def standing(self, loop: InnerLoop, carry: Any) -> list[tuple[InnerLoop, Carry, int | None]]:
        """Return where all particles start."""
        return [(loop, each, self.num_steps) for each in carries_in(carry)]

    @outside_inference_mode
    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: EvolutionCarry) -> Estimate:
        """Run every particle through the episode, or one window of it."""
        self.require_carry(theta, carry)
        inner, theta = carry.inner, tree.detach(theta)
        still = perturbations.check(loop, theta, objective, inner.tasks, self.num_steps, self.sigma)
        lengths = perturbations.lengths_of(loop, theta, self.sigma)
        source = perturbations.generator(carry.seed, carry.window)
        noise = perturbations.draw(theta, self.num_pairs, source, [] if inner.state is None else still)
        first, end = carry.pairs or (0, self.num_pairs)
        noise, num_pairs = {k: x[first:end] for k, x in noise.items()}, end - first
        thetas = perturbations.perturbed(theta, noise, lengths)
        if self.horizon is not None:  # the particle that the next window starts from
            thetas = {k: torch.cat([x, theta[k].unsqueeze(0)]) for k, x in thetas.items()}
        before = _spread(loop, thetas, inner)
        after, losses = particles.run(loop, before, self.num_steps)
        seen = finite_values(loop, objective, before, after, losses, num_pairs)
        found = seen.found[: 2 * num_pairs]
        pairs = perturbations.pair_gradients(theta, found, noise, lengths, ranked=self.ranked)
        info: dict[str, Any] = {
            "losses": perturbations.curve(seen.losses[:, :, : 2 * num_pairs], pairs.finite),
            "inner_steps": losses.numel(),
            "not_finite": int((~pairs.finite).sum()),
            **perturbations.variance_of(pairs),
            **self._tasks_told(carry, seen, pairs.finite),
        }
        if inner.state is not None and still:
            info["zero_gradient"] = still
        loss = found[pairs.finite.repeat(2)].mean()
        return Estimate(loss, perturbations.mean_of(pairs), self._next(carry, after), info)

    def _tasks_told(self, carry: EvolutionCarry, seen: Values, finite: Tensor) -> dict[str, Any]:
        told = report([seen], tree.size(carry.inner.params))
        if carry.pairs is None:
            return told
        num_tasks = told.pop("num_tasks", tree.size(carry.inner.params))
        told.pop("failed_tasks", None)  # a task has failed where no pair of any part is finite
        return {**told, "num_tasks": num_tasks * int(finite.sum()) / self.num_pairs}

    def _next(self, carry: EvolutionCarry, after: Particles) -> EvolutionCarry | None:
        if self.horizon is None or after.steps[0] >= self.horizon:
            return None
        params, state = tree.tree_map(lambda x: x[:, -1].clone(), (after.params, after.state))
        return EvolutionCarry(
            Carry(after.tasks, params, state, after.steps[0]), carry.seed, carry.window + 1, carry.pairs
        )


def _spread(loop: InnerLoop, thetas: Theta, inner: Carry) -> Particles:
    """Return the particles at the episode's start, each at its own, or at the window's, all at the same."""
    num_slots, num_particles = tree.size(inner.params), tree.size(thetas)
    thetas = perturbations.for_slots(thetas, num_slots)
    if inner.state is None:
        return particles.begin(loop, thetas, inner.tasks, inner.params, inner.step)

    def copies(x: Tensor) -> Tensor:
        return x.unsqueeze(1).expand(num_slots, num_particles, *x.shape[1:]).contiguous()

    params, state = tree.tree_map(copies, (inner.params, inner.state))
    return Particles(inner.tasks, (inner.step,) * num_slots, thetas, params, state)
