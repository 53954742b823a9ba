"""One round of ``soak.py``: a real training that is to be struck, and what must be true of its end."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.soak_runs import Process, differences, last_step, said, started, wait_for_end, wait_until
from benchmarks.soak_trainings import Training

LAST = 60
"""The meta-steps of every training here."""


class Wrong(Exception):
    """The library did what it must not do."""


class Round(NamedTuple):
    """One training to be struck.

    Args:
        training: which one.
        runs: an empty folder.
        whole: the folder of the undisturbed run.
        home: a folder for what is kept from round to round, such as compiled code.
        moments: where chance comes from.
    """

    training: Training
    runs: Path
    whole: Path
    home: Path
    moments: random.Random

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.runs / "run"

    @contextmanager
    def start(self, environment: dict[str, str] | None = None, **options: Any) -> Iterator[Process]:
        """Start the training; see ``started``."""
        own = {"HOME": str(self.home), "TORCHINDUCTOR_CACHE_DIR": str(self.home / "inductor"), **(environment or {})}
        with started(self.training, self.runs, environment=own, **options) as process:
            yield process

    def come_to(self, process: Process, step: int) -> None:
        """Wait until the record has meta-step ``step``, and a moment longer."""
        if not wait_until(process, lambda: last_step(self.folder) >= step):
            raise Wrong(f"it ended with code {process.returncode} before meta-step {step}: {self.tail()}")
        time.sleep(self.moments.uniform(0, 0.01))

    def tail(self) -> str:
        """Return the last line that was said."""
        return (said(self.runs).splitlines() or [""])[-1]

    def ends(self, process: Process, code: int, message: str = "") -> str:
        """Wait for the end; return the line of ``message``, a regular expression. Raise ``Wrong`` for another end."""
        wait_for_end(process)
        text = said(self.runs)
        if "Traceback" in text:
            raise Wrong(f"a traceback, and code {process.returncode}: {self.tail()}")
        if process.returncode != code:
            raise Wrong(f"code {process.returncode} instead of {code}: {self.tail()}")
        lines = [line for line in text.splitlines() if re.search(message, line)]
        if not lines:
            raise Wrong(f"it did not say {message!r}, but: {self.tail()}")
        told = lines[-1].replace(str(self.folder), "FOLDER").replace(str(self.runs), "RUNS")
        return re.sub(r"/\S*/home/\.cache", "HOME/.cache", told)

    def finish(self) -> None:
        """Run to the end, undisturbed, and compare. Raise ``Wrong`` where it is not where it would have been."""
        with self.start(fork=True) as process:
            self.ends(process, 0)
        self.compare()

    def compare(self) -> None:
        """Raise ``Wrong`` unless the run is the undisturbed one, to the bit."""
        if found := differences(self.folder, self.whole):
            raise Wrong("; ".join(found))
