"""Hand-designed optimizers as hard to beat as they can be made: schedules, decays and rates, tuned by grids."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from learnedopt.core.registry import nearest
from learnedopt.core.rule import UpdateRule

Schedule: TypeAlias = Literal["cosine", "linear-end"]
FEW = 4
"""Tuning tasks on which the whole grid is tried, to find where to try more on all."""
_EXTENSIONS = 4  # rounds, at most, while the best rate is at the edge
_PARTS = 4  # that a step of the grid is cut into: an eighth of a decade, of half ones
_FINALISTS = 2  # choices that are tried on all tasks


class Point(NamedTuple):
    """A rate, and the number of a choice of the other hyperparameters."""

    rate: float
    choice: int


@dataclass(frozen=True)
class Grid:
    """Optimizers that differ in their learning rate, and perhaps in some choices beside it.

    Args:
        make: number of steps -> the rule, with ``lr`` and the names of the choices as its meta-parameters.
        rates: the grid to begin with, positive and growing; a single one is not tuned.
        choices: values of the other meta-parameters, all of which are tried at every rate.
    """

    make: Callable[[int], UpdateRule]
    rates: tuple[float, ...]
    choices: tuple[Mapping[str, float], ...] = ({},)

    def __post_init__(self) -> None:
        if not self.rates or self.rates[0] <= 0 or list(self.rates) != sorted(set(self.rates)):
            raise ValueError(f"rates={self.rates!r} is no grid; pass positive numbers that grow, or a single one")
        if not self.choices:
            raise ValueError("choices=() leaves nothing to try; pass ({},) where there is nothing to choose")

    def values(self, point: Point) -> dict[str, float]:
        """Return the meta-parameters at a point."""
        return {"lr": point.rate, **self.choices[point.choice]}


@dataclass(frozen=True)
class Search:
    """The best point, and the scores of those tried, on few tasks and on all; lower is better."""

    best: Point
    screened: dict[Point, float]
    scores: dict[Point, float]

    @property
    def at_edge(self) -> bool:
        """Whether a rate beyond those tried, with the same choice, might be better."""
        return _edge(self.best, self.scores) is not None


def search(score: Callable[[Sequence[Point], bool], Sequence[float]], grid: Grid) -> Search:
    """Return the point with the lowest score, found in rounds whose points are all scored at once.

    First all rates with all choices on few tasks; while the best rate of a choice is at its edge, three more beyond it.
    Then, on all tasks and with the best two choices, nine rates around the best of each, a step of the grid to both
    sides; while the best of all is at an edge of these, four more beyond it. NaN counts as infinite; of equal scores
    the lower rate wins, then the earlier choice.

    Args:
        score: points, and whether on few tasks only -> the scores.
        grid: what is tried.

    Raises:
        ValueError: no score is finite.
    """
    screened: dict[Point, float] = {}
    scores: dict[Point, float] = {}

    def attempt(new: Sequence[Point], found: dict[Point, float]) -> Point:
        fresh = [point for point in new if point not in found]
        values = score(fresh, found is screened) if fresh else ()
        found.update({p: math.inf if math.isnan(value) else value for p, value in zip(fresh, values, strict=True)})
        return min(sorted(found), key=found.__getitem__)

    ratio = grid.rates[-1] / grid.rates[-2] if len(grid.rates) > 1 else 1.0
    best = attempt([Point(rate, c) for rate in grid.rates for c in range(len(grid.choices))], screened)
    for _ in range(_EXTENSIONS):
        open_ended = {p: beyond for p in _favourites(screened) if (beyond := _edge(p, screened)) is not None}
        if not open_ended:
            break
        further = [Point(p.rate * ratio ** (b * k), p.choice) for p, b in open_ended.items() for k in (1, 2, 3)]
        best = attempt(further, screened)
    _require_finite(best, screened)
    steps = range(-_PARTS, _PARTS + 1) if ratio > 1 else (0,)
    kept = _favourites(screened)[:_FINALISTS]
    best = attempt([Point(p.rate * ratio ** (k / _PARTS), p.choice) for p in kept for k in steps], scores)
    for _ in range(_EXTENSIONS):
        if (beyond := _edge(best, scores)) is None:
            break
        further = [Point(best.rate * ratio ** (beyond * k / _PARTS), best.choice) for k in range(1, _PARTS + 1)]
        best = attempt(further, scores)
    _require_finite(best, scores)
    return Search(best, screened, scores)


def _require_finite(best: Point, found: Mapping[Point, float]) -> None:
    if math.isinf(found[best]):
        rates = sorted(point.rate for point in found)
        raise ValueError(f"every learning rate from {rates[0]:.3g} to {rates[-1]:.3g} diverged on the tuning tasks")


def _favourites(found: Mapping[Point, float]) -> list[Point]:
    """Return the best point of each choice, the best choice first; without those that diverge at every rate."""
    best: dict[int, Point] = {}
    for point in sorted(found, key=lambda p: (found[p], p)):
        if math.isfinite(found[point]):
            best.setdefault(point.choice, point)
    return list(best.values())


def _edge(best: Point, found: Mapping[Point, float]) -> int | None:
    """Return 1 or -1 where the best rate is the highest or the lowest tried with its choice."""
    rates = sorted(point.rate for point in found if point.choice == best.choice)
    if len(rates) < 2 or best.rate not in (rates[0], rates[-1]):
        return None
    return 1 if best.rate == rates[-1] else -1


def half_decades(low: float, high: float) -> tuple[float, ...]:
    """Return 10^low, 10^(low + 1/2), ..., 10^high."""
    return tuple(10.0 ** (k / 2) for k in range(round(2 * low), round(2 * high) + 1))


def _rule(
    name: str, schedule: Schedule | None, learn: tuple[str, ...], options: Mapping[str, Any], num_steps: int
) -> Any:
    from learnedopt import optimizers

    if name == "schedule-free":  # its own warm-up, of as many steps as a schedule's
        options = {**options, "warmup_steps": max(1, round(0.05 * num_steps))}
    rule = optimizers.make(name, learn=("lr", *learn), **options)
    if schedule is None:
        return rule
    return optimizers.Scheduled(rule, schedule, warmup=0.05 if schedule == "cosine" else 0.0)


@dataclass(frozen=True)
class Made:
    """Makes a registered rule for a number of steps; see ``Grid.make``."""

    name: str
    schedule: Schedule | None
    learn: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, num_steps: int) -> UpdateRule:
        """Return the rule."""
        return _rule(self.name, self.schedule, self.learn, dict(self.options), num_steps)


def grid(
    name: str, rates: tuple[float, ...], schedule: Schedule | None = None,
    tried: Mapping[str, Sequence[float]] | None = None, **options: Any,
) -> Grid:  # fmt: skip
    """Return a registered rule as a grid.

    Args:
        name: of the rule.
        rates: learning rates.
        schedule: as ``Scheduled``'s; None for a constant rate.
        tried: hyperparameter -> values, all combinations of which are the choices.
        options: of the rule.

    Example:
        >>> decayed = grid("adamw", half_decades(-4, -1), "cosine", {"weight_decay": (0.0, 0.1)})
    """
    tried = tried or {}
    choices = tuple(dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values()))
    return Grid(Made(name, schedule, tuple(tried), tuple(options.items())), rates, choices)


_DECAYS = {"weight_decay": (0.0, 0.01, 0.1)}
_ADAM, _SGD, _MUON = half_decades(-4.5, -0.5), half_decades(-3, 1), half_decades(-4, 0)
_HYBRID = {"ratio": (0.3, 1.0, 3.0), "weight_decay": (0.0, 0.1)}
# At this adjustment an entry of a matrix moves about as far as AdamW moves one, so one rate serves both: the ratio
# of the two is tuned around 1.
_MATCHED = {"adjust": "match_rms_adamw"}

HARD_BASELINES: Mapping[str, Grid] = {
    "Adam, default": grid("adam", (1e-3,)),
    "SGD": grid("sgd", _SGD),
    "SGD + cosine": grid("sgd", _SGD, "cosine"),
    "SGD, linear end": grid("sgd", _SGD, "linear-end"),
    "Nesterov": grid("nesterov", half_decades(-3.5, 0.5)),
    "Nesterov + cosine": grid("nesterov", half_decades(-3.5, 0.5), "cosine"),
    "Nesterov, linear end": grid("nesterov", half_decades(-3.5, 0.5), "linear-end"),
    "Adam": grid("adam", _ADAM),
    "Adam + cosine": grid("adam", _ADAM, "cosine"),
    "Adam, linear end": grid("adam", _ADAM, "linear-end"),
    "AdamW": grid("adamw", _ADAM, None, _DECAYS),
    "AdamW + cosine": grid("adamw", _ADAM, "cosine", _DECAYS),
    "AdamW, linear end": grid("adamw", _ADAM, "linear-end", _DECAYS),
    "NAdam": grid("nadam", _ADAM),
    "NAdam + cosine": grid("nadam", _ADAM, "cosine"),
    "Schedule-Free": grid("schedule-free", half_decades(-4, 0), None, _DECAYS),
    "Muon": grid("muon", _MUON, None, _HYBRID, **_MATCHED),
    "Muon + cosine": grid("muon", _MUON, "cosine", _HYBRID, **_MATCHED),
}
"""What a learned optimizer has to beat. All but the first are tuned; "Muon" is a hybrid with AdamW; momentum is 0.9 in
Nesterov's and 0.95 in Muon's, everything else as in ``torch.optim``. Cosines warm up over 5 % of the steps; "linear
end" is constant, then falls to 0 over the last 40 %."""

MAIN_BASELINES: Mapping[str, Grid] = {
    label: HARD_BASELINES[label]
    for label in (
        "Adam, default", "Nesterov", "Nesterov + cosine", "Adam", "AdamW + cosine", "AdamW, linear end",
        "NAdam + cosine", "Schedule-Free", "Muon + cosine",
    )
}  # fmt: skip
"""Those of them that came out best of their kind, and the two that ratios are shown to: half the time of all."""


def named(text: str) -> Mapping[str, Grid]:
    """Return the baselines that a command line names: "main", "all", "none", or labels with semicolons between them.

    Raises:
        ValueError: there is no such baseline.
    """
    if text in ("main", "all", "none"):
        known: dict[str, Mapping[str, Grid]] = {"main": MAIN_BASELINES, "all": HARD_BASELINES, "none": {}}
        return known[text]
    labels = [label.strip() for label in text.split(";") if label.strip()]
    unknown = [label for label in labels if label not in HARD_BASELINES]
    if unknown or not labels:
        near = nearest(unknown[0], HARD_BASELINES) if unknown else ""
        raise ValueError(
            f"baselines {text!r}: there is no {'; '.join(unknown) or 'label in it'}{near or ':'} use main, all, none, "
            f"or some of {'; '.join(HARD_BASELINES)}"
        )
    return {label: HARD_BASELINES[label] for label in labels}
