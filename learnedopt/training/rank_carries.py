"""An estimator's carry among ranks: each holds the share of its tasks, a checkpoint the whole."""

from __future__ import annotations

import tempfile
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
    """Return this rank's share of what is kept of a meta-batch; None where there are fewer tasks left than ranks.

    Raises:
        Indivisible: the estimator's carry, or its estimate, knows no shares.
    """
    if ranks.alone or kept is None:
        return kept
    carry, places = opened(kept, num_tasks)
    start, stop = ranks.share(len(places))
    return None if start == stop else Remaining(estimator.narrow(carry, start, stop), places[start:stop])


def whole_carry(ranks: Ranks, estimator: GradientEstimator, kept: Any, training: Training, num_tasks: int) -> Any:
    """Return what all ranks have kept on rank 0, and None on the others; all ranks must call it."""
    if ranks.alone:
        return kept
    home = next(iter(training.theta.values())).device
    packed = carries.pack(kept, home)
    sent = pytree.tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, packed)
    found = [carries.unpack(each, training.classes, home) for each in ranks.gather(sent, "the gathering of the carry")]
    shares = [each for each in found if each is not None]
    if not shares:
        return None
    places = tuple(place for each in shares for place in each.places)
    return remaining(estimator.join([each.carry for each in shares]), places, num_tasks)


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
