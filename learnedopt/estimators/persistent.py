"""Persistent evolution strategies: windows that remember their perturbations, which makes them unbiased."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from learnedopt.core import shares, tree
from learnedopt.core.carry import Carry
from learnedopt.core.estimator import Estimate, GradientEstimator, as_leaves, check_loop
from learnedopt.core.inner import InnerLoop
from learnedopt.core.modes import outside_inference_mode
from learnedopt.core.objective import MetaObjective
from learnedopt.core.task import Tasks
from learnedopt.core.tree import Theta
from learnedopt.estimators import perturbations
from learnedopt.estimators.finite_tasks import Values, finite_values, report
from learnedopt.estimators.persistent_carry import (
    Cohort,
    PersistentCarry,
    first_particle,
    join_cohorts,
    narrow_cohort,
    places_of,
)
from learnedopt.estimators.perturbations import PairGradients
from learnedopt.estimators.windows import require_windows
from learnedopt.execution import particles
from learnedopt.execution.particles import Particles


@final
@dataclass(frozen=True)
class PersistentES(GradientEstimator):
    """Evolution strategies in windows, unbiased for the whole episode (Vicol et al. 2021, algorithm 2).

    Every window perturbs theta afresh, ``theta ± eps``; each particle keeps its own inner state, and each pair the sum
    ``xi`` of its perturbations since its episode began. The estimate is the mean over pairs of ``xi (f₊ - f₋) /
    (2 length²)``, f the window's objective: on average one window's share of the gradient of the sum of the objective
    over all windows, that is 1 / (horizon / num_steps) of it.

    Pairs stand at staggered phases of their episodes, as evenly as they can, so that an estimate sees all parts of the
    horizon: those at one phase, a cohort, share tasks and batches, and phases count equally. ``start`` runs each cohort
    to its phase, half a horizon on average, with perturbations of its own. A cohort whose episode is over begins
    another on as many fresh tasks, which it draws by ``family.sample`` from the seed in the carry: there is no end, and
    the carry is never None.

    Args:
        num_steps: inner steps of a window.
        horizon: inner steps of an episode, a multiple of ``num_steps``.
        num_pairs: antithetic pairs, over all phases.
        sigma: how far theta is perturbed in a window, in units of ``theta_scale``.
        reuse_noise: keep one perturbation for the whole of an episode, ``xi = eps`` (noise-reuse evolution strategies,
            Li et al. 2023): less variance where the windows' gradients agree.
        ranked: take ranks of the objective within a cohort in its place.

    A pair is left out of an estimate where its objective is not finite, and counted in ``info["not_finite"]``; so is a
    task of a cohort on which no pair is finite, see ``Estimate``. What has parameters that are not finite stays out
    until its episode is over. ``loss`` is the mean over the particles,
    ``info["losses"]`` the mean curve over phases; ``info["variance"]`` takes pairs of all phases for draws of one kind,
    so that differences between phases count as well. For the rest of ``info`` see ``EvolutionStrategies``.

    Raises:
        ValueError: as ``EvolutionStrategies``; a carry of other pairs, windows, sigma, reuse or theta.
    """

    num_steps: int
    horizon: int
    num_pairs: int
    sigma: float
    reuse_noise: bool = False
    ranked: bool = False
    renews_tasks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        perturbations.require_pairs(self.num_pairs, self.sigma)
        require_windows(self.num_steps, self.horizon)

    @property
    def takes_second_derivatives(self) -> bool:
        """Not even first ones, beyond those of the inner steps."""
        return False

    @property
    def cohort_sizes(self) -> list[int]:
        """How many pairs stand at each phase: as many phases as there are windows, or fewer where pairs are fewer."""
        count = min(self.num_pairs, self.horizon // self.num_steps)
        return [self.num_pairs // count + (i < self.num_pairs % count) for i in range(count)]

    @outside_inference_mode
    def start(self, loop: InnerLoop, theta: Theta, tasks: Tasks, generator: torch.Generator) -> PersistentCarry:
        """Return cohorts on these tasks, each run to its phase."""
        theta, seed, windows = tree.detach(theta), perturbations.draw_seed(generator), self.horizon // self.num_steps
        check_loop(loop, as_leaves(theta), loop.start(tasks), second_derivatives=False)
        still = sorted(perturbations.moving(loop, theta, tasks, self.horizon, self.sigma).start_alone)
        cohorts = [self._fresh(loop, theta, tasks, size, 0) for size in self.cohort_sizes]
        phases = [i * windows // len(cohorts) for i in range(len(cohorts))]
        # The estimates' windows are numbered from ``windows`` on, those that lead up to them just before.
        for number in range(windows):
            running = [i for i, phase in enumerate(phases) if phase >= windows - number]
            moved = self._advance(loop, theta, [cohorts[i] for i in running], running, seed, number, still)
            for i, each in zip(running, moved, strict=True):
                cohorts[i] = each.cohort
        places = shares.all_places(tree.size(tasks))
        return PersistentCarry(tuple(cohorts), seed, windows, float(self.sigma), self.reuse_noise, places)

    def forms(self, loop: InnerLoop, theta: Theta, carry: PersistentCarry) -> list[Any]:
        """Return the carry with all of its cohorts fresh, and with all of them begun."""
        theta, tasks = tree.detach(theta), carry.cohorts[0].tasks
        fresh = [self._fresh(loop, theta, tasks, tree.size(each.drift), 0) for each in carry.cohorts]
        begun: list[Cohort] = []
        for each in fresh:
            many = {k: x.expand(2 * tree.size(each.drift), *x.shape) for k, x in theta.items()}
            placed = _placed(loop, perturbations.for_slots(many, tree.size(each.params)), each)
            begun.append(each._replace(params=placed.params, state=placed.state))
        return [carry._replace(cohorts=(*cohorts,)) for cohorts in (fresh, begun)]

    def count_tasks(self, carry: PersistentCarry) -> int:
        """Return of how many tasks each cohort is."""
        return tree.size(carry.cohorts[0].params)

    def narrow(self, carry: PersistentCarry, start: int, stop: int) -> PersistentCarry:
        """Return a share of each cohort's tasks, which sees the same perturbations, and draws its own fresh tasks."""
        perturbations.require_unranked(self)
        places = shares.narrow_places(places_of(carry), start, stop)
        return carry._replace(
            cohorts=tuple(narrow_cohort(cohort, start, stop) for cohort in carry.cohorts), places=places
        )

    def join(self, carries: Sequence[PersistentCarry]) -> PersistentCarry:
        """Return the carry of all tasks of these shares."""
        shares.require_same("seed or window", [(x.seed, x.window) for x in carries], "PersistentES")
        cohorts = tuple(map(join_cohorts, zip(*(x.cohorts for x in carries), strict=True)))
        places = shares.join_places([places_of(x) for x in carries], "PersistentES")
        return carries[0]._replace(cohorts=cohorts, places=places)

    @property
    def num_parts(self) -> int:
        """As many as there are phases, which count equally."""
        return len(self.cohort_sizes)

    def narrow_parts(self, carry: PersistentCarry, start: int, stop: int) -> PersistentCarry:
        """Return the carry with some of the phases' cohorts alone, which are perturbed as they are among all."""
        perturbations.require_unranked(self)
        shares.require_bounds(start, stop, self.num_parts, "phases")
        return carry._replace(cohorts=carry.cohorts[start:stop], phases=(start, stop))

    def join_parts(self, carries: Sequence[PersistentCarry]) -> PersistentCarry:
        """Return the carry of all phases."""
        shares.require_parts([x.phases for x in carries], self.num_parts, "PersistentES")
        shares.require_same("seed, window or place", [(x.seed, x.window, x.places) for x in carries], "PersistentES")
        return carries[0]._replace(cohorts=tuple(each for x in carries for each in x.cohorts), phases=None)

    def is_part(self, carry: PersistentCarry) -> bool:
        """Return whether it is of some of the phases."""
        return carry.phases is not None

    def standing(self, loop: InnerLoop, carry: PersistentCarry) -> list[tuple[InnerLoop, Carry, int | None]]:
        """Return the first particle of each cohort."""
        return [(loop, first_particle(cohort), self.num_steps) for cohort in carry.cohorts]

    @outside_inference_mode
    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: PersistentCarry) -> Estimate:
        """Run every particle through one window of its episode."""
        self.require_carry(theta, carry)
        theta, tasks = tree.detach(theta), carry.cohorts[0].tasks
        still = perturbations.check(loop, theta, objective, tasks, self.num_steps, self.sigma, self.horizon)
        lengths = perturbations.lengths_of(loop, theta, self.sigma)
        everyone = self._phases(carry)
        moved = self._advance(loop, theta, carry.cohorts, everyone, carry.seed, carry.window, still)
        told = [
            finite_values(loop, objective, each.before, each.after, each.losses, tree.size(each.cohort.drift))
            for each in moved
        ]
        found = [each.found for each in told]
        pairs = [
            perturbations.pair_gradients(theta, f, each.cohort.drift, lengths, ranked=self.ranked)
            for f, each in zip(found, moved, strict=True)
        ]
        seen = [(v, p) for v, p in zip(told, pairs, strict=True) if p.finite.any()]
        info: dict[str, Any] = {
            "losses": _mean([perturbations.curve(v.losses, p.finite) for v, p in seen], moved[0].losses[:, 0, 0]),
            "inner_steps": sum(each.losses.numel() for each in moved),
            "not_finite": sum(int((~p.finite).sum()) for p in pairs),
            **perturbations.variance_of(_all(pairs)),
            **self._tasks_told(carry, told),
        }
        grads = {k: _mean([perturbations.mean_of(p)[k] for _, p in seen], theta[k]) for k in theta}
        loss = _mean([v.found[p.finite.repeat(2)].mean() for v, p in seen], found[0][0])
        places = places_of(carry)
        onward = zip(everyone, moved, strict=True)
        cohorts = tuple(self._next(loop, theta, i, each.cohort, carry.seed, places) for i, each in onward)
        return Estimate(loss, grads, carry._replace(cohorts=cohorts, window=carry.window + 1), info)

    def _phases(self, carry: PersistentCarry) -> list[int]:
        return list(range(*(carry.phases or (0, self.num_parts))))

    def _tasks_told(self, carry: PersistentCarry, seen: Sequence[Values]) -> dict[str, Any]:
        """Return what ``report`` says, of a part of the phases as the part of the whole that it is."""
        num_tasks = self.count_tasks(carry)
        told = report(seen, num_tasks)
        if carry.phases is None:
            return told
        part = len(seen) / self.num_parts
        counts = {"num_tasks": num_tasks, **told}
        return told | {k: part * counts[k] for k in ("num_tasks", "failed_tasks") if k in counts}

    def _advance(
        self, loop: InnerLoop, theta: Theta, cohorts: Sequence[Cohort], indices: list[int], seed: int, window: int,
        still: list[str],
    ) -> list[_Moved]:  # fmt: skip
        """Run cohorts through a window, those of one size together."""
        lengths = perturbations.lengths_of(loop, theta, self.sigma)
        befores: list[Particles] = []
        drifts: list[Theta] = []
        for i, cohort in zip(indices, cohorts, strict=True):
            noise = self._noise(theta, cohort, perturbations.generator(seed, 0, window, i), still)
            thetas = perturbations.for_slots(perturbations.perturbed(theta, noise, lengths), tree.size(cohort.params))
            befores.append(_placed(loop, thetas, cohort))
            fixed = self.reuse_noise or cohort.state is None
            drifts.append(noise if fixed else {k: cohort.drift[k] + noise[k] for k in theta})
        afters: dict[int, tuple[Particles, Tensor]] = {}
        for size in sorted({tree.size(drift) for drift in drifts}):
            members = [j for j, drift in enumerate(drifts) if tree.size(drift) == size]
            after, losses = particles.run(loop, particles.concatenate([befores[j] for j in members]), self.num_steps)
            slots = [len(befores[j].steps) for j in members]
            ends = zip(particles.split(after, slots), torch.split(losses, slots, dim=1), strict=True)
            afters.update(zip(members, ends, strict=True))
        moved: list[_Moved] = []
        for j, cohort in enumerate(cohorts):
            after, losses = afters[j]
            onward = cohort._replace(params=after.params, state=after.state, step=after.steps[0], drift=drifts[j])
            moved.append(_Moved(onward, befores[j], after, losses))
        return moved

    def _noise(self, theta: Theta, cohort: Cohort, source: torch.Generator, still: list[str]) -> Theta:
        if cohort.state is not None and self.reuse_noise:
            return cohort.drift
        begun = cohort.state is not None
        return perturbations.draw(theta, tree.size(cohort.drift), source, still if begun else [])

    def _fresh(self, loop: InnerLoop, theta: Theta, tasks: Tasks, num_pairs: int, episode: int) -> Cohort:
        begun = loop.start(tasks)
        zeros = {k: x.new_zeros(num_pairs, *x.shape) for k, x in theta.items()}
        return Cohort(begun.tasks, begun.params, None, 0, zeros, episode)

    def _next(self, loop: InnerLoop, theta: Theta, i: int, cohort: Cohort, seed: int, places: shares.Places) -> Cohort:
        """Return the cohort itself or, once its episode is over, one on fresh tasks."""
        if cohort.step < self.horizon:
            return cohort
        episode = cohort.episode + 1
        tasks = loop.family.sample(places.num_tasks, perturbations.generator(seed, 1, episode, i))
        if not places.all:
            tasks = tree.tree_map(lambda x: x[list(places.positions)], tasks)
        return self._fresh(loop, theta, tasks, tree.size(cohort.drift), episode)

    def require_carry(self, theta: Theta, carry: Any) -> None:
        """Raise TypeError where a carry is of another class, ValueError where other pairs or another theta made it."""
        if not isinstance(carry, PersistentCarry):
            raise TypeError(
                f"PersistentES keeps its particles in a carry of its own, got a {type(carry).__name__}; begin with "
                "estimator.start(loop, theta, tasks, generator)"
            )
        sizes = [tree.size(cohort.drift) for cohort in carry.cohorts]
        steps = {cohort.step for cohort in carry.cohorts}
        if sizes != self.cohort_sizes[slice(*(carry.phases or (None, None)))]:
            raise ValueError(
                f"the carry holds {sum(sizes)} pairs at {len(sizes)} phases ({sizes}), this estimator has "
                f"{self.num_pairs} at {len(self.cohort_sizes)} ({self.cohort_sizes}); go on with the estimator that it "
                "came from, or begin anew with estimator.start(...)"
            )
        if any(step % self.num_steps or step >= self.horizon for step in steps):
            raise ValueError(
                f"the carry's pairs stand at the steps {sorted(steps)}, which are no windows of {self.num_steps} steps "
                f"within {self.horizon}; go on with the estimator that it came from, or begin anew"
            )
        if (carry.sigma, carry.reuse_noise) != (self.sigma, self.reuse_noise):
            raise ValueError(
                f"the carry's pairs were perturbed with sigma={carry.sigma:g} and reuse_noise={carry.reuse_noise}, "
                f"this estimator has sigma={self.sigma:g} and reuse_noise={self.reuse_noise}: what they remember would "
                "be taken for other perturbations; go on with the estimator that it came from, or begin anew"
            )
        here = {k: tuple(x.shape) for k, x in theta.items()}
        for cohort in carry.cohorts:
            drifts = {k: tuple(x.shape[1:]) for k, x in cohort.drift.items()}
            if drifts != here:
                raise ValueError(
                    f"the carry's perturbations are of a theta of shapes {drifts}, this one has {here}; go on with the "
                    "theta that it came from, or begin anew with estimator.start(...)"
                )


class _Moved(NamedTuple):
    """A cohort after a window, with its particles before and after it and their losses."""

    cohort: Cohort
    before: Particles
    after: Particles
    losses: Tensor


def _placed(loop: InnerLoop, thetas: Theta, cohort: Cohort) -> Particles:
    if cohort.state is None:
        return particles.begin(loop, thetas, cohort.tasks, cohort.params, cohort.step)
    steps = (cohort.step,) * tree.size(cohort.params)
    return Particles(cohort.tasks, steps, thetas, cohort.params, cohort.state)


def _all(pairs: list[PairGradients]) -> PairGradients:
    shares = tree.concatenate([p.shares for p in pairs])
    return PairGradients(shares, torch.cat([p.finite for p in pairs]))


def _mean(found: list[Tensor], like: Tensor) -> Tensor:
    """Return the mean over cohorts; NaN where no pair of any is finite."""
    return torch.stack(found).mean(0) if found else torch.full_like(like, torch.nan)
