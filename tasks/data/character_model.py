"""Models of character text: what they share but the network."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core import tree
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, initial_params, streams, text


@dataclass(frozen=True)
class CharacterModel(TaskFamily):
    """Next-character prediction on the sources of Python's standard library: mean cross-entropy over all positions.

    A task is a seed, which draws the initial parameters and the batches: every step's sequences start anywhere in the
    text of ``meta_split``, drawn afresh and with replacement. The text depends on Python's version, see
    ``learnedopt.tasks.data.text``; it has 64 symbols. A batch is ``{"inputs": (batch_size, context), "targets":
    (batch_size, context)}`` of int64 symbols, made on the CPU; targets are the inputs one character later. Without
    ``held_out``, "train" and "valid" batches are independent draws from the SAME text.

    Args:
        batch_size: sequences a batch.
        context: characters that are read, and predicted, a sequence.
        held_out: the last tenth of each file is left out of "train" batches, and "valid" ones are drawn from it: the
            loss on them is then a test loss.
        dtype: of the parameters, "float32" or "float64"; by default torch's default dtype.
        meta_split: which files, chosen by a hash of their names: 80 % are "train", 10 % "valid" and 10 % "test".

    Raises:
        ValueError: an option is out of its range.
        FileNotFoundError: from ``batch``: Python's library is not there as sources.
    """

    batch_size: int = 16
    context: int = 32
    held_out: bool = False
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"

    @abstractmethod
    def layout(self) -> initial_params.Layout:
        """Return the parameters in the order that the network uses them in, and how they start."""

    @abstractmethod
    def logits(self, params: Params, inputs: Tensor) -> Tensor:
        """Return those of the next symbol at each place of ``inputs`` (batch_size, context), one row a place."""

    def __post_init__(self) -> None:
        arguments.require_count("batch_size", self.batch_size)
        arguments.require_count("context", self.context)
        if not isinstance(cast("object", self.held_out), bool):
            raise TypeError(f"held_out={self.held_out!r} is neither True nor False")
        arguments.require_common(self.dtype, self.meta_split)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw one seed a task."""
        return {"seed": streams.sample_seeds(num_tasks, generator)}

    def init_params(self, tasks: Tasks) -> Params:
        """Draw each task's own start."""
        return initial_params.draw(self.layout(), tasks["seed"], None, arguments.resolve_dtype(self.dtype))

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Draw this step's sequences of each task."""
        held_out = "kept" if split == "train" else "held-out"
        symbols = text.load(self.meta_split, held_out if self.held_out else "whole")
        num_starts = len(symbols) - self.context
        if num_starts < 1:
            raise ValueError(f"context={self.context} is longer than the text, {len(symbols)} characters; pass less")
        streamed = [streams.stream(seed, split, step) for seed in tasks["seed"].tolist()]
        starts = np.stack([random.integers(num_starts, size=(self.batch_size, 1)) for random in streamed])
        sequences = symbols[tree.from_numpy(starts + np.arange(self.context + 1))].long()
        return {"inputs": sequences[..., :-1], "targets": sequences[..., 1:]}

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the logits (batch_size, context, 64)."""
        return torch.unflatten(self.logits(params, batch["inputs"]), 0, (-1, self.context))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the next character, in nats."""
        return functional.cross_entropy(self.logits(params, batch["inputs"]), batch["targets"].flatten())

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Return the share of characters that are predicted right."""
        logits = self.logits(params, batch["inputs"])
        return {"accuracy": (logits.argmax(-1) == batch["targets"].flatten()).to(logits.dtype).mean()}


def embedded(table: Tensor, symbols: Tensor) -> Tensor:
    """Return the rows of ``table`` (num_symbols, dim) that are named by symbols (...): (..., dim).

    By a matrix product: an index's derivative is summed in any order on the GPU, and is no faster for so few symbols.
    """
    return (symbols.unsqueeze(-1) == torch.arange(len(table), device=table.device)).to(table.dtype) @ table
