"""Any family with its parameters in other units and its start at another scale, drawn anew for every task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, streams
from learnedopt.tasks.data.wrapping import with_common


@final
@dataclass(frozen=True)
class Rescaled(TaskFamily):
    """A family whose optimizees are seen through factors: ``loss(params) = family.loss(factors · params)``.

    What is trained are the family's parameters divided by the factors: the functions are the same ones, but gradients
    are multiplied by the factors and distances divided, so that a rule which is meta-trained on such tasks cannot rely
    on the units of its parameters (Lv et al. 2017, section 4.1). With standard normal numbers N, one a task, tensor or
    coordinate, a factor is ``e^(tensor_scale·N + coordinate_scale·N)``. Before that the family's own start is
    multiplied by ``e^(initial_scale·N)``, all of it alike, which does change what is trained.

    A task is ``{"inner": the family's, "start": (), "factors": {name: ...}}``, a batch ``{"inner": the family's,
    "factors": the task's}``; a factor has the parameter's number of dimensions, each 1 without ``coordinate_scale``.
    Outputs and metrics are the family's. An inner objective that reads batches does not find its entries.

    Args:
        family: what is trained.
        initial_scale: standard deviation of the logarithm of the start's factor; 0 for none.
        tensor_scale: of each tensor's factor.
        coordinate_scale: of each coordinate's.
        probability: the share of tasks that have factors of tensors and coordinates; those of the others are 1.
        dtype: of the family, in place of its own.
        meta_split: of the family, in place of its own.

    Raises:
        TypeError: ``family`` is none.
        ValueError: an option is out of its range, or the family has no such option to hand it on to.

    Example:
        >>> family = Rescaled(learnedopt.tasks.make("image-mlp"), initial_scale=0.35, tensor_scale=0.4, probability=0.5)
    """

    family: TaskFamily
    initial_scale: float = 0.0
    tensor_scale: float = 0.0
    coordinate_scale: float = 0.0
    probability: float = 1.0
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", with_common(self.family, self.dtype, self.meta_split))
        for option in ("initial_scale", "tensor_scale", "coordinate_scale", "probability"):
            arguments.require_number(option, getattr(self, option), least=0)
        if self.probability > 1:
            raise ValueError(f"probability={self.probability!r} is none; pass a number from 0 to 1")

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw the family's tasks, then the factors."""
        inner = self.family.sample(num_tasks, generator)
        one = self.family.init_params(tree.narrow(inner, 0, 1))
        start = (self.initial_scale * streams.normal((num_tasks,), generator)).exp()
        chance = torch.rand(num_tasks, generator=generator, dtype=torch.float64, device=generator.device)
        factors = {}
        for name, shape in ((name, p.shape[1:]) for name, p in one.items()):
            flat = (num_tasks, *(1 for _ in shape))
            log = self.tensor_scale * streams.normal(flat, generator)
            if self.coordinate_scale:
                log = log + self.coordinate_scale * streams.normal((num_tasks, *shape), generator)
            factors[name] = (log * (chance < self.probability).reshape(flat)).exp()
        dtype = next(iter(one.values())).dtype
        return {"inner": inner, **tree.to({"start": start, "factors": factors}, None, dtype)}

    def init_params(self, tasks: Tasks) -> Params:
        """Return the family's start times the start's factor, divided by the factors."""
        own = self.family.init_params(tasks["inner"])
        device = next(iter(own.values())).device  # families that draw by seed start on the CPU, wherever tasks lie
        start, factors = tree.to((tasks["start"], tasks["factors"]), device, None)
        starts = {name: start.reshape(-1, *(1 for _ in p.shape[1:])) for name, p in own.items()}
        return {name: p * starts[name] / factors[name] for name, p in own.items()}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the family's batch beside the factors."""
        return {"inner": self.family.batch(tasks["inner"], step, split), "factors": tasks["factors"]}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the family's loss at the factors times the parameters."""
        return self.family.loss(_scaled(params, batch), batch["inner"])

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the family's outputs there."""
        return self.family.outputs(_scaled(params, batch), batch["inner"])

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Return the family's metrics there."""
        return self.family.metrics(_scaled(params, batch), batch["inner"])

    def faults(self, params: Params, batch: Batch, *, second_derivatives: bool = False) -> list[str]:
        """Return what the family says there."""
        return self.family.faults(_scaled(params, batch), batch["inner"], second_derivatives=second_derivatives)


def _scaled(params: Params, batch: Batch) -> Params:
    return {name: p * batch["factors"][name] for name, p in params.items()}
