"""Tasks of several families, whose parameters may differ in names and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.containers import is_tuple
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, streams
from learnedopt.tasks.data.wrapping import with_common


@final
@dataclass(frozen=True)
class Mixture(TaskFamily):
    """Each task is one of a family that is drawn by weight: what a rule for every net is meta-trained on.

    Tasks of different shapes cannot be one batch, so no inner loop runs a mixture itself: ``split`` says which tasks
    are whose, and ``TaskByTask`` and ``Validation`` run them on their own families. To evaluate, take each of
    ``families``. A task is ``{"member": (), "seed": ()}``, both int64: the number of its family, and the seed that the
    family draws it with.

    Args:
        members: pairs of a positive weight and a family; a task's chance to be of a family is its share of the weights.
            In a configuration a family is ``{"name": ..., "options": {...}}``.
        dtype: of all families, in place of their own.
        meta_split: of all families, in place of their own.

    Raises:
        TypeError: ``members`` are no pairs of weights and families.
        ValueError: there is none, one is there twice or a mixture itself, a weight is not positive, or a family has no
            such option to hand it on to; from everything that an inner loop asks for: see above.

    Example:
        >>> family = Mixture(((0.7, learnedopt.tasks.make("image-mlp")), (0.3, learnedopt.tasks.make("text-rnn"))))
        >>> tasks = family.sample(8, torch.Generator().manual_seed(0))
        >>> for member, _, positions in family.split(tasks):
        ...     print(type(member).__name__, positions)
        ImageMLP (2, 4, 6, 7)
        TextRNN (0, 1, 3, 5)
    """

    members: tuple[tuple[float, TaskFamily], ...]
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit | None = None

    def __post_init__(self) -> None:
        members: list[tuple[float, TaskFamily]] = []
        for i, pair in enumerate(_pairs(self.members)):
            arguments.require_number(f"the weight of members[{i}]", pair[0], least=0)
            if pair[0] == 0:
                raise ValueError(f"the weight of members[{i}] is 0, so no task is of it; leave it out")
            if pair[1] in [family for _, family in members]:
                raise ValueError(f"members[{i}] is there twice: {pair[1]!r}; add up the weights")
            members.append((pair[0], pair[1]))
        handed = tuple((weight, with_common(family, self.dtype, self.meta_split)) for weight, family in members)
        object.__setattr__(self, "members", handed)

    @property
    def families(self) -> tuple[TaskFamily, ...]:
        """The members without their weights."""
        return tuple(family for _, family in self.members)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw each task's family, and a seed for it."""
        weights = torch.tensor([weight for weight, _ in self.members], dtype=torch.float64)
        chance = torch.rand(num_tasks, generator=generator, dtype=torch.float64, device=generator.device)
        bounds = (weights.cumsum(0) / weights.sum())[:-1].to(chance.device)
        member = torch.searchsorted(bounds, chance, right=True)
        return {"member": member, "seed": streams.sample_seeds(num_tasks, generator)}

    def split(self, tasks: Tasks) -> list[tuple[TaskFamily, Tasks, tuple[int, ...]]]:
        """Return each family that has some of these tasks, with these, batched, and where each of them stood.

        Each is what the family samples with a generator of the task's seed, so it does not depend on the others.
        """
        numbers: list[int] = tree.numbers(tasks["member"])
        found: list[tuple[TaskFamily, Tasks, tuple[int, ...]]] = []
        for member, family in enumerate(self.families):
            positions = tuple(i for i, number in enumerate(numbers) if number == member)
            seeds = tasks["seed"][list(positions)]
            own = [family.sample(1, torch.Generator().manual_seed(seed)) for seed in tree.numbers(seeds)]
            if own:
                found.append((family, tree.concatenate(own), positions))
        return found

    def init_params(self, tasks: Tasks) -> Params:
        """Raise ValueError: a mixture has no parameters of one shape."""
        self._refuse()

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Raise ValueError."""
        self._refuse()

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Raise ValueError."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"the tasks of a mixture ({', '.join(type(family).__name__ for family in self.families)}) differ in shape, "
            "so one inner loop cannot run them together: meta-train with the estimator TaskByTask, which runs each on "
            "its own family, and evaluate on each of mixture.families"
        )


def _pairs(members: Any) -> Sequence[Any]:
    pairs = is_tuple(members) and all(is_tuple(pair) and len(pair) == 2 for pair in members)
    if not pairs or not all(isinstance(family, TaskFamily) for _, family in members):
        raise TypeError(
            f"members={members!r} are no pairs of a weight and a family; pass such as ((0.5, family), (0.5, other))"
        )
    if not members:
        raise ValueError("members=() are no families to draw from; pass one pair of a weight and a family at least")
    return members
