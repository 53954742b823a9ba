"""Random numbers as pure functions of a task."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

Purpose: TypeAlias = Literal["init", "train", "valid", "labels"]
_NUMBERS = {"init": 0, "train": 1, "valid": 2, "labels": 3}


def sample_seeds(num_tasks: int, generator: torch.Generator) -> Tensor:
    """Draw one seed a task: (num_tasks,), int64, so many values that two tasks never share one."""
    return torch.randint(2**63 - 1, (num_tasks,), generator=generator, device=generator.device)


def stream(seed: int, purpose: Purpose, step: int = 0) -> np.random.Generator:
    """Return the random numbers of one task, purpose and inner step, independent of those of any other.

    The bit generator is counter-based: the seed is its key, step and purpose are the upper half of its counter. So no
    two streams overlap, and none depends on how many numbers were drawn before.
    """
    key = np.array([seed, 0], dtype=np.uint64)
    counter = np.array([0, 0, step, _NUMBERS[purpose]], dtype=np.uint64)  # lowest word first
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers in float64, so that tasks in float32 are the same ones but for rounding."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
