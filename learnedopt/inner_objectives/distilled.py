"""Dataset distillation: a few learned examples in place of the training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor

from learnedopt.core.inner_objective import InnerObjective
from learnedopt.core.task import Batch, TaskFamily
from learnedopt.core.tree import Params, Theta
from learnedopt.inner_objectives.bases import arguments


@final
@dataclass(frozen=True)
class DistilledData(InnerObjective):
    """``family.loss(x; learned images, their labels)`` in place of the loss on the task's own examples.

    Wang et al. (2018), equation 5, with fixed labels: ``per_class`` images of each class 0, 1, ..., learned so that
    training on them alone does well on real examples. All inner steps see all images. Outside, the family's loss on its
    own batch counts alone.

    The family's batch must be a dict with ``"inputs"`` (n, *shape) and ``"targets"`` (n,), integer classes; the learned
    examples take the place of these two, and of any further entry, which tells of examples that are not seen.

    Args:
        shape: of one example's inputs.
        num_classes: of the labels.
        per_class: learned images a class.
        std: of the normal noise with mean 0 that the images start from.

    Theta: ``images`` (num_classes * per_class, *shape), those of one class beside one another.

    Raises:
        TypeError: ``std`` is not a number.
        ValueError: a count is none, ``shape`` is no tuple of counts, or ``std`` is negative; at use, the batch is not
            as said above.

    Example:
        >>> objective = DistilledData(shape=(784,), per_class=2)
        >>> objective.init_theta(torch.Generator())["images"].shape
        torch.Size([20, 784])
    """

    shape: tuple[int, ...]
    num_classes: int = 10
    per_class: int = 1
    std: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(cast("object", self.shape), tuple):
            raise ValueError(f"DistilledData: shape={self.shape!r} is not a tuple; pass that of one input, as (784,)")
        for i, size in enumerate(self.shape):
            arguments.require_count("DistilledData", f"shape[{i}]", size)
        arguments.require_count("DistilledData", "num_classes", self.num_classes)
        arguments.require_count("DistilledData", "per_class", self.per_class)
        arguments.require_number("DistilledData", "std", self.std)
        if self.std < 0:
            raise ValueError(f"DistilledData: std={self.std!r} is negative; pass 0 or more")

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Draw the images from N(0, std²)."""
        size = (self.num_classes * self.per_class, *self.shape)
        return {"images": self.std * torch.randn(size, generator=generator, device=generator.device)}

    def loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Batch) -> Tensor:
        """Return the family's loss on the learned images."""
        inputs = arguments.entry("DistilledData", batch, "inputs", "what the model sees of each example")
        targets = arguments.entry("DistilledData", batch, "targets", "the class of each example")
        if inputs.shape[1:] != self.shape or not inputs.is_floating_point():
            raise ValueError(
                f"DistilledData learns inputs of shape {self.shape}, the family's are {inputs.dtype} of shape "
                f"{tuple(inputs.shape[1:])}; pass shape={tuple(inputs.shape[1:])} for floating-point inputs, others "
                "cannot be learned"
            )
        if targets.shape != inputs.shape[:1] or targets.is_floating_point() or targets.dtype == torch.bool:
            raise ValueError(
                f"DistilledData: batch['targets'] is {targets.dtype} of shape {tuple(targets.shape)}, the labels of "
                f"learned examples are integer classes (n,) as cross-entropy takes them; of {len(inputs)} examples "
                f"give {(len(inputs),)} integers"
            )
        images = theta["images"].to(inputs.dtype)
        return family.loss(params, {"inputs": images, "targets": self.labels(targets)})

    def labels(self, like: Tensor) -> Tensor:
        """Return the class of each image, on the device and in the dtype of ``like``."""
        classes = torch.arange(self.num_classes, device=like.device, dtype=like.dtype)
        return classes.repeat_interleave(self.per_class)
