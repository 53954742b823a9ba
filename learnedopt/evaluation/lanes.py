"""One rule with many thetas trained on the same tasks and batches at once: what tuning a rate by a grid needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.execution import Execution
from learnedopt.core.inner import InnerLoop
from learnedopt.core.inner_objective import InnerObjective, TaskLoss
from learnedopt.core.rule import UpdateRule
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params, Theta
from learnedopt.execution import particles as lanes

_NUMBERS_TOGETHER = {"cuda": 400_000_000, "cpu": 2_000_000}
"""Parameters of all runs that are taken together: on a GPU as its memory allows, on a CPU nearly as its cache does."""
_BYTES = {"cuda": 16 * 2**30, "cpu": 2**30}
"""What batches are remembered of."""


class Trained(NamedTuple):
    """What came of tasks that were trained by each of several thetas, on the CPU.

    ``losses`` (num_steps, num_tasks, num_thetas) are the outer losses before each update, on "train" batches, where the
    gradients are taken; ``final`` (num_tasks, num_thetas) those after the last one, on "valid" batches and at what the
    rule keeps (``UpdateRule.result``). Both float64.
    """

    losses: Tensor
    final: Tensor


@final
@dataclass(frozen=True, eq=False)
class Remembered(TaskFamily):
    """A family whose batches are drawn once and kept on a device, as long as there is room for them.

    Args:
        family: the family.
        device: where batches are kept.
    """

    family: TaskFamily
    device: torch.device

    def __post_init__(self) -> None:
        object.__setattr__(self, "_kept", {})
        object.__setattr__(self, "_room", [_BYTES.get(self.device.type, 0)])

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw the family's."""
        return self.family.sample(num_tasks, generator)

    def init_params(self, tasks: Tasks) -> Params:
        """Return the family's."""
        return self.family.init_params(tasks)

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the family's, on the device."""
        kept: dict[Any, Batch] = self.__dict__["_kept"]
        room: list[int] = self.__dict__["_room"]
        key = (split, step, *(x.numpy().tobytes() for x in tree.leaves(tree.to(tasks, "cpu", None))))
        if key in kept:
            return kept[key]
        batch = tree.to(self.family.batch(tasks, step, split), self.device, None)
        size = sum(x.numel() * x.element_size() for x in tree.leaves(batch))
        if size <= room[0]:
            room[0] -= size
            kept[key] = batch
        return batch

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the family's."""
        return self.family.loss(params, batch)

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the family's."""
        return self.family.outputs(params, batch)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Return the family's."""
        return self.family.metrics(params, batch)

    def faults(self, params: Params, batch: Batch, *, second_derivatives: bool = False) -> list[str]:
        """Say what the family says."""
        return self.family.faults(params, batch, second_derivatives=second_derivatives)


def train(
    rule: UpdateRule,
    thetas: Sequence[Theta],
    family: TaskFamily,
    tasks: Tasks,
    num_steps: int,
    execution: Execution,
    *,
    inner_objective: InnerObjective = TaskLoss(),
    num_final: int = 1,
    graph: bool = False,
) -> Trained:
    """Train each of ``tasks`` from a fresh start for ``num_steps`` by each of ``thetas``.

    Args:
        rule: how a step moves.
        thetas: at least one, with at least one meta-parameter.
        family: of the tasks.
        tasks: on the CPU, so that nobody waits for a GPU to read a seed.
        num_steps: at least 1; also the horizon that the rule is told.
        execution: how; without a ``chunk_size`` as many runs together as its device likes.
        inner_objective: what the steps descend.
        num_final: "valid" batches that the final loss is a mean over.
        graph: run steps as a CUDA graph.

    Raises:
        ValueError: bad input, before the first step.
    """
    if not thetas or not thetas[0]:
        raise ValueError(f"{type(rule).__name__}: nothing to tell runs apart by; pass thetas with at least one entry")
    start = tree.to(family.init_params(tasks), execution.device, execution.dtype)
    size = sum(p[0].numel() for p in start.values())
    if execution.chunk_size is None:
        together = _NUMBERS_TOGETHER.get(next(iter(start.values())).device.type, 0)
        execution = replace(execution, chunk_size=max(1, together // size))
    loop = InnerLoop(family, rule, execution, inner_objective, horizon=num_steps)
    stacked = {k: torch.stack([theta[k] for theta in thetas]) for k in thetas[0]}
    stacked = tree.to(stacked, execution.device, execution.dtype)
    loop.check_start({k: v[0] for k, v in stacked.items()}, loop.start(tree.narrow(tasks, 0, 1)))
    num_tasks = tree.size(start)
    particles = lanes.begin(loop, {k: v.expand(num_tasks, *v.shape) for k, v in stacked.items()}, tasks, start)
    particles, losses = lanes.run(loop, particles, num_steps, graph=graph)
    ended = lanes.results(loop, particles)
    found: list[Tensor] = []
    for i in range(num_final):
        found.append(lanes.losses(loop, ended._replace(steps=(num_steps + i,) * num_tasks), "valid"))
    return Trained(losses.double().cpu(), torch.stack(found).double().mean(0).cpu())


def points(rule: UpdateRule, values: Sequence[Mapping[str, float]]) -> list[Theta]:
    """Return the thetas of a hand-designed rule, or of one wrapped, at the values of all its meta-parameters by name.

    Raises:
        ValueError: the names are others than those of the rule's meta-parameters (without the wrappers' prefixes).
    """
    own = {name: name.rpartition("/")[2] for name in rule.init_theta(torch.Generator())}
    for each in values:
        if {*each} != {*own.values()}:
            raise ValueError(
                f"{type(rule).__name__} has the meta-parameters {sorted(own)}, got values of {sorted(each)}"
            )
    return [{name: torch.tensor(float(each[last])) for name, last in own.items()} for each in values]
