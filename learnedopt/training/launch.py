"""The process group of a launcher such as ``torchrun``: made for a command or a script, and ended with it."""

from __future__ import annotations

import datetime
import math
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from learnedopt.training.ranks import GRACE, TIMEOUT, RankFailed

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return all(name in os.environ for name in _LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


@contextmanager
def process_group(
    device: torch.device | str | None = None, backend: str | None = None, timeout: float = TIMEOUT
) -> Generator[None, None, None]:
    """Join the processes that a launcher has started, for as long as the block lasts.

    Without a launcher, with one process, or inside a process group that stands, nothing is done.

    Args:
        device: where the training runs. With "cuda" each process takes a GPU of its own, by ``LOCAL_RANK``.
        backend: of ``torch.distributed``; by default NCCL for "cuda" and gloo for the CPU.
        timeout: seconds to wait for the others to come.

    Raises:
        ValueError: no positive time; the backend is not there; there are more processes than GPUs, or all were given
            the same one.
        RankFailed: some have not come.

    Example:
        >>> with process_group():
        ...     MetaTrainer(loop, estimator, objective, num_tasks=64).run(1000)
    """
    if not 0 < timeout < math.inf:
        raise ValueError(
            f"timeout={timeout!r} is how many seconds processes wait for each other: pass a positive number"
        )
    if backend is not None:
        _require_backend(backend, device)  # what is said must be right, even where nobody needs it
    if not launched() or (dist.is_available() and dist.is_initialized()):
        yield
        return
    where = torch.device(device or "cpu")
    if backend is None:
        backend = "nccl" if where.type == "cuda" else "gloo"
        _require_backend(backend, where)
    if where.type == "cuda":
        _take_gpu(where)
    store = _roll_call(timeout)
    # Objects, and who is missing, are gloo's matter also where NCCL sums.
    mixed = f"cpu:gloo,cuda:{backend}" if backend != "gloo" else backend
    dist.init_process_group(
        mixed, store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=timeout),
    )  # fmt: skip
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _require_backend(backend: str, device: torch.device | str | None) -> None:
    if not dist.is_available():
        raise ValueError("this build of torch has no torch.distributed: train in one process, or install another")
    there = [name for name in dist.Backend.backend_list if name != "undefined" and dist.is_backend_available(name)]
    if backend not in there:
        raise ValueError(
            f"the backend {backend!r} of torch.distributed is not there: this build of torch has {', '.join(there)}; "
            "pass --backend gloo for CPUs, or install a build of torch with it"
        )
    where = str(device or "cpu")
    if backend == "nccl" and not where.startswith("cuda"):
        raise ValueError(
            f"the backend 'nccl' connects GPUs, and this training runs on {where!r}; pass --backend gloo, or set "
            "execution.device=cuda"
        )


def _take_gpu(where: torch.device) -> None:
    """Make "cuda" mean this process's own GPU."""
    mine, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    index = cast("int | None", where.index)  # torch's types say that there always is one
    if index is not None and here > 1:
        raise ValueError(
            f"execution.device={str(where)!r} is one GPU for all {here} processes of this machine; say 'cuda', and "
            "each takes its own"
        )
    if index is None:
        if mine >= torch.cuda.device_count():
            raise ValueError(
                f"process {mine} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; start "
                "as many processes as GPUs (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(mine)


def _roll_call(timeout: float) -> Store:
    """Return the group's store once all have come to it; name those who have not."""
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage] - not in every build

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port, patience = (
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        datetime.timedelta(seconds=timeout),
    )
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else the launcher does
    try:
        kept = TCPStore(host, port, size, keeps, patience, wait_for_workers=False, multi_tenant=True)
        # A launcher that starts processes again keeps its store: what those before them wrote there is not theirs.
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", kept)
        store.set(f"here/{rank}", "here")
    except RuntimeError as error:
        raise RankFailed(
            f"rank {rank} of {size} found nobody at {host}:{port} within {timeout:g} s, where rank 0 or the launcher "
            f"keeps the group's store ({' '.join(str(error).split())[:200]})"
        ) from error
    try:
        store.wait([f"here/{each}" for each in range(size)], patience)
    except RuntimeError as error:
        raise RankFailed(
            f"rank {rank} of {size}, at the start: {_missing(store, size)} did not come within {timeout:g} s; start "
            f"{size} processes in all, or raise --timeout"
        ) from error
    return store


def _missing(store: Store, size: int) -> str:
    try:
        missing = [str(each) for each in range(size) if not store.check([f"here/{each}"])]
    except RuntimeError:  # who keeps the store has given up before
        return "some ranks"
    time.sleep(GRACE)  # if it is kept here, for the others to look as well
    return f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(missing)}"
