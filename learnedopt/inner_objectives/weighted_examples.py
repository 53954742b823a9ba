"""A learned weight for every training example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core.inner_objective import InnerObjective
from learnedopt.core.task import Batch, TaskFamily
from learnedopt.core.tree import Params, Theta
from learnedopt.inner_objectives.bases import arguments

PerExample: TypeAlias = Literal["cross_entropy", "squared"]


@final
@dataclass(frozen=True)
class WeightedExamples(InnerObjective):
    """``1/n Σ_i σ(w_index(i)) · ℓ_i`` over the n examples of a batch: data hyper-cleaning.

    Franceschi et al. (2017), section 5.1, and Shaban et al. (2019), section 5.2: examples that do not help on clean
    validation data are weighted down, wrong labels before all. The mean is over the batch, not over the weights, so
    that small weights also slow training down. The family's own loss is left out inside, and counts alone outside.

    The family's batch must be a dict with ``"targets"`` and ``"index"``: (n,) int64, which of the training set's
    examples each one is; ``family.outputs`` must return (n, ...).

    Args:
        num_examples: the size of the training set: indices run from 0 to ``num_examples - 1``.
        per_example: ℓ_i. "cross_entropy": of logits (n, classes) and classes (n,); "squared": half the squared distance
            of outputs and targets of equal shape (n, ...), summed over an example's entries.

    Theta: ``example_weights`` (num_examples,), the raw w of all weights σ(w) in (0, 1); they start at w = 0.

    Raises:
        ValueError: ``num_examples`` is not a count; ``per_example`` is no such choice; at use, the batch lacks an entry
            or one has another shape.
        IndexError: at use, an index is not one of the training set.

    Example:
        >>> objective = WeightedExamples(num_examples=5000)
        >>> objective.init_theta(torch.Generator())["example_weights"].shape
        torch.Size([5000])
    """

    num_examples: int
    per_example: PerExample = "cross_entropy"

    def __post_init__(self) -> None:
        arguments.require_count("WeightedExamples", "num_examples", self.num_examples)
        arguments.require_choice("WeightedExamples", "per_example", self.per_example, PerExample)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return raw weights of 0: every example counts the same, by half."""
        return {"example_weights": torch.zeros(self.num_examples, device=generator.device)}

    def loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Batch) -> Tensor:
        """Return the weighted mean of the losses of the batch's examples."""
        targets = arguments.entry("WeightedExamples", batch, "targets", "what each example should give")
        index = arguments.entry("WeightedExamples", batch, "index", "the number of each example in the training set")
        losses = self._losses(family.outputs(params, batch), targets)
        if index.shape != losses.shape or index.dtype != torch.int64:
            raise ValueError(
                f"WeightedExamples: batch['index'] is {index.dtype} of shape {tuple(index.shape)}, the batch has "
                f"{len(losses)} examples; give each its number in the training set, int64 of shape {(len(losses),)}"
            )
        try:
            raw = theta["example_weights"].index_select(0, index)
        except (IndexError, RuntimeError) as error:  # the second where tasks are together
            if "out of" not in str(error):
                raise
            raise ValueError(
                f"WeightedExamples: batch['index'] names an example outside 0 to {self.num_examples - 1} "
                f"({error}); set num_examples to the size of the training set"
            ) from error
        return (raw.to(losses.dtype).sigmoid() * losses).mean()

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ℓ (n,)."""
        if self.per_example == "cross_entropy":
            if outputs.ndim == 2 and targets.shape == outputs.shape[:1] and not targets.is_floating_point():
                return functional.cross_entropy(outputs, targets, reduction="none")
            wanted = "logits (n, classes) and integer classes (n,)"
        else:
            if outputs.ndim and outputs.shape == targets.shape:
                return 0.5 * (outputs - targets).square().reshape(len(outputs), -1).sum(1)
            wanted = "outputs and targets of one shape (n, ...)"
        raise ValueError(
            f"WeightedExamples: per_example={self.per_example!r} needs {wanted}, got outputs {tuple(outputs.shape)} "
            f"and targets {tuple(targets.shape)} of {targets.dtype}; choose another per_example, or reshape them in "
            "the family"
        )
