"""What the user's ``WANDB_*`` variables say: they come before our defaults, and what is passed comes before both."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import Literal, TypeAlias

Mode: TypeAlias = Literal["online", "offline", "disabled"]
_MODES: dict[str, Mode] = {
    "online": "online", "offline": "offline", "disabled": "disabled", "run": "online", "dryrun": "offline",
}  # fmt: skip


def resolve_mode(mode: str | None, environ: Mapping[str, str] = os.environ) -> Mode:
    """Return what the user said, else what ``WANDB_MODE`` says, else ``"offline"``; in a sweep ``"online"``.

    W&B itself would let a mode given in the call override its variable, and without any of them ask for an account. A
    sweep's agent has one, and offline its server would never hear of the metric that it compares the trials by.

    Raises:
        ValueError: neither online, offline nor disabled (nor W&B's old words for them, run and dryrun).
    """
    default = "online" if in_sweep(environ) else "offline"
    source, word = ("mode", mode) if mode is not None else ("WANDB_MODE", environ.get("WANDB_MODE") or default)
    if word not in _MODES:
        raise ValueError(f"{source}={word!r} is not a W&B mode that works here; use 'online', 'offline' or 'disabled'")
    return _MODES[word]


def said(given: str | None, variable: str, default: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return what was passed, else what the variable says, else the default."""
    return given or environ.get(variable) or default


def in_sweep(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ``wandb agent`` has started this process, as one trial of a sweep."""
    return bool(environ.get("WANDB_SWEEP_ID"))


def identity(run_id: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """Return the id of a run in W&B: in a sweep the one that W&B has given the trial, else the run's own, or a new one.

    Outside a sweep ``WANDB_RUN_ID`` does not count against the run's own: a resume without the variable would split a
    run in two, and another run started beside it would write into the same one.
    """
    trial = environ.get("WANDB_RUN_ID") or None
    return (trial if in_sweep(environ) else None) or run_id or trial or uuid.uuid4().hex[:8]


def folder_name(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return what a run's folder is called by default: as its recipe, in a sweep with the trial's id behind it.

    Example: "maml-sine", or "maml-sine-x3k9q2ab" where ``wandb agent`` has started it, also when it resumes the trial.
    """
    return f"{name}-{identity(None, environ)}" if in_sweep(environ) else name
