"""The folder of a run: whose it is, and whether a run of another configuration is in it."""

from __future__ import annotations

import os
import platform
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import learnedopt
from learnedopt import plugins
from learnedopt.config import as_config, split_imaml, up_to_date
from learnedopt.core.files import exclusive, parse_json, remove_partials, require_plain_file
from learnedopt.core.sealed import read_record, write_record
from learnedopt.recipes.recipe import Recipe
from learnedopt.recipes.study import Study
from learnedopt.training.json_tracker import read_metrics
from learnedopt.training.progress import saved_config

_LENGTH = "num_meta_steps"
_LAST = 1 << 12
"""Bytes at a record's end that hold its last event, if that is the end of a run."""


def configuration(recipe: Recipe | Study) -> dict[str, Any]:
    """Return the recipe as plain values: what tells one run from another."""
    return {key: value for key, value in as_config(recipe).items() if key != "type"}


def enter(recipe: Recipe | Study, folder: Path, held: ExitStack, *, extend: bool = False) -> str:
    """Hold the folder of a run until ``held`` closes, and return the run's id."""
    find_run(folder, recipe, extend=extend)  # refused before anything is written
    if isinstance(recipe, Recipe) and not extend:
        _require_own_length(folder, recipe.num_meta_steps)
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(exclusive(folder))
    run_id = find_run(folder, recipe, extend=extend) or begin_run(folder, recipe)
    remove_partials(folder)  # left by a kill in the middle of a write
    return run_id


def find_run(folder: Path, recipe: Recipe | Study, *, extend: bool = False) -> str | None:
    """Return the id of the run of this recipe that ``folder`` holds, maybe of an earlier version; None for no run.

    A run of another configuration does not count where not one meta-step was taken, and no part of a study finished;
    otherwise it is refused. Where ``config.json`` is gone, the checkpoint's own record of it is compared.

    With ``extend`` there must be a run, and it may have fewer meta-steps than the recipe.
    """
    run_id, saved = _recorded(folder, recipe)
    if extend and run_id is None:
        raise ValueError(f"{folder} holds no run that could be extended, with its config.json: begin one")
    if saved is None:
        return None
    config = configuration(recipe)
    if saved == config:
        return run_id
    changed = sorted(k for k in saved.keys() | config.keys() if saved.get(k, ...) != config.get(k, ...))
    if extend:
        _require_longer(folder, changed, saved, config)
        return run_id
    record, state = folder / "metrics.jsonl", folder / "checkpoint.pt"
    rows = read_metrics(record) if record.exists() else []  # row 0 is the validation of the start
    # A study remembers its parts by files that do not tell all its settings, often before it has told any number.
    own = folder / "config.json"
    parts = (p for p in folder.rglob("*.json") if p != own and p.relative_to(folder).parts[0] != "wandb")
    if state.exists() or any(row["step"] > 0 for row in rows) or any(parts):
        longer = changed == [_LENGTH] and config[_LENGTH] > saved[_LENGTH]
        raise ValueError(
            f"{folder} holds a run with another configuration (different: {', '.join(changed)}); give this run a "
            f"--name of its own, or remove that folder{', or let it go on for longer with --extend' if longer else ''}"
        )
    return None


def _recorded(folder: Path, recipe: Recipe | Study) -> tuple[str | None, dict[str, Any] | None]:
    """Return id and configuration of the run in ``folder``, as the present version would write it; None for none."""
    path, state = folder / "config.json", folder / "checkpoint.pt"
    run_id, saved = None, None
    if path.exists():
        try:
            found = read_record(path)
            run_id, saved = str(found["run_id"]), dict(found["recipe"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no run's configuration ({error!r}); remove {folder}, or give this run a --name of its own"
            ) from error
    elif state.exists():
        saved = saved_config(state)
        if saved is None:
            raise ValueError(
                f"{folder} holds a checkpoint, but no config.json, which says of what run: put it back, give this run "
                "a --name of its own, or remove that folder"
            )
    if saved is None:
        return None, None
    saved = up_to_date(saved, recipe)
    rule, descended = split_imaml(saved.get("rule"))
    if descended is not None:
        saved |= {"rule": rule, "inner_objective": descended}
    return run_id, saved


def _require_longer(folder: Path, changed: list[str], saved: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise ValueError unless the new configuration is the one on record with more meta-steps."""
    others = [name for name in changed if name != _LENGTH]
    if others:
        raise ValueError(
            f"the run in {folder} can go on for longer, but not as another one: {', '.join(others)} differ; leave them "
            "as they were, or begin a new run, with a --name of its own"
        )
    if not config[_LENGTH] > saved[_LENGTH]:
        raise ValueError(
            f"the run in {folder} is of {_LENGTH}={saved[_LENGTH]}, and cannot be extended to {config[_LENGTH]}: name "
            f"more, such as {_LENGTH}={2 * saved[_LENGTH]}"
        )


def _require_own_length(folder: Path, length: int) -> None:
    """Raise ValueError where the checkpoint is of a longer run: a kill came between the two files of an extension."""
    state = folder / "checkpoint.pt"
    longer = (saved_config(state) or {}).get(_LENGTH) if (folder / "config.json").exists() and state.exists() else None
    if isinstance(longer, int) and longer > length:
        raise ValueError(
            f"the run in {folder} was being extended from {_LENGTH}={length} to {longer} when it was stopped: repeat "
            f"that, with --extend and {_LENGTH}={longer}"
        )


def is_finished(folder: Path, recipe: Recipe | Study, *, extend: bool = False) -> bool:
    """Return whether ``folder`` holds the run of this recipe, all files written and its end on record.

    Raises:
        ValueError: as ``find_run``; or it is finished, and was to be extended.
    """
    found = find_run(folder, recipe, extend=extend)
    study = isinstance(recipe, Study)
    files = [f"{recipe.name}.png"] if study else ["theta.safetensors", "theta.json", "checkpoint.pt", "training.png"]
    if found is None or any(folder.glob(".*.partial")) or not all((folder / name).exists() for name in files):
        return False
    end = read_end(folder / "metrics.jsonl")
    if end is None or end["exit_code"] != 0 or not (study or end["step"] == recipe.num_meta_steps):
        return False
    if extend and isinstance(recipe, Recipe):
        length = recipe.num_meta_steps
        raise ValueError(
            f"the run in {folder} has finished its {_LENGTH}={length}: name more to extend it, such as "
            f"{_LENGTH}={2 * length}"
        )
    return True


def read_end(record: Path) -> dict[str, Any] | None:
    """Return how the record of a run ends, its event ``finish``; None where it has not ended."""
    if not record.exists():
        return None
    require_plain_file(record)
    with record.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - _LAST, 0))
        lines = file.read().split(b"\n")
    if len(lines) < 2 or lines[-1] or not lines[-2].startswith(b'{"event": "finish"'):
        return None
    entry = parse_json(lines[-2])
    return entry if {"step", "exit_code"} <= entry.keys() else None


def record_length(folder: Path, recipe: Recipe) -> None:
    """Let the run in ``folder`` be one of the recipe's length."""
    path = folder / "config.json"
    write_record(path, {**read_record(path), "recipe": configuration(recipe)})


def environment() -> dict[str, str]:
    """Return the versions and the machine that numbers may depend on; not who or where."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "learnedopt": learnedopt.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "platform": platform.platform(), "processor": platform.machine(), "gpu": gpu,
    }  # fmt: skip


def begin_run(folder: Path, recipe: Recipe | Study) -> str:
    """Write the configuration of a new run, and what it runs on, into its folder; return the run's id."""
    run_id = uuid.uuid4().hex[:8]
    about = {"run_id": run_id, "recipe": configuration(recipe), **plugins.record(), "environment": environment()}
    write_record(folder / "config.json", about)
    return run_id
