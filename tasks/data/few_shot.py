"""Few-shot classification of images: tasks of N classes with K images each to learn from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, conv_net, image_array, initial_params, streams
from learnedopt.tasks.data.image_array import ClassImages
from learnedopt.tasks.module_family import ModuleFamily

BatchNorm: TypeAlias = Literal["transductive", "support"]


@dataclass(frozen=True)
class FewShotImages(TaskFamily):
    """N-way K-shot classification: mean cross-entropy (Vinyals et al. 2016); what the families of images share.

    A task is ``ways`` different classes in random order, which are its labels 0, 1, ..., and of each class ``shots``
    images for the support set (split "train") and ``queries`` others for the query set ("valid"), the same at every
    step unless ``batch_shots`` is given. A batch is sorted by class, with pixels in [0, 1], made on the CPU:
    ``{"inputs": (ways·images, channels, side, side), "targets": (ways·images,)}``. Parameters: see
    ``learnedopt.tasks.data.conv_net.layout``.

    Batch normalisation uses the statistics of images at hand, never running ones. With "transductive" these are the
    images of the batch, so that query images are classified together and see each other, as in the experiments of
    Finn et al. (2017), Nichol et al. (2018, "transduction") and Rajeswaran et al. (2019). With "support" they are the
    support images, also for the query set, whose batches then hold the support images as "support".

    Args:
        ways: classes a task, N.
        shots: images a class to learn from, K.
        queries: images a class to test on.
        model: "conv", "conv-pool" or "mlp", see ``learnedopt.tasks.data.conv_net.layout``.
        width: filters of a convolution; units of the narrowest layer of the "mlp".
        dtype: "float32" or "float64"; by default torch's default dtype.
        meta_split: which classes: those to meta-train on, to validate on, or to test on.
        batch_norm: "transductive" or "support".
        init_seed: all tasks start at the point that this seed draws, as torch's layers do by default; None lets each
            task draw its own.
        batch_shots: images a class in the "train" batch of one inner step; the steps go round the support set, so that
            successive ones see different images, as Reptile needs (Nichol et al. 2018). None takes all.

    Raises:
        ValueError: an option is out of its range; from ``sample``: ``ways`` is more than there are classes, or
            ``shots + queries`` more than a class has images.
    """

    ways: int = 5
    shots: int = 1
    queries: int = 15
    model: conv_net.Model = "conv"
    width: int = 64
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"
    batch_norm: BatchNorm = "transductive"
    init_seed: int | None = 0
    batch_shots: int | None = None

    @abstractmethod
    def images(self) -> ClassImages:
        """Return the images of ``meta_split``'s classes, read once in a process."""

    @abstractmethod
    def image_shape(self) -> tuple[int, int]:
        """Return the side of an image and its channels."""

    def __post_init__(self) -> None:
        for option in ("ways", "shots", "queries", "width"):
            arguments.require_count(option, getattr(self, option))
        if self.ways < 2:
            raise ValueError(f"ways={self.ways!r} leaves nothing to tell apart; pass at least 2")
        arguments.require_choice("model", self.model, conv_net.Model)
        arguments.require_choice("batch_norm", self.batch_norm, BatchNorm)
        arguments.require_common(self.dtype, self.meta_split)
        arguments.require_seed("init_seed", self.init_seed)
        if self.batch_shots is not None:
            arguments.require_count("batch_shots", self.batch_shots)
            if self.batch_shots > self.shots:
                raise ValueError(
                    f"batch_shots={self.batch_shots} are taken from shots={self.shots} images a class; pass at most as "
                    "many, or None for all"
                )

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw classes and images: {"seed": (num_tasks,), "train": (num_tasks, ways·shots), "valid": ...} indices."""
        _, first, counts = self.images()
        self._require_enough(counts)

        def uniform(*shape: int) -> Tensor:
            device = generator.device
            return torch.rand(num_tasks, *shape, generator=generator, dtype=torch.float32, device=device).cpu()

        # The largest of independent numbers are a draw without replacement, in random order.
        classes = uniform(len(counts)).topk(self.ways).indices
        noise = uniform(self.ways, int(counts.max()))
        absent = torch.arange(noise.shape[-1]) >= counts[classes].unsqueeze(-1)
        drawn = noise.masked_fill(absent, -1.0).topk(self.shots + self.queries).indices + first[classes].unsqueeze(-1)
        seeds = streams.sample_seeds(num_tasks, generator)
        support, query = drawn[..., : self.shots].flatten(1), drawn[..., self.shots :].flatten(1)
        return {"seed": seeds, "train": support.to(seeds.device), "valid": query.to(seeds.device)}

    def init_params(self, tasks: Tasks) -> Params:
        """Draw the start, one for all tasks or one a task, as ``init_seed`` says."""
        side, channels = self.image_shape()
        layout = conv_net.layout(self.model, self.width, channels, side, self.ways)
        return initial_params.draw(layout, tasks["seed"], self.init_seed, arguments.resolve_dtype(self.dtype))

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return all images of the split, or of the support set those of the step."""
        inputs = self._gather(self._of_step(tasks[split], step) if split == "train" else tasks[split])
        labels = torch.arange(self.ways).repeat_interleave(inputs.shape[1] // self.ways)
        batch = {"inputs": inputs, "targets": labels.repeat(len(inputs), 1)}
        if self.batch_norm == "support" and split == "valid":
            batch["support"] = self._gather(tasks["train"])
        return batch

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the logits (ways·images, ways)."""
        return conv_net.logits(self.model, params, batch["inputs"], batch.get("support"))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the mean cross-entropy."""
        return functional.cross_entropy(self.outputs(params, batch), batch["targets"])

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Return the share of images that are classified right."""
        return {"accuracy": accuracy(self.outputs(params, batch), batch["targets"])}

    def _of_step(self, index: Tensor, step: int) -> Tensor:
        if self.batch_shots is None:
            return index
        turn = (step * self.batch_shots + torch.arange(self.batch_shots, device=index.device)) % self.shots
        return torch.unflatten(index, 1, (self.ways, self.shots))[..., turn].flatten(1)

    def _gather(self, index: Tensor) -> Tensor:
        pixels = self.images().pixels
        image_array.require_mapped(pixels)
        chosen = pixels.index_select(0, index.flatten().cpu())
        images = torch.unflatten(chosen.to(arguments.resolve_dtype(self.dtype)).div_(255), 0, index.shape)
        return images.movedim(-1, 2)  # a view: channels stay last in memory, where convolutions on the CPU are fastest

    def _require_enough(self, counts: Tensor) -> None:
        if self.ways > len(counts):
            raise ValueError(
                f"ways={self.ways}: {self!r} has only {len(counts)} classes in meta_split={self.meta_split!r}; pass "
                "fewer ways, or a split with more classes"
            )
        fewest = int(counts.min())
        if self.shots + self.queries > fewest:
            raise ValueError(
                f"shots={self.shots} and queries={self.queries} need {self.shots + self.queries} images a class, but "
                f"{self!r} has classes of only {fewest}; pass fewer shots or queries, or leave out small classes"
            )


@final
class ModuleOnImages(TaskFamily):
    """Few-shot classification with a module of one's own.

    Args:
        episodes: where the tasks come from; its ``model``, ``width`` and ``batch_norm`` play no part.
        build: returns a new module from images (num_images, channels, side, side) to logits (num_images, ways), without
            randomness and running statistics of its own; see ``learnedopt.ModuleFamily``.

    Raises:
        TypeError: ``build`` returns something else than a module.
        ValueError: the module cannot be a pure function.

    Example:
        >>> from learnedopt.tasks import Omniglot
        >>> family = ModuleOnImages(Omniglot(ways=20), lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 20)))
    """

    def __init__(self, episodes: FewShotImages, build: Callable[[], nn.Module]) -> None:
        self.episodes = episodes
        self.module: ModuleFamily = ModuleFamily(build, functional.cross_entropy, _no_data)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw tasks as ``episodes`` does."""
        return self.episodes.sample(num_tasks, generator)

    def init_params(self, tasks: Tasks) -> Params:
        """Build the module under ``episodes``' ``init_seed``, or under each task's own seed where that is None."""
        seed, seeds = self.episodes.init_seed, tasks["seed"]
        if seed is None:
            return self.module.init_params({"seed": seeds})
        shared = self.module.init_params({"seed": torch.tensor([seed])})
        return {name: p.expand(len(seeds), *p.shape[1:]).clone() for name, p in shared.items()}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return all images of the split."""
        return self.episodes.batch(tasks, step, split)

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the module's logits."""
        return self.module.outputs(params, batch)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the mean cross-entropy."""
        return self.module.loss(params, batch)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Return the share of images that are classified right."""
        return {"accuracy": accuracy(self.outputs(params, batch), batch["targets"])}

    def faults(self, params: Params, batch: Batch, *, second_derivatives: bool = False) -> list[str]:
        """Say what ``learnedopt.ModuleFamily`` finds."""
        return self.module.faults(params, batch, second_derivatives=second_derivatives)


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the share of rows whose largest logit is the target's."""
    return (logits.argmax(-1) == targets).to(logits.dtype).mean()


def _no_data(seed: int, step: int, split: Split) -> tuple[Any, Any]:
    raise AssertionError("batches come from the episodes")
