"""Processes that train together: which of them this one is, and what they do together, on ``torch.distributed``.

Rank 0 leads: it alone logs and writes. All others estimate their share of each meta-batch, and follow its theta.
"""

from __future__ import annotations

import datetime
import itertools
import os
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, final

import torch
import torch.distributed as dist
from torch import Tensor

from learnedopt.core import shares

T = TypeVar("T")

TIMEOUT = 600.0
"""Seconds that ranks wait for each other by default: more than anything takes that only one of them does."""
_BAD_INPUT = (ValueError, TypeError, NotImplementedError, OSError)
_SIGNALS = 65  # numbers of signals are below
GRACE = 3.0
"""Seconds that a rank which has lost another gives the rest to say what they know."""


class RankFailed(RuntimeError):
    """Another process of the training has failed, or did not come to what all do together."""


@final
@dataclass(frozen=True)
class Ranks:
    """This process among those of one training; ``Ranks()`` is alone, and then nothing here sends anything.

    All ranks must call the same methods in the same order. Where one fails, or does not come within ``timeout``
    seconds, the others raise ``RankFailed`` that names it and says what was waited for.

    Args:
        rank: number of this one, from 0.
        size: how many there are.
        timeout: seconds to wait for the others.
        group: of all ranks, with the backend gloo; None where there is one rank only. Held weakly: its threads end with
            it, and one that outlives Python by a moment, letting go of what it sent, would abort the process.
        gpu: where NCCL sums; None where gloo does, on the CPU.
        calls: counts what all have done together.
    """

    rank: int = 0
    size: int = 1
    timeout: float = TIMEOUT
    group: weakref.ReferenceType[dist.ProcessGroup] | None = None
    gpu: torch.device | None = None
    calls: Iterator[int] = field(default_factory=lambda: itertools.count(1), repr=False, compare=False)

    @property
    def leads(self) -> bool:
        """Whether this is the one that logs and writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.size == 1

    @property
    def _gloo(self) -> dist.ProcessGroup:
        group = self.group() if self.group is not None else None
        if group is None:
            raise RuntimeError(
                f"the process group of rank {self.rank} of {self.size} has ended: train inside process_group(), or "
                "before destroy_process_group()"
            )
        return group

    def share(self, num_tasks: int) -> tuple[int, int]:
        """Return the first of this rank's tasks and the one after its last; shares differ by one task at most."""
        return shares.even(num_tasks, self.size, self.rank)

    def sum(self, numbers: Tensor, what: str) -> Tensor:
        """Return the sum over ranks of a vector, the same to the bit on all of them."""
        if self.alone:
            return numbers
        sent = numbers.to(self.gpu or "cpu", copy=True)
        with self._together(what):
            if self.gpu is not None:
                # Who does not come is found out before: NCCL would end the process instead of raising.
                _sum(torch.zeros(1), self._gloo)
            _sum(sent, self._gloo if self.gpu is None else None)
        return sent.to(numbers.device)

    def agree(self, signal: int | None, what: str) -> int | None:
        """Return the number of a signal that any rank has got: the same on all."""
        if self.alone:
            return signal
        got = torch.zeros(_SIGNALS, dtype=torch.float64)
        got[signal or 0] = 1
        found = self.sum(got, what)[1:].nonzero()
        return int(found[0]) + 1 if len(found) else None

    def follow(self, tensors: Sequence[Tensor], what: str) -> None:
        """Write rank 0's values into the tensors of all: machines of other kinds may round differently."""
        if self.alone:
            return
        # Every floating-point type is exact in float64.
        sent = torch.cat([x.detach().to("cpu", torch.float64).flatten() for x in tensors])
        with self._together(what):
            dist.broadcast(sent, 0, group=self._gloo)
        if not self.leads:
            with torch.no_grad():
                for x, values in zip(tensors, torch.split(sent, [x.numel() for x in tensors]), strict=True):
                    x.copy_(values.reshape(x.shape))

    def gather(self, value: T, what: str) -> list[T]:
        """Return every rank's value, by rank, on rank 0, and nothing on the others. Tensors must lie on the CPU."""
        if self.alone:
            return [value]
        found: list[Any] | None = [None] * self.size if self.leads else None
        with self._together(what):
            dist.gather_object(value, found, dst=0, group=self._gloo)
        return found or []

    def everyones(self, value: T, what: str) -> list[T]:
        """Return every rank's value, by rank, on all of them."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        with self._together(what):
            # torch gives it no types.
            dist.all_gather_object(found, value, group=self._gloo)  # pyright: ignore[reportUnknownMemberType]
        return found

    def lead(self, act: Callable[[], T], what: str) -> T:
        """Let rank 0 alone act, and return what it found on all; where it raises bad input's errors, so do all."""
        if self.alone:
            return act()
        told: list[Any] = [None, None, ""]
        raised: Exception | None = None
        if self.leads:
            try:
                told[0] = act()
            except _BAD_INPUT as error:
                raised = error
                told[1:] = next(kind for kind in _BAD_INPUT if isinstance(cast("Exception", error), kind)), str(error)
        with self._together(what):
            dist.broadcast_object_list(told, 0, group=self._gloo)
        if told[1] is not None:
            raise raised or told[1](told[2])
        return told[0]

    @contextmanager
    def failing_together(self, agreed: type[Exception] | tuple[()] = ()) -> Generator[None, None, None]:
        """Let the others know what error ended the block on this rank, and do not let them wait for it.

        ``agreed`` is an error that all ranks raise together, after which they may go on to do things together.
        """
        try:
            yield
        except agreed:
            raise
        except BaseException as error:
            self._leave(error)
            raise

    def _leave(self, error: BaseException) -> None:
        """Let the others know of an error, and end the group; it may have ended in an inner block."""
        group = self.group() if self.group is not None and dist.is_initialized() else None
        if group is None:
            return
        if not isinstance(error, RankFailed):
            _Notes(group).write("failed", self.rank, f"{type(error).__name__}: {_one_line(error)}")
        with suppress(ValueError):  # of an inner block
            dist.destroy_process_group(group)

    @contextmanager
    def _together(self, what: str) -> Generator[None, None, None]:
        """Name who is missing where something that all ranks do together fails."""
        notes, came = _Notes(self._gloo), next(self.calls)
        notes.write("came", self.rank, f"{came} {what}")
        began = time.monotonic()
        try:
            yield
        except (RuntimeError, ValueError) as error:  # a connection that breaks, or one that was broken before
            in_time = time.monotonic() - began < self.timeout
            who = self._who(notes, came, error, "has ended" if in_time else f"did not come within {self.timeout:g} s")
            raise RankFailed(f"rank {self.rank} of {self.size}, at {what}: {who}") from error

    def _who(self, notes: _Notes, came: int, error: Exception, how: str) -> str:
        """Say which ranks have failed, or have not come."""
        others, why = [r for r in range(self.size) if r != self.rank], _one_line(error)[:200]
        try:
            notes.write("lost", self.rank, "here")
            failed = notes.wait_for(others, min(GRACE, self.timeout))
            silent = [r for r in others if r not in failed and not notes.read("lost", r)]
            late = [r for r in silent if notes.came(r) < came]
            last = {r: notes.read("came", r).partition(" ")[2] or "nothing" for r in late}
        except RuntimeError:
            return f"the process that keeps the group's store, mostly rank 0 or the launcher, has ended ({why})"
        if failed:
            return "; ".join(f"rank {r} has failed with {text}" for r, text in failed.items())
        told = [f"rank {r} {how} (it came last to: {what})" for r, what in last.items()]
        if not late:  # else they may still be waiting as well
            told = [f"the process of rank {r} has ended or hangs" for r in silent]
        return "; ".join(told) if told else f"the others have given up, or the connection broke ({why})"


ALONE = Ranks()
"""One process."""


def _sum(x: Tensor, group: dist.ProcessGroup | None) -> None:
    """Write the sum over the group's ranks into ``x``."""
    dist.all_reduce(x, group=group)  # pyright: ignore[reportUnknownMemberType] - torch gives it no types


class _Notes:
    """What ranks tell each other beside what they do together, in the store by which their group was made."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage] - not in every build

        # A launcher's store outlives the processes that it starts again.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        # The public ones make a store of their own.
        store = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
        self._store = PrefixStore(f"learnedopt/{attempt}/{group.group_name}", store)

    def write(self, kind: str, rank: int, text: str) -> None:
        """Leave a note; those of one kind replace each other."""
        # Where the store is gone, what the note is about will be found out all the same.
        with suppress(RuntimeError):
            self._store.set(f"{kind}/{rank}", text)

    def read(self, kind: str, rank: int) -> str:
        """Return a rank's note, "" where there is none."""
        key = f"{kind}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def came(self, rank: int) -> int:
        """Return to how many things a rank has come."""
        return int(self.read("came", rank).partition(" ")[0] or 0)

    def wait_for(self, ranks: Sequence[int], seconds: float) -> dict[int, str]:
        """Wait until a rank has failed, or all know that one has; return which failed, and with what."""
        until = time.monotonic() + seconds
        while True:
            failed = {r: text for r in ranks if (text := self.read("failed", r))}
            if failed or time.monotonic() > until or all(self.read("lost", r) for r in ranks):
                return failed
            time.sleep(0.05)


def present(device: torch.device | str | None = None, timeout: float = TIMEOUT) -> Ranks:
    """Return this process among those of the process group that is initialised; alone without one.

    All ranks must call it, as it connects them by gloo besides: NCCL knows neither objects nor who is missing.

    Args:
        device: where theta lies; the CPU by default.
        timeout: seconds to wait for the others at anything that all do together.

    Raises:
        ValueError: the group cannot sum what lies there.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks()
    rank, size, where = dist.get_rank(), dist.get_world_size(), torch.device(device or "cpu")
    # torch gives it no types.
    group = dist.new_group(  # pyright: ignore[reportUnknownMemberType]
        backend="gloo", timeout=datetime.timedelta(seconds=timeout)
    )
    assert isinstance(group, dist.ProcessGroup)
    on_gpu = where.type == "cuda" and "nccl" in str(dist.get_backend())
    return Ranks(rank, size, float(timeout), weakref.ref(group), where if on_gpu else None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
