"""Minibatches of images: what the families that train networks on whole data sets share."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from learnedopt.core import tree
from learnedopt.core.task import Split
from learnedopt.tasks.data import arguments, characters, images, streams

Dataset: TypeAlias = Literal["mnist", "fashion-mnist", "omniglot-characters"]
MOMENTS: dict[Dataset, tuple[float, float]] = {**images.MOMENTS, "omniglot-characters": (0.0840, 0.2395)}
"""Mean and standard deviation of all pixels, scaled to [0, 1]: of the 60,000 training images, or of all drawings."""
_CHUNK = 5000  # images that are scaled down at once
_SCALED: MutableMapping[Tensor, dict[Any, Tensor]] = WeakTensorKeyDictionary()
"""Whole data sets scaled down, which would otherwise take longer at every step than a small network's gradient."""


@final
@dataclass(frozen=True)
class Minibatches:
    """Minibatches of a data set: every step's is drawn afresh, with replacement, by the task's seed.

    Args:
        dataset: "mnist", "fashion-mnist" or "omniglot-characters".
        batch_size: images a minibatch.
        dtype: of the pixels; by default torch's default dtype.
        meta_split: which images. Of the MNISTs, "train" uses images 1 to 50,000, "valid" images 50,001 to 60,000,
            "test" the 10,000 test images. Of the characters, see ``learnedopt.tasks.data.characters``, other alphabets:
            99, 89 and 98 classes; the first 15 drawings of each.
        crop: the side of the central square that is seen, even.
        size: the side that the square is scaled down to by averaging, a divisor of ``crop``; None leaves it as it is.
        standardize: subtract the mean of all pixels and divide by their standard deviation, both of the whole data set
            at full size, see ``MOMENTS``.
        held_out: "valid" minibatches are drawn from images that no "train" minibatch holds: the 10,000 test images, or
            the characters' last 5 drawings. A loss on them is a test loss: to evaluate with, never to meta-train on.
            Otherwise both splits are independent draws from the same images.

    Raises:
        TypeError: ``standardize`` or ``held_out`` is not a bool.
        ValueError: an option is out of its range, or nothing is left to hold out.
    """

    dataset: Dataset
    batch_size: int
    dtype: arguments.DType | None
    meta_split: arguments.MetaSplit
    crop: int = images.SIDE
    size: int | None = None
    standardize: bool = False
    held_out: bool = False

    def __post_init__(self) -> None:
        arguments.require_choice("dataset", self.dataset, Dataset)
        arguments.require_count("batch_size", self.batch_size)
        arguments.require_common(self.dtype, self.meta_split)
        arguments.require_count("crop", self.crop)
        if self.crop > images.SIDE or self.crop % 2:
            raise ValueError(f"crop={self.crop!r} cannot be centred; pass an even number of at most {images.SIDE}")
        if self.size is not None:
            arguments.require_count("size", self.size)
            if self.crop % self.size:
                raise ValueError(f"size={self.size!r} does not divide crop={self.crop}: blocks of pixels are averaged")
        for option in ("standardize", "held_out"):
            if not isinstance(getattr(self, option), bool):
                raise TypeError(f"{option}={getattr(self, option)!r} is neither True nor False")
        if self.held_out and self.meta_split == "test" and self.dataset != "omniglot-characters":
            raise ValueError(
                f"held_out=True with meta_split='test': of {self.dataset} the test images are what is held out, so no "
                "network may train on them; pass meta_split='train', or held_out=False"
            )

    @property
    def side(self) -> int:
        """The side of the square that is seen."""
        return self.crop if self.size is None else self.size

    @property
    def num_classes(self) -> int:
        """How many labels there are, known without reading the data."""
        return images.NUM_CLASSES if self.dataset != "omniglot-characters" else characters.NUM_CLASSES[self.meta_split]

    def draw(self, seeds: Tensor, step: int, split: Split) -> tuple[Tensor, Tensor]:
        """Return a step's minibatches, one a seed, on the CPU.

        Args:
            seeds: (num_tasks,) int64.
            step: the inner step.
            split: "train" or "valid".

        Returns:
            Pixels (num_tasks, batch_size, side, side), in [0, 1] unless standardized, and labels (num_tasks,
            batch_size) int64.
        """
        pixels, labels = self.all_images(split)
        drawn = [
            streams.stream(s, split, step).integers(len(labels), size=self.batch_size) for s in tree.numbers(seeds)
        ]
        index = tree.from_numpy(np.concatenate(drawn))
        seen = self._seen(pixels.index_select(0, index)) if self.size is None else self._scaled(pixels)[index]
        shape = (len(drawn), self.batch_size)
        return seen.reshape(*shape, self.side, self.side), labels.index_select(0, index).reshape(shape)

    def all_images(self, split: Split) -> images.Images:
        """Return what a split's minibatches are drawn from, as stored: whole, and neither scaled nor standardized."""
        apart = self.held_out and split == "valid"
        if self.dataset == "omniglot-characters":
            return characters.load(self.meta_split, held_out=apart)
        return images.load(self.dataset, "test" if apart else self.meta_split)

    def _scaled(self, pixels: Tensor) -> Tensor:
        """Return what the network sees of a whole data set, made once in a process: 39 MB for 50,000 of 14x14."""
        made = _SCALED.setdefault(pixels, {})
        key = (self.crop, self.size, self.standardize, arguments.resolve_dtype(self.dtype))
        if key not in made:
            made[key] = torch.cat([self._seen(part) for part in torch.split(pixels, _CHUNK)])
        return made[key]

    def _seen(self, pixels: Tensor) -> Tensor:
        """Return what the network sees of images (num_images, 784): (num_images, side, side)."""
        margin = (images.SIDE - self.crop) // 2
        inner = slice(margin, images.SIDE - margin)
        square = pixels.reshape(-1, images.SIDE, images.SIDE)[:, inner, inner]
        inputs = square.to(arguments.resolve_dtype(self.dtype)).div_(255)
        if self.standardize:
            mean, std = MOMENTS[self.dataset]
            inputs = (inputs - mean) / std
        return inputs if self.size is None else functional.avg_pool2d(inputs, self.crop // self.size)
