"""Small real problems on which the guard is measured: plain torch modules, and the minibatches of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from learnedopt.tasks.data import images, text

Batches = Iterator[tuple[Tensor, Tensor]]
CONTEXT = 32


@dataclass(frozen=True)
class Problem:
    """A net, its data, and how many steps a run takes.

    ``trained`` is how many steps of Adam, of rate 0.003, the net has behind it when a run begins.
    """

    net: Callable[[], nn.Module]
    batches: Callable[[torch.Generator], Batches]
    num_steps: int
    trained: int = 0

    def start(self, seed: int) -> tuple[nn.Module, Batches]:
        """Return a net and its minibatches; the same for every optimizer."""
        torch.manual_seed(seed)
        model = self.net()
        batches = self.batches(torch.Generator().manual_seed(seed))
        optimizer = torch.optim.Adam(model.parameters(), 0.003)
        for _ in range(self.trained):
            optimizer.zero_grad()
            loss_on(model, next(batches)).backward()
            optimizer.step()
        return model, batches


@dataclass(frozen=True)
class ImageBatches:
    """Minibatches of MNIST or Fashion-MNIST, drawn with replacement.

    ``scale`` is by what pixels of 0..255 are divided; ``size`` the side they are averaged down to.
    """

    dataset: images.Dataset
    scale: float = 255.0
    size: int = 28
    batch_size: int = 128
    pixels: Tensor = field(init=False, compare=False)
    labels: Tensor = field(init=False, compare=False)

    def __post_init__(self) -> None:
        pixels, labels = images.load(self.dataset, "train")
        square = pixels.float().view(-1, 1, 28, 28)
        square = square if self.size == 28 else functional.avg_pool2d(square, 28 // self.size)
        object.__setattr__(self, "pixels", square.flatten(1) / self.scale)
        object.__setattr__(self, "labels", labels)

    def __call__(self, generator: torch.Generator) -> Batches:
        """Yield inputs (batch_size, size²) and classes (batch_size,) without end."""
        while True:
            chosen = torch.randint(len(self.labels), (self.batch_size,), generator=generator)
            yield self.pixels[chosen], self.labels[chosen]


@dataclass(frozen=True)
class TextBatches:
    """Pieces of the sources of Python's standard library, and the character after each of theirs."""

    batch_size: int = 16

    def __call__(self, generator: torch.Generator) -> Batches:
        """Yield symbols (batch_size, CONTEXT), twice, one character apart."""
        symbols = text.load("train").long()
        while True:
            first = torch.randint(len(symbols) - CONTEXT - 1, (self.batch_size,), generator=generator)
            pieces = symbols[first.unsqueeze(1) + torch.arange(CONTEXT + 1)]
            yield pieces[:, :-1], pieces[:, 1:]


class Transformer(nn.Module):
    """A causal transformer on characters."""

    def __init__(self, width: int = 32, depth: int = 1) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(text.NUM_SYMBOLS, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, text.NUM_SYMBOLS)
        self.mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)

    def forward(self, symbols: Tensor) -> Tensor:
        """Return logits (batch_size, CONTEXT, NUM_SYMBOLS)."""
        x = self.symbols(symbols) + self.places.weight
        return self.head(self.norm(self.body(x, mask=self.mask, is_causal=True)))


def mlp(inputs: int, hidden: tuple[int, ...], activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Return fully connected layers, ten classes at their end."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), activation()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 10))


def conv(side: int = 14, filters: tuple[int, int] = (8, 16)) -> nn.Module:
    """Return two convolutions of stride 2 and a linear layer."""
    first, second = filters
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)), nn.Conv2d(1, first, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(first, second, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(second * (-(-side // 4)) ** 2, 10),
    )  # fmt: skip


def loss_on(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy over examples, or over all characters."""
    inputs, targets = batch
    logits = model(inputs)
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
