"""The estimates of all ranks' shares of a meta-batch as one, by one all-reduce."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

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
        stop: the number of a signal that asks it to stop; None for none.
    """

    found: Found | None
    num_tasks: int
    stop: int | None = None


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
        own = {} if found is None or not found.weight else _numbers(found.estimate.info)
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
        head["num_tasks"] = float(share.num_tasks)
        head |= {share.stop: 1.0} if share.stop in _SIGNALS else {}
        slots = torch.zeros(self._ranks.size, self._slot, dtype=torch.float64)
        grads = [torch.zeros(x.numel(), dtype=torch.float64) for x in theta.values()]
        if share.found is not None:
            found, weight = share.found.estimate, share.found.weight
            head["goes_on"] = float(bool(share.found.places) and found.carry is not None)
            head["failed_now"] = float(len(share.found.failures))
            head["failed"] = float(found.info.get(FAILED, len(share.found.failures)))
            if weight:
                head |= {"weight": weight, "loss": weight * float(found.loss)}
                grads = [weight * found.grads[k].detach().to("cpu", torch.float64).flatten() for k in theta]
                padded = (x for k, size in self._reported.items() for x in _padded(own.get(k), size))
                slots[self._ranks.rank] = torch.tensor([weight, *padded], dtype=torch.float64)
        return torch.cat([torch.tensor([*head.values()], dtype=torch.float64), slots.flatten(), *grads])

    @property
    def _slot(self) -> int:
        return 1 + sum(1 + size for size in self._reported.values())

    def _whole(self, share: Share, total: Tensor, theta: Theta, failures: list[Failure]) -> Whole:
        sizes = [len(_HEAD), self._ranks.size * self._slot, *(x.numel() for x in theta.values())]
        numbers, slots, *sums = total.split(sizes)
        head = dict(zip(_HEAD, numbers.tolist(), strict=True))
        weight = head["weight"] or math.nan  # the mean over nothing is not finite
        grads = {k: (g / weight).reshape(x.shape).to(x) for (k, x), g in zip(theta.items(), sums, strict=True)}
        loss = torch.tensor(head["loss"] / weight, dtype=torch.float64)
        told = [self._read(row) for row in slots.reshape(self._ranks.size, -1).tolist() if row[0]]
        info = mean_info([each for _, each in told], [each / weight for each, _ in told])
        info |= {FAILED: head["failed"]} if head["failed"] else {}  # of phases that count equally, a fraction
        own, carry, places = share.found, None, ()
        if own is not None and own.places:
            carry, places = own.estimate.carry, own.places
        stop = next((number for number in _SIGNALS if head[number]), None)
        return Whole(
            Estimate(loss, grads, carry, info), failures, places, int(head["num_tasks"]), bool(head["goes_on"]), stop
        )

    def _read(self, row: Sequence[float]) -> tuple[float, dict[str, Any]]:
        """Return a rank's weight, and what it reported."""
        info, at = {}, 1
        for key, size in self._reported.items():
            (name, _, kind), count = key.rpartition(" "), int(row[at])
            values = row[at + 1 : at + 1 + count]
            if count:
                info[name] = _KINDS[kind](values)
            at += 1 + size
        return row[0], info


_KINDS = {
    "int": lambda values: int(values[0]),
    "float": lambda values: values[0],
    "curve": lambda values: torch.tensor(values, dtype=torch.float64),
}


def _numbers(info: dict[str, Any]) -> dict[str, list[float]]:
    """Return what is a number, or the curve of losses, by name and kind."""
    found = {}
    for name, x in info.items():
        if isinstance(x, Tensor) and name == "losses" and x.numel():
            found[f"{name} curve"] = x.detach().to("cpu", torch.float64).flatten().tolist()
        elif isinstance(x, int | float) and not isinstance(x, bool):
            found[f"{name} {type(x).__name__}"] = [float(x)]
    return found


def _padded(values: list[float] | None, size: int) -> list[float]:
    """Return how many numbers there are, these, and zeros."""
    values = values or []
    return [float(len(values)), *values, *[0.0] * (size - len(values))]
