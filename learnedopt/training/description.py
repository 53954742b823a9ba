"""What a checkpoint is of: names and shapes tell one of another training, where theta's do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import narrow
from learnedopt.core.containers import is_list_or_tuple
from learnedopt.core.estimator import GradientEstimator
from learnedopt.core.inner import InnerLoop
from learnedopt.core.parts import parts_of
from learnedopt.core.tree import Theta
from learnedopt.training import carries
from learnedopt.training.isolation import Remaining
from learnedopt.training.meta_update import MetaUpdate
from learnedopt.training.progress import SHAPES, Training
from learnedopt.training.saved_carry import expected

_EXAMPLES = 3
"""Of how many tasks the carries are that others are compared with."""


def made_of(thing: Any) -> str:
    """Return the class of a thing and, in brackets, those of the dataclasses among its options, at any depth.

    Options themselves are not compared: those that a later version adds would make another training of a file.
    """
    parts = [getattr(thing, each.name) for each in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else []
    found = [made_of(part) for part in _flat(parts) if dataclasses.is_dataclass(part) and not isinstance(part, type)]
    return f"{type(thing).__name__}({', '.join(found)})" if found else type(thing).__name__


def _flat(parts: Iterable[Any]) -> Iterator[Any]:
    for part in parts:
        if is_list_or_tuple(part):
            yield from _flat(part)
        else:
            yield part


def describe(
    loop: InnerLoop, estimator: GradientEstimator, theta: Theta, update: MetaUpdate, settings: dict[str, Any]
) -> Training:  # fmt: skip
    """Return what the checkpoint of a meta-training is of.

    Args:
        loop: what is trained.
        estimator: what estimates.
        theta: the leaves that are trained.
        update: moves them.
        settings: plain values that a checkpoint must agree with, ``num_tasks`` among them.
    """
    fixed, generator = tree.detach(theta), torch.Generator().manual_seed(0)
    tasks = loop.family.sample(settings["num_tasks"], generator)
    parts = parts_of(loop, tasks)
    begun = [part.loop.begin(fixed, narrow(part.loop.start(part.tasks), 0, 1)) for part in parts]
    things = {
        "family": loop.family,
        "rule": loop.rule,
        "inner_objective": loop.inner_objective,
        "estimator": estimator,
        "meta_optimizer": update.meta_optimizer,
        "scheduler": update.scheduler,
    }
    run: dict[str, Any] = {k: type(thing).__name__ for k, thing in things.items()} | settings
    run |= {f"{k} in full": made_of(things[k]) for k in ("family", "rule", "inner_objective", "estimator")}
    leaves = carries.leaves(begun[0] if len(begun) == 1 else begun)
    run[SHAPES] = {path: f"{x.dtype} {tuple(x.shape)}" for path, x in leaves if isinstance(x, Tensor)}

    def start() -> Any:
        return estimator.start(loop, fixed, tasks, torch.Generator().manual_seed(0))

    few = tree.narrow(tasks, 0, min(_EXAMPLES, tree.size(tasks)))
    example = estimator.start(loop, fixed, few, torch.Generator().manual_seed(0))
    classes = carries.classes_of([begun, example, Remaining(None, ())])
    return Training(
        theta, update.meta_optimizer, update.scheduler, update.anew, run, classes, lambda: loop.begin(fixed, start()),
        expected(loop, estimator, fixed, settings["num_tasks"], tree.size(few), example, begun),
    )  # fmt: skip
