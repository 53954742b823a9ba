"""An estimator's carry among ranks: each holds the share of its tasks, a checkpoint the whole."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from learnedopt.core.estimator import GradientEstimator
from learnedopt.training import carries
from learnedopt.training.progress import Progress, Training, load_progress
from learnedopt.training.ranks import Ranks


def own_share(ranks: Ranks, estimator: GradientEstimator, carry: Any) -> Any:
    """Return this rank's share of a carry of all tasks; None where there are fewer tasks than ranks, and none for it.

    Raises:
        ValueError: the estimator's carry, or its estimate, knows no shares.
    """
    if ranks.alone or carry is None:
        return carry
    start, stop = ranks.share(estimator.count_tasks(carry))
    return None if start == stop else estimator.narrow(carry, start, stop)


def whole_carry(
    ranks: Ranks, estimator: GradientEstimator, carry: Any, classes: carries.Classes, home: torch.device
) -> Any:
    """Return the carry of all ranks' shares on rank 0, and None on the others; all ranks must call it."""
    if ranks.alone:
        return carry
    packed = carries.pack(carry, home)
    sent = pytree.tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, packed)
    found = [carries.unpack(each, classes, home) for each in ranks.gather(sent, "the gathering of the carry")]
    found = [each for each in found if each is not None]
    return estimator.join(found) if found else None


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
