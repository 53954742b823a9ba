"""An estimator's carry among ranks: each holds the share of its tasks, a checkpoint the whole."""

from __future__ import annotations

import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from learnedopt.core.estimator import GradientEstimator
from learnedopt.training import carries
from learnedopt.training.isolation import Remaining, opened, remaining
from learnedopt.training.progress import Progress, Training, load_progress
from learnedopt.training.ranks import Ranks


def own_share(ranks: Ranks, estimator: GradientEstimator, kept: Any, num_tasks: int) -> Any:
    """Return this rank's share of what is kept of a meta-batch; None where there is nothing left for it.

    That is some of the tasks or, where they are fewer than ranks, parts of the estimate of one of them (see
    ``GradientEstimator.num_parts``).

    Raises:
        Indivisible: the estimator's carry, or its estimate, knows no shares.
    """
    if ranks.alone or kept is None:
        return kept
    carry, places = opened(kept, num_tasks)
    if len(places) >= ranks.size or estimator.num_parts == 1:
        start, stop = ranks.share(len(places))
        return None if start == stop else Remaining(estimator.narrow(carry, start, stop), places[start:stop])
    task, start, stop = part_of_task(ranks, len(places), estimator.num_parts)
    if start == stop:
        return None
    carry = carry if len(places) == 1 else estimator.narrow(carry, task, task + 1)
    whole = (start, stop) == (0, estimator.num_parts)
    return Remaining(carry if whole else estimator.narrow_parts(carry, start, stop), places[task : task + 1])


def part_of_task(ranks: Ranks, num_tasks: int, num_parts: int) -> tuple[int, int, int]:
    """Return the task of this rank, the first of the parts of its estimate, and the one after the last, where tasks are
    fewer than ranks: each task is of as many ranks as any other, or one more, and each of them of as many parts."""
    task = ranks.rank * num_tasks // ranks.size
    first, end = -(-task * ranks.size // num_tasks), -(-(task + 1) * ranks.size // num_tasks)
    number, of = ranks.rank - first, end - first
    return task, number * num_parts // of, (number + 1) * num_parts // of


def _on_cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, torch.Tensor) else x


def whole_carry(ranks: Ranks, estimator: GradientEstimator, kept: Any, training: Training, num_tasks: int) -> Any:
    """Return what all ranks have kept on rank 0, and None on the others; all ranks must call it."""
    if ranks.alone:
        return kept
    home = next(iter(training.theta.values())).device
    packed = carries.pack(kept, home)
    sent = pytree.tree_map(_on_cpu, packed)
    found = [carries.unpack(each, training.classes, home) for each in ranks.gather(sent, "the gathering of the carry")]
    shares = [opened(each, num_tasks) for each in found if each is not None]
    if not shares:
        return None
    of_tasks: list[Any] = []
    places: tuple[int, ...] = ()
    for own, group in groupby(shares, key=lambda share: share[1]):  # ranks with parts of one task follow each other
        parts = [carry for carry, _ in group]
        of_tasks.append(estimator.join_parts(parts) if estimator.is_part(parts[0]) else parts[0])
        places += own
    return remaining(of_tasks[0] if len(of_tasks) == 1 else estimator.join(of_tasks), places, num_tasks)


def resume(ranks: Ranks, path: Path, training: Training) -> Progress | None:
    """Restore a training on all ranks from rank 0's file, see ``load_progress``; None where there is none."""
    loaded: list[Progress] = []

    def read() -> bytes | None:
        if not path.exists():
            return None
        loaded.append(load_progress(path, training))
        return b"" if ranks.alone else path.read_bytes()

    content = ranks.lead(read, "the reading of the checkpoint")
    if content is None or loaded:
        return loaded[0] if loaded else None
    with tempfile.TemporaryDirectory() as folder:  # another machine may not have the file
        (Path(folder) / path.name).write_bytes(content)
        return load_progress(Path(folder) / path.name, training)
