"""Studies: recipes that set several methods side by side, where a ``Recipe`` is one meta-training."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learnedopt.core.containers import is_dict
from learnedopt.core.files import plain_json
from learnedopt.core.pace import Pace, duration
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
        num_threads: of torch; inner problems are small, and more threads mostly wait for one another.
    """

    name: str
    num_threads: int = 1

    @abstractmethod
    def run(self, folder: Path, tracker: Tracker) -> None:
        """Compute every method, tell the tracker, and draw ``<name>.png``, with the numbers beside it as JSON.

        What was finished in ``folder`` before is not computed again, and how fast it goes is said: see ``Parts``.
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
    stop.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, {_VALUE: plain_json(compute())})
    found = read_record(path, of_before=(dict, list))
    return found[_VALUE] if is_dict(found) and found.keys() == {_VALUE} else found


class Parts:
    """The parts of a study, each a file of its folder; the rate and the time left are printed as they are computed.

    Args:
        folder: the study's.
        num_runs: runs in all parts, however the study counts them: what takes twice as long is better counted twice.

    Example:
        >>> parts = Parts(folder, len(self.seeds))
        >>> found = [parts.remember(f"runs/{seed}.json", partial(self.one_run, seed)) for seed in self.seeds]
    """

    def __init__(self, folder: Path, num_runs: int) -> None:
        self._folder = folder
        self._pace = Pace(num_runs, lambda line: print(f"{line}.", flush=True), interval=_WORTH_A_LINE)

    def remember(self, name: str, compute: Callable[[], Any], num_runs: int = 1) -> Any:
        """Return what the file of that name holds, computed where there is none: ``remember`` of this module."""
        path = self._folder / name
        if path.exists():
            self._pace.found(num_runs)
            return remember(path, compute)
        began = time.perf_counter()
        self._pace.begin(num_runs)
        found = remember(path, compute)
        self._pace.ran(f"Computed {path.stem} in {duration(time.perf_counter() - began)}", num_runs)
        return found
