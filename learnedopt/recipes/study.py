"""Studies: recipes that set several methods side by side, where a ``Recipe`` is one meta-training."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learnedopt.core.files import plain_json
from learnedopt.core.pace import duration
from learnedopt.core.sealed import read_record, write_record
from learnedopt.training.tracker import Tracker

_VALUE = "value"
_WORTH_A_LINE = 2.0
"""Seconds."""


@dataclass(frozen=True)
class Study(ABC):
    """Settings of a comparison; ``run`` computes it, in a folder of its own.

    What is learned in it is learned by ``MetaTrainer`` or ``HyperOptimizer``, as anywhere.

    Args:
        name: what the study is called.
        num_threads: of torch.
    """

    name: str
    num_threads: int = 1

    @abstractmethod
    def run(self, folder: Path, tracker: Tracker) -> None:
        """Compute every method, tell the tracker, and draw ``<name>.png``, with the numbers beside it as JSON.

        What was finished in ``folder`` before is not computed again: see ``remember``.
        """

    def small(self) -> Study:
        """Return it with settings of which the whole takes under a minute; see ``recipes.smoke``.

        Raises:
            ValueError: it does not say any.
        """
        raise ValueError(
            f"the study {self.name} does not say how it is made small: let {type(self).__name__}.small return it with "
            "other settings, or set them by hand"
        )


def require_some(study: Study, *options: str) -> None:
    """Raise ValueError where one of these settings, each a tuple, is empty."""
    for option in options:
        if not getattr(study, option):
            raise ValueError(f"{option} is empty: {study.name} cannot do without; name one at least")


def remember(path: Path, compute: Callable[[], Any]) -> Any:
    """Return what the file ``path`` holds; where there is none, compute it and write it, atomically, with its SHA-256.

    What is computed comes back as the file gives it, so that a study that went on tells the same as one that did not
    stop. How long a part took is printed, where that is worth a line.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        write_record(path, {_VALUE: plain_json(compute())})
        if (seconds := time.perf_counter() - began) >= _WORTH_A_LINE:
            print(f"Computed {path.stem} in {duration(seconds)}.", flush=True)
    found = read_record(path, of_before=(dict, list))
    return found[_VALUE] if isinstance(found, dict) and found.keys() == {_VALUE} else found
