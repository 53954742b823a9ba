"""Softmax regression on images whose labels are partly random, with clean images to validate on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core import tree
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, images, initial_params, streams


@final
@dataclass(frozen=True)
class NoisyImages(TaskFamily):
    """Data hyper-cleaning (Franceschi et al. 2017, section 5.1): which training labels are wrong is to be found out.

    ONE training set, drawn by ``data_seed``, serves all tasks, so that meta-parameters may belong to its examples; a
    task is a seed that draws the initial parameters. The model is softmax regression, its loss the mean cross-entropy.
    Inputs are pixels in [0, 1] minus the mean image of the training set, without which gradient descent needs a rate
    several times smaller. Parameters: ``weight`` (10, 784) and ``bias`` (10,). Batches are the same at every step:

    - "train": all of the training set, ``{"inputs": (n, 784), "targets": (n,), "index": (n,)}``; a share ``noise`` of
      the targets is drawn from all ten classes, so that a tenth of them is right by chance.
    - "valid": ``{"inputs", "targets"}`` of other images, with their right labels.

    Args:
        dataset: "mnist" or "fashion-mnist"; where the files are looked for is said in ``learnedopt.tasks.data.images``.
        num_train: images in the training set.
        num_valid: clean images to meta-train on.
        noise: the share of training labels that are random, from 0 to 1.
        data_seed: draws the images and the labels.
        dtype: "float32" or "float64"; by default torch's default dtype.
        meta_split: what the "valid" batch holds. "train": ``num_valid`` of images 1 to 50,000; "valid": images 50,001
            to 60,000; "test": the 10,000 test images. The training set is of images 1 to 50,000 in any case.

    Raises:
        ValueError: an option is out of its range; from ``batch``: there are fewer images than asked for.
        FileNotFoundError: from ``batch``: the data are not there and cannot be downloaded.
    """

    dataset: images.Dataset = "mnist"
    num_train: int = 5000
    num_valid: int = 5000
    noise: float = 0.5
    data_seed: int = 0
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"
    _made: dict[Any, Batch] = field(default_factory=dict[Any, Batch], init=False, repr=False, compare=False)
    """Batches that were made, by split and dtype: every step asks for them again."""

    def __post_init__(self) -> None:
        arguments.require_choice("dataset", self.dataset, images.Dataset)
        arguments.require_count("num_train", self.num_train)
        arguments.require_count("num_valid", self.num_valid)
        arguments.require_number("noise", self.noise, least=0)
        if self.noise > 1:
            raise ValueError(f"noise={self.noise!r} is no share of the labels; pass a number from 0 to 1")
        arguments.require_seed("data_seed", self.data_seed)
        arguments.require_common(self.dtype, self.meta_split)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw one seed a task."""
        return {"seed": streams.sample_seeds(num_tasks, generator)}

    def init_params(self, tasks: Tasks) -> Params:
        """Draw each task's parameters as ``nn.Linear`` does."""
        layout = initial_params.layer("layer", (images.NUM_CLASSES, images.NUM_PIXELS))
        drawn = initial_params.draw(layout, tasks["seed"], None, arguments.resolve_dtype(self.dtype))
        return {name.removeprefix("layer."): p for name, p in drawn.items()}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the split's images, the same for every task."""
        key = (split, arguments.resolve_dtype(self.dtype))
        if key not in self._made:
            self._made[key] = self._make(split)
        num_tasks = len(tasks["seed"])
        return {name: x.expand(num_tasks, *x.shape) for name, x in self._made[key].items()}

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the logits (n, 10)."""
        return functional.linear(batch["inputs"], params["weight"], params["bias"])

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the mean cross-entropy."""
        return functional.cross_entropy(self.outputs(params, batch), batch["targets"])

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Return the share of images that are classified as the batch's targets say."""
        logits = self.outputs(params, batch)
        return {"accuracy": (logits.argmax(-1) == batch["targets"]).to(logits.dtype).mean()}

    def wrong_labels(self) -> Tensor:
        """Return which of the training set's targets are not the images' labels: (num_train,) bool."""
        _, labels = images.load(self.dataset, "train")
        chosen, targets = self._training_set()
        return labels[chosen[: self.num_train]] != targets

    def _training_set(self) -> tuple[Tensor, Tensor]:
        """Return the images chosen, those to meta-train on after those to train on, and the training targets."""
        _, labels = images.load(self.dataset, "train")
        asked = self.num_train + self.num_valid
        if asked > len(labels):
            raise ValueError(
                f"num_train={self.num_train} and num_valid={self.num_valid} are {asked} images, {self.dataset} has "
                f"{len(labels)} to choose from; ask for fewer"
            )
        random = streams.stream(self.data_seed, "train")
        chosen = tree.from_numpy(random.permutation(len(labels))[:asked])
        targets = labels[chosen[: self.num_train]]
        noisy = tree.from_numpy(random.permutation(self.num_train)[: round(self.noise * self.num_train)])
        targets[noisy] = tree.from_numpy(random.integers(images.NUM_CLASSES, size=len(noisy)))
        return chosen, targets

    def _make(self, split: Split) -> Batch:
        pixels, labels = images.load(self.dataset, "train")
        chosen, targets = self._training_set()
        train, valid = chosen[: self.num_train], chosen[self.num_train :]
        if split == "train":
            own, rest = pixels[train], {"targets": targets, "index": torch.arange(self.num_train)}
        elif self.meta_split == "train":
            own, rest = pixels[valid], {"targets": labels[valid]}
        else:
            own, labels = images.load(self.dataset, self.meta_split)
            rest = {"targets": labels}
        # In float64 first, so that float32 batches are the same ones but for rounding.
        centred = (own.numpy() - pixels[train].numpy().mean(0, dtype=np.float64)) / 255
        return {"inputs": tree.from_numpy(centred).to(arguments.resolve_dtype(self.dtype)), **rest}
