"""Learned optimizers against hand-designed ones, whose learning rates were tuned on other tasks of the same family."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Tape
from learnedopt.core.counts import require_count
from learnedopt.core.execution import Execution
from learnedopt.core.inner import InnerLoop
from learnedopt.core.inner_objective import InnerObjective, TaskLoss
from learnedopt.core.pace import Pace
from learnedopt.core.registry import nearest
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.task import TaskFamily, Tasks
from learnedopt.core.tree import Params, Theta
from learnedopt.core.user_warning import warn_user
from learnedopt.evaluation import lanes
from learnedopt.evaluation.comparison import (
    MEASURES,
    Comparison,
    Difference,
    Measure,
    Outcome,
    Tuning,
    interval_of_means,
    summarise,
)
from learnedopt.evaluation.grids import FEW, Grid, Point, search

_SMALL = 1000  # parameters of a task, up to which tasks run together
_TOGETHER = 50_000  # parameters that run together: a rule's states for them stay near the cache
_EXTENSIONS = 8  # of a grid, at most, while its winner is at the edge
_REFINEMENTS = 2  # of half decades: to an eighth of a decade on both sides of the winner


class TuningWarning(UserWarning):
    """The best learning rate lies at the edge of what was tried."""


@dataclass(frozen=True)
class Baseline:
    """Optimizers that differ in one number, which is tuned.

    Args:
        make: learning rate -> rule and theta.
        rates: the grid to begin with, positive and growing.
    """

    make: Callable[[float], tuple[UpdateRule, Theta]]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.rates) < 2 or self.rates[0] <= 0 or list(self.rates) != sorted(set(self.rates)):
            raise ValueError(f"rates={self.rates!r} is no grid; pass at least two positive numbers that grow")


def hand_designed(name: str, low: int = -4, high: int = 2, **options: Any) -> Baseline:
    """Return a registered rule with a learning rate as a baseline, its grid the half decades from 10^low to 10^high.

    Example:
        >>> baselines = {**BASELINES, "momentum 0.99": hand_designed("momentum", momentum=0.99)}
    """
    return Baseline(partial(_make, name, options), tuple(10.0 ** (k / 2) for k in range(2 * low, 2 * high + 1)))


def _make(name: str, options: dict[str, Any], rate: float) -> tuple[UpdateRule, Theta]:
    from learnedopt import optimizers

    return optimizers.make(name, lr=rate, learn=(), **options), {}


BASELINES: Mapping[str, Baseline] = {
    "SGD": hand_designed("sgd"),
    "momentum": hand_designed("momentum"),
    "Nesterov": hand_designed("nesterov"),
    "RMSprop": hand_designed("rmsprop", low=-5, high=1),
    "Adam": hand_designed("adam", low=-5, high=1),
}
"""Momentum 0.9; everything else but the learning rate as in ``torch.optim``."""


Candidate: TypeAlias = "tuple[UpdateRule, Theta] | tuple[UpdateRule, Theta, InnerObjective]"
"""A rule, its theta and, where that is not the task's loss, the inner objective whose theta is in it too."""


def measure(candidate: Candidate, family: TaskFamily, tasks: Tasks, num_steps: int, execution: Execution) -> Outcome:
    """Run an optimizer for ``num_steps``, its horizon, from a fresh start on each of ``tasks``; outer losses."""
    rule, theta = candidate[:2]
    descended = candidate[2] if len(candidate) == 3 else TaskLoss()
    loop = InnerLoop(family, rule, execution, descended, horizon=max(num_steps, 1))
    theta = tree.to(theta, execution.device, execution.dtype)
    rollout = loop.run(theta, loop.start(tasks), num_steps, Tape.NONE)
    losses = rollout.losses.double().cpu()
    end = rollout.end._replace(params=_results(loop, theta, rollout.end))
    values = _measured(losses, loop.losses(theta, end, "valid").double().cpu())
    return Outcome(values, losses.mean(1), interval=interval_of_means(losses) if losses.shape[1] > 1 else None)


def _results(loop: InnerLoop, theta: Theta, end: Carry) -> Params:
    def result(theta: Theta, state: State, params: Params) -> Params:
        return loop.mover.result(theta, params, state)

    with torch.no_grad():
        return loop.over_tasks(result, (loop.rule_theta(theta),), end.state, end.params)


def _measured(losses: Tensor, final: Tensor) -> dict[Measure, Tensor]:
    """Return all measures of losses (num_steps, ...) before each update and after the last; infinite for no number."""
    values: dict[Measure, Tensor] = {
        "final_loss": final, "sum_of_losses": losses.sum(0), "last_ten": losses[-10:].mean(0)
    }  # fmt: skip
    return {k: torch.where(v.isfinite(), v, math.inf) for k, v in values.items()}


def tune(score: Callable[[float], float], rates: tuple[float, ...]) -> Tuning:
    """Return the rate with the lowest score; NaN counts as infinite, and of equal scores the lower rate wins.

    While the winner is at the grid's edge, the grid is extended beyond it by the same ratio, at most 8 times; then the
    two gaps beside the winner are halved (geometrically), twice.

    Raises:
        ValueError: no rate has a finite score.
    """
    scores: dict[float, float] = {}

    def best() -> tuple[float, int, list[float]]:
        tried = sorted(scores)
        rate = min(tried, key=lambda r: scores[r])
        return rate, tried.index(rate), tried

    def attempt(new: list[float]) -> None:
        scores.update({rate: math.inf if math.isnan(value := score(rate)) else value for rate in new})

    attempt([*rates])
    for _ in range(_EXTENSIONS):
        rate, i, tried = best()
        if 0 < i < len(tried) - 1:
            break
        attempt([rate * rate / tried[1 if i == 0 else i - 1]])
    for _ in range(_REFINEMENTS):
        rate, i, tried = best()
        attempt([math.sqrt(rate * neighbour) for neighbour in tried[max(i - 1, 0) : i] + tried[i + 1 : i + 2]])
    rate, _, tried = best()
    if math.isinf(scores[rate]):
        raise ValueError(f"every learning rate from {tried[0]:.3g} to {tried[-1]:.3g} diverged on the tuning tasks")
    return Tuning(rate, scores)


def compare(
    candidates: Mapping[str, Candidate],
    family: TaskFamily,
    *,
    tuning_family: TaskFamily | None = None,
    num_steps: int = 100,
    num_tasks: int = 100,
    num_tuning_tasks: int | None = None,
    seed: int = 0,
    baselines: Mapping[str, Baseline | Grid] = BASELINES,
    tune_for: Measure = "final_loss",
    execution: Execution | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Run candidates and tuned baselines on the same fresh tasks.

    Args:
        candidates: label -> rule and theta, and the inner objective where that is not the task's loss.
        family: where the fresh tasks come from, such as a family with ``meta_split="test"``.
        tuning_family: where the baselines' tuning tasks come from, such as the same with ``meta_split="train"``; by
            default the family itself. Seeds differ between the two in any case.
        num_steps: inner steps from a fresh start.
        num_tasks: fresh tasks, at least 2.
        num_tuning_tasks: by default as many as fresh ones where tasks are small (see ``execution``), else at most 8.
        seed: of the tasks.
        baselines: label -> what is tuned and run beside the candidates; ``grids.HARD_BASELINES`` for one has schedules.
        tune_for: the measure whose mean over the tuning tasks chooses a learning rate.
        execution: how tasks are run; by default together, in chunks, where a task has at most 1,000 parameters, and
            as the engine likes it above.
        report: is told, in one line each, what goes on.

    Raises:
        ValueError: bad input, before the first inner step; or a baseline that diverges at every rate.

    Warns:
        TuningWarning: a baseline's best rate is at the edge even of the extended grid: it may be better than shown.

    Example:
        >>> comparison = compare({"LSTM": learnedopt.load("lstm-quadratic")}, learnedopt.tasks.make("quadratic"))
        >>> print(comparison.markdown())
    """
    _check(candidates, baselines, num_steps, num_tasks, tune_for)
    fresh = sample_tasks(family, num_tasks, "fresh", seed)
    execution = execution or _fitting_execution(family, fresh)
    if num_tuning_tasks is None:
        num_tuning_tasks = num_tasks if (execution.chunk_size or 1) > 1 else min(num_tasks, 8)
    require_count("num_tuning_tasks", num_tuning_tasks, least=1)
    for candidate in candidates.values():  # one that does not fit is refused before anything is run
        measure(candidate, family, tree.narrow(fresh, 0, 1), 0, execution)
    outcomes: dict[str, Outcome] = {}
    sizes = {label: _runs_of(baseline, num_tuning_tasks) for label, baseline in baselines.items()}
    pace = Pace(len(candidates) + sum(sizes.values()), report)
    for label, candidate in candidates.items():
        report(f"Running {label} on {num_tasks} tasks")
        pace.begin(1)
        outcomes[label] = measure(candidate, family, fresh, num_steps, execution)
    others_family = tuning_family or family
    others = sample_tasks(others_family, num_tuning_tasks, "tuning", seed)
    for label, baseline in baselines.items():
        pace.begin(sizes[label])
        report(f"Tuning {label} on {num_tuning_tasks} other tasks ({pace.words()})")
        tuning, tuned = _tune(label, baseline, others_family, others, num_steps, tune_for, execution, pace)
        report(f"Running {label} at learning rate {tuning.rate:.3g} on {num_tasks} tasks")
        outcome = measure(tuned, family, fresh, num_steps, execution)
        outcomes[label] = replace(outcome, tuning=tuning)
    settings = {
        "num_steps": num_steps, "num_tasks": num_tasks, "num_tuning_tasks": num_tuning_tasks, "seed": seed,
        "tune_for": tune_for,
    }  # fmt: skip
    return Comparison(settings, outcomes, _differences(outcomes))


def _check(
    candidates: Mapping[str, Any], baselines: Mapping[str, Any], num_steps: int, num_tasks: int, tune_for: str
) -> None:
    require_count("num_steps", num_steps, least=1)
    require_count("num_tasks", num_tasks, least=2)  # an interval needs two
    if tune_for not in MEASURES:
        raise ValueError(f"tune_for={tune_for!r} is none of {', '.join(MEASURES)}{nearest(tune_for, MEASURES)}")
    if twice := candidates.keys() & baselines.keys():
        raise ValueError(f"{sorted(twice)} name both candidates and baselines; label the candidates otherwise")


def sample_tasks(family: TaskFamily, num_tasks: int, purpose: str, seed: int) -> Tasks:
    """Draw tasks that no other purpose or seed draws."""
    # Hashed, so that neither another purpose nor a training from a small seed draws the same tasks; 32 bits, because
    # torch's CPU generator reads no more of a seed.
    digest = hashlib.sha256(f"learnedopt.evaluate {purpose} {seed}".encode()).digest()
    return family.sample(num_tasks, torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))


def _fitting_execution(family: TaskFamily, tasks: Tasks) -> Execution:
    size = sum(p.numel() for p in family.init_params(tree.narrow(tasks, 0, 1)).values())
    return Execution(chunk_size=_TOGETHER // size) if 0 < size <= _SMALL else Execution()


def _tune(
    label: str, baseline: Baseline | Grid, family: TaskFamily, tasks: Tasks, num_steps: int, by: Measure,
    execution: Execution, pace: Pace,
) -> tuple[Tuning, Candidate]:  # fmt: skip
    """Return what was found, and the rule with its theta; warn where a better rate may lie beyond."""
    ran = partial(pace.ran, f"Tuning {label}")

    def score(rate: float) -> float:
        assert isinstance(baseline, Baseline)
        found = float(measure(baseline.make(rate), family, tasks, num_steps, execution).values[by].mean())
        ran()
        return found

    try:
        if isinstance(baseline, Grid):
            tuning, tuned = _tune_grid(baseline, family, tasks, num_steps, by, execution, ran)
        else:
            tuning = tune(score, baseline.rates)
            tuned = baseline.make(tuning.rate)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    if tuning.at_edge:
        warn_user(
            f"{label}: the best learning rate {tuning.rate:.3g} is at the edge of all that were tried "
            f"({min(tuning.scores):.3g} to {max(tuning.scores):.3g}); give the baseline a grid that reaches further",
            TuningWarning,
        )
    return tuning, tuned


def _tune_grid(
    grid: Grid, family: TaskFamily, tasks: Tasks, num_steps: int, by: Measure, execution: Execution,
    ran: Callable[[float], None],
) -> tuple[Tuning, Candidate]:  # fmt: skip
    rule = grid.make(num_steps)

    def score(points: Sequence[Point], few: bool) -> list[float]:
        thetas = lanes.points(rule, [grid.values(point) for point in points])
        some = tree.narrow(tasks, 0, min(FEW, tree.size(tasks))) if few else tasks
        measured = _measured(*lanes.train(rule, thetas, family, some, num_steps, execution))
        found = tree.numbers(measured[by].mean(0))
        ran(len(points) * tree.size(some) / tree.size(tasks))
        return found

    found = search(score, grid)
    scores = {point.rate: value for point, value in found.scores.items() if point.choice == found.best.choice}
    (theta,) = lanes.points(rule, [grid.values(found.best)])
    return Tuning(found.best.rate, scores, dict(grid.choices[found.best.choice])), (rule, theta)


def _runs_of(baseline: Baseline | Grid, num_tasks: int) -> float:
    """Return about how many runs on all tuning tasks it takes to tune a baseline, the one that is reported included."""
    if isinstance(baseline, Baseline):
        return len(baseline.rates) + 2 * _REFINEMENTS + 1
    screened = len(baseline.rates) * len(baseline.choices) * min(FEW, num_tasks) / num_tasks
    return screened + 16  # about as many around the best few


def _differences(outcomes: Mapping[str, Outcome]) -> list[Difference]:
    baselines = [label for label, outcome in outcomes.items() if outcome.tuning]
    if not baselines:
        return []
    found: list[Difference] = []
    for name in MEASURES:
        means = {label: float(outcomes[label].values[name].mean()) for label in baselines}
        best = min(means, key=means.__getitem__)
        for label, outcome in outcomes.items():
            if outcome.tuning is None:
                summary = summarise(outcome.values[name] - outcomes[best].values[name])
                found.append(Difference(label, best, name, summary))
    return found
