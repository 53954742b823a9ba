"""Every estimator on one's own loop: bias and variance against the longest unroll, cosine, time, peak memory."""

from __future__ import annotations

import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Tape
from learnedopt.core.counts import require_count
from learnedopt.core.estimator import GradientEstimator, call_objective
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import MetaObjective
from learnedopt.core.task import Tasks
from learnedopt.core.tree import Theta
from learnedopt.estimators import perturbations
from learnedopt.estimators.combined import Combined
from learnedopt.estimators.task_by_task import TaskByTask
from learnedopt.estimators.unrolled import Unrolled
from learnedopt.evaluation.diagnose_numbers import LEAST, Accuracy, Truth, accuracy_of, truth_of
from learnedopt.evaluation.diagnose_plans import Facts, Tried, spelled, suggested, windows_of
from learnedopt.evaluation.diagnose_report import Diagnosis, Row, recommend
from learnedopt.execution.memory import peak_of

REFUSALS = (ValueError, NotImplementedError)
"""What an estimator raises for a loop or an objective that it cannot work with; a TypeError is a mistake in either."""


def diagnose(
    loop: InnerLoop,
    objective: MetaObjective,
    theta: Theta | None = None,
    *,
    horizon: int,
    num_tasks: int = 8,
    num_batches: int = 16,
    num_truth_batches: int | None = None,
    seed: int = 0,
    estimators: Mapping[str, Tried] | None = None,
    also: Mapping[str, Tried] | None = None,
    truth_dtype: torch.dtype | None = torch.float64,
    budget: float | None = None,
    memory_limit: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Diagnosis:
    """Take every estimator's gradient of the same episodes, and compare them with the exact one.

    The truth is the gradient, at a fixed theta, of the mean over tasks of ``objective(a whole episode of horizon
    steps)``, exact through all of its steps, in ``truth_dtype``. Estimators in windows give one for each: these are
    summed over an episode where the objective of an episode is the sum of its windows' (``SumOfLosses``), and averaged
    where it is their mean (``MeanLogLoss``), which is found out by running one; of other objectives (``FinalLoss``)
    windows have gradients of something else, and are refused. ``PersistentES`` gives one window's share, on average,
    so that as many as an episode has windows add up to it too, though its cohorts go on to other tasks meanwhile.

    All numbers are of gradients with respect to ``theta / theta_scale``, as ``MetaTrainer`` has them. Bias is told from
    differences to the exact gradient of the very same tasks. It and the variance depend on theta: diagnose at a
    trained one as well. Times are of the CPU, or by the clock on a GPU, the median without the first; the peak is that
    of an eager run, on a GPU what its allocator held, on a CPU without scratch memory inside single operations.

    Args:
        loop: as for ``MetaTrainer``.
        objective: the meta-objective.
        theta: where; by default as the loop initialises it.
        horizon: inner steps of an episode, at least 1.
        num_tasks: tasks of a batch: what one meta-step would see.
        num_batches: estimates of each estimator, at least 3.
        num_truth_batches: batches of the truth, by default four times as many; at least as many.
        seed: of the tasks, theta and perturbations.
        estimators: label -> estimator, or why there is none; by default one or more of each kind, made for this loop
            (``learnedopt.evaluation.diagnose_plans.HINTS``).
        also: more of them; their labels count where both have the same one.
        truth_dtype: in which the truth is computed; None for the loop's own.
        budget: seconds of compute that errors are compared at; by default those of one exact gradient.
        memory_limit: bytes, above which nothing is recommended.
        report: is told, in a line, how far it is.

    Raises:
        ValueError: a count is too small; theta is another loop's; the exact gradient is refused; no estimator applies.

    Example:
        >>> found = diagnose(loop, SumOfLosses(), horizon=100, num_tasks=16)
        >>> print(found.to_markdown())
    """
    require_count("horizon", horizon, least=1)
    require_count("num_tasks", num_tasks, least=1)
    require_count("num_batches", num_batches, least=1)
    if num_batches < LEAST:
        raise ValueError(
            f"num_batches={num_batches}: the variance of an estimate, and how well it is known, cannot be told from "
            f"so few; pass {LEAST} at least, better 16"
        )
    num_truth = 4 * num_batches if num_truth_batches is None else num_truth_batches
    require_count("num_truth_batches", num_truth, least=num_batches)
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"budget={budget!r} are seconds of compute: pass a positive, finite number")
    if memory_limit is not None:
        require_count("memory_limit", memory_limit, least=1)
    at: Theta = loop.init_theta(perturbations.generator(seed, 0)) if theta is None else tree.detach(theta)
    loop.require_theta(at)
    bench = _Bench(loop, objective, at, num_tasks, num_batches, horizon, seed, truth_dtype)
    exact, seconds = _exact(bench, num_truth, report)
    truth = truth_of(exact, seconds)
    facts = Facts(horizon, sum(x.numel() for x in at.values()), truth.median_length)
    also = also or {}
    tried = suggested(facts) if estimators is None else estimators
    tried = {**{label: x for label, x in tried.items() if x not in also.values()}, **also}
    budget = seconds if budget is None else budget
    rows: list[Row] = []
    for label, estimator in tried.items():
        rows.append(_row(bench, label, estimator, exact, truth, budget))
        report(f"{label}: {rows[-1].refused or f'{rows[-1].seconds:.3g} s an episode'}")
    if all(row.refused is not None for row in rows):
        reasons = "; ".join(f"{row.label}: {row.refused}" for row in rows)
        raise ValueError(f"no estimator applies to this loop and objective ({reasons or 'none was given'})")
    about = {
        "horizon": horizon, "num_tasks": num_tasks, "num_batches": num_batches, "num_truth_batches": num_truth,
        "seed": seed, "budget": budget, "memory_limit": memory_limit, "num_entries": facts.num_entries,
        "truth_dtype": str(truth_dtype),
    }  # fmt: skip
    return Diagnosis(about, truth, tuple(rows), recommend(rows, truth, memory_limit))


@dataclass(frozen=True, eq=False)
class _Bench:
    """What all estimators are tried on."""

    loop: InnerLoop
    objective: MetaObjective
    theta: Theta
    num_tasks: int
    num_batches: int
    horizon: int
    seed: int
    truth_dtype: torch.dtype | None

    def tasks(self, batch: int) -> Tasks:
        return self.loop.family.sample(self.num_tasks, perturbations.generator(self.seed, 1, batch))

    def in_dtype(self, dtype: torch.dtype | None, *, eager: bool) -> _Bench:
        own = self.loop.execution
        execution = replace(own, dtype=own.dtype if dtype is None else dtype, compile=own.compile and not eager)
        if execution == own:
            return self._with(self.loop)
        family, rule, objective, horizon = (
            self.loop.family,
            self.loop.rule,
            self.loop.inner_objective,
            self.loop.horizon,
        )
        return self._with(InnerLoop(family, rule, execution, objective, horizon))

    def _with(self, loop: InnerLoop) -> _Bench:
        theta = tree.to(self.theta, loop.execution.device, loop.execution.dtype)
        return replace(self, loop=loop, theta=theta)


class _Episode(NamedTuple):
    """The gradient of one episode with respect to theta / theta_scale, (num_entries,), what it took, and its end.

    ``dropped``: how many tasks the estimator left out.
    """

    gradient: Tensor
    seconds: float
    last: Any
    dropped: int


def _exact(bench: _Bench, count: int, report: Callable[[str], None]) -> tuple[Tensor, float]:
    """Return the exact gradients of so many batches (count, num_entries), and the median of their seconds."""
    report(f"exact gradients of {count} batches")
    bench = bench.in_dtype(bench.truth_dtype, eager=True)
    estimator: GradientEstimator = Unrolled(bench.horizon, segment=max(1, math.isqrt(bench.horizon)))
    if len(bench.loop.family.families) > 1:  # of several shapes: one task at a time
        estimator = TaskByTask(estimator)
    found = [_episode(bench, estimator, batch, 1, "sum") for batch in range(count)]
    # What is left of a batch is a mean over other tasks.
    gradients = [each.gradient * math.nan if each.dropped else each.gradient for each in found]
    return torch.stack(gradients), statistics.median(each.seconds for each in found[1:])


def _row(bench: _Bench, label: str, tried: Tried, exact: Tensor, truth: Truth, budget: float) -> Row:
    """Return what one estimator does, or why it does not apply."""
    if isinstance(tried, str):
        return Row(label, "", refused=tried)
    bench, eager = bench.in_dtype(None, eager=False), bench.in_dtype(None, eager=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            windows = windows_of(tried, bench.horizon)
            joined = _joined(bench.in_dtype(bench.truth_dtype, eager=True), windows)
            found: list[_Episode] = []
            for batch in range(bench.num_batches):
                last = found[-1].last if found else None
                found.append(_episode(bench, tried, batch, windows, joined, last))
            peak = _peak(eager, tried, windows, watch=bench.loop.execution.compile is False)
        except REFUSALS as error:
            return Row(label, spelled(tried), refused=first_sentence(str(error)))
    seconds = statistics.median(each.seconds for each in found[1:])
    gradients = torch.stack([each.gradient for each in found])
    finite = gradients.isfinite().all(1)
    notes = _notes(caught)
    dropped = sum(each.dropped for each in found)
    if dropped:
        notes.append(f"left out {dropped} of {bench.num_tasks * len(found)} tasks")
    accuracy = _accuracy(gradients, finite, exact, truth, seconds / budget)
    return Row(label, spelled(tried), None, windows, int((~finite).sum()), accuracy, seconds, peak, (*notes,))


def _notes(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """Return the first of each kind of warning; what is not for the user goes where it would have gone."""
    found: dict[type[Warning], list[str]] = {}
    for each in caught:
        if issubclass(each.category, UserWarning):
            found.setdefault(each.category, []).append(first_sentence(str(each.message)))
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return [f"{texts[0]} (the first of {len(texts)})" if len(texts) > 1 else texts[0] for texts in found.values()]


def _accuracy(found: Tensor, finite: Tensor, exact: Tensor, truth: Truth, cost: float) -> Accuracy | None:
    """Return what finite estimates say; None where these are too few, or the truth is not there."""
    whole = exact.isfinite().all(1)
    paired = finite & whole[: len(found)]
    if int(paired.sum()) < LEAST or not truth.unit > 0:
        return None
    rest = exact[len(found) :][whole[len(found) :]]
    return accuracy_of(found[paired], torch.cat([exact[: len(found)][paired], rest]), truth.unit, cost)


def _episode(
    bench: _Bench, estimator: GradientEstimator, batch: int, windows: int, joined: Literal["sum", "mean"],
    last: Any = None,
) -> _Episode:  # fmt: skip
    """Take the estimates of an episode of one batch, window by window."""
    loop, theta = bench.loop, bench.theta
    tasks, source = bench.tasks(batch), perturbations.generator(bench.seed, 2, batch)
    carry = estimator.start(loop, theta, tasks, source)
    if isinstance(estimator, Combined) and last is not None:  # its weights are of what it has seen before
        carry = carry._replace(moments=last.moments)
    total: dict[str, Tensor] = {}
    dropped, began = 0, _clock(theta)  # persistent particles are brought to their phases once, which is not timed
    for _ in range(windows):
        found = estimator.estimate(loop, theta, bench.objective, carry)
        carry = found.carry
        total = {k: g.double() + total[k] if total else g.double() for k, g in found.grads.items()}
        dropped += found.info.get("dropped", 0)
    seconds = _clock(theta) - began
    share = 1 / windows if joined == "mean" else 1.0
    scale = loop.theta_scale(theta)
    gradient = torch.cat([(share * g * scale[k]).flatten().cpu() for k, g in total.items()])
    return _Episode(gradient, seconds, carry, dropped)


def _joined(bench: _Bench, windows: int) -> Literal["sum", "mean"]:
    """Return how the objective of an episode comes of its windows'; ValueError where it does not."""
    if windows == 1:
        return "sum"
    loop, theta = bench.loop, bench.theta
    begun = loop.begin(theta, loop.start(bench.tasks(0)))
    at = begun
    values: list[float] = []
    for _ in range(windows):
        rollout = loop.run(theta, at, bench.horizon // windows, Tape.NONE)
        values.append(float(call_objective(bench.objective, loop, theta, rollout)[0]))
        at = rollout.end
    whole = float(call_objective(bench.objective, loop, theta, loop.run(theta, begun, bench.horizon, Tape.NONE))[0])
    size = sum(map(abs, values))
    eps = math.sqrt(torch.finfo(next(iter(theta.values())).dtype).eps)
    if abs(sum(values) - whole) <= eps * size:
        return "sum"
    if abs(sum(values) / windows - whole) <= eps * size / windows:
        return "mean"
    name = type(bench.objective).__name__
    raise ValueError(
        f"the {name} of an episode is neither the sum nor the mean of its windows', so that windows have gradients of "
        "something else; to go back through the last steps alone there is TruncatedBackprop"
    )


def _peak(bench: _Bench, estimator: GradientEstimator, windows: int, *, watch: bool) -> int:
    """Return the most bytes that tensors of an episode take at a time; without ``watch`` it is run once before."""

    def run() -> object:
        return _episode(bench, estimator, 0, windows, "sum")

    if not watch:
        run()  # what is done once is not to be seen
    device = next(iter(bench.theta.values())).device
    if device.type != "cuda":
        return peak_of(run)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _clock(theta: Theta) -> float:
    device = next(iter(theta.values())).device
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def first_sentence(text: str) -> str:
    """Return a message up to its first full stop or semicolon."""
    return re.split(r"[.;]\s", " ".join(text.split()), maxsplit=1)[0].rstrip(".")
