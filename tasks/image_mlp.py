"""Image classification with a multi-layer perceptron."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core import tree
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, images, streams
from learnedopt.tasks.data.activations import ACTIVATIONS, Activation
from learnedopt.tasks.data.minibatches import Dataset, Minibatches

Init: TypeAlias = Literal["linear", "normal"]


@final
@dataclass(frozen=True)
class ImageMLP(TaskFamily):
    """An MLP on 28x28 images, pixels scaled to [0, 1]: mean cross-entropy of a minibatch (Andrychowicz et al. 2016).

    A task is a seed, which draws the initial parameters and the minibatches: every step's minibatch is drawn afresh,
    with replacement, from all images of ``meta_split``. "train" and "valid" minibatches are independent draws from the
    SAME images unless ``held_out``; what is held out from meta-training is held out by ``meta_split``. Parameters:
    ``layer0.weight`` (hidden[0], 784), ``layer0.bias``, ... as ``nn.Linear`` has them. A batch is ``{"inputs":
    (batch_size, side²), "targets": (batch_size,)}``, made on the CPU; side is 28 unless ``crop`` or ``size`` say
    otherwise.

    Args:
        dataset: "mnist", "fashion-mnist" or "omniglot-characters", see ``learnedopt.tasks.data.minibatches``; where the
            files are looked for is said in ``learnedopt.tasks.data.images`` and at ``Omniglot``.
        hidden: the widths of the hidden layers, any number of them; none gives softmax regression.
        activation: after each hidden layer.
        batch_size: images a minibatch.
        init: "linear" draws weights and biases as ``nn.Linear`` does by default, from U(±1/√fan_in); "normal" draws all
            from N(0, std²), as the paper's public code does with std 0.01.
        std: of "normal"; 0.01 by default.
        dtype: "float32" or "float64"; by default torch's default dtype.
        meta_split: "train" uses images 1 to 50,000, "valid" images 50,001 to 60,000, "test" the 10,000 test images. Of
            the characters: alphabets of 99, 89 and 98 characters, one class each, 15 drawings a class.
        crop: the side of the central square that the network sees, even: a smaller one leaves out the border, which is
            black in MNIST, and with it weights that never move. Their start is that of the whole network's part.
        size: the side that the square is scaled down to by averaging, a divisor of ``crop``; None leaves it as it is.
            The start is that of the whole scaled image's network.
        standardize: subtract the mean of all pixels and divide by their standard deviation, both of the data set's
            60,000 training images, or of all characters, at full size.
        relabel_every: the labels are permuted anew every so many steps, the first time at step 0, by a permutation that
            the task's seed draws; both splits' alike. The task changes under the training, as in continual learning.
            None keeps the images' labels.
        held_out: "valid" minibatches are drawn from other images than "train" ones: the 10,000 test images, or 5 more
            drawings of each character. A loss on them is a test loss: to evaluate with, never to meta-train on.

    Raises:
        ValueError: an option is out of its range.
        FileNotFoundError: from ``batch``: the data are not there and cannot be downloaded.

    Example:
        >>> family = ImageMLP(hidden=(40, 40), activation="tanh", meta_split="valid")
        >>> tasks = family.sample(2, torch.Generator().manual_seed(0))
        >>> family.init_params(tasks)["layer0.weight"].shape
        torch.Size([2, 40, 784])
    """

    dataset: Dataset = "mnist"
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
    held_out: bool = False

    def __post_init__(self) -> None:
        arguments.require_widths("hidden", self.hidden)
        arguments.require_choice("activation", self.activation, Activation)
        arguments.require_choice("init", self.init, Init)
        if self.std is not None:
            arguments.require_number("std", self.std, least=0)
            if self.init != "normal":
                raise ValueError(f"std={self.std!r} has no effect with init={self.init!r}; pass init='normal' as well")
        if self.relabel_every is not None:
            arguments.require_count("relabel_every", self.relabel_every)
        self.data()

    def data(self) -> Minibatches:
        """Return where the minibatches come from."""
        return Minibatches(
            self.dataset, self.batch_size, self.dtype, self.meta_split,
            crop=self.crop, size=self.size, standardize=self.standardize, held_out=self.held_out,
        )  # fmt: skip

    @property
    def side(self) -> int:
        """The side of the square that the network sees."""
        return self.data().side

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw one seed a task."""
        return {"seed": streams.sample_seeds(num_tasks, generator)}

    def init_params(self, tasks: Tasks) -> Params:
        """Draw each task's parameters, as ``init`` says, from its seed."""
        drawn = [self._draw(streams.stream(seed, "init")) for seed in tree.numbers(tasks["seed"])]
        dtype = arguments.resolve_dtype(self.dtype)
        return {k: tree.from_numpy(np.stack([params[k] for params in drawn])).to(dtype) for k in drawn[0]}

    def _draw(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        """Draw one task's parameters in float64, so that float32 ones are the same but for rounding."""
        widths = (self.side**2, *self.hidden, self.data().num_classes)
        whole = images.SIDE * self.side / self.crop  # a crop starts as its part of the whole
        params: dict[str, np.ndarray] = {}
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
        inputs, targets = self.data().draw(tasks["seed"], step, split)
        if self.relabel_every is not None:
            targets = self._relabelled(targets, tree.numbers(tasks["seed"]), step)
        return {"inputs": inputs.flatten(2), "targets": targets}

    def _relabelled(self, targets: Tensor, seeds: list[int], step: int) -> Tensor:
        """Return targets (num_tasks, batch_size) under the permutations that hold at this step."""
        assert self.relabel_every is not None
        classes, turn = self.data().num_classes, step // self.relabel_every
        drawn = [streams.stream(seed, "labels", turn).permutation(classes) for seed in seeds]
        return tree.from_numpy(np.stack(drawn)).gather(1, targets)

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the logits (batch_size, num_classes): 10, or as many as there are characters."""
        hidden = batch["inputs"]
        for i in range(len(self.hidden)):
            hidden = functional.linear(hidden, params[f"layer{i}.weight"], params[f"layer{i}.bias"])
            hidden = ACTIVATIONS[self.activation](hidden)
        last = len(self.hidden)
        return functional.linear(hidden, params[f"layer{last}.weight"], params[f"layer{last}.bias"])

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the mean cross-entropy."""
        return functional.cross_entropy(self.outputs(params, batch), batch["targets"])

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Return the share of images that are classified right."""
        logits = self.outputs(params, batch)
        return {"accuracy": (logits.argmax(-1) == batch["targets"]).to(logits.dtype).mean()}
