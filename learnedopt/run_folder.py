"""The folder of a run: whose it is, and whether a run of another configuration is in it."""

from __future__ import annotations

import platform
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import learnedopt
from learnedopt.config import as_config, split_imaml, up_to_date
from learnedopt.core.files import exclusive, remove_partials
from learnedopt.core.sealed import read_record, write_record
from learnedopt.recipes.recipe import Recipe
from learnedopt.recipes.study import Study
from learnedopt.training.json_tracker import read_metrics
from learnedopt.training.progress import saved_config


def configuration(recipe: Recipe | Study) -> dict[str, Any]:
    """Return the recipe as plain values: what tells one run from another."""
    return {key: value for key, value in as_config(recipe).items() if key != "type"}


def enter(recipe: Recipe | Study, folder: Path, held: ExitStack) -> str:
    """Hold the folder of a run until ``held`` closes, and return the run's id."""
    find_run(folder, recipe)  # refused before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(exclusive(folder))
    run_id = find_run(folder, recipe) or begin_run(folder, recipe)
    remove_partials(folder)  # left by a kill in the middle of a write
    return run_id


def find_run(folder: Path, recipe: Recipe | Study) -> str | None:
    """Return the id of the run of this recipe that ``folder`` holds, maybe of an earlier version; None for no run.

    A run of another configuration does not count where not one meta-step was taken, and no part of a study finished;
    otherwise it is refused. Where ``config.json`` is gone, the checkpoint's own record of it is compared.
    """
    path, record, state = (folder / name for name in ("config.json", "metrics.jsonl", "checkpoint.pt"))
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
        return None
    config = configuration(recipe)
    saved = up_to_date(saved, recipe)
    rule, descended = split_imaml(saved.get("rule"))
    if descended is not None:
        saved |= {"rule": rule, "inner_objective": descended}
    if saved == config:
        return run_id
    rows = read_metrics(record) if record.exists() else []  # row 0 is the validation of the start
    # A study remembers its parts by files that do not tell all its settings, often before it has told any number.
    parts = (p for p in folder.rglob("*.json") if p != path and p.relative_to(folder).parts[0] != "wandb")
    if state.exists() or any(row["step"] > 0 for row in rows) or any(parts):
        changed = sorted(k for k in saved.keys() | config.keys() if saved.get(k, ...) != config.get(k, ...))
        raise ValueError(
            f"{folder} holds a run with another configuration (different: {', '.join(changed)}); give this run a "
            "--name of its own, or remove that folder"
        )
    return None


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
    about = {"run_id": run_id, "recipe": configuration(recipe), "environment": environment()}
    write_record(folder / "config.json", about)
    return run_id
