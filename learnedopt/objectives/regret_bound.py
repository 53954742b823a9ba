"""Bounds on the regret of gradient descent within a task, and the moments out of which the best rates are made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, cast, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Rollout, Tape, detach, narrow
from learnedopt.core.counts import require_count
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import TaskMean
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.objectives.targets import Target


class WithinTask(NamedTuple):
    """What a task did from its start: ``target`` and the sum over steps of ``squares`` of gradients; no graph."""

    target: Params
    squares: Params


def within_task(loop: InnerLoop, theta: Theta, rollout: Rollout, num_steps: int, target: Target | None) -> WithinTask:
    """Take ``num_steps`` steps from a rollout without any, and return what they leave; all batched.

    The squares are of the gradients that the rule is handed, at the points that it reaches.

    Raises:
        ValueError: the rollout has steps of its own: the bound would be one from the start, and they would count twice.
    """
    _require_no_steps(len(rollout.losses), num_steps)
    start = detach(rollout.end)
    watched = loop.cache.remember("sum of squares", lambda: replace(loop, rule=_SumOfSquares(loop.rule)))
    zeros = {k: torch.zeros_like(p, dtype=_wide(p)) for k, p in start.params.items()}
    last = watched.run(theta, start._replace(state=(start.state, zeros)), num_steps, Tape.NONE).end
    assert last.state is not None
    found = last if target is None else target.find(loop, theta, start).target
    return WithinTask(tree.detach(found.params), last.state[1])


@final
@dataclass(frozen=True)
class RegretBound(TaskMean):
    """Bound on the regret of gradient descent within a task, by the rates that ``theta`` holds.

    ``sum_j (target_j - start_j)**2 / (2 lr_j) + lr_j / 2 * sum_i g_ij**2`` over coordinates j and steps i: for convex
    losses no less than the sum over steps of the losses minus that of the target's (Khodak et al. 2019, section 2; for
    online gradient descent, Zinkevich 2003). The start is the rollout's: its gradient is ``(start - target) / lr``. No
    gradient flows into target and squares, which are those of ``num_steps`` steps from the start.

    It is for ``Unrolled(0)`` and rules that step by ``-lr * grad`` with a learned ``lr``: ``meta-sgd``,
    ``learned-rates``, ``sgd``. Any optimizer may minimise it in start and rates, as long as these stay positive.

    Args:
        num_steps: m, the steps of a task.
        target: what the regret is against, such as ``BestInHindsight``; None for the last iterate of the steps.

    Raises:
        ValueError: theta has no rates ``lr`` or ``lr/<param>``, or one that is not positive, or rates for each step;
            the estimator takes steps of its own.
    """

    num_steps: int
    target: Target | None = None

    reads_theta: ClassVar[tuple[str, ...]] = ("*lr*",)  # pyright: ignore[reportIncompatibleVariableOverride] - no field
    holds_fixed = True

    def __post_init__(self) -> None:
        _require_within(self.num_steps, self.target)

    def check(self, loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> None:
        """Take the first two tasks' value, where the estimator takes no steps."""
        _require_no_steps(num_steps, self.num_steps)
        start = loop.begin(theta, narrow(carry, 0, min(2, tree.size(carry.params))))
        self(loop, theta, loop.run(theta, start, 0, Tape.NONE))

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        """Return the mean over tasks."""
        return self.bounds(loop, theta, rollout).mean()

    def bounds(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        """Return each task's bound (num_tasks,)."""
        rates = {name: _rate(theta, name, start.shape[1:]) for name, start in rollout.end.params.items()}
        found = within_task(loop, theta, rollout, self.num_steps, self.target)
        terms: list[Tensor] = []
        for name, start in rollout.end.params.items():
            rate = rates[name]
            gaps = (found.target[name] - start).square()
            terms.append((gaps / (2 * rate) + rate / 2 * found.squares[name]).flatten(1).sum(1))
        return torch.stack(terms).sum(0)


@final
@dataclass(frozen=True)
class MomentMatching(TaskMean):
    """Half the squared distances from what a task shows: the objective that the rule ``aruba`` learns by.

    ``(|start - target|**2 + |distance - factor * d**2|**2 + |squares - s|**2) / 2`` with d the way from start to target
    and s the sum over steps of squared gradients, per coordinate; where coordinates share a rate, their means. No
    gradient flows into target, d and s, so theta's is ``start - target``, ``distance - factor * d**2`` and
    ``squares - s``: for the start that of Reptile, for the others that of running means, over tasks too. Of these the
    rate of the least mean bound is ``sqrt(distance / squares)``. From the gradients of ``RegretBound`` they could be
    told for one task a meta-step only.

    It is for ``Unrolled(0)`` and ``BalancedRates``. With ``ARUBA`` it is the algorithm of Khodak et al. (2019); with
    ``torch.optim.SGD`` older tasks are forgotten, for tasks that drift. Any optimizer will do that keeps distances and
    squares positive.

    Args:
        num_steps: m, the steps of a task.
        target: where a task should end, such as ``BestInHindsight``; None for the last iterate of the steps.
        factor: of the squared distances. As published one half, which makes rates about 0.7 of the best in hindsight; 1
            makes them these.

    Raises:
        ValueError: theta has no distances and squares, or one that is not positive; the estimator takes steps of its
            own.
    """

    num_steps: int
    target: Target | None = None
    factor: float = 0.5

    # No field: the base leaves open whether it is the class's.
    reads_theta: ClassVar[tuple[str, ...]] = (  # pyright: ignore[reportIncompatibleVariableOverride]
        "*distance*",
        "*squares*",
    )
    holds_fixed = True

    def __post_init__(self) -> None:
        _require_within(self.num_steps, self.target)
        if not self.factor > 0:
            raise ValueError(f"factor={self.factor!r} must be positive: it scales squared distances; 0.5 as published")

    def check(self, loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> None:
        """Take the first two tasks' value, where the estimator takes no steps."""
        _require_no_steps(num_steps, self.num_steps)
        start = loop.begin(theta, narrow(carry, 0, min(2, tree.size(carry.params))))
        self(loop, theta, loop.run(theta, start, 0, Tape.NONE))

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        """Return the mean over tasks."""
        starts = rollout.end.params
        learned = [_moments(theta, kind, starts) for kind in ("distance", "squares")]
        found = within_task(loop, theta, rollout, self.num_steps, self.target)
        gaps = {k: start - found.target[k] for k, start in starts.items()}
        shown = ({k: self.factor * gap.detach().square() for k, gap in gaps.items()}, found.squares)
        value = torch.stack([_half_squares(gap) for gap in gaps.values()]).sum(0)
        for values, seen in zip(learned, shown, strict=True):
            value = value + _half_squares_from(values, seen)
        return value.mean()


def _require_within(num_steps: int, target: Target | None) -> None:
    require_count("num_steps", num_steps, least=1)
    if target is not None and not isinstance(cast("object", target), Target):
        raise TypeError(
            f"target={target!r} is no Target; pass an instance, such as BestInHindsight(SumOfLossesSolver(), "
            f"{num_steps}), or None for the last iterate"
        )


def _require_no_steps(taken: int, num_steps: int) -> None:
    if taken:
        raise ValueError(
            f"a bound on the regret is one from the start, and takes its own {num_steps} steps from there, but the "
            f"estimator takes {taken} before; use Unrolled(0)"
        )


def _moments(theta: Theta, kind: str, params: Params) -> Theta:
    """Return theta's ``kind`` for each parameter, or for all together under the empty name."""
    for key in (kind, f"rule/{kind}"):
        if key in theta:
            return {"": _positive(theta, key, "aruba")}
    owner = "" if f"{kind}/{next(iter(params))}" in theta else "rule/"
    return {name: _positive(theta, f"{owner}{kind}/{name}", "aruba") for name in params}


def _half_squares_from(learned: Theta, shown: Params) -> Tensor:
    """Return half the squared distances (num_tasks,) of b or g from what was shown, or from its means where shared."""
    if "" in learned:
        return _half_squares(learned[""] - torch.cat([x.flatten(1) for x in shown.values()], dim=1).mean(1))
    each = [
        _half_squares(value - (shown[name] if value.ndim else shown[name].flatten(1).mean(1)))
        for name, value in learned.items()
    ]
    return torch.stack(each).sum(0)


def _half_squares(x: Tensor) -> Tensor:
    return 0.5 * x.square().reshape(len(x), -1).sum(1)


def _rate(theta: Theta, name: str, shape: torch.Size) -> Tensor:
    keys = ("lr", "rule/lr", f"lr/{name}", f"rule/lr/{name}")
    key = next((key for key in keys if key in theta), keys[-1])
    rate = _positive(theta, key, "meta-sgd")
    if rate.ndim and rate.shape != shape:
        raise ValueError(
            f"the bound on the regret is of one rate for all steps, a number or one for each coordinate of {name!r} "
            f"{tuple(shape)}, but theta[{key!r}] has the shape {tuple(rate.shape)}, as rates for each step have; use a "
            "rule with one rate for all steps, such as meta-sgd"
        )
    return rate


def _positive(theta: Theta, key: str, rule: str) -> Tensor:
    if key not in theta:
        raise ValueError(f"theta has no {key!r}, only {sorted(theta)}; the objective is for rules such as {rule}")
    if not (theta[key] > 0).all():
        raise ValueError(
            f"theta's {key!r} must be positive everywhere, its least entry is {float(theta[key].detach().min()):.3g}; "
            "start it higher, or lower the meta-learning rate"
        )
    return theta[key]


def _wide(x: Tensor) -> torch.dtype:
    """Return a dtype in which small squares do not vanish: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


class _SumOfSquares(UpdateRule):
    """A rule as it is, which also sums the squares of the gradients that it is handed: state (its own, sums)."""

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule

    @property
    def reads_horizon(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - read, and never set
        return self.rule.reads_horizon

    def within(self, horizon: int | None) -> UpdateRule:
        return _SumOfSquares(self.rule.within(horizon))

    def init_theta(self, generator: torch.Generator) -> Theta:
        return self.rule.init_theta(generator)

    def theta_scale(self) -> dict[str, float | Tensor]:
        return self.rule.theta_scale()

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        params, state = self.rule.init(theta, params)
        return params, (state, {k: torch.zeros_like(p, dtype=_wide(p)) for k, p in params.items()})

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        own, sums = state
        deltas, own = self.rule.update(theta, grads, own, params, loss)
        return deltas, (own, {k: total + grads[k].to(total.dtype).square() for k, total in sums.items()})
