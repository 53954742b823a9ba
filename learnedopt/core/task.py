"""What is trained inside: a distribution over optimizees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from learnedopt.core import tree
from learnedopt.core.tree import Params

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

    A task is a seed: it initialises the module and, through ``data``, chooses the batches. The parameters are the
    module's that require a gradient; frozen parameters and buffers are constants, the same for every task.

    Args:
        build: returns a new module; called twice for its structure and once per task, each time with torch's global
            generators seeded, so that its layers may initialise themselves as usual, and put back afterwards.
        loss_fn: ``(outputs, targets) -> scalar``, such as ``torch.nn.functional.cross_entropy``.
        data: ``(seed, step, split) -> (inputs, targets)``, a pure function that yields ONE task's batch, tensors or
            trees of them; ``split`` is "train" or "valid".

    Raises:
        TypeError: ``build`` returns something else than a module.
        ValueError: the module has nothing to train; it holds active dropout, which draws random numbers of its own, or
            running statistics, which a pure function cannot update; its constants differ from one build to the next.

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
        data: Callable[[int, int, Split], tuple[Any, Any]],
    ) -> None:
        self.build, self.loss_fn, self.data = build, loss_fn, data
        self.module = self._build(seed=0)  # for its structure and constants: parameters are passed in
        _refuse_impure(self.module)
        if not _trained(self.module):
            raise ValueError(f"no parameter of {type(self.module).__name__} requires a gradient: nothing to train")
        self.constants = _constants(self.module)
        everything = [p for _, p in self.module.named_parameters(remove_duplicate=False)]
        self._tied = len(everything) > len({id(p) for p in everything})
        _refuse_unequal(self.constants, _constants(self._build(seed=1)))

    def _build(self, seed: int) -> nn.Module:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices):
            # Not torch.manual_seed: where CUDA has not started, its seed would stay behind and take effect later.
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
            module = self.build()
        if not isinstance(module, nn.Module):
            raise TypeError(f"build returned a {type(module).__name__}, not an nn.Module; pass a function or a class")
        return module

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw one seed a task."""
        return {"seed": torch.randint(2**31, (num_tasks,), generator=generator, device=generator.device)}

    def init_params(self, tasks: Tasks) -> Params:
        """Build the module once per task under that task's seed."""
        built = [_trained(self._build(seed)) for seed in tasks["seed"].tolist()]
        return {name: torch.stack([params[name] for params in built]) for name in built[0]}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Stack the tasks' batches."""
        batches = [self.data(seed, step, split) for seed in tasks["seed"].tolist()]
        inputs, targets = tree.tree_map(lambda *each: torch.stack(each), *batches)
        return {"inputs": inputs, "targets": targets}

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Call the module with ``params`` on the inputs."""
        like = next(iter(params.values()))
        constants = tree.to(self.constants, like.device, like.dtype)
        values = {**params, **constants} if constants else params
        # Looking for shared parameters at every call costs as much as a small layer.
        return torch.func.functional_call(self.module, values, (batch["inputs"],), tie_weights=self._tied)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Apply ``loss_fn`` to the outputs and the targets."""
        return self.loss_fn(self.outputs(params, batch), batch["targets"])


def _trained(module: nn.Module) -> Params:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def _constants(module: nn.Module) -> dict[str, Tensor]:
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return frozen | dict(module.named_buffers())


def _refuse_unequal(constants: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    for name, constant in constants.items():
        if not torch.equal(constant, others[name]):
            raise ValueError(
                f"the module's {name!r} is not trained, and differs from one build to the next; make it once, outside "
                "of build, or train it (requires_grad=True)"
            )


def _refuse_impure(module: nn.Module) -> None:
    for name, part in module.named_modules():
        where = f"module {name or 'itself'!r} ({type(part).__name__})"
        # Dropout layers, and layers with dropout inside, such as nn.LSTM and nn.MultiheadAttention.
        drops = part.p > 0 if isinstance(part, nn.modules.dropout._DropoutNd) else _rate(part) > 0
        if part.training and (drops or isinstance(part, nn.RReLU)):
            raise ValueError(
                f"{where} is active dropout: the loss would draw random numbers of its own; set p=0 or eval()"
            )
        if getattr(part, "track_running_stats", False) and part.training:
            raise ValueError(
                f"{where} updates running statistics, which a pure loss cannot; build it with track_running_stats=False"
            )


def _rate(part: nn.Module) -> float:
    rate = getattr(part, "dropout", 0.0)
    return rate if isinstance(rate, int | float) else 0.0
