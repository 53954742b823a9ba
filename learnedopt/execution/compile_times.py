"""How long compiling has taken before: kept in the folder of torch's compiler, with which it is forgotten."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import torch

from learnedopt.core.files import parse_json, write_json
from learnedopt.core.fingerprint import words
from learnedopt.core.inner import InnerLoop
from learnedopt.execution.compiler_cache import VARIABLE, keep_compiler_cache_private

logger: logging.Logger = logging.getLogger("learnedopt.compiling")
"""Told, at level INFO, what is compiled, about how long that takes, and how long it took."""
FILE = "learnedopt-seconds.json"
_MOST = 1000  # kinds that are remembered


def kind_of(loop: InnerLoop, what: str) -> str:
    """Return a word for what is compiled: the same for a loop of the same parts in another process."""
    told = [what, torch.__version__, *words([loop.family, loop.rule, loop.inner_objective, loop.execution])]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def expected(kind: str) -> str:
    """Say how long it took the last time, or what is to be expected."""
    seconds = _read().get(kind)
    if seconds is None:
        return "for the first time here: that takes some seconds to a few minutes, the longer the more inner steps"
    return f"which took {seconds:.0f} s the last time, and takes less where its kernels are found on disk"


def remember(kind: str, seconds: float) -> None:
    """Keep how long it took, where there is a folder to keep it in."""
    path = _path()
    if path is None:
        return
    found = {**_read(), kind: round(seconds, 1)}
    try:
        write_json(path, dict([*found.items()][-_MOST:]))
    except OSError as error:  # a full disk, say: the next time it is told as the first one
        logger.debug("how long compiling took could not be kept in %s: %s", path, error)


def _read() -> dict[str, float]:
    path = _path()
    if path is None or not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:  # cut off, say: nothing depends on it
        logger.debug("%s is not read: %s", path, error)
        return {}
    numbers = found.items() if isinstance(found, dict) else ()
    return {key: float(value) for key, value in numbers if isinstance(value, int | float)}


def _path() -> Path | None:
    keep_compiler_cache_private()
    named = os.environ.get(VARIABLE)
    return None if not named else Path(named) / FILE
