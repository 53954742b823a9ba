"""How a run is followed: what a user says about it, and the trackers that this makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from learnedopt.core.counts import require_count
from learnedopt.training.json_tracker import JsonLinesTracker
from learnedopt.training.tensorboard_tracker import TensorBoardTracker
from learnedopt.training.thinned import Thinned
from learnedopt.training.tracker import ConsoleTracker, Tracker, Trackers
from learnedopt.training.wandb_tracker import WandbTracker
from learnedopt.training.wandb_variables import Mode, said


@dataclass(frozen=True)
class Tracking:
    """Who else is told of a run, beside the console and ``metrics.jsonl``, which are told every meta-step.

    Args:
        wandb: Weights & Biases, ``online``, ``offline`` or ``disabled``; by default what WANDB_MODE says, else
            offline, in a sweep of W&B online.
        project: W&B's project; by default WANDB_PROJECT, else learnedopt.
        entity: W&B's user or team; by default WANDB_ENTITY, else the account's own.
        group: the runs that it stands beside in W&B; by default WANDB_RUN_GROUP, else the recipe's name.
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


class Named(Protocol):
    """What is said of a run to its trackers: a recipe, with its ``num_meta_steps``, or a study, which has none."""

    @property
    def name(self) -> str:
        """What the runs of this configuration are called together."""
        ...


def trackers(recipe: Named, folder: Path, tracking: Tracking, run_id: str) -> Trackers:
    """Return who is told of a run: the console, a file of JSON lines, Weights & Biases, TensorBoard.

    Args:
        recipe: its name is the group; one without ``num_meta_steps`` is a study.
        folder: of the run.
        tracking: what the user says.
        run_id: what the run keeps when it goes on.

    Raises:
        ValueError: the mode of W&B is unknown, or TensorBoard is not installed.
    """
    total: int | None = getattr(recipe, "num_meta_steps", None)
    kind = "study" if total is None else "meta-train"
    views: list[Tracker] = [
        wandb_view(tracking, folder, group=recipe.name, job_type=kind, name=folder.name, run_id=run_id)
    ]
    if tracking.tensorboard:
        views.append(TensorBoardTracker(folder / "tensorboard"))
    console, record = ConsoleTracker(total=total), JsonLinesTracker(folder / "metrics.jsonl")
    return Trackers([console, record, Thinned(views, tracking.log_every)])


def wandb_view(
    tracking: Tracking, folder: Path, *, group: str, job_type: str, name: str | None = None, run_id: str | None = None
) -> WandbTracker:
    """Return W&B's view of a run: what ``tracking`` says comes before the user's variables, these before the rest.

    Args:
        tracking: what the user says.
        folder: where W&B's files go by default, else where WANDB_DIR says.
        group: default of the group: runs of one recipe, such as those of several seeds, are drawn as one band.
        job_type: what kind of run it is, such as "evaluate".
        name: default of what W&B calls the run.
        run_id: what the run keeps when it goes on.
    """
    return WandbTracker(
        tracking.wandb,
        project=tracking.project,
        entity=tracking.entity,
        group=said(tracking.group, "WANDB_RUN_GROUP", group),
        job_type=said(None, "WANDB_JOB_TYPE", job_type),
        name=said(None, "WANDB_NAME", name),
        tags=tracking.tags,
        notes=tracking.notes,
        dir=Path(said(None, "WANDB_DIR", str(folder)) or folder),
        run_id=run_id,
    )
