"""Starting points of networks: drawn once for all tasks, or once a task."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.tree import Params
from learnedopt.tasks.data import streams


class Entry(NamedTuple):
    """One parameter: ``center`` plus a draw from U(-bound, bound), or from N(0, (bound/2)²) cut off there."""

    name: str
    shape: tuple[int, ...]
    bound: float
    center: float = 0.0
    normal: bool = False


Layout: TypeAlias = tuple[Entry, ...]


def layer(name: str, weight_shape: tuple[int, ...], *, bias: bool = True) -> Layout:
    """Return ``<name>.weight`` and ``<name>.bias``, drawn from U(±1/√fan_in) as torch's layers do by default."""
    bound = 1 / math.sqrt(math.prod(weight_shape[1:]))
    entries = (Entry(f"{name}.weight", weight_shape, bound), Entry(f"{name}.bias", weight_shape[:1], bound))
    return entries if bias else entries[:1]


def small_layer(name: str, weight_shape: tuple[int, ...], std: float) -> Layout:
    """Return a weight drawn from N(0, std^2), cut off at two standard deviations, and a bias of zeros."""
    weight = Entry(f"{name}.weight", weight_shape, 2 * std, normal=True)
    return weight, Entry(f"{name}.bias", weight_shape[:1], 0.0)


def norm(name: str, width: int) -> Layout:
    """Return the learned scale ``<name>.weight``, of ones, and shift ``<name>.bias``, of zeros, of a normalisation."""
    return (Entry(f"{name}.weight", (width,), 0.0, 1.0), Entry(f"{name}.bias", (width,), 0.0))


def draw(layout: Layout, seeds: Tensor, init_seed: int | None, dtype: torch.dtype) -> Params:
    """Return one start a task, batched, on the CPU.

    Args:
        layout: the parameters.
        seeds: (num_tasks,) int64, the tasks' own.
        init_seed: all tasks start at the point that this seed draws; None lets each task's seed draw its own.
        dtype: numbers are drawn in float64, so that float32 ones are the same but for rounding.
    """
    if init_seed is not None:
        shared = _draw(layout, init_seed, dtype)
        return {name: p.expand(len(seeds), *p.shape).clone() for name, p in shared.items()}
    own = [_draw.__wrapped__(layout, seed, dtype) for seed in tree.numbers(seeds)]
    return {entry.name: torch.stack([params[entry.name] for params in own]) for entry in layout}


@functools.lru_cache(maxsize=8)
def _draw(layout: Layout, seed: int, dtype: torch.dtype) -> Params:
    random = streams.stream(seed, "init")
    params: Params = {}
    for name, shape, bound, center, normal in layout:
        values = torch.as_tensor(random.uniform(-bound, bound, shape) if bound else 0.0).expand(shape)
        if normal:
            values = _to_normal(values / bound) * bound / 2
        params[name] = (values + center).to(dtype)
    return params


def _to_normal(uniform: Tensor) -> Tensor:
    """Turn numbers from U(-1, 1) into ones from N(0, 1), cut off at two, by the inverse of the distribution."""
    return math.sqrt(2) * torch.erfinv(uniform * math.erf(math.sqrt(2)))
