"""Any ``nn.Module`` and loss function as a family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from learnedopt.core import tree
from learnedopt.core.containers import is_list_or_tuple
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params, Tree
from learnedopt.tasks.modules import structure, trial
from learnedopt.tasks.modules.stateless import Stateless, constants, trained
from learnedopt.tasks.modules.torch_errors import explained


@final
class ModuleFamily(TaskFamily):
    """Turn any ``nn.Module`` and loss function into a family.

    A task is a seed: it initialises the module and, through ``data``, chooses the batches. The parameters are the
    module's that require a gradient; frozen parameters and buffers are constants, the same for every task. Constants
    keep their dtype; where parameters come in another one than the module's own, as under ``Execution(dtype=...)``,
    floating-point constants of that same own dtype follow them.

    Args:
        build: returns a new module; called twice for its structure and once per task, each time with torch's global
            generators seeded, so that its layers may initialise themselves as usual, and put back afterwards.
        loss_fn: ``(outputs, targets) -> scalar``, such as ``torch.nn.functional.cross_entropy``.
        data: ``(seed, step, split) -> (inputs, targets)``, a pure function that yields ONE task's batch, tensors or
            trees of them, of the same shapes for every task; ``split`` is "train" or "valid". Numpy arrays and numbers
            become tensors of their own dtype. A tuple of inputs is passed to ``forward`` as positional arguments, a
            dict as keyword arguments; where ``forward`` does not accept them so, as one argument (a tuple that it would
            accept is passed as one by ``((a, b),)``). Items of unequal length are padded, with a mask as a further
            input. ``targets`` may be None.

    Raises:
        TypeError: ``build`` returns something else than a module.
        ValueError: the module has nothing to train; it holds active dropout, which draws random numbers of its own, or
            running statistics, which a pure function cannot update; an embedding writes to its weights or does not
            return the loss's gradient; a parameter is complex; its constants differ from one build to the next.

    What only shows when the module is called (random numbers, buffers that are written to, checkpointing) is found by
    ``faults``, which a loop asks before its first step.

    Example:
        >>> def data(seed, step, split):
        ...     generator = torch.Generator().manual_seed(1000 * seed + step + 500 * (split == "valid"))
        ...     x = torch.randn(16, 3, generator=generator)
        ...     return x, x.sum(1, keepdim=True)
        >>> family = ModuleFamily(lambda: nn.Linear(3, 1), nn.functional.mse_loss, data)

        Attention over padded sequences, with two inputs:

        >>> class Pooled(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)
        ...     def forward(self, tokens, padding):
        ...         mixed, _ = self.attention(tokens, tokens, tokens, key_padding_mask=padding, need_weights=False)
        ...         return self.head(mixed.masked_fill(padding[..., None], 0.0).sum(1))
        >>> def sequences(seed, step, split):
        ...     tokens = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(seed + step))
        ...     padding = torch.arange(5) >= torch.arange(8)[:, None] % 4 + 2
        ...     return {"tokens": tokens, "padding": padding}, tokens.sum((1, 2))[:, None]
        >>> family = ModuleFamily(Pooled, nn.functional.mse_loss, sequences)
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        loss_fn: Callable[[Any, Any], Tensor],
        data: Callable[[int, int, Split], tuple[Any, Any]],
    ) -> None:
        self.build = build
        self.loss_fn = loss_fn
        self.data = data
        self.module: nn.Module = self._build(seed=0)  # for its structure and constants: parameters are passed in
        structure.require_pure(self.module)
        self._call = Stateless(self.module)
        if not self._call.trained:
            raise ValueError(f"no parameter of {type(self.module).__name__} requires a gradient: nothing to train")
        structure.require_equal(self._call.constants, constants(self._build(seed=1)))

    def _build(self, seed: int) -> nn.Module:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices):  # pyright: ignore[reportUnknownMemberType] - torch gives it no types
            # Not torch.manual_seed: where CUDA has not started, its seed would stay behind and take effect later.
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
            module = self.build()
        if not isinstance(cast("object", module), nn.Module):
            raise TypeError(f"build returned a {type(module).__name__}, not an nn.Module; pass a function or a class")
        return module

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw one seed a task."""
        return {"seed": torch.randint(2**31, (num_tasks,), generator=generator, device=generator.device)}

    def init_params(self, tasks: Tasks) -> Params:
        """Build the module once per task under that task's seed."""
        built = [trained(self._build(seed)) for seed in tasks["seed"].tolist()]
        return {name: torch.stack([params[name] for params in built]) for name in built[0]}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Stack the tasks' batches; without "targets" where ``data`` returns None for them.

        Raises:
            TypeError: ``data`` returns something else than a pair, or leaves that cannot become tensors.
            ValueError: the tasks' batches differ in structure or shape.
        """
        pairs = [_pair(self.data(seed, step, split)) for seed in tasks["seed"].tolist()]
        batch = {"inputs": _stack("inputs", [inputs for inputs, _ in pairs])}
        if any(targets is not None for _, targets in pairs):
            batch["targets"] = _stack("targets", [targets for _, targets in pairs])
        return batch

    @explained
    def outputs(self, params: Params, batch: Batch) -> Any:
        """Call the module with ``params`` on the inputs.

        Raises:
            RuntimeError: a known error of torch, such as of recurrent layers with tasks together, with what to do.
        """
        with self._call.left_alone():
            return self._call(self._call.values(params), batch["inputs"])

    @explained
    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Apply ``loss_fn`` to the outputs and the targets."""
        return self.loss_fn(self.outputs(params, batch), batch.get("targets"))

    @explained
    def faults(self, params: Params, batch: Batch, *, second_derivatives: bool = False) -> list[str]:
        """Call the module a few times on copies, and say what it draws, writes, keeps or computes again."""
        found = structure.wrong_second_derivatives(self.module) if second_derivatives else []
        tried = trial.Trial(self._call, self.loss_fn, params, batch["inputs"], batch.get("targets"))
        return found + trial.faults(tried, second_derivatives=second_derivatives)


def _pair(returned: Any) -> Sequence[Any]:
    if not is_list_or_tuple(returned) or len(returned) != 2:
        raise TypeError(
            f"data must return a pair (inputs, targets), got a {type(returned).__name__}; return (inputs, None) where "
            "there are no targets"
        )
    return returned


def _stack(what: str, items: list[Tree]) -> Tree:
    items = [tree.tree_map(lambda x: _tensor(what, x), item) for item in items]
    return tree.tree_map(lambda *each: _stacked(what, each), *items)


def _stacked(what: str, each: tuple[Tensor, ...]) -> Tensor:
    shapes = {tuple(x.shape) for x in each}
    if len(shapes) > 1:
        raise ValueError(
            f"data returned {what} of shapes {sorted(shapes)} for different tasks, and a batch of tasks is one tensor; "
            "pad them to one length, and pass a mask as a further input"
        )
    return torch.stack(each)


def _tensor(what: str, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if isinstance(x, np.ndarray | np.generic | int | float | complex):
        try:
            return torch.tensor(x)
        except TypeError as error:
            raise TypeError(f"data returned {what} that cannot become a tensor: {error}") from error
    raise TypeError(
        f"data returned {what} that hold a {type(x).__name__}; return tensors, numpy arrays or numbers, alone or in "
        "tuples and dicts, and leave out an input that is None"
    )
