"""What the outer level wants of an inner loop.

A meta-objective is a callable ``(loop, theta, rollout) -> scalar``, or ``-> (scalar, next carry)`` where training goes
on from elsewhere than the rollout's end. The scalar must be a mean over tasks, so that tasks may be run in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Rollout, Tape, detach
from learnedopt.core.counts import require_count
from learnedopt.core.inner import InnerLoop
from learnedopt.core.task import Split
from learnedopt.core.tree import Theta

MetaObjective: TypeAlias = Callable[[InnerLoop, Theta, Rollout], "Tensor | tuple[Tensor, Carry]"]
Matching: TypeAlias = Callable[[InnerLoop, Carry, Carry, Split], Tensor]


class TaskMean:
    """Marks an objective that is a mean over tasks by construction, which spares it the check of others."""

    end_only: bool = False
    """A function of the state at the end alone, as an implicit meta-gradient needs it."""
    reads_theta: tuple[str, ...] = ()
    """Patterns, as of ``fnmatch``, of the meta-parameters that it reads from ``theta`` itself: those reach it, whatever
    the inner steps make of them."""


@final
@dataclass(frozen=True)
class FinalLoss(TaskMean):
    """Loss on the valid split at the end, as in MAML (Finn et al. 2017)."""

    end_only = True

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        """Return the mean over tasks."""
        return loop.losses(theta, rollout.end, "valid").mean()


@final
@dataclass(frozen=True)
class SumOfLosses(TaskMean):
    """Sum of the train losses after steps 1..K (Andrychowicz et al. 2016, equation 3 with all weights 1)."""

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        """Return the mean over tasks of the sum over steps."""
        return _losses_after_steps(loop, theta, rollout).sum(0).mean()


@final
@dataclass(frozen=True)
class MeanLogLoss(TaskMean):
    """Mean over steps 1..K of the logarithm of the train loss: every decade of progress counts the same.

    The losses must be positive: the logarithm is not shifted or clamped.
    """

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
        """Return the mean over steps and tasks."""
        return _losses_after_steps(loop, theta, rollout).log().mean()


def _losses_after_steps(loop: InnerLoop, theta: Theta, rollout: Rollout) -> Tensor:
    """Return the train losses (max(num_steps, 1), num_tasks) after each step."""
    return torch.cat([rollout.losses[1:], loop.losses(theta, rollout.end, "train").unsqueeze(0)])


@final
@dataclass(frozen=True)
class SquaredDistance:
    """Half the squared Euclidean distance, summed over all parameters of a task."""

    def __call__(self, loop: InnerLoop, target: Carry, end: Carry, split: Split) -> Tensor:
        """Return each task's distance (num_tasks,)."""
        a, b = (tree.ravel(list(carry.params.values())) for carry in (target, end))
        return 0.5 * (a - b).square().sum(1)


@final
@dataclass(frozen=True)
class KLDivergence:
    """KL(target || end) between the two models' categorical outputs on the batch of ``split`` at the end's step.

    The family's ``outputs`` are logits with classes last; the divergence is a mean over all other dimensions.
    """

    def __call__(self, loop: InnerLoop, target: Carry, end: Carry, split: Split) -> Tensor:
        """Return each task's divergence (num_tasks,)."""
        # Both models see the same batch, so the target is evaluated at the end's step.
        p, q = (loop.outputs(c, split).log_softmax(-1) for c in (target._replace(step=end.step), end))
        divergence = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        return divergence.reshape(divergence.shape[0], -1).mean(1)


@final
@dataclass(frozen=True)
class BootstrappedTarget(TaskMean):
    """Distance from the rollout's end to a target that the rule itself, run further, provides (Flennerhag et al. 2022).

    From the end, ``num_target_steps - 1`` further steps of the rule are taken, then one plain gradient step on the loss
    of ``split``; no gradient flows into the target. Training goes on from the state after the rule's further steps: the
    plain step belongs to the target alone.

    Args:
        num_target_steps: L, at least 1. With L = 1 and the squared distance the meta-gradient is ``step_size`` times
            that of the final loss on ``split``.
        step_size: of the plain gradient step, positive.
        split: "train" or "valid", for the plain step (and for the outputs that a KL matching compares).
        matching: ``SquaredDistance()`` or ``KLDivergence()``.
    """

    num_target_steps: int
    step_size: float
    split: Split = "valid"
    matching: Matching = SquaredDistance()

    end_only = True

    def __post_init__(self) -> None:
        require_count("num_target_steps", self.num_target_steps, least=1)
        if not self.step_size > 0:
            raise ValueError(f"step_size={self.step_size!r} must be positive: the target lies down the loss's gradient")
        if self.split not in ("train", "valid"):
            raise ValueError(f"split={self.split!r} is neither 'train' nor 'valid'")

    def __call__(self, loop: InnerLoop, theta: Theta, rollout: Rollout) -> tuple[Tensor, Carry]:
        """Return the mean distance over tasks, and the carry that training goes on from."""
        ahead, target = self.targets(loop, theta, rollout.end)
        distances = self.matching(loop, target, rollout.end, self.split)
        num_tasks = tree.size(rollout.end.params)
        if distances.shape != (num_tasks,):
            raise ValueError(
                f"the matching {self.matching!r} must return one distance per task, shape {(num_tasks,)}, got "
                f"{tuple(distances.shape)}; the mean over tasks is the objective's business"
            )
        return distances.mean(), ahead

    def targets(self, loop: InnerLoop, theta: Theta, end: Carry) -> tuple[Carry, Carry]:
        """Return the carry after the rule's further steps, and the target beyond it; both without a graph."""
        ahead = loop.run(theta, detach(end), self.num_target_steps - 1, Tape.NONE).end
        with torch.enable_grad():
            params = {k: p.detach().requires_grad_() for k, p in ahead.params.items()}
            losses = loop.losses(theta, ahead._replace(params=params), self.split)
        grads = torch.autograd.grad(losses.sum(), tuple(params.values()), materialize_grads=True)
        moved = {k: p.detach() - self.step_size * g for (k, p), g in zip(params.items(), grads, strict=True)}
        return ahead, ahead._replace(params=moved)
