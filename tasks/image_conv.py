"""Image classification with a small convolutional network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, final

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, initial_params, streams
from learnedopt.tasks.data.activations import ACTIVATIONS, Activation
from learnedopt.tasks.data.minibatches import Dataset, Minibatches

Norm: TypeAlias = Literal["none", "batch", "group"]
_EPS = 1e-5  # torch's default of its normalisations
_A_BLOCK = 2  # convolutions of a residual block


@final
@dataclass(frozen=True)
class ImageConv(TaskFamily):
    """A convolutional network on 28x28 images, pixels scaled to [0, 1]: mean cross-entropy of a minibatch.

    A stage is a 3x3 convolution (padding 1), the normalisation and the activation; with ``residual`` a residual block
    h -> act(h + norm(conv(act(norm(conv(h)))))) follows (He et al. 2016). Between stages 2x2 pixels are averaged, an
    odd last row and column left out; after the last one all are, and a linear layer makes the logits. All of it but the
    activations "relu" and "elu" is smooth.

    A task is a seed, which draws the initial parameters, as ``nn.Conv2d`` and ``nn.Linear`` do by default, and the
    minibatches, see ``learnedopt.tasks.data.minibatches``. Parameters, convolutions counted from first to last:
    ``conv0.weight`` (channels[0], 1, 3, 3), ``conv0.bias`` (only without normalisation, which has a bias of its own),
    ``norm0.weight`` and ``norm0.bias`` (channels[0],), gains that start at 1 and shifts at 0, ``conv1.weight``, ...,
    ``head.weight``, ``head.bias``. A batch is ``{"inputs": (batch_size, 1, side, side), "targets": (batch_size,)}``.

    Args:
        dataset: "mnist", "fashion-mnist" or "omniglot-characters".
        channels: of each stage's convolutions.
        norm: "none"; "batch", each channel by its mean and variance over the minibatch at hand, never by running ones;
            or "group", ``groups`` groups of channels of each image by theirs (Wu and He 2018).
        groups: of "group", a divisor of every stage's channels; otherwise without effect.
        activation: as ``ImageMLP``'s.
        residual: whether a block of two more convolutions follows each stage's first.
        batch_size: images a minibatch.
        dtype: "float32" or "float64"; by default torch's default dtype.
        meta_split: which images, or which characters, as ``ImageMLP``'s.
        size: the side that images are scaled down to by averaging, a divisor of 28; None leaves it at 28.
        standardize: as ``ImageMLP``'s.
        held_out: as ``ImageMLP``'s: "valid" minibatches are of images that are not trained on.

    Raises:
        TypeError: ``residual``, ``standardize`` or ``held_out`` is not a bool.
        ValueError: an option is out of its range, or the images are too small for so many stages.
        FileNotFoundError: from ``batch``: the data are not there and cannot be downloaded.

    Example:
        >>> family = ImageConv("fashion-mnist", channels=(8, 16), norm="batch", size=14)
        >>> tasks = family.sample(2, torch.Generator().manual_seed(0))
        >>> family.init_params(tasks)["conv1.weight"].shape
        torch.Size([2, 16, 8, 3, 3])
    """

    dataset: Dataset = "mnist"
    channels: tuple[int, ...] = (16, 32)
    norm: Norm = "none"
    groups: int = 4
    activation: Activation = "relu"
    residual: bool = False
    batch_size: int = 64
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"
    size: int | None = None
    standardize: bool = False
    held_out: bool = False

    def __post_init__(self) -> None:
        arguments.require_widths("channels", self.channels)
        if not self.channels:
            raise ValueError("channels=() is no convolution; pass one width a stage, such as (16, 32)")
        arguments.require_choice("norm", self.norm, Norm)
        arguments.require_count("groups", self.groups)
        if self.norm == "group" and any(width % self.groups for width in self.channels):
            raise ValueError(f"groups={self.groups} does not divide each of channels={self.channels}; pass a divisor")
        arguments.require_choice("activation", self.activation, Activation)
        if not isinstance(cast("object", self.residual), bool):
            raise TypeError(f"residual={self.residual!r} is neither True nor False")
        side = self.data().side
        if side >> (len(self.channels) - 1) == 0:
            raise ValueError(
                f"channels={self.channels}: images of {side}x{side} cannot be halved {len(self.channels) - 1} times; "
                "pass fewer stages, or a larger size"
            )

    def data(self) -> Minibatches:
        """Return where the minibatches come from."""
        return Minibatches(
            self.dataset, self.batch_size, self.dtype, self.meta_split,
            size=self.size, standardize=self.standardize, held_out=self.held_out,
        )  # fmt: skip

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw one seed a task."""
        return {"seed": streams.sample_seeds(num_tasks, generator)}

    def init_params(self, tasks: Tasks) -> Params:
        """Draw each task's parameters from its seed."""
        layers: list[initial_params.Entry] = []
        widths = [width for width in self.channels for _ in range(1 + _A_BLOCK * self.residual)]
        for i, (fan, width) in enumerate(zip((1, *widths[:-1]), widths, strict=True)):
            layers += initial_params.layer(f"conv{i}", (width, fan, 3, 3), bias=self.norm == "none")
            if self.norm != "none":
                layers += initial_params.norm(f"norm{i}", width)
        layers += initial_params.layer("head", (self.data().num_classes, self.channels[-1]))
        return initial_params.draw(tuple(layers), tasks["seed"], None, arguments.resolve_dtype(self.dtype))

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Draw this step's minibatch of each task."""
        inputs, targets = self.data().draw(tasks["seed"], step, split)
        return {"inputs": inputs.unsqueeze(2), "targets": targets}

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the logits (batch_size, num_classes): 10, or as many as there are characters."""
        act, hidden, first = ACTIVATIONS[self.activation], batch["inputs"], 0
        for stage in range(len(self.channels)):
            if stage:
                hidden = functional.avg_pool2d(hidden, 2)
            hidden = act(self._layer(params, first, hidden))
            first += 1
            if self.residual:
                inner = act(self._layer(params, first, hidden))
                hidden = act(hidden + self._layer(params, first + 1, inner))
                first += _A_BLOCK
        return functional.linear(hidden.mean((-2, -1)), params["head.weight"], params["head.bias"])

    def _layer(self, params: Params, i: int, hidden: Tensor) -> Tensor:
        """Return convolution i of the images, normalised."""
        out = functional.conv2d(hidden, params[f"conv{i}.weight"], params.get(f"conv{i}.bias"), padding=1)
        if self.norm == "none":
            return out
        # By hand: torch's own batch normalisation has wrong derivatives in some orders of its modes, and says nothing.
        # The mean of squares of what is centred costs a third of torch.var_mean on the CPU.
        groups, axes = (1, (0, 3, 4)) if self.norm == "batch" else (self.groups, (2, 3, 4))
        grouped = torch.unflatten(out, 1, (groups, -1))
        gain, shift = (params[f"norm{i}.{name}"].reshape(groups, -1, 1, 1) for name in ("weight", "bias"))
        centred = grouped - grouped.mean(axes, keepdim=True)
        scale = (centred.square().mean(axes, keepdim=True) + _EPS).rsqrt() * gain
        return (centred * scale + shift).flatten(1, 2)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the mean cross-entropy."""
        return functional.cross_entropy(self.outputs(params, batch), batch["targets"])

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Return the share of images that are classified right."""
        logits = self.outputs(params, batch)
        return {"accuracy": (logits.argmax(-1) == batch["targets"]).to(logits.dtype).mean()}
