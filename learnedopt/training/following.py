"""How a run is followed, as the user says it. Imports no tracker: the commands' help lists this, and waits for none."""

from __future__ import annotations

from dataclasses import dataclass

from learnedopt.core.counts import require_count
from learnedopt.training.wandb_variables import Mode


@dataclass(frozen=True)
class Tracking:
    """Who else is told of a run, beside the console and ``metrics.jsonl``, which are told every meta-step.

    Args:
        wandb: Weights & Biases, ``online``, ``offline`` or ``disabled``; by default what WANDB_MODE says, else
            offline, in a sweep of W&B online.
        project: W&B's project; by default WANDB_PROJECT, else learnedopt.
        entity: W&B's user or team; by default WANDB_ENTITY, else the account's own.
        group: the runs that it stands beside in W&B; by default WANDB_RUN_GROUP, else the recipe's name, or what is
            evaluated.
        tags: words to find it by in W&B; by default WANDB_TAGS.
        notes: a longer description in W&B; by default WANDB_NOTES.
        tensorboard: also write event files for TensorBoard, into the run's folder.
        log_every: W&B and TensorBoard are told every so many meta-steps; validations and the last step always.

    Raises:
        ValueError: ``log_every`` is not a positive count.
    """

    wandb: Mode | None = None
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    notes: str | None = None
    tensorboard: bool = False
    log_every: int = 1

    def __post_init__(self) -> None:
        require_count("log_every", self.log_every, least=1)
