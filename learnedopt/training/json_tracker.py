"""The record of a meta-training: a text file of JSON lines that survives kills, full disks and resumes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from learnedopt.core.containers import is_dict, is_list
from learnedopt.core.files import json_number, parse_json, plain_json, require_plain_file, write_atomically
from learnedopt.training.tracker import Metrics

MAX_LINE = 1 << 26
"""Bytes of a line that is read."""
_PIECE = 1 << 20
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class JsonLinesTracker:
    """Appends the run to a text file, one JSON object a line: the record of a training.

    A line of metrics is ``{"step": 7, "meta_loss": 0.5, "inner_loss": [0.9, 0.7], ...}``; ``read_metrics`` gives these
    back. Other lines have an ``"event"``: ``start`` (``config``, ``time`` in Unix seconds), ``figure``, ``artifact``,
    ``finish``. JSON has no NaN and no infinities: they are written as the strings ``"NaN"``, ``"Infinity"``
    and ``"-Infinity"``, which ``float`` (and JavaScript's ``Number``) reads back. Finite numbers keep every digit.
    Configuration values that are not JSON (paths, types) are written as ``str`` shows them.

    Each line is handed to the operating system in one write before the call returns, so a killed process loses no
    finished line. A write that fails halfway (a full disk) is taken back, so that later lines stay readable.
    A resumed run calls ``rewind`` with the step it resumes from, before ``start`` or after: each step is then there
    once.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path = Path(path)
        self._fd: int | None = None
        self._last_step: int | None = None

    def start(self, config: dict[str, Any]) -> None:
        """Open the file, after cutting off a last line that a kill left half-written, and write the configuration.

        Raises:
            OSError: the folder or the file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _mend_tail(self.path)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._append({"event": "start", "time": time.time(), "config": plain_json(config)})

    def log(self, metrics: Metrics, step: int) -> None:
        """Append one line.

        Raises:
            ValueError: a metric is named ``step`` or ``event``, which the format keeps for itself.
            OSError: the line could not be written; nothing of it remains.
        """
        if reserved := {"step", "event"} & set(metrics):
            raise ValueError(f"metrics named {sorted(reserved)} would hide the record's own fields; rename them")
        self._last_step = step
        self._append({"step": step, **{name: _number_or_curve(value) for name, value in metrics.items()}})

    def figure(self, name: str, path: Path) -> None:
        """Append where the figure is."""
        self._append({"event": "figure", "step": self._last_step, "name": name, "path": str(path)})

    def artifact(self, name: str, paths: list[Path], metadata: dict[str, Any]) -> None:
        """Append where the files are and what describes them."""
        files, about = [str(path) for path in paths], plain_json(metadata)
        self._append({"event": "artifact", "step": self._last_step, "name": name, "paths": files, "metadata": about})

    def finish(self, exit_code: int = 0) -> None:
        """Append how the run ended and close the file."""
        if self._fd is not None:
            try:
                self._append({"event": "finish", "step": self._last_step, "exit_code": exit_code})
            finally:
                os.close(self._fd)
                self._fd = None

    def rewind(self, step: int) -> None:
        """Drop a half-written last line and every line of a step after ``step``; lines without a step stay.

        Meta-steps count from 1, and 0 is the start: ``rewind(-1)`` begins anew. The file is replaced as a whole: a kill
        in between leaves it as it was.

        Raises:
            ValueError: a line before the last is not JSON: this is not, or no longer, a record.
            OSError: the folder cannot be written.
        """
        self._last_step = step if step >= 0 else None
        if not self.path.exists():
            return
        _mend_tail(self.path)

        def write(partial: Path) -> None:
            with partial.open("wb") as kept:
                for row, line in _rows(self.path):
                    if row.get("step") is None or row["step"] <= step:
                        kept.write(line)

        write_atomically(self.path, write)
        if self._fd is not None:  # the open file is the replaced one
            os.close(self._fd)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def _append(self, entry: dict[str, Any]) -> None:
        if self._fd is None:
            raise ValueError(f"the record {self.path} is not open: call start() first, and nothing after finish()")
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        end = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes fitted into {self.path}; make room on the disk")
        except OSError:
            os.ftruncate(self._fd, end)
            raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the metric lines of a ``JsonLinesTracker``'s file, in order, with NaN and infinities as floats again.

    Example: ``[row["meta_loss"] for row in read_metrics(run / "metrics.jsonl") if "meta_loss" in row]``.

    Raises:
        ValueError: a line, which is named, is not JSON, or has no metrics: its step is no count, or a value neither a
            number, text nor a list of numbers. (A half-written last line has no line end and is left out.)
    """
    found: list[dict[str, Any]] = []
    for number, (row, _) in enumerate(_rows(Path(path)), start=1):
        if "event" in row:
            continue
        revived: dict[str, Any] = {}
        for name, value in row.items():
            try:
                revived[name] = [_number(x) for x in value] if is_list(value) else _revive(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"line {number} of {path} has a {name!r} that is no metric ({error}); mend that line, or delete it"
                ) from error
        found.append(revived)
    return found


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield what each line that has its end says, and the line: not all of a long record at once."""
    require_plain_file(path)
    with path.open("rb") as file:
        number = 0
        while (line := file.readline(MAX_LINE + 1)).endswith(b"\n"):
            number += 1
            yield _parse(path, number, line), line
        if len(line) > MAX_LINE:
            raise ValueError(
                f"line {number + 1} of {path} is longer than {MAX_LINE} bytes, so it is not a record of a "
                "training; move it away"
            )


def _number_or_curve(value: float | list[float] | str) -> Any:
    if isinstance(value, str):
        return value
    return [json_number(x) for x in value] if isinstance(value, list) else json_number(value)


def _revive(value: Any) -> int | float | str:
    if isinstance(value, str) and value not in _NOT_FINITE:
        return value
    number = _number(value)
    return number if isinstance(value, str) else value


def _number(value: Any) -> float:
    """Return a number that JSON has, or that was written as text for want of one."""
    if not isinstance(value, int | float) and value not in _NOT_FINITE:
        raise TypeError(f"{value!r:.40} is no number")
    return float(value)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise ValueError(
            f"line {number} of {path} is not JSON ({error}), so it is not a record of a training, or was damaged; "
            "move it away or mend that line"
        ) from error
    if not is_dict(entry):
        raise ValueError(f"line {number} of {path} is not a JSON object but {type(entry).__name__}; move the file away")
    step = entry.get("step")
    if not (type(step) is int and 0 <= step < 1 << 63) and not (step is None and "event" in entry):
        raise ValueError(
            f"line {number} of {path} has no meta-step that is a count, nor is it an event; mend that line"
        )
    return entry


def _mend_tail(path: Path) -> None:
    """Cut off what follows the last line end: a line that was being written when the process died."""
    require_plain_file(path)
    if path.exists():
        with path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            while end > 0:
                start = max(end - _PIECE, 0)
                file.seek(start)
                if (last := file.read(end - start).rfind(b"\n")) >= 0:
                    end = start + last + 1
                    break
                end = start
            file.truncate(end)
