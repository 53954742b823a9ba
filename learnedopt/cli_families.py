"""What learned optimizers of a command line are evaluated on: a family that is named, or that of the first run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learnedopt.checkpoint import Checkpoint
    from learnedopt.core.task import TaskFamily


def load_all(checkpoints: Sequence[str]) -> dict[str, Checkpoint]:
    """Return the checkpoints by what each is called: its file's or folder's name, or the path where two share that."""
    from learnedopt.checkpoint import load_checkpoint

    labels = [Path(name).name.removesuffix(".safetensors") or "learned" for name in checkpoints]
    if len(set(labels)) < len(labels):
        labels = [str(Path(name)).strip("/").replace("/", "-") for name in checkpoints]
    if len(set(labels)) < len(labels):
        raise ValueError(f"the same checkpoint is named twice in {' '.join(checkpoints)}")
    return {label: load_checkpoint(name) for label, name in zip(labels, checkpoints, strict=True)}


def families(
    name: str | None, assignments: Sequence[str], checkpoint: str, learned: Checkpoint
) -> tuple[TaskFamily, TaskFamily]:
    """Return the family of fresh tasks and that of tasks to tune on, from different splits where there are any.

    Args:
        name: of the family; None for that of the record of ``checkpoint``, whose options ``assignments`` change.
        assignments: ``KEY=VALUE``, options of the family.
        checkpoint: what the record is of, for messages.
        learned: what was loaded of it.
    """
    from learnedopt import tasks

    options, settings = {}, _settings(assignments)
    if name is None:
        name, options = _recorded_family(checkpoint, learned.metadata)
        _require_no_paths(checkpoint, {k: v for k, v in options.items() if k not in settings})
    options = {**options, **settings}
    family = tasks.make(name, **options)
    if not hasattr(family, "meta_split"):
        return family, family
    return tasks.make(name, **{"meta_split": "test", **options}), tasks.make(name, **{**options, "meta_split": "train"})


def _recorded_family(checkpoint: str, record: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and options of the family that the record of a checkpoint tells, without the split."""
    if not record.get("family"):
        raise ValueError(f"{checkpoint} has no record of a family; name one with --family")
    try:
        held_out = (record.get("validation") or {}).get("family_options") or {}
        name, options = record["family"]["name"], {**record["family"]["options"], **held_out}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the record of {checkpoint} is of no family ({error!r}); name one with --family") from error
    options.pop("meta_split", None)
    return name, options


def _require_no_paths(checkpoint: str, options: dict[str, Any]) -> None:
    """Raise ValueError where the record of a checkpoint would choose the files that are read here."""
    paths = {key: value for key, value in options.items() if _may_name_files(key, value)}
    if paths:
        told = " and ".join(f"{key}={value!r}" for key, value in paths.items())
        raise ValueError(
            f"the record of {checkpoint} names what is to be read: {told}; a file does not choose that here: pass "
            f"{' '.join(f'--set {key}=...' for key in paths)} with a folder that you mean"
        )


def _may_name_files(key: str, value: Any) -> bool:
    if isinstance(value, dict):  # a part, or a family of a mixture
        return any(_may_name_files(k, v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return any(_may_name_files(key, each) for each in value)
    return isinstance(value, str) and (key in ("root", "lists") or not set(value).isdisjoint("/\\~") or value == "..")


def _settings(assignments: Sequence[str]) -> dict[str, Any]:
    from learnedopt.config import read_value

    settings = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {assignment!r} is not of the form KEY=VALUE, such as --set batch_size=64")
        settings[key] = read_value(text)
    return settings
