"""The estimates of all ranks' shares of a meta-batch as one, by one all-reduce."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.estimator import Estimate
from learnedopt.core.tree import Theta
from learnedopt.training.isolation import FAILED, Failure, Found
from learnedopt.training.meta_batch import mean_info
from learnedopt.training.ranks import Ranks

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
_HEAD = ("weight", "num_tasks", "failed", "failed_now", "goes_on", "unknown", "loss", *_SIGNALS)


class Share(NamedTuple):
    """What this rank brings to a meta-step.

    Args:
        found: of its tasks; None where it has none.
        num_tasks: of how many.
        part: the position of its task where it is of a part of the estimate of one alone; None for whole tasks.
        stop: the number of a signal that asks it to stop; None for none.
    """

    found: Found | None
    num_tasks: int
    stop: int | None = None
    part: int | None = None

    @property
    def of_part(self) -> bool:
        """Whether it is of a part of one task's estimate."""
        return self.part is not None


class Whole(NamedTuple):
    """What all ranks have brought, the same on all but for the carry and ``places``, which are the rank's own.

    Args:
        estimate: over the tasks of all ranks that are finite.
        failures: of all ranks.
        places: of the tasks that the carry is of.
        num_tasks: of how many the meta-batch still was.
        goes_on: whether any rank's episode does.
        stop: a signal that reached any of them.
    """

    estimate: Estimate
    failures: list[Failure]
    places: tuple[int, ...]
    num_tasks: int
    goes_on: bool
    stop: int | None


@final
class Summing:
    """Sums what ranks bring, in float64, in one vector: ``sum w_i (loss_i, grads_i)``, ``sum w_i``, and all the rest.

    Numbers that are reported lie in a slot for each rank that the others leave at 0: their sum is every rank's. Which
    there are is agreed once, and again where one comes with another.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._reported: dict[str, int] = {}  # name and kind -> numbers, the same on all ranks

    def __call__(self, share: Share, theta: Theta, what: str) -> Whole:
        """Return the whole of all ranks' shares; ``theta`` is for names, shapes and types."""
        found = share.found
        if self._ranks.alone and found is not None:
            goes_on = found.estimate.carry is not None
            return Whole(found.estimate, found.failures, found.places, share.num_tasks, goes_on, share.stop)
        own = {} if found is None or not (found.weight or share.of_part) else _numbers(found.estimate.info)
        total = self._ranks.sum(self._vector(share, own, theta), what)
        if total[_HEAD.index("unknown")]:  # on any rank, and so on all
            for numbers in self._ranks.everyones({k: len(x) for k, x in own.items()}, what):
                self._reported |= {k: max(size, self._reported.get(k, 0)) for k, size in numbers.items()}
            total = self._ranks.sum(self._vector(share, own, theta), what)
        failures: list[Failure] = []
        if total[_HEAD.index("failed_now")]:  # seldom, and then they are named
            each = self._ranks.everyones([] if found is None else found.failures, what)
            failures = [failure for one in each for failure in one]
        return self._whole(share, total, theta, failures)

    def _vector(self, share: Share, own: dict[str, list[float]], theta: Theta) -> Tensor:
        head = dict.fromkeys(_HEAD, 0.0)
        head["unknown"] = float(any(len(x) > self._reported.get(k, 0) for k, x in own.items()))
        head["num_tasks"] = 0.0 if share.of_part else float(share.num_tasks)  # those in parts are counted in _parts
        head |= {share.stop: 1.0} if share.stop in _SIGNALS else {}
        slots = torch.zeros(self._ranks.size, self._slot, dtype=torch.float64)
        grads = [torch.zeros(x.numel(), dtype=torch.float64) for x in theta.values()]
        if share.found is not None:
            found, weight = share.found.estimate, share.found.weight
            head["goes_on"] = float(bool(share.found.places) and found.carry is not None)
            head["failed_now"] = float(len(share.found.failures))
            head["failed"] = float(found.info.get(FAILED, 0 if share.of_part else len(share.found.failures)))
            if weight:
                head |= {"weight": weight, "loss": weight * float(found.loss)}
                grads = [weight * found.grads[k].detach().to("cpu", torch.float64).flatten() for k in theta]
            if weight or share.of_part:
                padded = (x for k, size in self._reported.items() for x in _padded(own.get(k), size))
                part = 0 if share.part is None else share.part + 1
                slots[self._ranks.rank] = torch.tensor([weight, part, *padded], dtype=torch.float64)
        return torch.cat([torch.tensor([*head.values()], dtype=torch.float64), slots.flatten(), *grads])

    @property
    def _slot(self) -> int:
        return 2 + sum(1 + size for size in self._reported.values())

    def _whole(self, share: Share, total: Tensor, theta: Theta, failures: list[Failure]) -> Whole:
        sizes = [len(_HEAD), self._ranks.size * self._slot, *(x.numel() for x in theta.values())]
        numbers, slots, *sums = torch.split(total, sizes)
        head: dict[str, float] = dict(zip(_HEAD, tree.numbers(numbers), strict=True))
        weight = head["weight"] or math.nan  # the mean over nothing is not finite
        grads = {k: (g / weight).reshape(x.shape).to(x) for (k, x), g in zip(theta.items(), sums, strict=True)}
        loss = torch.tensor(head["loss"] / weight, dtype=torch.float64)
        rows = [self._read(row) for row in tree.numbers(slots.reshape(self._ranks.size, -1))]
        told = [row for row in rows if row.weight]
        info = mean_info([row.info for row in told], [row.weight / weight for row in told])
        parts = _Parts.of(rows)
        if parts.by_task:
            info["not_finite"] = max(info.get("not_finite", 0), parts.not_finite)
            failures = parts.named(failures)
        num_failed, num_tasks = head["failed"] + parts.num_lost, int(head["num_tasks"]) + len(parts.by_task)
        info |= {FAILED: num_failed} if num_failed else {}  # of phases that count equally, a fraction
        own, carry, places = share.found, None, ()
        if own is not None and own.places:
            carry, places = own.estimate.carry, own.places
        stop = next((number for number in _SIGNALS if head[number]), None)
        return Whole(Estimate(loss, grads, carry, info), failures, places, num_tasks, bool(head["goes_on"]), stop)

    def _read(self, row: Sequence[float]) -> _Row:
        info, at = {}, 2
        for key, size in self._reported.items():
            (name, _, kind), count = key.rpartition(" "), int(row[at])
            values = row[at + 1 : at + 1 + count]
            if count:
                info[name] = _KINDS[kind](values)
            at += 1 + size
        return _Row(row[0], int(row[1]) - 1, info)


class _Row(NamedTuple):
    """A rank's weight, the position of the task of which it has a part (-1: it has none), and what it reported."""

    weight: float
    task: int
    info: dict[str, Any]


class _Parts(NamedTuple):
    """What ranks with parts of a task have brought, by its position: only all of them know whether it has failed."""

    by_task: dict[int, list[_Row]]

    @classmethod
    def of(cls, rows: Sequence[_Row]) -> _Parts:
        """Return those of these rows."""
        return cls({row.task: [each for each in rows if each.task == row.task] for row in rows if row.task >= 0})

    @property
    def not_finite(self) -> int:
        """Of how many pairs, of the task with most, the objective is not finite."""
        return max(sum(row.info["not_finite"] for row in rows) for rows in self.by_task.values())

    @property
    def num_lost(self) -> int:
        """How many tasks no part of which is finite there are beside those that the estimator counts."""
        return sum(self._lost(task) and not self._counts(task) for task in self.by_task)

    def named(self, failures: Sequence[Failure]) -> list[Failure]:
        """Return the failures of tasks that one process would name, each task once."""
        kept = [
            f for f in failures if f.position not in self.by_task or self._lost(f.position) or self._counts(f.position)
        ]
        return [*{f.position: f for f in reversed(kept)}.values()][::-1]

    def _lost(self, task: int) -> bool:
        return not any(row.weight for row in self.by_task[task])

    def _counts(self, task: int) -> bool:
        return any(FAILED in row.info for row in self.by_task[task])


_KINDS: dict[str, Callable[[Sequence[float]], int | float | Tensor]] = {
    "int": lambda values: int(values[0]),
    "float": lambda values: values[0],
    "curve": lambda values: torch.tensor(values, dtype=torch.float64),
}


def _numbers(info: dict[str, Any]) -> dict[str, list[float]]:
    """Return what is a number, or the curve of losses, by name and kind."""
    found: dict[str, list[float]] = {}
    for name, x in info.items():
        if isinstance(x, Tensor) and name == "losses" and x.numel():
            found[f"{name} curve"] = tree.numbers(x.detach().to("cpu", torch.float64).flatten())
        elif isinstance(x, int | float) and not isinstance(x, bool):
            found[f"{name} {type(x).__name__}"] = [float(x)]
    return found


def _padded(values: list[float] | None, size: int) -> list[float]:
    """Return how many numbers there are, these, and zeros."""
    values = values or []
    return [float(len(values)), *values, *[0.0] * (size - len(values))]
