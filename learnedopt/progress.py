"""The state of a meta-training as one file, from which it goes on exactly."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from learnedopt import tree
from learnedopt.files import write_atomically
from learnedopt.inner import Carry
from learnedopt.tree import Theta

FORMAT = "learnedopt-training-1"


@dataclass
class Progress:
    """How far a meta-training has come, beside theta and the meta-optimizer."""

    meta_step: int = 0
    episode: int = 0
    num_skipped: int = 0
    skips_in_a_row: int = 0
    best_value: float = math.inf
    best_theta: Theta | None = None
    carry: Carry | None = None


def save_progress(
    path: Path, progress: Progress, theta: Theta, optimizer: torch.optim.Optimizer, scheduler: Any
) -> None:
    """Write everything that the next meta-step depends on, atomically."""
    carry = progress.carry
    content = {
        "format": FORMAT,
        "theta": {k: v.detach() for k, v in theta.items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if scheduler else None,
        # Only the leaves of the carry: its structure comes from the family and the rule, so no class needs loading.
        "carry": None if carry is None else {"leaves": _leaves(carry), "step": carry.step},
        **{
            k: getattr(progress, k)
            for k in ("meta_step", "episode", "num_skipped", "skips_in_a_row", "best_value", "best_theta")
        },
    }
    write_atomically(path, lambda partial: torch.save(content, partial))


def load_progress(
    path: Path, theta: Theta, optimizer: torch.optim.Optimizer, scheduler: Any, like: Callable[[], Carry]
) -> Progress:
    """Restore theta, the optimizer and the scheduler in place, and return the progress.

    ``like`` makes a begun carry of the structure that the saved one had. Only tensors and plain values are loaded.

    Raises:
        ValueError: the file is corrupt, is no training state, or belongs to another rule or family.
    """
    advice = "choose another checkpoint path, or remove the file to start anew"
    try:
        content = torch.load(path, map_location=next(iter(theta.values())).device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as a training state ({error}): it is corrupt or foreign; {advice}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no training state of this library (expected format {FORMAT!r}); {advice}")
    saved, here = ({k: tuple(v.shape) for k, v in t.items()} for t in (content["theta"], theta))
    if saved != here:
        raise ValueError(f"{path} was written for another rule: its theta is {saved}, this rule's {here}; {advice}")
    with torch.no_grad():
        for k, v in theta.items():
            v.copy_(content["theta"][k])
    optimizer.load_state_dict(content["optimizer"])
    if scheduler:
        scheduler.load_state_dict(content["scheduler"])
    carry = None
    if content["carry"] is not None:
        flat, rebuild = tree.flatten(like()[:3])
        leaves = content["carry"]["leaves"]
        if [(x.shape, x.dtype) for x in flat] != [(x.shape, x.dtype) for x in leaves]:
            raise ValueError(f"{path} was written for other tasks: shapes or types of its inner state differ; {advice}")
        carry = Carry(*rebuild(leaves), step=content["carry"]["step"])
    names = ("meta_step", "episode", "num_skipped", "skips_in_a_row", "best_value", "best_theta")
    return Progress(**{k: content[k] for k in names}, carry=carry)


def _leaves(carry: Carry) -> list[torch.Tensor]:
    # Views of larger tensors would be saved whole: a copy is exactly as large as it looks.
    return [x.detach().clone() for x in tree.leaves(carry[:3])]
