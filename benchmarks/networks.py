"""The networks and data of the benchmarks: as functions of their parameters, and as the modules that peers work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from learnedopt import TaskFamily
from learnedopt.core.tree import Params

Forward: TypeAlias = Callable[[Sequence[Tensor], Tensor], Tensor]
Examples: TypeAlias = tuple[Tensor, Tensor]

IMAGE, FILTERS, CONV_WAYS = 28, 64, 5


class Problem(NamedTuple):
    """A network and data for it.

    ``module`` holds the starting parameters, ``forward`` is the same network as a function of them, in their order;
    ``train`` and ``valid`` are inputs and classes of all tasks, (num_tasks, ...), or (num_tasks, num_steps, ...).
    """

    module: nn.Module
    forward: Forward
    train: Examples
    valid: Examples

    @property
    def start(self) -> Params:
        """One task's starting parameters by name."""
        return {k: p.detach() for k, p in self.module.named_parameters()}

    @property
    def num_tasks(self) -> int:
        """How many tasks there are data for."""
        return len(self.train[1])

    def loss(self, params: Sequence[Tensor], examples: Examples) -> Tensor:
        """Return the mean cross-entropy of one task's examples."""
        return functional.cross_entropy(self.forward(params, examples[0]), examples[1])


class Stored(TaskFamily):
    """Tasks whose data are there already, so that no time goes into making them.

    Args:
        problem: network and data.
        fresh: whether every inner step has data of its own, a second dimension of the training data.
    """

    def __init__(self, problem: Problem, fresh: bool = False) -> None:
        self.problem, self.fresh = problem, fresh

    def sample(self, num_tasks, generator):
        """Return the tasks, always the same."""
        return {"train": self.problem.train, "valid": self.problem.valid}

    def init_params(self, tasks):
        """Start all tasks at the module's parameters."""
        num_tasks = len(tasks["train"][1])
        return {k: p.expand(num_tasks, *p.shape) for k, p in self.problem.start.items()}

    def batch(self, tasks, step, split):
        """Return the data of the split, or those of the step."""
        inputs, targets = tasks[split]
        return (inputs[:, step], targets[:, step]) if self.fresh else (inputs, targets)

    def loss(self, params, batch):
        """Return the mean cross-entropy."""
        return self.problem.loss(list(params.values()), batch)


def at(examples: Examples, *index: int) -> Examples:
    """Return one task's examples, or one step's of one task."""
    return examples[0][index], examples[1][index]


def images(shape: tuple[int, ...], classes: int, generator: torch.Generator, dtype: torch.dtype) -> Examples:
    """Return random images (*shape, 784) and random classes (*shape,), rounded from float64 to ``dtype``."""
    inputs = torch.rand(*shape, IMAGE**2, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(classes, shape, generator=generator)


def mlp(widths: Sequence[int], activation: type[nn.Module], dtype: torch.dtype) -> tuple[nn.Module, Forward]:
    """Return a multi-layer perceptron with the activation after each hidden layer."""
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), activation())]
    function = {nn.ReLU: torch.relu, nn.Sigmoid: torch.sigmoid}[activation]

    def forward(params: Sequence[Tensor], x: Tensor) -> Tensor:
        *hidden, last = zip(params[::2], params[1::2], strict=True)
        for weight, bias in hidden:
            x = function(functional.linear(x, weight, bias))
        return functional.linear(x, *last)

    return _drawn(nn.Sequential(*layers[:-1]), dtype), forward


class ConvNet(nn.Module):
    """Four blocks of 3x3 convolution, batch normalisation, ReLU and 2x2 max-pooling, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        blocks = []
        for channels in (1, FILTERS, FILTERS, FILTERS):
            convolution = nn.Conv2d(channels, FILTERS, 3, padding=1)
            norm = nn.BatchNorm2d(FILTERS, track_running_stats=False)
            blocks.append(nn.Sequential(convolution, norm, nn.ReLU(), nn.MaxPool2d(2)))
        self.blocks, self.linear = nn.Sequential(*blocks), nn.Linear(FILTERS, CONV_WAYS)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images (num_images, 1, 28, 28)."""
        return self.linear(self.blocks(x).flatten(1))


def conv(dtype: torch.dtype) -> tuple[nn.Module, Forward]:
    """Return the convolutional network."""

    def forward(params: Sequence[Tensor], x: Tensor) -> Tensor:
        blocks, linear = params[:-2], params[-2:]
        for weight, bias, scale, shift in zip(*(blocks[i::4] for i in range(4)), strict=True):
            x = functional.conv2d(x, weight, bias, padding=1)
            x = functional.batch_norm(x, None, None, scale, shift, training=True)
            x = functional.max_pool2d(functional.relu(x), 2)
        return functional.linear(x.flatten(1), *linear)

    return _drawn(ConvNet(), dtype), forward


class PooledFirst(ConvNet):
    """The same network with ReLU after pooling, which is equal, and channels last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images (num_images, 1, 28, 28)."""
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks.children():
            convolution, norm, activation, pool = block.children()
            x = activation(pool(norm(convolution(x))))
        return self.linear(x.flatten(1))


def conv_pooled_first(dtype: torch.dtype) -> tuple[nn.Module, Forward]:
    """Return the convolutional network, computed in the other order."""

    def forward(params: Sequence[Tensor], x: Tensor) -> Tensor:
        blocks, linear = params[:-2], params[-2:]
        x = x.contiguous(memory_format=torch.channels_last)
        for weight, bias, scale, shift in zip(*(blocks[i::4] for i in range(4)), strict=True):
            x = functional.conv2d(x, weight, bias, padding=1)
            x = functional.batch_norm(x, None, None, scale, shift, training=True)
            x = functional.relu(functional.max_pool2d(x, 2))
        return functional.linear(x.flatten(1), *linear)

    return _drawn(PooledFirst(), dtype), forward


def _drawn(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Draw the parameters anew, the same in every process, and the same in every dtype but for rounding."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.data = p.data.to(dtype)
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (2 / p[0].numel()) ** 0.5)
            else:  # a scale or a shift
                noise = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.copy_(noise + float(name.endswith("1.weight")))
    return module
