"""How far an inner loop's end is from a target: a number a task, differentiable in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, final

from torch import Tensor
from torch.nn import functional

from learnedopt.core import tree
from learnedopt.core.carry import Carry
from learnedopt.core.inner import InnerLoop
from learnedopt.core.task import Split

Matching: TypeAlias = Callable[[InnerLoop, Carry, Carry, Split], Tensor]
"""``(loop, target, end, split) -> distances (num_tasks,)``; ``split`` is the target's."""


@final
@dataclass(frozen=True)
class SquaredDistance:
    """Half the squared Euclidean distance, summed over all parameters of a task."""

    def __call__(self, loop: InnerLoop, target: Carry, end: Carry, split: Split) -> Tensor:
        """Return each task's distance (num_tasks,)."""
        a, b = (tree.ravel([carry.params[k] for k in end.params]) for carry in (target, end))
        return 0.5 * (a - b).square().sum(1)


@final
@dataclass(frozen=True)
class KLDivergence:
    """The divergence between the two models' categorical outputs, on one batch at the end's step.

    The family's ``outputs`` are logits ``(examples, ..., classes)``; it is a mean over all dimensions but the classes.

    Args:
        direction: "forward" is ``KL(target || end)``, whose gradient moves the end's probabilities to the target's;
            "reverse" is ``KL(end || target)``, which with logits that are linear in the parameters is, for a target one
            plain step of size a away, exactly ``a J^T F grad f`` (F the outputs' Fisher matrix) whatever a is.
        split: of the batch; None for the target's.

    Raises:
        NotImplementedError: the family has no outputs.
        ValueError: its outputs are no logits of at least two classes.
    """

    direction: Literal["forward", "reverse"] = "forward"
    split: Split | None = None

    def __post_init__(self) -> None:
        if self.direction not in ("forward", "reverse"):
            raise ValueError(
                f"direction={self.direction!r} is neither 'forward', which is KL(target || end), nor 'reverse', which "
                "is KL(end || target)"
            )
        if self.split not in ("train", "valid", None):
            raise ValueError(f"split={self.split!r} is neither 'train' nor 'valid', nor None for the target's")

    def __call__(self, loop: InnerLoop, target: Carry, end: Carry, split: Split) -> Tensor:
        """Return each task's divergence (num_tasks,)."""
        # Both models see the same batch, so the target is evaluated at the end's step.
        of_target, of_end = (self._log_probabilities(loop, c, split) for c in (target._replace(step=end.step), end))
        p, q = (of_target, of_end) if self.direction == "forward" else (of_end, of_target)
        divergence = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        return divergence.reshape(divergence.shape[0], -1).mean(1)

    def _log_probabilities(self, loop: InnerLoop, carry: Carry, split: Split) -> Tensor:
        outputs = cast("object", loop.outputs(carry, self.split or split))  # who knows what a user's family gives
        if not isinstance(outputs, Tensor) or outputs.ndim < 3 or outputs.shape[-1] < 2:
            got = tuple(outputs.shape[1:]) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"KLDivergence compares distributions over classes, but {type(loop.family).__name__}.outputs gives "
                f"{got} for a task, which are no logits (examples, ..., classes) of at least two classes; use "
                "SquaredDistance(), or return logits (two, such as (0, z), for a model of yes or no)"
            )
        return outputs.log_softmax(-1)


def require_distances(matching: Matching, distances: Tensor, num_tasks: int) -> Tensor:
    """Return what a matching found; raise ValueError unless it is one distance a task."""
    found = cast("object", distances)  # who knows what a user's own returns
    shape = tuple(distances.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != (num_tasks,):
        raise ValueError(
            f"the matching {matching!r} must return one distance per task, shape {(num_tasks,)}, got {shape}; the mean "
            "over tasks is the objective's business"
        )
    return distances


def require_matching(matching: Matching) -> None:
    """Raise TypeError unless a matching can be called."""
    if isinstance(matching, type) or not callable(matching):
        raise TypeError(
            f"matching={matching!r} cannot be called on (loop, target, end, split); pass SquaredDistance(), "
            "KLDivergence(), or a function of your own"
        )
