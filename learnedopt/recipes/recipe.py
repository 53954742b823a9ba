"""What a recipe says: the full configuration of one meta-training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from learnedopt.core.counts import require_count
from learnedopt.core.estimator import GradientEstimator
from learnedopt.core.execution import Execution
from learnedopt.core.objective import FinalLoss
from learnedopt.core.registry import Choice
from learnedopt.training.failures import require_share
from learnedopt.training.steadying import Steadying

ALL_TASKS = 2**31  # a chunk size that no number of tasks exceeds: all at once


@dataclass(frozen=True)
class MetaLearning:
    """How theta moves.

    Args:
        lr: the learning rate that training begins with.
        final_lr_fraction: the rate is annealed by a half cosine to this fraction of ``lr``; 1 keeps it.
        max_grad_norm: meta-gradients are clipped to this norm; by default they are not.
        optimizer: what moves theta; its options are those beside ``lr``.
        average: what is learned is an average of theta, in which the newest weighs this much; by default theta.
        rollback_above: when theta goes back to its average, see ``MetaTrainer``; by default never.
        micro_batch: tasks that are estimated at once; by default all.
        max_failed_share: the share of a meta-batch's tasks that may fail.
    """

    lr: float = 1e-3
    final_lr_fraction: float = 1.0
    max_grad_norm: float | None = None
    optimizer: Choice = field(default_factory=lambda: Choice("adam"))
    average: float | None = None
    rollback_above: float | None = None
    micro_batch: int | None = None
    max_failed_share: float = 0.5

    def __post_init__(self) -> None:
        Steadying(self.average, self.rollback_above)  # says what is wrong with them
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr!r} is a learning rate and must be positive")
        if not self.final_lr_fraction >= 0:
            raise ValueError(f"final_lr_fraction={self.final_lr_fraction!r} must not be negative; 1 keeps the rate")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm!r} must be positive, or null for no clipping")
        if self.micro_batch is not None:
            require_count("micro_batch", self.micro_batch, least=1)
        require_share("max_failed_share", self.max_failed_share)


@dataclass(frozen=True)
class HeldOut:
    """What validation measures; the best theta is kept.

    Args:
        objective: what is measured.
        num_steps: inner steps; of the estimator's own inner solver where it has one.
        num_tasks: held-out tasks.
        every: meta-steps from one validation to the next.
        family_options: options of the family in which its tasks differ from training's.
    """

    objective: Any = field(default_factory=FinalLoss)
    num_steps: int = 100
    num_tasks: int = 16
    every: int = 100
    family_options: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        for count, least in {"num_steps": 0, "num_tasks": 1, "every": 1}.items():
            require_count(count, getattr(self, count), least)


@dataclass(frozen=True)
class Recipe:
    """A full configuration of one meta-training.

    A training in stages is a chain of recipes: ``after`` is the stage before, which is trained first, in a folder of
    its own inside the run's, and whose best theta this one starts from. Rules may differ from stage to stage: with
    ``start_partly`` the meta-parameters of the same name are taken, the others initialised.

    A field that joins later needs a default that trains as before it: runs on disk are taken to have had that.

    Args:
        name: what the recipe is called.
        family: what is trained inside.
        rule: how an inner step moves.
        estimator: how the meta-gradient is found.
        objective: what the outer level wants.
        num_meta_steps: steps of theta.
        num_tasks: tasks of a meta-batch.
        meta: how theta moves.
        validation: what validation measures.
        execution: how tasks are run.
        checkpoint_every: meta-steps from one checkpoint to the next.
        seed: of theta, and of all tasks.
        start: a run's folder, a checkpoint or a packaged name: where theta starts; by default as the rule says.
        num_threads: of torch; inner problems are small, and more threads mostly wait for one another.
        compare: at the end, set what was learned beside tuned optimizers on fresh tasks: table, numbers and figure.
        inner_objective: what the inner steps descend; by default the task's loss.
        horizon: of the inner loop, for rules that read it; validation's is its own number of steps.
        after: the stage before.
        start_partly: of the theta that it starts from, take what has the same name; the rest begins as the rule says.
    """

    name: str
    family: Choice
    rule: Choice
    estimator: GradientEstimator
    objective: Any
    num_meta_steps: int
    num_tasks: int = 1
    meta: MetaLearning = field(default_factory=MetaLearning)
    validation: HeldOut = field(default_factory=HeldOut)
    execution: Execution = field(default_factory=Execution)
    checkpoint_every: int = 100
    seed: int = 0
    start: str | None = None
    num_threads: int = 1
    compare: bool = False
    inner_objective: Choice | None = None
    horizon: int | None = None
    after: Recipe | None = None
    start_partly: bool = False

    def __post_init__(self) -> None:
        for count in ("num_meta_steps", "num_tasks", "checkpoint_every"):
            require_count(count, getattr(self, count), least=1)
        if self.horizon is not None:
            require_count("horizon", self.horizon, least=1)
        if self.after is not None and self.start is not None:
            raise ValueError(
                f"{self.name} would start both from start={self.start!r} and after the recipe {self.after.name!r}; "
                "keep one of them"
            )
        if self.start_partly and self.after is None and self.start is None:
            raise ValueError(
                f"{self.name}: start_partly=True says how theta is taken over, and there is none: set start"
            )
