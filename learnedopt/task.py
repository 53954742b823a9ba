"""What is trained inside: a distribution over optimizees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from learnedopt.tree import Params

Tasks: TypeAlias = Any
"""Batched tree of tensors that describes tasks completely, seeds included."""
Batch: TypeAlias = Any
"""Tree of tensors that ``loss`` reads beside the parameters."""
Split: TypeAlias = Literal["train", "valid"]


class TaskFamily(ABC):
    """A distribution over optimizees, given as pure functions.

    *Batched* trees have a leading dimension ``num_tasks``; methods marked "one task" see a single task without it, and
    must work under ``torch.func.vmap``: no ``.item()``, no ``if`` on tensors, no randomness of their own.

    Example:
        >>> class Bowl(TaskFamily):
        ...     def sample(self, num_tasks, generator):
        ...         return {"center": torch.randn(num_tasks, 2, generator=generator)}
        ...     def init_params(self, tasks):
        ...         return {"x": torch.zeros_like(tasks["center"])}
        ...     def batch(self, tasks, step, split):
        ...         return tasks
        ...     def loss(self, params, batch):
        ...         return (params["x"] - batch["center"]).square().sum()
    """

    @abstractmethod
    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw ``num_tasks`` tasks: a batched tree of tensors."""

    @abstractmethod
    def init_params(self, tasks: Tasks) -> Params:
        """Return each task's own starting point, batched; a pure function of ``tasks``."""

    @abstractmethod
    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the data of inner step ``step``, batched; a pure function of its arguments, never under vmap."""

    @abstractmethod
    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the scalar loss of ONE task."""

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the model's logits or predictions for ONE task; needed by objectives that compare outputs."""
        raise NotImplementedError(
            f"{type(self).__name__} has no outputs; define outputs(params, batch) to compare models by predictions"
        )

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Return scalars worth reporting beside the loss for ONE task, such as the accuracy."""
        return {}


@final
class ModuleFamily(TaskFamily):
    """Turn any ``nn.Module`` and loss function into a family.

    A task is a seed: it initialises the module and, through ``data``, chooses the batches.

    Args:
        build: returns a new module; called once for its structure and once per task with the global generator forked
            and seeded by the task, so that its layers may initialise themselves as usual.
        loss_fn: ``(outputs, targets) -> scalar``, such as ``torch.nn.functional.cross_entropy``.
        data: ``(seed, step, split) -> (inputs, targets)``, a pure function that yields ONE task's batch; ``split`` is
            "train" or "valid".

    Raises:
        ValueError: the module holds active dropout, which draws random numbers of its own, or running statistics,
            which a pure function cannot update.

    Example:
        >>> def data(seed, step, split):
        ...     generator = torch.Generator().manual_seed(1000 * seed + step + 500 * (split == "valid"))
        ...     x = torch.randn(16, 3, generator=generator)
        ...     return x, x.sum(1, keepdim=True)
        >>> family = ModuleFamily(lambda: nn.Linear(3, 1), nn.functional.mse_loss, data)
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        loss_fn: Callable[[Tensor, Any], Tensor],
        data: Callable[[int, int, Split], tuple[Tensor, Any]],
    ) -> None:
        self.build, self.loss_fn, self.data = build, loss_fn, data
        self.module = self._build(seed=0)  # for its structure and constant buffers: parameters are passed in
        _refuse_impure(self.module)

    def _build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw one seed a task."""
        return {"seed": torch.randint(2**31, (num_tasks,), generator=generator)}

    def init_params(self, tasks: Tasks) -> Params:
        """Build the module once per task under that task's seed."""
        built = [dict(self._build(seed).named_parameters()) for seed in tasks["seed"].tolist()]
        return {name: torch.stack([params[name].detach() for params in built]) for name in built[0]}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Stack the tasks' batches."""
        batches = [self.data(seed, step, split) for seed in tasks["seed"].tolist()]
        inputs, targets = zip(*batches, strict=True)
        return {"inputs": torch.stack(inputs), "targets": torch.stack(targets)}

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Call the module with ``params`` on the inputs."""
        return torch.func.functional_call(self.module, params, (batch["inputs"],))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Apply ``loss_fn`` to the outputs and the targets."""
        return self.loss_fn(self.outputs(params, batch), batch["targets"])


def _refuse_impure(module: nn.Module) -> None:
    for name, part in module.named_modules():
        where = f"module {name or 'itself'!r} ({type(part).__name__})"
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
            raise ValueError(
                f"{where} is active dropout: the loss would draw random numbers of its own; set p=0 or eval()"
            )
        if getattr(part, "track_running_stats", False) and part.training:
            raise ValueError(
                f"{where} updates running statistics, which a pure loss cannot; build it with track_running_stats=False"
            )
