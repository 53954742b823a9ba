"""The state of a meta-training as one file, from which it goes on exactly."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from learnedopt.core import tree
from learnedopt.core.carry import Carry
from learnedopt.core.containers import is_dict
from learnedopt.core.files import parse_json
from learnedopt.core.tree import Theta
from learnedopt.training import carries, training_file
from learnedopt.training.pickled import NotPlain
from learnedopt.training.saved_carry import Expected
from learnedopt.training.saved_optimizer import Anew, require_saved, restore
from learnedopt.training.saved_state import require_progress, require_steadied
from learnedopt.training.steadying import Steadied
from learnedopt.training.validation import Judgement

FORMAT = "learnedopt-training-3"
FORMAT_2 = "learnedopt-training-2"
"""Had neither a SHA-256 nor the configuration."""
FORMAT_1 = "learnedopt-training-1"
"""Held a ``Carry`` at most, its tensors without their structure."""
SHAPES = "inner_state"
"""What the shapes and types of an inner loop's state are called in ``Training.run``."""
_RENAMED = {("rule", "IMAML"): "LearnedInit"}
"""What ``run`` said until version 0.1, where the proximal term was the rule's: its theta and its state are the same."""
_COUNTS = ("meta_step", "episode", "num_skipped", "skips_in_a_row", "best_value")
_ADVICE = "choose another checkpoint path, or remove the file to start anew"
_KEYS = {"format", "run", "theta", "best_theta", "optimizer", "scheduler", "carry", *_COUNTS}
_CONFIG = "config"
_STEADIED = "steadied"
"""There in files of trainings that average theta."""
_BEST_FAILED = "best_failed"
"""There where the best theta fails on held-out tasks."""


@dataclass
class Progress:
    """How far a meta-training has come, beside theta and the meta-optimizer."""

    meta_step: int = 0
    episode: int = 0
    num_skipped: int = 0
    skips_in_a_row: int = 0
    best_value: float = math.inf
    best_failed: int = 0  # on how many held-out tasks the best theta is not finite
    best_theta: Theta | None = None
    carry: Any = None  # the estimator's own
    steadied: Steadied = field(default_factory=Steadied)

    @property
    def at_start(self) -> bool:
        """Whether nothing has been done that a validation of the start would come too late for."""
        return self.meta_step == 0 and self.best_theta is None

    def keep_the_best(self, theta: Theta, found: Judgement) -> None:
        """Let a theta be the best so far where what was found of it says so."""
        best = None if self.best_theta is None else Judgement(self.best_value, self.best_failed)
        if found.beats(best):
            self.best_value, self.best_failed = found
            self.best_theta = theta


class Training(NamedTuple):
    """What a file is the state of, beside its progress.

    Args:
        theta: leaves, which ``load_progress`` writes to; so it does to ``optimizer`` and ``scheduler``.
        optimizer: of theta.
        scheduler: of the optimizer, or None.
        anew: makes both again, of copies of theta.
        run: plain values that say which training this is, for what no shape tells.
        classes: what carries are made of beside plain containers; no others are ever made.
        begun: makes a begun carry of the structure that a file of the first format holds the leaves of.
        expected: what the estimator's carries are compared with.
        config: the configuration of the run, which ``saved_config`` gives back.
    """

    theta: Theta
    optimizer: torch.optim.Optimizer
    scheduler: Any
    anew: Anew
    run: dict[str, Any]
    classes: carries.Classes
    begun: Callable[[], Any]
    expected: Expected
    config: Mapping[str, Any] = {}


def save_progress(path: Path, progress: Progress, training: Training) -> None:
    """Write everything that the next meta-step depends on, atomically.

    Raises:
        OSError: it cannot be written, as on a full disk; what was there is still there then.
    """
    scheduler = training.scheduler
    content = {
        "format": FORMAT,
        "run": training.run,
        _CONFIG: json.dumps(training.config, default=str, skipkeys=True),
        "theta": {k: v.detach() for k, v in training.theta.items()},
        "optimizer": training.optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if scheduler else None,
        "carry": carries.pack(progress.carry, _home(training.theta)),
        "best_theta": progress.best_theta,
        **{k: getattr(progress, k) for k in _COUNTS},
    }
    if progress.steadied.average is not None:
        content[_STEADIED] = {**vars(progress.steadied)}
    if progress.best_failed:
        content[_BEST_FAILED] = progress.best_failed
    training_file.write(path, content)


def load_progress(path: Path, training: Training) -> Progress:
    """Restore theta, the optimizer and the scheduler in place, and return the progress.

    Only tensors and plain values are loaded, and all of them are checked before the first is restored.

    Raises:
        ValueError: the file is damaged, is no training state, or belongs to another run; nothing is restored then.
    """
    content = _read(path)
    try:
        progress = _checked(path, content, training)
    except (ValueError, OSError):
        raise
    except Exception as error:  # what is in a file may be of any type in any place
        raise ValueError(f"{path} is no training state of this library ({_told(error)}); {_ADVICE}") from error
    optimizer, scheduler = training.optimizer, training.scheduler
    before = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict() if scheduler else None))
    try:
        restore(optimizer, scheduler, content["optimizer"], content["scheduler"])
    except Exception as error:
        restore(optimizer, scheduler, *before)
        raise ValueError(
            f"the state of the meta-optimizer or scheduler in {path} does not fit them ({_told(error)}); {_ADVICE}"
        ) from error
    with torch.no_grad():
        for k, v in training.theta.items():
            v.copy_(content["theta"][k])
    return progress


def saved_config(path: Path) -> dict[str, Any] | None:
    """Return the configuration in a training state; None for one of an earlier version, which had none.

    Raises:
        ValueError: the file is damaged, or is no training state.
    """
    text = _read(path).get(_CONFIG)
    if text is None:
        return None
    try:
        config = parse_json(text)
        if not is_dict(config):
            raise TypeError(f"a {type(config).__name__}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"the configuration in {path} is none ({_told(error)}); {_ADVICE}") from error
    return config


def _checked(path: Path, content: dict[str, Any], training: Training) -> Progress:
    """Return the progress in a file, all of which was found to fit the training."""
    theta = training.theta
    _require_same_training(path, content, training)
    counts = {k: content[k] for k in _COUNTS} | {_BEST_FAILED: content.get(_BEST_FAILED, 0)}
    try:
        require_progress(counts, content["theta"], content["best_theta"], theta)
        require_saved(content["optimizer"], content["scheduler"], training.anew, counts["meta_step"])
        steadied = Steadied(**content.get(_STEADIED, {}))
        require_steadied(steadied, training.run["average"] is not None, theta)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds what no training leaves: {error}; {_ADVICE}") from error
    carry = _carry(path, content, training)
    best_theta = content["best_theta"] and _like(content["best_theta"], theta)
    steadied.average = steadied.average and _like(steadied.average, theta)
    return Progress(**counts, best_theta=best_theta, carry=carry, steadied=steadied)


def _like(saved: Theta, theta: Theta) -> Theta:
    """Return what was saved where theta lies."""
    return {k: v.to(theta[k].device) for k, v in saved.items()}


def _require_same_training(path: Path, content: dict[str, Any], training: Training) -> None:
    saved, here = (
        {k: (tuple(v.shape), v.dtype) for k, v in theta.items()} for theta in (content["theta"], training.theta)
    )
    if saved != here:
        raise ValueError(f"{path} was written for another rule: its theta is {saved}, this rule's {here}; {_ADVICE}")
    # Files of before say less.
    # Without an average nothing of it was said, nor is.
    content["run"].setdefault("average", None)
    written, run = {k: _RENAMED.get((k, str(v)), v) for k, v in content["run"].items()}, training.run
    differing = [k for k in run if k in written and written[k] != run[k]]
    if differing == [SHAPES]:
        raise ValueError(f"{path} was written for other tasks: shapes or types of its inner state differ; {_ADVICE}")
    if differing:
        told = ", ".join(f"{k} {written[k]!r} instead of {run[k]!r}" for k in differing if k != SHAPES)
        raise ValueError(f"{path} was written for another training, with {told}; {_ADVICE}")


def require_loadable(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Check that a checkpoint of these could be loaded again: before hours of work, not after.

    Raises:
        TypeError: their state holds something else than tensors and plain values, such as a NumPy number.
    """
    for name, thing in (("meta-optimizer", optimizer), ("scheduler", scheduler)):
        if thing is None:
            continue
        try:
            training_file.require_readable(thing.state_dict())
        except TypeError as error:
            raise TypeError(
                f"a checkpoint cannot keep the state of the {name} {type(thing).__name__}, which holds more than "
                "tensors and plain values; convert what it was given, such as a NumPy learning rate, with float()"
            ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content, sealed = training_file.read(path)
    except (pickle.UnpicklingError, NotPlain) as error:
        # torch's own text goes on to advise loading it all the same.
        reason = f" ({error})" if isinstance(error, NotPlain) else ""
        raise ValueError(
            f"{path} is corrupt or foreign: it holds something else than tensors and plain values{reason}, and nothing "
            f"else is ever loaded; {_ADVICE}"
        ) from error
    except Exception as error:  # a damaged file can make anything of its reader
        raise ValueError(
            f"{path} cannot be read as a training state ({_told(error)}): it is corrupt or foreign; {_ADVICE}"
        ) from error
    written = content.get("format") if is_dict(content) else None
    keys = _KEYS | {_CONFIG} if written == FORMAT else _KEYS
    if written not in (FORMAT, FORMAT_2, FORMAT_1) or content.keys() - {_STEADIED, _BEST_FAILED} != keys:
        raise ValueError(f"{path} is no training state of this library (expected format {FORMAT!r}); {_ADVICE}")
    if written == FORMAT and not sealed:
        raise ValueError(f"{path} is corrupt: its SHA-256 is not at its end, where it was written; {_ADVICE}")
    return content


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _carry(path: Path, content: dict[str, Any], training: Training) -> Any:
    saved = content["carry"]
    if content["format"] == FORMAT_1:
        return None if saved is None else _carry_of_format_1(path, saved, training.begun())
    try:
        carry = carries.unpack(saved, training.classes, _home(training.theta))
        training.expected.require_loaded(carry)
    except Exception as error:  # whatever a family makes of tasks that are none of its own
        told = str(error) if isinstance(error, TypeError | ValueError) else _told(error)
        raise ValueError(f"{path} was written for another estimator or rule: {told}; {_ADVICE}") from error
    return carry


def _carry_of_format_1(path: Path, saved: dict[str, Any], like: Carry) -> Carry:
    """Return the carry whose tensors alone were saved, in the order of those of a begun one."""
    flat, rebuild = tree.flatten(like[:3])
    leaves = saved["leaves"]
    if [(x.shape, x.dtype) for x in flat] != [(x.shape, x.dtype) for x in leaves]:
        raise ValueError(f"{path} was written for other tasks: shapes or types of its inner state differ; {_ADVICE}")
    return Carry(*rebuild([x.to(y.device) for x, y in zip(leaves, flat, strict=True)]), step=saved["step"])


def _home(theta: Theta) -> torch.device:
    return next(iter(theta.values())).device
