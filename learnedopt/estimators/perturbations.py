"""What estimators that perturb theta share: their draws, the particles' thetas and objectives, and the checks.

Perturbations come in antithetic pairs, ``theta ± sigma * scale * n`` with n standard normal and ``scale`` the loop's
``theta_scale``; the particles of a pair lie num_pairs apart: first all with the plus sign, then all with the minus.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Rollout, Tape
from learnedopt.core.counts import require_count
from learnedopt.core.estimator import as_leaves, call_objective, check_loop, check_objective
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import MetaObjective, OfLosses, TaskMean, read_directly
from learnedopt.core.shares import Indivisible
from learnedopt.core.task import Tasks
from learnedopt.core.tree import Theta
from learnedopt.execution import particles
from learnedopt.execution.particles import Particles


def require_pairs(num_pairs: int, sigma: object) -> None:
    """Raise TypeError or ValueError unless there is a pair, and a length to perturb by."""
    require_count("num_pairs", num_pairs, least=1)
    if isinstance(sigma, bool) or not isinstance(sigma, int | float):
        raise TypeError(f"sigma={sigma!r} is a {type(sigma).__name__}; pass a number, such as 0.01")
    if not 0 < sigma < math.inf:
        raise ValueError(
            f"sigma={sigma!r} must be positive and finite: it is how far theta is perturbed, in units of theta_scale"
        )


def require_unranked(estimator: Any) -> None:
    """Raise Indivisible where a meta-batch cannot be estimated in shares: ranks of its means are no means of ranks."""
    if estimator.ranked:
        raise Indivisible(
            f"a meta-batch of {type(estimator).__name__}(ranked=True) cannot be estimated in shares: pairs are ranked "
            "among each other by the mean of their objective over all tasks; leave ranked out, or estimate all in one "
            "process"
        )


def generator(seed: int, *numbers: int) -> torch.Generator:
    """Return a generator that the numbers alone decide; others' draws are independent of its own."""
    # Torch's CPU generator reads the low 32 bits of a seed only: all numbers must be mixed into these.
    mixed = np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint32)[0]
    return torch.Generator().manual_seed(int(mixed))


def draw_seed(source: torch.Generator) -> int:
    """Draw the seed of everything that an estimator will draw by itself."""
    return int(torch.randint(2**31, (), generator=source, device=source.device))


def draw(theta: Theta, num_pairs: int, source: torch.Generator, still: list[str]) -> Theta:
    """Draw standard normal numbers (num_pairs, ...) for each meta-parameter, zeros for those in ``still``.

    In float64 first, so that a theta in float32 is perturbed by the same ones but for rounding.
    """
    noise: Theta = {}
    for k, x in theta.items():
        drawn = torch.randn((num_pairs, *x.shape), generator=source, dtype=torch.float64).to(x.device, x.dtype)
        noise[k] = torch.zeros_like(drawn) if k in still else drawn
    return noise


def perturbed(theta: Theta, noise: Theta, lengths: Theta) -> Theta:
    """Return the particles' thetas (2 num_pairs, ...): theta plus, then minus, noise times ``lengths``."""
    moves = {k: noise[k] * lengths[k] for k in theta}
    return {k: torch.cat([x + moves[k], x - moves[k]]) for k, x in theta.items()}


def for_slots(theta: Theta, num_slots: int) -> Theta:
    """Return the particles' thetas for each of as many tasks: (num_slots, num_particles, ...)."""
    return {k: x.expand(num_slots, *x.shape) for k, x in theta.items()}


def lengths_of(loop: InnerLoop, theta: Theta, sigma: float) -> Theta:
    """Return how far each meta-parameter is perturbed: sigma times its scale."""
    return {k: sigma * x for k, x in loop.theta_scale(theta).items()}


def values(loop: InnerLoop, objective: MetaObjective, before: Particles, after: Particles, losses: Tensor) -> Tensor:
    """Return each particle's objective (num_particles,), the mean over the tasks of the slots; of losses in float64.

    Args:
        loop: the loop.
        objective: one of losses is evaluated for all particles at once, others for one particle after the other.
        before: the particles at the start of the window; all slots at one step.
        after: at its end.
        losses: of the window, (num_steps, num_slots, num_particles).
    """
    if isinstance(objective, OfLosses):
        end = particles.losses(loop, after, objective.split)
        found = objective.of_losses(losses.flatten(1), end.flatten()).reshape(end.shape)
        return found.double().mean(0)  # a mean in float32 would hide differences between particles in its rounding
    values: list[Tensor] = []
    with torch.no_grad():
        for i in range(losses.shape[2]):
            theta = {k: x[0, i] for k, x in after.theta.items()}
            rollout = Rollout(_carry(before, i), _carry(after, i), losses[:, :, i])
            value, onward = call_objective(objective, loop, theta, rollout)
            if onward is not None:
                raise ValueError(
                    f"{_name(objective)} names a carry that training goes on from, but perturbed particles go on from "
                    "where they are; return the scalar alone, or use an estimator that back-propagates"
                )
            values.append(value)
    return torch.stack(values)


def _carry(at: Particles, i: int) -> Carry:
    params, state = tree.tree_map(lambda x: x[:, i], (at.params, at.state))
    return Carry(at.tasks, params, state, at.steps[0])


def finite_pairs(found: Tensor, num_pairs: int) -> Tensor:
    """Return of which pairs (num_pairs,) both objectives are finite."""
    finite = found.isfinite()
    return finite[:num_pairs] & finite[num_pairs : 2 * num_pairs]


class PairGradients(NamedTuple):
    """What pairs tell of the gradient: each one's share (num_pairs, ...), and which are finite (num_pairs,)."""

    shares: Theta
    finite: Tensor


def pair_gradients(theta: Theta, found: Tensor, directions: Theta, lengths: Theta, *, ranked: bool) -> PairGradients:
    """Return each pair's ``direction * (f₊ - f₋) / (2 length)``, where ``direction * length`` is how theta was moved.

    Args:
        theta: for its names.
        found: the objectives of the particles, (2 num_pairs,).
        directions: standard normal numbers, or sums of them, (num_pairs, ...).
        lengths: sigma times the scales.
        ranked: put the ranks of the objectives, from -0.5 to 0.5, in their place (Salimans et al. 2017).
    """
    num_pairs = len(found) // 2
    finite = finite_pairs(found, num_pairs)
    fitness = ranks(found, finite.repeat(2)) if ranked else found
    differences = torch.where(finite, (fitness[:num_pairs] - fitness[num_pairs:]) / 2, 0.0)
    shares = {}
    for k in theta:
        each = differences.to(directions[k].dtype).reshape(-1, *(1,) * (directions[k].ndim - 1))
        shares[k] = each * directions[k] / lengths[k]
    return PairGradients(shares, finite)


def ranks(found: Tensor, finite: Tensor) -> Tensor:
    """Return the ranks of the finite values, centred and scaled to [-0.5, 0.5]; equal ones share theirs."""
    kept = found[finite]
    below, equal = (kept[:, None] > kept).sum(1), (kept[:, None] == kept).sum(1)
    centred = (below + (equal - 1) / 2) / max(len(kept) - 1, 1) - 0.5
    return torch.full_like(found, torch.nan).masked_scatter(finite, centred.to(found.dtype))


def curve(losses: Tensor, finite: Tensor) -> Tensor:
    """Return the finite pairs' mean curve (num_steps,) of losses (num_steps, num_slots, 2 num_pairs)."""
    return losses[:, :, finite.repeat(2)].flatten(1).mean(1)


def mean_of(pairs: PairGradients) -> Theta:
    """Return the mean over the finite pairs; NaN where there is none, so that nobody takes it for a zero."""
    count = pairs.finite.sum()
    return {k: x.sum(0) / count for k, x in pairs.shares.items()}


def variance_of(pairs: PairGradients) -> dict[str, Any]:
    """Return ``variance`` of the mean over pairs by entry, and its sum; nothing where fewer than two pairs tell."""
    count = int(pairs.finite.sum())
    if count < 2:
        return {}
    kept = {k: x[pairs.finite] for k, x in pairs.shares.items()}
    variance = {k: x.var(0) / count for k, x in kept.items()}
    return {"variance": variance, "gradient_variance": float(sum(x.sum() for x in variance.values()))}


def check(
    loop: InnerLoop, theta: Theta, objective: MetaObjective, tasks: Tasks, num_steps: int, sigma: float,
    reach: int | None = None,
) -> list[str]:  # fmt: skip
    """Make all checks of an estimator that perturbs theta, before its first inner step.

    Args:
        loop: the loop.
        theta: the loop's.
        objective: the objective.
        tasks: some of them.
        num_steps: of a window.
        sigma: how far theta is perturbed.
        reach: inner steps in which each meta-parameter has to move something; by default the window's.

    Returns:
        The names that enter through the start alone: in windows after the first they need no perturbation.

    Raises:
        ValueError: as for other estimators; part of the objective is held fixed where it is differentiated; a
            meta-parameter moves nothing when it is perturbed.
    """
    loop.require_theta(as_leaves(theta))
    reach = num_steps if reach is None else reach
    if not loop.cache.seen(objective, "perturbed", num_steps, reach, sigma):
        carry = loop.start(tasks)
        check_loop(loop, theta, carry, second_derivatives=False)
        read = read_directly(objective, theta)
        if getattr(objective, "holds_fixed", False):
            raise ValueError(
                f"{_name(objective)} holds a part of itself fixed where it is differentiated, but a perturbed theta "
                "moves all of it, so that differences of its values are not its gradient; use an estimator that "
                "back-propagates, or an objective that is a function of theta, such as FinalLoss"
            )
        check_objective(loop, theta, objective, carry, num_steps)
        lost = sorted(theta.keys() - moving(loop, theta, tasks, reach, sigma).whole - read)
        if lost:
            raise ValueError(
                f"perturbing the meta-parameters {lost} by {sigma:g} (times theta_scale) moves nothing in {reach} "
                "inner steps, to the last bit, so their meta-gradient would be a silent zero; take more steps or a "
                "larger sigma, or fix them instead of learning them (an objective that reads them from theta itself "
                "says so in reads_theta)"
            )
        loop.cache.saw(objective, "perturbed", num_steps, reach, sigma)
    return sorted(moving(loop, theta, tasks, reach, sigma).start_alone - read_directly(objective, theta))


class Moving(NamedTuple):
    """The names of the meta-parameters that move anything, ``whole``, and of those that move the start alone."""

    whole: frozenset[str]
    start_alone: frozenset[str]


def moving(loop: InnerLoop, theta: Theta, tasks: Tasks, num_steps: int, sigma: float) -> Moving:
    """Return which meta-parameters move anything when they are perturbed; found once, on one task."""
    key = ("moving", num_steps, sigma, *(x.dtype for x in theta.values()))  # by rounding, the less precise ones do not
    return loop.cache.remember(key, lambda: _find_moving(loop, tree.detach(theta), tasks, num_steps, sigma))


def _find_moving(loop: InnerLoop, theta: Theta, tasks: Tasks, num_steps: int, sigma: float) -> Moving:
    lengths = lengths_of(loop, theta, sigma)
    # Where particles are: at theta itself a read-out that starts at zero would hide what lies before it.
    noise = draw(theta, 1, generator(1), [])
    theta = {k: x + (noise[k] * lengths[k]).squeeze(0) for k, x in theta.items()}
    fresh = loop.start(tree.narrow(tasks, 0, 1))
    whole = frozenset[str]()
    count = num_steps
    for count in dict.fromkeys((min(num_steps, 3), num_steps)):  # a few steps tell of most rules
        whole = _moved(loop, theta, lengths, fresh, count)
        if not theta.keys() - whole:
            break
    return Moving(whole, whole - _moved(loop, theta, lengths, loop.begin(theta, fresh), count))


_DRAWS = 8  # of a meta-parameter that is rounded, one perturbation may move nothing


def _moved(loop: InnerLoop, theta: Theta, lengths: Theta, carry: Carry, num_steps: int) -> frozenset[str]:
    """Return the meta-parameters of which the end or the losses of one task's inner steps are a function."""

    def follow(theta: Theta) -> list[Tensor]:
        rollout = loop.run(theta, carry, num_steps, Tape.NONE)
        ends = [loop.losses(theta, rollout.end, split) for split in ("train", "valid")]
        return [*tree.leaves(rollout.end.params), rollout.losses, *ends]

    expected, found = follow(theta), set[str]()
    for number in range(_DRAWS):
        noise = draw(theta, 1, generator(0, number), [])
        for k in sorted(theta.keys() - found):
            moved = follow({**theta, k: theta[k] + (noise[k] * lengths[k]).squeeze(0)})
            if any(not torch.equal(a, b) for a, b in zip(moved, expected, strict=True)):
                found.add(k)
    return frozenset(found)


def _name(objective: MetaObjective | TaskMean) -> str:
    return getattr(objective, "__name__", type(objective).__name__)
