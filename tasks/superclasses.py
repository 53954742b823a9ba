"""Classification into super-classes of Fashion-MNIST, each task with other classes of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, images, streams

SUPERCLASSES = ((0, 2, 4, 6), (1, 3), (5, 7, 9), (8,))
"""Tops, trousers and dresses, shoes, bags: which of Fashion-MNIST's classes each label stands for."""


@final
@dataclass(frozen=True)
class Superclasses(TaskFamily):
    """Online multinomial logistic regression on Fashion-MNIST: one example a step, four labels that keep their meaning.

    A task draws one class of each super-class (tops, trousers and dresses, shoes, bags), ``shots`` of its images for
    each split, without replacement, and the order in which they come: ``4 shots`` losses, that of step i being number i
    modulo so many. Inputs are ``num_features`` principal components, divided by their length. Components are those of
    images 1 to 50,000, whatever the split. Parameters: ``weight`` (4, num_features), from the origin. A batch is
    ``{"inputs": (num_features,), "targets": ()}``.

    Args:
        shots: images a class and split.
        num_features: principal components.
        dtype: "float32" or "float64"; by default torch's default dtype.
        meta_split: "train" draws from images 1 to 50,000, "valid" from 50,001 to 60,000, "test" from the test images.

    Raises:
        ValueError: an option is out of its range.
        FileNotFoundError: from ``sample``: the data are not there and cannot be downloaded.

    Example:
        >>> family = Superclasses(shots=4)  # 16 losses a task
    """

    shots: int = 1
    num_features: int = 50
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"

    def __post_init__(self) -> None:
        for option in ("shots", "num_features"):
            arguments.require_count(option, getattr(self, option))
        if self.num_features > images.NUM_PIXELS:
            raise ValueError(f"num_features={self.num_features}: an image has {images.NUM_PIXELS} pixels; pass fewer")
        arguments.require_common(self.dtype, self.meta_split)

    @property
    def num_losses(self) -> int:
        """m, the losses of a task."""
        return self.shots * len(SUPERCLASSES)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw each task's images and labels, both (num_tasks, 2, num_losses): those of both splits, in their order."""
        by_class = _features(self.meta_split, self.num_features)[1]
        drawn = [_draw(seed, self.shots, by_class) for seed in tree.numbers(streams.sample_seeds(num_tasks, generator))]
        images_of, labels = (tree.from_numpy(np.stack(x)) for x in zip(*drawn, strict=True))
        return {"images": images_of, "labels": labels}

    def init_params(self, tasks: Tasks) -> Params:
        """Start at the origin."""
        shape = (len(tasks["labels"]), len(SUPERCLASSES), self.num_features)
        return {"weight": torch.zeros(shape, dtype=arguments.resolve_dtype(self.dtype))}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the step's example of each task."""
        inputs, _ = _features(self.meta_split, self.num_features)
        chosen, labels = (tasks[k][:, int(split == "valid"), step % self.num_losses] for k in ("images", "labels"))
        return {"inputs": inputs[chosen].to(arguments.resolve_dtype(self.dtype)), "targets": labels}

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the logits (4,)."""
        return params["weight"] @ batch["inputs"]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the cross-entropy of the example."""
        logits = self.outputs(params, batch)  # torch's own cross_entropy is slow under vmap
        return logits.logsumexp(0) - logits.gather(0, batch["targets"].reshape(1)).squeeze(0)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Return 1 where the example is classified right."""
        logits = self.outputs(params, batch)
        return {"accuracy": (logits.argmax(-1) == batch["targets"]).to(logits.dtype)}


@functools.cache
def _components(num_features: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the leading principal components (784, num_features) of the training images."""
    pixels = images.load("fashion-mnist", "train").pixels.numpy() / 255.0
    mean = pixels.mean(0)
    centred = pixels - mean
    return mean, np.linalg.eigh(centred.T @ centred / len(pixels))[1][:, ::-1][:, :num_features]


@functools.cache
def _features(meta_split: arguments.MetaSplit, num_features: int) -> tuple[Tensor, tuple[np.ndarray, ...]]:
    """Return all images' unit features (num_images, num_features), and which images each class has."""
    mean, components = _components(num_features)
    pixels, labels = images.load("fashion-mnist", meta_split)
    scores = (pixels.numpy() / 255.0 - mean) @ components
    unit = scores / np.linalg.norm(scores, axis=1, keepdims=True)
    return tree.from_numpy(unit), tuple(np.flatnonzero(labels.numpy() == c) for c in range(images.NUM_CLASSES))


def _draw(seed: int, shots: int, by_class: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return a task's images and their labels, both (2, 4 shots): the examples of both splits in their order."""
    random = streams.stream(seed, "init")
    chosen = [int(random.choice(classes)) for classes in SUPERCLASSES]
    drawn = np.stack([random.choice(by_class[c], size=(2, shots), replace=False) for c in chosen], axis=1)
    labels = np.broadcast_to(np.arange(len(chosen))[None, :, None], drawn.shape)
    order = np.stack([random.permutation(shots * len(chosen)) for _ in range(2)])
    images_of, labels = (np.take_along_axis(x.reshape(2, -1), order, axis=1) for x in (drawn, labels))
    return images_of, labels
