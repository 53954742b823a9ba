"""Hand-designed optimizers as hard to beat as they can be made: schedules, decays and rates, tuned by grids."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from learnedopt.core.rule import UpdateRule

_EXTENSIONS = 4  # rounds, at most, while the best rate is at the edge
_STEPS_BEYOND = 3  # of the grid's ratio, a round
_PARTS = 4  # that the gaps beside the best rate are cut into: to an eighth of a decade from half ones


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
    """The best point, and the score of each one tried; lower is better."""

    best: Point
    scores: dict[Point, float]

    @property
    def at_edge(self) -> bool:
        """Whether a rate beyond those tried, with the same choice, might be better."""
        rates = [point.rate for point in self.scores if point.choice == self.best.choice]
        return len(rates) > 1 and self.best.rate in (min(rates), max(rates))


def search(score: Callable[[Sequence[Point]], Sequence[float]], grid: Grid) -> Search:
    """Return the point with the lowest score, found in rounds whose points are all scored at once.

    First all rates with all choices; while the best rate is at its edge, three more beyond it with its choice; then,
    with all choices, three in each of the two gaps beside it. NaN counts as infinite; of equal scores the lower rate
    wins, then the earlier choice.

    Raises:
        ValueError: no score is finite.
    """
    scores: dict[Point, float] = {}

    def attempt(new: Sequence[Point]) -> Point:
        fresh = [point for point in new if point not in scores]
        found = score(fresh) if fresh else ()
        scores.update({p: math.inf if math.isnan(value) else value for p, value in zip(fresh, found, strict=True)})
        return min(sorted(scores), key=scores.__getitem__)

    choices = range(len(grid.choices))
    best = attempt([Point(rate, choice) for rate in grid.rates for choice in choices])
    if len(grid.rates) == 1 and len(grid.choices) == 1:
        return Search(best, scores)
    for _ in range(_EXTENSIONS if len(grid.rates) > 1 else 0):
        rates = sorted(point.rate for point in scores if point.choice == best.choice)
        if best.rate not in (rates[0], rates[-1]) or math.isinf(scores[best]):
            break
        ratio = rates[0] / rates[1] if best.rate == rates[0] else rates[-1] / rates[-2]
        best = attempt([Point(best.rate * ratio**k, best.choice) for k in range(1, _STEPS_BEYOND + 1)])
    if math.isinf(scores[best]):
        rates = sorted(point.rate for point in scores)
        raise ValueError(f"every learning rate from {rates[0]:.3g} to {rates[-1]:.3g} diverged on the tuning tasks")
    rates = sorted(point.rate for point in scores if point.choice == best.choice)
    i = rates.index(best.rate)
    between = [
        low * (high / low) ** (k / _PARTS)
        for low, high in itertools.pairwise(rates[max(i - 1, 0) : i + 2])
        for k in range(1, _PARTS)
    ]
    return Search(attempt([Point(rate, choice) for rate in between for choice in choices]), scores)


def half_decades(low: float, high: float) -> tuple[float, ...]:
    """Return 10^low, 10^(low + 1/2), ..., 10^high."""
    return tuple(10.0 ** (k / 2) for k in range(round(2 * low), round(2 * high) + 1))


def _rule(name: str, schedule: str | None, learn: tuple[str, ...], options: Mapping[str, Any], num_steps: int) -> Any:
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
    schedule: str | None
    learn: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, num_steps: int) -> UpdateRule:
        """Return the rule."""
        return _rule(self.name, self.schedule, self.learn, dict(self.options), num_steps)


def grid(
    name: str, rates: tuple[float, ...], schedule: str | None = None,
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
