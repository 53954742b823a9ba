"""Autoencoding of images with a multi-layer perceptron."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, initial_params, streams
from learnedopt.tasks.data.activations import ACTIVATIONS, Activation
from learnedopt.tasks.data.minibatches import Dataset, Minibatches

Error: TypeAlias = Literal["squared", "cross-entropy"]


@final
@dataclass(frozen=True)
class ImageAutoencoder(TaskFamily):
    """An MLP that narrows and widens again, back to the pixels x in [0, 1]: its mean error per pixel on a minibatch.

    The widths are side², widths[0], ..., widths[-1] (the code), ..., widths[0], side²; after each layer but the last
    comes the activation, after the last the sigmoid, which makes the reconstruction x̂. The error is (x - x̂)², or with
    "cross-entropy" -x log x̂ - (1 - x) log(1 - x̂), whose least value is above 0 where pixels are grey.

    A task is a seed, which draws the initial parameters, as ``nn.Linear`` does by default, and the minibatches, see
    ``learnedopt.tasks.data.minibatches``. Parameters: ``layer0.weight`` (widths[0], side²), ``layer0.bias``, .... A
    batch is ``{"inputs": (batch_size, side²)}``.

    Args:
        dataset: "mnist", "fashion-mnist" or "omniglot-characters".
        widths: of the encoder's layers, the last being the code; the decoder's are the same in reverse.
        activation: as ``ImageMLP``'s.
        error: "squared" or "cross-entropy".
        batch_size: images a minibatch.
        dtype: "float32" or "float64"; by default torch's default dtype.
        meta_split: which images, or which characters, as ``ImageMLP``'s.
        size: the side that images are scaled down to by averaging, a divisor of 28; None leaves it at 28.
        held_out: as ``ImageMLP``'s: "valid" minibatches are of images that are not trained on.

    Raises:
        TypeError: ``held_out`` is not a bool.
        ValueError: an option is out of its range.
        FileNotFoundError: from ``batch``: the data are not there and cannot be downloaded.

    Example:
        >>> family = ImageAutoencoder(widths=(32, 8))
        >>> tasks = family.sample(2, torch.Generator().manual_seed(0))
        >>> family.init_params(tasks)["layer3.weight"].shape
        torch.Size([2, 784, 32])
    """

    dataset: Dataset = "mnist"
    widths: tuple[int, ...] = (64, 16)
    activation: Activation = "relu"
    error: Error = "squared"
    batch_size: int = 128
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"
    size: int | None = None
    held_out: bool = False

    def __post_init__(self) -> None:
        arguments.require_widths("widths", self.widths)
        if not self.widths:
            raise ValueError("widths=() leaves no code; pass one width a layer of the encoder, such as (64, 16)")
        arguments.require_choice("activation", self.activation, Activation)
        arguments.require_choice("error", self.error, Error)
        self.data()

    def data(self) -> Minibatches:
        """Return where the minibatches come from."""
        return Minibatches(
            self.dataset, self.batch_size, self.dtype, self.meta_split, size=self.size, held_out=self.held_out
        )

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw one seed a task."""
        return {"seed": streams.sample_seeds(num_tasks, generator)}

    def init_params(self, tasks: Tasks) -> Params:
        """Draw each task's parameters from its seed."""
        encoder = (self.data().side ** 2, *self.widths)
        pairs = itertools.pairwise((*encoder, *encoder[-2::-1]))
        layers = [entry for i, (a, b) in enumerate(pairs) for entry in initial_params.layer(f"layer{i}", (b, a))]
        return initial_params.draw(tuple(layers), tasks["seed"], None, arguments.resolve_dtype(self.dtype))

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Draw this step's minibatch of each task."""
        return {"inputs": self.data().draw(tasks["seed"], step, split)[0].flatten(2)}

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the reconstruction (batch_size, side²), in (0, 1)."""
        return self._logits(params, batch).sigmoid()

    def _logits(self, params: Params, batch: Batch) -> Tensor:
        hidden, last = batch["inputs"], 2 * len(self.widths) - 1
        for i in range(last):
            hidden = functional.linear(hidden, params[f"layer{i}.weight"], params[f"layer{i}.bias"])
            hidden = ACTIVATIONS[self.activation](hidden)
        return functional.linear(hidden, params[f"layer{last}.weight"], params[f"layer{last}.bias"])

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the mean error per pixel."""
        if self.error == "cross-entropy":  # from the logits: the logarithm of a sigmoid near 0 would be lost
            return functional.binary_cross_entropy_with_logits(self._logits(params, batch), batch["inputs"])
        return self._squared_error(params, batch)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Return the mean squared error per pixel, which compares what was trained on either error."""
        return {"squared_error": self._squared_error(params, batch)}

    def _squared_error(self, params: Params, batch: Batch) -> Tensor:
        return (self.outputs(params, batch) - batch["inputs"]).square().mean()
