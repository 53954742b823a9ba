"""Where the numbers of a meta-training go: trackers, what they share, and the console.

A tracker only listens. Nothing that it does or fails to do may change a number or stop a training, so the trainer
talks to one ``Trackers``, which keeps its sinks apart. ``json_tracker`` writes the record of a run; the console and
W&B (``wandb_tracker``) are views of it.

Metrics that the trainer logs: ``meta_loss``, ``validation``, ``best_validation``, ``grad_norm``, ``step_ms``
(milliseconds per meta-step) and ``skipped`` (meta-steps skipped so far), each a number; ``inner_loss`` is a list, the
mean training loss before each inner step. Where tasks have failed, ``failed_tasks`` is how many of the meta-batch, and
``failed``, words, which and where; ``validation_failed`` is how many held-out tasks. Before the first meta-step, as
step 0, there are the validations alone.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeAlias, runtime_checkable

from learnedopt.core.pace import duration
from learnedopt.core.tree import Theta

logger: logging.Logger = logging.getLogger(__name__)

Metrics: TypeAlias = Mapping[str, "float | list[float] | str"]
"""Numbers by name; a list is a curve, such as the loss before each inner step, and a string are words to be read."""


class Tracker(Protocol):
    """What a trainer tells about its run. One object serves one run; ``step`` counts meta-steps."""

    def start(self, config: dict[str, Any]) -> None:
        """Begin the run, or go on with it; ``config`` is the resolved configuration, nested dicts of plain values."""
        ...

    def log(self, metrics: Metrics, step: int) -> None:
        """Record the metrics of meta-step ``step``. Steps may repeat (a validation later in the same step)."""
        ...

    def figure(self, name: str, path: Path) -> None:
        """Record the PNG file at ``path`` under ``name``."""
        ...

    def artifact(self, name: str, paths: list[Path], metadata: dict[str, Any]) -> None:
        """Record a new version of the files ``paths`` (theta and its configuration) with what describes them."""
        ...

    def finish(self, exit_code: int = 0) -> None:
        """End the run: 0 when it completed, 128 + signal number when a signal ended it. Later calls do nothing."""
        ...


@runtime_checkable
class Rewindable(Protocol):
    """A tracker whose record can be taken back to an earlier meta-step, which exact resume needs."""

    def rewind(self, step: int) -> None:
        """Forget everything after meta-step ``step``, the last one that the resumed training will not repeat.

        -1 where it repeats all, the validation of the start included, which counts as meta-step 0.
        """
        ...


@runtime_checkable
class Watching(Protocol):
    """A tracker that looks at theta itself when it likes to."""

    def watch(self, theta: Theta) -> None:
        """Take theta as the training moves it, in place; to be read only, and only within a call of this tracker."""
        ...


@runtime_checkable
class Charting(Protocol):
    """A tracker that draws several lines into one chart."""

    def lines(self, name: str, lines: Mapping[str, Sequence[float]], xname: str) -> None:
        """Draw lines by their labels, such as the losses of a learned optimizer and of others, over 0, 1, 2, ..."""
        ...


class NullTracker:
    """Records nothing; for tests and for ranks other than 0."""

    def start(self, config: dict[str, Any]) -> None:
        """Do nothing."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Do nothing."""

    def figure(self, name: str, path: Path) -> None:
        """Do nothing."""

    def artifact(self, name: str, paths: list[Path], metadata: dict[str, Any]) -> None:
        """Do nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Do nothing."""


class Trackers:
    """Passes every call on to each of ``sinks`` and keeps their failures away from the training and from each other.

    The first failure of a sink is reported by ``logging`` (which, unlike a warning, no filter turns into an exception).
    The sink is still called afterwards, since a disk that was full may have room again; it is not reported again.
    """

    def __init__(self, sinks: Sequence[Tracker]) -> None:
        self.sinks: list[Tracker] = list(sinks)
        self._reported: set[int] = set()

    def start(self, config: dict[str, Any]) -> None:
        """See ``Tracker``."""
        self._each("start", lambda sink: sink.start(config))

    def log(self, metrics: Metrics, step: int) -> None:
        """See ``Tracker``."""
        self._each("log", lambda sink: sink.log(metrics, step))

    def figure(self, name: str, path: Path) -> None:
        """See ``Tracker``."""
        self._each("figure", lambda sink: sink.figure(name, path))

    def artifact(self, name: str, paths: list[Path], metadata: dict[str, Any]) -> None:
        """See ``Tracker``."""
        self._each("artifact", lambda sink: sink.artifact(name, paths, metadata))

    def finish(self, exit_code: int = 0) -> None:
        """See ``Tracker``."""
        self._each("finish", lambda sink: sink.finish(exit_code))

    def rewind(self, step: int) -> None:
        """Rewind the sinks that can; see ``Rewindable``."""
        self._each("rewind", lambda sink: sink.rewind(step) if isinstance(sink, Rewindable) else None)

    def watch(self, theta: Theta) -> None:
        """Show theta to the sinks that look at it; see ``Watching``."""
        self._each("watch", lambda sink: sink.watch(theta) if isinstance(sink, Watching) else None)

    def lines(self, name: str, lines: Mapping[str, Sequence[float]], xname: str) -> None:
        """Draw lines in the sinks that can; see ``Charting``."""
        self._each("lines", lambda sink: sink.lines(name, lines, xname) if isinstance(sink, Charting) else None)

    def _each(self, doing: str, call: Callable[[Tracker], None]) -> None:
        for index, sink in enumerate(self.sinks):
            try:
                call(sink)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is reported and must not stop a training
                if index not in self._reported:
                    self._reported.add(index)
                    logger.warning(
                        "%s failed in %s() with %s: %s. The training goes on, but what this tracker should have "
                        "recorded may be missing; its further failures are not reported.",
                        type(sink).__name__, doing, type(error).__name__, error,
                    )  # fmt: skip


def sinks_of(tracker: Tracker | Callable[[], Tracker] | None) -> Trackers:
    """Return a tracker, what a function makes, or nothing, as ``Trackers``."""
    made = tracker() if callable(tracker) else tracker or NullTracker()
    return made if isinstance(made, Trackers) else Trackers([made])


_WORDS = {
    "meta_loss": "meta-loss {:.4g}",
    "validation": "validation {:.4g}",
    "grad_norm": "gradient norm {:.3g}",
    "skipped": "{:.0f} skipped",
    "failed_tasks": "{:.3g} tasks failed",
}


class ConsoleTracker:
    """Tells the progress in one line: meta-step, rate, time left, meta-loss, validation, gradient norm, skipped.

    On a terminal the line is rewritten in place; elsewhere (a pipe, a file, a notebook) each is a sentence of its own,
    without control codes, and they become rarer with time.

    Args:
        total: the number of meta-steps to come, shown beside the present one; by default the ``num_meta_steps`` that
            the trainer tells at the start.
        interval: seconds between two lines. None means 0.2 on a terminal; elsewhere a twentieth of the time since the
            start, at least 10 and at most 600. 0 shows every call.
        stream: where to write; None means ``sys.stdout`` as it is at the time of writing.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        total: int | None = None,
        interval: float | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if interval is not None and not interval >= 0:
            raise ValueError(f"interval must be a number of seconds that is not negative, got {interval}")
        self._total, self._interval, self._stream, self._clock = total, interval, stream, clock
        self._latest: dict[str, float] = {}
        self._step: int | None = None
        self._first: tuple[int, float] | None = None  # a meta-step, and when it was done
        self._shown_at = -math.inf
        self._pending = False  # the latest numbers have not been shown
        self._open_line = False  # the cursor stands behind a line that may be rewritten
        self._finished = False

    def start(self, config: dict[str, Any]) -> None:
        """Print the top-level settings that are words or numbers."""
        told = {key: value for key, value in config.items() if not isinstance(value, bool)}
        plain = [f"{key}={value}" for key, value in told.items() if isinstance(value, str | int | float)]
        self._sentence("Meta-training starts" + (f" with {', '.join(plain)}." if plain else "."))
        if isinstance(told := config.get("num_meta_steps"), int):
            self._total = told
        self._first, self._finished = None, False

    def log(self, metrics: Metrics, step: int) -> None:
        """Show the latest value of every known metric, unless the last line is younger than the interval."""
        self._latest.update(
            {name: float(value) for name, value in metrics.items() if not isinstance(value, list | str)}
        )
        self._step, self._pending, now = step, True, self._clock()
        if self._first is None and step > 0:  # from its end on: the first one may compile, load and check
            self._first = step, now
        if now - self._shown_at >= self._seconds_between(now):
            self._show(now)

    def figure(self, name: str, path: Path) -> None:
        """Print where the figure is, after the last numbers."""
        self._show_pending()
        self._sentence(f"Figure {name} is at {path}.")

    def artifact(self, name: str, paths: list[Path], metadata: dict[str, Any]) -> None:
        """Print where the files are, after the last numbers."""
        self._show_pending()
        self._sentence(f"Saved {name} at {', '.join(map(str, paths))}.")

    def finish(self, exit_code: int = 0) -> None:
        """Print the last numbers, if they have not been shown, and how the run ended."""
        if self._finished:
            return
        self._finished = True
        self._show_pending()
        how = "ended" if exit_code == 0 else f"stopped with exit code {exit_code}"
        after = "before its first meta-step" if not self._step else f"after meta-step {self._step}"
        self._sentence(f"Meta-training {how} {after}.")

    def _seconds_between(self, now: float) -> float:
        if self._interval is not None:
            return self._interval
        if self._on_terminal():
            return 0.2
        return 10.0 if self._first is None else min(max(10.0, (now - self._first[1]) / 20), 600.0)

    def _show_pending(self) -> None:
        if self._pending:
            self._show(self._clock())

    def _show(self, now: float) -> None:
        of_total = "" if self._total is None else f" of {self._total}"
        known = [words.format(self._latest[name]) for name, words in _WORDS.items() if name in self._latest]
        line = f"Meta-step {self._step}{of_total}{self._pace(now)}" + (f": {', '.join(known)}" if known else "") + "."
        self._shown_at, self._pending = now, False
        if self._on_terminal() and self._step:  # the start keeps its line: the first meta-step may compile, and say so
            # Return to the line's start and erase it. A line that wraps could not be erased: it is cut.
            self._write(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}")
            self._open_line = True
        else:
            self._write(f"{line}\n")

    def _pace(self, now: float) -> str:
        """Return the meta-steps per second since the first one seen, and the time left at that rate."""
        if self._first is None or self._step is None or self._step <= self._first[0] or now <= self._first[1]:
            return ""
        rate = (self._step - self._first[0]) / (now - self._first[1])
        left = "" if self._total is None else f", {duration(max(self._total - self._step, 0) / rate)} left"
        return f" ({rate:.3g} meta-steps/s{left})"

    def _sentence(self, text: str) -> None:
        self._write(("\n" if self._open_line else "") + text + "\n")
        self._open_line = False

    def _on_terminal(self) -> bool:
        return (self._stream or sys.stdout).isatty()

    def _write(self, text: str) -> None:
        stream = self._stream or sys.stdout
        stream.write(text)
        stream.flush()


def progress_line() -> ConsoleTracker:
    """Return the console as a trainer has it by default: on stderr, so that what a script prints stays its own."""
    return ConsoleTracker(stream=sys.stderr)
