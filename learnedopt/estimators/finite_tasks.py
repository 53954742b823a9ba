"""Particles' objectives over the tasks on which they are finite: one bad task tells nothing of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import MetaObjective
from learnedopt.estimators.perturbations import finite_pairs, values
from learnedopt.execution import particles
from learnedopt.execution.particles import Particles


class Values(NamedTuple):
    """Each particle's objective (num_particles,), the mean over all tasks but those that have failed.

    ``losses`` (num_steps, num_tasks left, num_particles) are theirs. ``failed`` and ``newly`` are positions of tasks:
    on the second ones some particle was still finite at the start of the window.
    """

    found: Tensor
    losses: Tensor
    failed: list[int]
    newly: list[int]


def finite_values(
    loop: InnerLoop, objective: MetaObjective, before: Particles, after: Particles, losses: Tensor, num_pairs: int
) -> Values:
    """Return ``values`` over the tasks on which a pair is finite; over all of them where there is no such task.

    Of a failed task the particles stay where they are: it stays out until its episode is over.
    """
    found, num_tasks = values(loop, objective, before, after, losses), losses.shape[1]
    if finite_pairs(found, num_pairs).any():
        return Values(found, losses, [], [])
    pieces = zip(particles.split(before, [1] * num_tasks), particles.split(after, [1] * num_tasks), strict=True)
    own = zip(pieces, torch.split(losses, 1, dim=1), strict=True)
    each = torch.stack([values(loop, objective, *ends, curve) for ends, curve in own])
    kept = torch.stack([finite_pairs(x, num_pairs).any() for x in each])
    failed: list[int] = tree.numbers((~kept).nonzero().flatten())
    alive = torch.stack([_rows(x).isfinite().all(2).any(1) for x in before.params.values()]).all(0)
    newly = [i for i in failed if alive[i]]
    if not kept.any():
        return Values(found, losses, failed, newly)
    return Values(each[kept].mean(0), losses[:, kept], failed, newly)


def report(seen: Sequence[Values], num_tasks: int) -> dict[str, Any]:
    """Return what ``info`` says of failed tasks, see ``Estimate``: of phases that count equally, of ``num_tasks`` each;
    nothing where all are finite."""
    num_failed = sum(len(x.failed) for x in seen) / len(seen)
    if not num_failed:
        return {}
    newly = sorted({i for x in seen for i in x.newly})
    return {"num_tasks": num_tasks - num_failed, "failed_tasks": num_failed, "failed": newly}


def _rows(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], -1)
