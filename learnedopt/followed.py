"""Evaluations as W&B and TensorBoard show them: linked to the trainings they are of, all curves in one chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learnedopt import checkpoint
from learnedopt.core import tree
from learnedopt.core.sealed import read_record
from learnedopt.evaluation.comparison import Comparison, summarise
from learnedopt.evaluation.few_shot import FewShot
from learnedopt.evaluation.suite_table import REFERENCES, Suite
from learnedopt.training.tensorboard_tracker import TensorBoardTracker, require_tensorboard
from learnedopt.training.tracker import Tracker, Trackers
from learnedopt.training.tracking import Tracking, wandb_view
from learnedopt.training.wandb_tracker import WandbTracker
from learnedopt.training.wandb_variables import resolve_mode

Checkpoints = Mapping[str, str]
"""Label -> the path, or packaged name, of what is evaluated under it."""


def require_views(tracking: Tracking) -> None:
    """Raise ValueError where W&B's mode is unknown or TensorBoard is missing: before the work, which takes minutes."""
    resolve_mode(tracking.wandb)
    if tracking.tensorboard:
        require_tensorboard()


def show_comparison(
    tracking: Tracking, folder: Path, checkpoints: Checkpoints, found: Comparison, paths: Mapping[str, Path]
) -> None:
    """Tell of a comparison: the numbers of its table, a chart of all loss curves, the figure and the files."""
    numbers = {
        f"{measure}/{label}/{name}": value
        for label, outcome in found.outcomes.items()
        for measure, values in outcome.values.items()
        for name, value in vars(summarise(values)).items()
    }
    tracker = _opened(tracking, folder, checkpoints, found.settings)
    tracker.log(numbers, step=0)
    curves = {label: tree.numbers(outcome.curve) for label, outcome in found.outcomes.items()}
    tracker.lines("losses", curves, "inner step")
    tracker.figure("loss_curves", paths["png"])
    _close(tracker, checkpoints, f"evaluation-{found.settings['family']['name']}", [*paths.values()], found.settings)


def show_few_shot(
    tracking: Tracking, folder: Path, checkpoints: Checkpoints, found: FewShot, paths: Mapping[str, Path]
) -> None:
    """Tell how few-shot learners adapt: every measure by steps, a chart of each with all, the figure, the files."""
    tracker = _opened(tracking, folder, checkpoints, found.settings)
    courses: dict[int, dict[str, float]] = {}
    lines: dict[str, dict[str, list[float]]] = {}
    for label, adaptation in found.adaptations.items():
        for measure in adaptation.values:
            summaries = adaptation.summaries(measure)
            lines.setdefault(measure, {})[label] = [summary.mean for summary in summaries]
            for step, summary in zip(adaptation.steps, summaries, strict=True):
                entry = courses.setdefault(step, {})
                entry |= {f"{measure}/{label}/{name}": value for name, value in vars(summary).items()}
    for step, numbers in sorted(courses.items()):
        tracker.log(numbers, step=step)
    for measure, each in lines.items():
        tracker.lines(f"{measure}_by_steps", each, "inner step")
    tracker.figure("adaptation", paths["png"])
    _close(tracker, checkpoints, f"few-shot-{found.settings['family']['name']}", [*paths.values()], found.settings)


def show_suite(
    tracking: Tracking, folder: Path, checkpoints: Checkpoints, name: str, found: Suite, paths: Mapping[str, Path]
) -> None:
    """Tell what came of each candidate on a suite, relative to the references, the figures and the files."""
    about = {"suite": name, "nets": [*found.results]}
    ratios = {(label, other): found.geometric_mean(label, other) for label in found.candidates for other in REFERENCES}
    tracker = _opened(tracking, folder, checkpoints, about, group=name)
    tracker.log({f"{label}/to {other}": ratio.mean for (label, other), ratio in ratios.items() if ratio}, step=0)
    tracker.figure("matrix", paths["png"])
    tracker.figure("loss_curves", paths["curves"])
    _close(tracker, checkpoints, f"suite-{name}", [*paths.values()], about)


def tell_used(tracker: WandbTracker, checkpoints: Checkpoints) -> None:
    """Let a run in W&B say what it evaluates: the version of the training's artifact, and the id of that run."""
    for label, name in checkpoints.items():
        path = checkpoint.file_of(name)
        metadata = checkpoint.load_checkpoint(path).metadata
        record = path.parent / "config.json"
        about = {
            "checkpoint": name,
            "run_id": read_record(record).get("run_id")
            if path.name == "theta.safetensors" and record.exists()
            else None,
            "meta_step": metadata.get("meta_step"),
        }
        files = [file for file in (path, path.with_suffix(".json")) if file.exists()]
        tracker.use(label, str(metadata.get("name", path.stem)), files, about)


def _opened(
    tracking: Tracking, folder: Path, checkpoints: Checkpoints, settings: dict[str, Any], group: str | None = None
) -> Trackers:
    wandb = wandb_view(tracking, folder, group=group or next(iter(checkpoints)), job_type="evaluate")
    views: list[Tracker] = [wandb]
    if tracking.tensorboard:
        views.append(TensorBoardTracker(folder / "tensorboard"))
    tracker = Trackers(views)
    tracker.start(settings)
    return tracker


def _close(
    tracker: Trackers, checkpoints: Checkpoints, name: str, paths: Sequence[Path], settings: dict[str, Any]
) -> None:
    tracker.artifact(name, [*paths], settings)
    for sink in tracker.sinks:
        if isinstance(sink, WandbTracker) and sink.active:
            tell_used(sink, checkpoints)  # last: a server that refuses the link has all the rest
    tracker.finish()
