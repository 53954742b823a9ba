"""Image classification with a multi-layer perceptron."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, images, streams

Activation: TypeAlias = Literal["sigmoid", "tanh", "relu", "elu", "gelu", "softplus"]
Init: TypeAlias = Literal["linear", "normal"]
_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": functional.elu,
    "gelu": functional.gelu,
    "softplus": functional.softplus,
}


@final
@dataclass(frozen=True)
class ImageMLP(TaskFamily):
    """An MLP on 28x28 images, pixels scaled to [0, 1]: mean cross-entropy of a minibatch (Andrychowicz et al. 2016).

    A task is a seed, which draws the initial parameters and the minibatches: every step's minibatch is drawn afresh,
    with replacement, from all images of ``meta_split``. "train" and "valid" minibatches are independent draws from the
    SAME images; what is held out from meta-training is held out by ``meta_split``. Parameters: ``layer0.weight``
    (hidden[0], 784), ``layer0.bias``, ... as ``nn.Linear`` has them. A batch is ``{"inputs": (batch_size, side²),
    "targets": (batch_size,)}``, made on the CPU; side is 28 unless ``crop`` or ``size`` say otherwise.

    Args:
        dataset: "mnist" or "fashion-mnist"; where the files are looked for is said in ``learnedopt.tasks.data.images``.
        hidden: the widths of the hidden layers, any number of them; none gives softmax regression.
        activation: after each hidden layer.
        batch_size: images a minibatch.
        init: "linear" draws weights and biases as ``nn.Linear`` does by default, from U(±1/√fan_in); "normal" draws all
            from N(0, std²), as the paper's public code does with std 0.01.
        std: of "normal"; 0.01 by default.
        dtype: "float32" or "float64"; by default torch's default dtype.
        meta_split: "train" uses images 1 to 50,000, "valid" images 50,001 to 60,000, "test" the 10,000 test images.
        crop: the side of the central square that the network sees, even: a smaller one leaves out the border, which is
            black in MNIST, and with it weights that never move. Their start is that of the whole network's part.
        size: the side that the square is scaled down to by averaging, a divisor of ``crop``; None leaves it as it is.
            The start is that of the whole scaled image's network.
        standardize: subtract the mean of all pixels and divide by their standard deviation, both of the data set's
            60,000 training images at full size.
        relabel_every: the labels are permuted anew every so many steps, the first time at step 0, by a permutation that
            the task's seed draws; both splits' alike. The task changes under the training, as in continual learning.
            None keeps the images' labels.

    Raises:
        ValueError: an option is out of its range.
        FileNotFoundError: from ``batch``: the data are not there and cannot be downloaded.

    Example:
        >>> family = ImageMLP(hidden=(40, 40), activation="tanh", meta_split="valid")
        >>> tasks = family.sample(2, torch.Generator().manual_seed(0))
        >>> family.init_params(tasks)["layer0.weight"].shape
        torch.Size([2, 40, 784])
    """

    dataset: images.Dataset = "mnist"
    hidden: tuple[int, ...] = (20,)
    activation: Activation = "sigmoid"
    batch_size: int = 128
    init: Init = "linear"
    std: float | None = None
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"
    crop: int = images.SIDE
    size: int | None = None
    standardize: bool = False
    relabel_every: int | None = None

    def __post_init__(self) -> None:
        arguments.require_choice("dataset", self.dataset, images.Dataset)
        if not isinstance(self.hidden, tuple):
            raise ValueError(f"hidden={self.hidden!r} is not a tuple of widths; pass one such as (20,) or (40, 40)")
        for i, width in enumerate(self.hidden):
            arguments.require_count(f"hidden[{i}]", width)
        arguments.require_choice("activation", self.activation, Activation)
        arguments.require_count("batch_size", self.batch_size)
        arguments.require_choice("init", self.init, Init)
        if self.std is not None:
            arguments.require_number("std", self.std, least=0)
            if self.init != "normal":
                raise ValueError(f"std={self.std!r} has no effect with init={self.init!r}; pass init='normal' as well")
        arguments.require_common(self.dtype, self.meta_split)
        arguments.require_count("crop", self.crop)
        if self.crop > images.SIDE or self.crop % 2:
            raise ValueError(f"crop={self.crop!r} cannot be centred; pass an even number of at most {images.SIDE}")
        if self.size is not None:
            arguments.require_count("size", self.size)
            if self.crop % self.size:
                raise ValueError(f"size={self.size!r} does not divide crop={self.crop}: blocks of pixels are averaged")
        if not isinstance(self.standardize, bool):
            raise TypeError(f"standardize={self.standardize!r} is neither True nor False")
        if self.relabel_every is not None:
            arguments.require_count("relabel_every", self.relabel_every)

    @property
    def side(self) -> int:
        """The side of the square that the network sees."""
        return self.crop if self.size is None else self.size

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw one seed a task."""
        return {"seed": streams.sample_seeds(num_tasks, generator)}

    def init_params(self, tasks: Tasks) -> Params:
        """Draw each task's parameters, as ``init`` says, from its seed."""
        drawn = [self._draw(streams.stream(seed, "init")) for seed in tasks["seed"].tolist()]
        dtype = arguments.resolve_dtype(self.dtype)
        return {k: torch.from_numpy(np.stack([params[k] for params in drawn])).to(dtype) for k in drawn[0]}

    def _draw(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        """Draw one task's parameters in float64, so that float32 ones are the same but for rounding."""
        widths = (self.side**2, *self.hidden, images.NUM_CLASSES)
        whole = images.SIDE * self.side / self.crop  # a crop starts as its part of the whole
        params = {}
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            for name, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,))):
                if self.init == "linear":
                    bound = 1 / math.sqrt(fan_in if i else whole**2)
                    params[f"layer{i}.{name}"] = random.uniform(-bound, bound, shape)
                else:
                    params[f"layer{i}.{name}"] = random.normal(0.0, 0.01 if self.std is None else self.std, shape)
        return params

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Draw this step's minibatch of each task."""
        pixels, labels = images.load(self.dataset, self.meta_split)
        seeds = tasks["seed"].tolist()
        drawn = [streams.stream(seed, split, step).integers(len(labels), size=self.batch_size) for seed in seeds]
        index = torch.from_numpy(np.concatenate(drawn))
        shape = (len(seeds), self.batch_size)
        inputs = self._seen(pixels.index_select(0, index)).reshape(*shape, -1)
        targets = labels.index_select(0, index).reshape(shape)
        if self.relabel_every is not None:
            targets = self._relabelled(targets, seeds, step)
        return {"inputs": inputs, "targets": targets}

    def _seen(self, pixels: Tensor) -> Tensor:
        """Return what the network sees of images (num_images, 784): (num_images, side, side)."""
        margin = (images.SIDE - self.crop) // 2
        inner = slice(margin, images.SIDE - margin)
        square = pixels.reshape(-1, images.SIDE, images.SIDE)[:, inner, inner]
        inputs = square.to(arguments.resolve_dtype(self.dtype)).div_(255)
        if self.standardize:
            mean, std = images.MOMENTS[self.dataset]
            inputs = (inputs - mean) / std
        return inputs if self.size is None else functional.avg_pool2d(inputs, self.crop // self.size)

    def _relabelled(self, targets: Tensor, seeds: list[int], step: int) -> Tensor:
        """Return targets (num_tasks, batch_size) under the permutations that hold at this step."""
        assert self.relabel_every is not None
        drawn = [streams.stream(s, "labels", step // self.relabel_every).permutation(images.NUM_CLASSES) for s in seeds]
        return torch.from_numpy(np.stack(drawn)).gather(1, targets)

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the logits (batch_size, 10)."""
        hidden = batch["inputs"]
        for i in range(len(self.hidden)):
            hidden = functional.linear(hidden, params[f"layer{i}.weight"], params[f"layer{i}.bias"])
            hidden = _ACTIVATIONS[self.activation](hidden)
        last = len(self.hidden)
        return functional.linear(hidden, params[f"layer{last}.weight"], params[f"layer{last}.bias"])

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the mean cross-entropy."""
        return functional.cross_entropy(self.outputs(params, batch), batch["targets"])

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Return the share of images that are classified right."""
        logits = self.outputs(params, batch)
        return {"accuracy": (logits.argmax(-1) == batch["targets"]).to(logits.dtype).mean()}
