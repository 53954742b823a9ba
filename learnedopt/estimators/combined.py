"""Two meta-gradients as one: each entry weighted by how little either one's has varied."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar, NamedTuple, NoReturn, cast, final

import torch
from torch import Tensor

from learnedopt.core.carry import Carry
from learnedopt.core.estimator import Estimate, GradientEstimator, Recording
from learnedopt.core.inner import InnerLoop, InnerSolver
from learnedopt.core.modes import outside_inference_mode
from learnedopt.core.objective import MetaObjective
from learnedopt.core.shares import Indivisible
from learnedopt.core.task import Tasks
from learnedopt.core.tree import Theta, size
from learnedopt.estimators import perturbations


class Moments(NamedTuple):
    """Running moments of one estimator's gradients over estimates, by entry, in float64.

    ``mean``, and ``spread``, the mean squared distance from it, are weighted means in which an estimate counts
    ``decay`` times as much as the one after it. ``count``: of how many, by name.
    """

    mean: Theta
    spread: Theta
    count: dict[str, int]  # pyright: ignore[reportIncompatibleMethodOverride] - no use of a tuple's method


class CombinedCarry(NamedTuple):
    """The carries of both, None where an episode is over, their moments, and what fresh episodes are drawn from."""

    back_propagated: Any
    perturbed: Any
    moments: tuple[Moments, Moments]
    seed: int
    restarts: int
    num_tasks: int


@final
@dataclass(frozen=True)
class Combined(GradientEstimator):
    """Two estimates of one gradient, each entry weighted by its inverse variance (Metz et al. 2019, section 3.2).

    ``g = w b + (1 - w) p`` with ``w = var_p / (var_b + var_p)`` by entry, the weights of least variance where the two
    are independent. The variances are running ones, of estimates BEFORE this one: the weights then know nothing of
    this one's noise, and a mean of unbiased gradients stays unbiased, as it would not with weights that read what they
    weigh. (Successive estimates of ``PersistentES`` are not independent, so that there it holds up to that.) Until both
    are known, after two estimates, and where both are 0, w is 1/2. Changes of the gradient as theta moves count as
    variance, as they do there; ``decay`` says how soon they are forgotten.

    Both see the same theta and objective, so they should estimate the same gradient: ``Unrolled(n)`` and
    ``EvolutionStrategies(n, ...)`` do, while ``PersistentES`` has one window's share of a sum over windows.

    Args:
        back_propagated: an estimator, exact for its tasks where gradients are well-behaved.
        perturbed: another, such as ``EvolutionStrategies``, that does not fail where these explode. Any two will do.
        decay: how much an estimate counts beside the next one, at least 0 and below 1; with 0 no variance is ever
            known.

    An estimate whose loss or gradient is not finite is left out, of its variance as well, and its episode is dropped;
    where both are, the result is not finite. A meta-parameter that one says to have no path (``zero_gradient``, in
    windows after the first) counts by the other alone.

    The carry holds both carries. Where one's episode is over, it starts again on as many fresh tasks, drawn by
    ``family.sample`` from a seed in the carry: there is no end by itself.

    ``loss`` and ``info["losses"]`` are the back-propagated one's, or the other's where it is left out. ``info`` also
    has ``weight_back_propagated``, the mean of w; ``variance_back_propagated`` and ``variance_perturbed``, the sums
    over entries, once they are known; ``not_finite_back_propagated`` and ``not_finite_perturbed``, 0 or 1;
    ``inner_steps``, of both, where both tell; and what else the two have.

    Raises:
        TypeError: a part is no estimator.
        ValueError: both parts are the same, or solve the inner problem by different solvers; ``decay`` is out of its
            range; a carry of another theta; and what either one refuses.

    Example:
        >>> estimator = Combined(Unrolled(20), EvolutionStrategies(20, num_pairs=16, sigma=0.01))
        >>> result = MetaTrainer(loop, estimator, FinalLoss()).run(100)
    """

    back_propagated: GradientEstimator
    perturbed: GradientEstimator
    decay: float = 0.9
    renews_tasks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("back_propagated", "perturbed"):
            part = getattr(self, name)
            if not isinstance(part, GradientEstimator):
                got = f"the class {part.__name__}" if isinstance(part, type) else repr(part)
                raise TypeError(f"Combined: {name}={got} is no GradientEstimator; pass an instance, as Unrolled(10)")
        if self.back_propagated == self.perturbed:
            raise ValueError(
                f"Combined: both parts are {self.perturbed!r}, so there is nothing to weigh; pass two kinds of one, or "
                "take more tasks instead"
            )
        if self.back_propagated.inner != self.perturbed.inner:
            raise ValueError(
                f"Combined: the inner problem is solved by {self.back_propagated.inner!r} in one part and by "
                f"{self.perturbed.inner!r} in the other (None: the rule's own steps), so that they have gradients of "
                "two different things; give both the same"
            )
        decay = cast("object", self.decay)
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise ValueError(f"Combined: decay={decay!r} is out of range; pass a number of at least 0 and below 1")

    @property
    def inner(self) -> InnerSolver | None:  # pyright: ignore[reportIncompatibleVariableOverride] - that of both
        """What solves the inner problem of both."""
        return self.back_propagated.inner

    @property
    def takes_second_derivatives(self) -> bool:
        """Whether either does."""
        return self.back_propagated.takes_second_derivatives or self.perturbed.takes_second_derivatives

    @property
    def recording(self) -> Recording | None:
        """That of the one that records."""
        return self.back_propagated.recording or self.perturbed.recording

    def start(self, loop: InnerLoop, theta: Theta, tasks: Tasks, generator: torch.Generator) -> CombinedCarry:
        """Return an episode of each on these tasks, nothing known of their variances, and a seed for fresh tasks."""
        seed = perturbations.draw_seed(generator)
        first, second = (part.start(loop, theta, tasks, generator) for part in (self.back_propagated, self.perturbed))
        return CombinedCarry(first, second, (_no_moments(theta), _no_moments(theta)), seed, 0, size(tasks))

    def forms(self, loop: InnerLoop, theta: Theta, carry: CombinedCarry) -> list[Any]:
        """Return those of both parts, which may also be over."""
        first = [None, *self.back_propagated.forms(loop, theta, carry.back_propagated)]
        second = [None, *self.perturbed.forms(loop, theta, carry.perturbed)]
        return [carry._replace(back_propagated=x, perturbed=y) for x, y in zip_longest(first, second)]

    def require_carry(self, theta: Theta, carry: Any) -> None:
        """Raise TypeError where a carry is of another class, ValueError where it is of another theta."""
        if not isinstance(carry, CombinedCarry):
            raise TypeError(
                f"Combined keeps two episodes and their variances in a carry of its own, got a {type(carry).__name__}; "
                "begin with estimator.start(loop, theta, tasks, generator)"
            )
        here = {k: tuple(v.shape) for k, v in theta.items()}
        for kind in (kind for moments in carry.moments for kind in (moments.mean, moments.spread)):
            found = {k: tuple(v.shape) for k, v in kind.items()}
            if found != here:
                raise ValueError(
                    f"the carry's variances are of a theta of shapes {found}, this one has {here}; go on with the "
                    "theta that it came from, or begin anew with estimator.start(...)"
                )
        parts = ((self.back_propagated, carry.back_propagated), (self.perturbed, carry.perturbed))
        for part, own in parts:
            if own is not None:
                part.require_carry(theta, own)

    def standing(self, loop: InnerLoop, carry: CombinedCarry) -> list[tuple[InnerLoop, Carry, int | None]]:
        """Return the inner loops of both."""
        parts = ((self.back_propagated, carry.back_propagated), (self.perturbed, carry.perturbed))
        return [each for part, own in parts if own is not None for each in part.standing(loop, own)]

    def count_tasks(self, carry: CombinedCarry) -> int:
        """Return of how many tasks each episode is."""
        return carry.num_tasks

    def narrow(self, carry: CombinedCarry, start: int, stop: int) -> NoReturn:
        """Raise Indivisible: the weights are of the variances of whole meta-batches."""
        raise Indivisible(
            "a meta-batch of Combined cannot be estimated in shares: each entry is weighted by the variances of both "
            "gradients of the whole meta-batch; use one of its parts, or estimate all tasks at once, in one process"
        )

    @outside_inference_mode
    def estimate(self, loop: InnerLoop, theta: Theta, objective: MetaObjective, carry: CombinedCarry) -> Estimate:
        """Take an estimate of each, and weigh them."""
        self.require_carry(theta, carry)
        carry = self._restarted(loop, theta, carry)
        found = (
            self.back_propagated.estimate(loop, theta, objective, carry.back_propagated),
            self.perturbed.estimate(loop, theta, objective, carry.perturbed),
        )
        finite = [each.finite for each in found]
        told = [_told(each, ok) for each, ok in zip(found, finite, strict=True)]
        shares = {k: self._share(k, told, carry.moments, finite) for k in theta}
        grads = {k: _mixed(shares[k], *(each.grads[k] for each in found)) for k in theta}
        moments = [self._taken_in(m, g) for m, g in zip(carry.moments, told, strict=True)]
        onward = [each.carry if ok else None for each, ok in zip(found, finite, strict=True)]
        leading = found[0] if finite[0] or not finite[1] else found[1]
        info = _joined(found[0].info, found[1].info, leading)
        info["weight_back_propagated"] = _mean_share(shares, theta)
        for name, each, ok, m in zip(("back_propagated", "perturbed"), found, finite, moments, strict=True):
            info[f"not_finite_{name}"] = int(not ok)
            if "failed_tasks" in each.info:
                info[f"failed_tasks_{name}"] = each.info["failed_tasks"]
            known = [self._variance(m, k) for k in theta]
            if all(x is not None for x in known):
                info[f"variance_{name}"] = float(sum(x.sum() for x in known if x is not None))
        return Estimate(leading.loss, grads, carry._replace(
            back_propagated=onward[0], perturbed=onward[1], moments=(moments[0], moments[1])
        ), info)  # fmt: skip

    def _restarted(self, loop: InnerLoop, theta: Theta, carry: CombinedCarry) -> CombinedCarry:
        """Return the carry with a fresh episode where one is over, each on tasks of its own."""
        for name in ("back_propagated", "perturbed"):
            if getattr(carry, name) is None:
                generator = perturbations.generator(carry.seed, carry.restarts)
                tasks = loop.family.sample(carry.num_tasks, generator)
                fresh = getattr(self, name).start(loop, theta, tasks, generator)
                carry = carry._replace(**{name: fresh}, restarts=carry.restarts + 1)
        return carry

    def _share(self, name: str, told: list[Theta], moments: tuple[Moments, ...], finite: list[bool]) -> Tensor | float:
        """Return w of one meta-parameter: a number, or one for each entry."""
        if name in told[0] and name in told[1]:
            first, second = (self._variance(m, name) for m in moments)
            if first is None or second is None:
                return 0.5
            # 0 / 0 and inf / inf: neither is known to be the better one.
            ratio = first / second
            return torch.where(ratio.isnan(), 0.5, 1 / (1 + ratio))
        if name in told[0] or name in told[1]:
            return float(name in told[0])
        return float(finite[0] or not finite[1])

    def _taken_in(self, moments: Moments, grads: Theta) -> Moments:
        """Return the moments with one estimate more, of those entries that it tells of."""
        mean, spread, count = dict(moments.mean), dict(moments.spread), dict(moments.count)
        for k, g in grads.items():
            count[k] += 1
            # Of all weights together, so that zeros of the beginning count nothing.
            newest = (1 - self.decay) / (1 - self.decay ** count[k])
            away = g.detach().double() - mean[k]
            mean[k] = mean[k] + newest * away
            # The first one has none: its distance from nothing may be infinite, and 0 times that is no 0.
            spread[k] = (1 - newest) * (spread[k] + newest * away.square()) if newest < 1 else spread[k]
        return Moments(mean, spread, count)

    def _variance(self, moments: Moments, name: str) -> Tensor | None:
        """Return the variance by entry, unbiased for equal means; None while it is not known."""
        d, power = self.decay, self.decay ** moments.count[name]
        # The sum of the squared weights: the share of the variance that the mean itself takes from the spread.
        squares = (1 - d) * (1 + power) / ((1 + d) * (1 - power)) if moments.count[name] else 1.0
        return moments.spread[name] / (1 - squares) if moments.count[name] > 1 and squares < 1 else None


def _no_moments(theta: Theta) -> Moments:
    def zeros() -> Theta:
        return {k: torch.zeros_like(v, dtype=torch.float64, requires_grad=False) for k, v in theta.items()}

    return Moments(zeros(), zeros(), dict.fromkeys(theta, 0))


def _told(found: Estimate, finite: bool) -> Theta:
    """Return the gradients that an estimate has something to say of."""
    silent = found.info.get("zero_gradient", [])
    return {k: g for k, g in found.grads.items() if finite and k not in silent}


def _mixed(share: Tensor | float, first: Tensor, second: Tensor) -> Tensor:
    """Return the weighted mean; what has no weight is left out, and not multiplied by 0, which NaN would survive."""
    if isinstance(share, float) and share != 0.5:
        return first if share else second
    return (share * first.double() + (1 - share) * second.double()).to(first.dtype)


def _mean_share(shares: dict[str, Tensor | float], theta: Theta) -> float:
    total = sum(float(torch.as_tensor(s).double().expand(theta[k].shape).sum()) for k, s in shares.items())
    return total / sum(v.numel() for v in theta.values())


def _joined(first: dict[str, Any], second: dict[str, Any], leading: Estimate) -> dict[str, Any]:
    """Return what both estimates report, less what is of one alone."""
    # Each part leaves out tasks of its own, so that its numbers of them are not those of the estimate.
    alone = ("losses", "inner_steps", "zero_gradient", "num_tasks", "failed_tasks", "failed")
    info = {k: v for k, v in {**second, **first}.items() if k not in alone}
    if "losses" in leading.info:
        info["losses"] = leading.info["losses"]
    if "inner_steps" in first and "inner_steps" in second:
        info["inner_steps"] = first["inner_steps"] + second["inner_steps"]
    zero = sorted({*first.get("zero_gradient", [])} & {*second.get("zero_gradient", [])})
    return {**info, "zero_gradient": zero} if zero else info
