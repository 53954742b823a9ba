"""Which estimators a diagnosis tries on a loop: one line for each kind, that says how to make some for an episode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from learnedopt.core.carry import Tape
from learnedopt.core.estimator import GradientEstimator
from learnedopt.estimators.combined import Combined
from learnedopt.estimators.evolution import EvolutionStrategies
from learnedopt.estimators.forward import ForwardMode
from learnedopt.estimators.hessian_free import HessianFree
from learnedopt.estimators.implicit import Implicit
from learnedopt.estimators.linear_solvers import GMRES, ConjugateGradient, Neumann
from learnedopt.estimators.persistent import PersistentES
from learnedopt.estimators.task_by_task import TaskByTask
from learnedopt.estimators.unrolled import FirstOrder, Truncated, TruncatedBackprop, Unrolled
from learnedopt.estimators.windows import require_windows

NUM_PAIRS, SIGMA = 8, 0.03  # of evolution strategies; sigma in units of theta_scale
NUM_ITERATIONS = 10  # of linear solvers
FEW_ENTRIES = 100  # of theta, up to which forward mode is tried: it takes a tangent for each
_CUTS = (2, 5, 20)  # into about so many windows an episode is cut

Tried: TypeAlias = GradientEstimator | str
"""An estimator, or why there is none."""
NO_HINT = (
    "there is no hint how to make one for a loop: let the recipe have it, pass an instance, or add a line to HINTS"
)


class Facts(NamedTuple):
    """What a hint is told: the episode's steps, theta's entries, and how long the exact gradient of a batch is.

    The length, a median over batches, is that of the gradient with respect to theta / theta_scale.
    """

    horizon: int
    num_entries: int
    length: float

    @property
    def windows(self) -> list[int]:
        """Lengths of windows that divide the episode: about a half, a fifth and a twentieth of it, the longest first.

        None of an episode of one step.
        """
        divisors = [n for n in range(1, self.horizon) if self.horizon % n == 0]
        nearest = [min(divisors, key=lambda n: abs(math.log(n * cut / self.horizon))) for cut in _CUTS if divisors]
        return sorted({*nearest}, reverse=True)

    @property
    def segment(self) -> int:
        """The length of segments of least memory."""
        return max(1, math.isqrt(self.horizon))


def _unrolled(facts: Facts) -> dict[str, Tried]:
    steps, segment = facts.horizon, facts.segment
    found: dict[str, Tried] = {"unrolled": Unrolled(steps), "first order": FirstOrder(steps)}
    return {**found, f"unrolled, segments of {segment}": Unrolled(steps, segment=segment)}


def _truncated(facts: Facts) -> dict[str, Tried]:
    found: dict[str, Tried] = {}
    for n in facts.windows:
        found[f"truncated {n}"] = Truncated(n, facts.horizon, Tape.FULL)
        found[f"truncated {n}, first order"] = Truncated(n, facts.horizon)
    return found or {"truncated": _no_windows(facts)}


def _implicit(facts: Facts) -> dict[str, Tried]:
    solvers = {"CG": ConjugateGradient, "Neumann": Neumann, "GMRES": GMRES}
    found: dict[str, Tried] = {
        f"implicit, {name} {NUM_ITERATIONS}": Implicit(facts.horizon, solver(NUM_ITERATIONS))
        for name, solver in solvers.items()
    }
    newton = Implicit(facts.horizon, ConjugateGradient(NUM_ITERATIONS), HessianFree(NUM_ITERATIONS))
    return {**found, "implicit, Hessian-free": newton}


def _forward(facts: Facts) -> dict[str, Tried]:
    if facts.num_entries > FEW_ENTRIES:
        reason = f"theta has {facts.num_entries} entries, and each takes a tangent: tried up to {FEW_ENTRIES}"
        return {"forward mode": reason}
    found: dict[str, Tried] = {"forward mode": ForwardMode(facts.horizon)}
    return found | {f"forward mode {n}": ForwardMode(n, facts.horizon) for n in facts.windows[1:2]}


def _evolution(facts: Facts) -> dict[str, Tried]:
    found: dict[str, Tried] = {"ES": EvolutionStrategies(facts.horizon, NUM_PAIRS, SIGMA)}
    return found | {
        f"ES {n}": EvolutionStrategies(n, NUM_PAIRS, SIGMA, horizon=facts.horizon) for n in facts.windows[1:2]
    }


def _persistent(facts: Facts) -> dict[str, Tried]:
    found: dict[str, Tried] = {}
    for n in facts.windows[:2]:
        found[f"PES {n}"] = PersistentES(n, facts.horizon, NUM_PAIRS, SIGMA)
    for n in facts.windows[:1]:
        found[f"PES {n}, noise reused"] = PersistentES(n, facts.horizon, NUM_PAIRS, SIGMA, reuse_noise=True)
    return found or {"PES": _no_windows(facts)}


def _combined(facts: Facts) -> dict[str, Tried]:
    perturbed = EvolutionStrategies(facts.horizon, NUM_PAIRS, SIGMA)
    return {"combined with ES": Combined(Unrolled(facts.horizon), perturbed)}


def _by_task(facts: Facts) -> dict[str, Tried]:
    whole = Unrolled(facts.horizon)
    found: dict[str, Tried] = {"task by task": TaskByTask(whole)}
    if 0 < facts.length < math.inf:
        found["task by task, clipped"] = TaskByTask(whole, max_task_grad_norm=facts.length)
    return found


def _last_steps(facts: Facts) -> dict[str, Tried]:
    return {f"through the last {n}": TruncatedBackprop(facts.horizon, n) for n in facts.windows[:2]} or {
        "through the last steps": _no_windows(facts)
    }


HINTS: Mapping[type[GradientEstimator], Callable[[Facts], dict[str, Tried]]] = {
    Unrolled: _unrolled,
    Truncated: _truncated,
    TruncatedBackprop: _last_steps,
    Implicit: _implicit,
    ForwardMode: _forward,
    EvolutionStrategies: _evolution,
    PersistentES: _persistent,
    Combined: _combined,
    TaskByTask: _by_task,
}
"""Kind of estimator -> the instances that a diagnosis tries, by label. A new kind joins with a line here."""


def suggested(facts: Facts) -> dict[str, Tried]:
    """Return what all hints say."""
    return {label: tried for hint in HINTS.values() for label, tried in hint(facts).items()}


def spelled(estimator: Any) -> str:
    """Return how an estimator, or another dataclass, is written: without what it has by default."""
    if isinstance(estimator, Tape):
        return str(estimator)
    if not dataclasses.is_dataclass(estimator):
        return repr(estimator)
    told: list[str] = []
    for field in dataclasses.fields(estimator):
        value = getattr(estimator, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default:
            told.append(f"{field.name}={spelled(value)}")
    return f"{type(estimator).__name__}({', '.join(told)})"


def windows_of(estimator: GradientEstimator, horizon: int) -> int:
    """Return how many estimates make one episode of ``horizon`` steps; 1 for a kind that is not known here.

    Raises:
        ValueError: its episodes have another length.
    """
    if isinstance(estimator, Truncated | PersistentES | ForwardMode | EvolutionStrategies):
        endless = isinstance(estimator, Truncated)  # a whole episode without a horizon, for the others
        if estimator.horizon is not None or endless:
            if estimator.horizon not in (None, horizon):
                raise ValueError(_other_length(estimator, estimator.horizon, horizon))
            require_windows(estimator.num_steps, horizon)
            return horizon // estimator.num_steps
    if isinstance(estimator, Combined):
        counts = {windows_of(part, horizon) for part in (estimator.back_propagated, estimator.perturbed)}
        if len(counts) > 1:
            raise ValueError(
                f"the parts of {spelled(estimator)} cut an episode into different numbers of windows, so that they "
                "have gradients of two different things; diagnose each by itself"
            )
        return counts.pop()
    if isinstance(estimator, TaskByTask):
        if estimator.horizons is not None:
            raise ValueError(
                f"{spelled(estimator)} draws a horizon for each task, and the diagnosis is of {horizon} steps for all; "
                "leave its horizons out"
            )
        return windows_of(estimator.estimator, horizon)
    whole = isinstance(estimator, Unrolled | TruncatedBackprop | Implicit | ForwardMode | EvolutionStrategies)
    if whole and estimator.num_steps != horizon:
        raise ValueError(_other_length(estimator, estimator.num_steps, horizon))
    return 1


def _no_windows(facts: Facts) -> str:
    return f"an episode of {facts.horizon} steps cannot be cut into windows"


def _other_length(estimator: GradientEstimator, steps: int, horizon: int) -> str:
    return (
        f"{spelled(estimator)} is for episodes of {steps} steps, and the diagnosis is of {horizon}; give both the same"
    )
