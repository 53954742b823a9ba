"""Whoever waits for a compiler is told so, and about how long: as the last time, or that there was none."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from problems import TanhMLP, generic_theta, sample, template

from learnedopt import Execution, FinalLoss, InnerLoop, Unrolled, optimizers
from learnedopt.execution import compile_times, programs
from learnedopt.execution.compiler_cache import VARIABLE


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let nothing be compiled, and return the file that is written."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(programs, "backend", lambda record, example: record)
    return tmp_path / compile_times.FILE


def said(caplog: pytest.LogCaptureFixture, hidden: int = 4) -> list[str]:
    """Estimate with a loop of its own, as another process would; return what was told."""
    caplog.clear()
    family = TanhMLP()
    rule = optimizers.make("meta-sgd", template=template(family), lr=0.1 * hidden)
    loop = InnerLoop(family, rule, Execution(1, compile=True))
    with caplog.at_level(logging.INFO, "learnedopt.compiling"):
        Unrolled(2).estimate(loop, generic_theta(rule), FinalLoss(), loop.start(sample(family)))
    return [record.getMessage() for record in caplog.records]


def test_the_first_time_and_the_last_are_told(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, done = said(caplog)
    assert first.startswith("Compiling the meta-gradient, for the first time here: that takes some seconds to")
    assert done.startswith("Compiled the meta-gradient in ")
    (kind,) = compile_times._read()
    compile_times.remember(kind, 61.04)
    assert said(caplog)[0].startswith("Compiling the meta-gradient, which took 61 s the last time, and takes less")
    assert said(caplog, hidden=5)[0] == first  # another rule


@pytest.mark.parametrize("text", [b"", b"[1]", b'{"a": "b"', b"\xff"])
def test_a_damaged_record_counts_as_none(text: bytes, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    place.write_bytes(text)
    assert "for the first time" in said(caplog)[0]
    assert "the last time" in said(caplog)[0]


def test_what_cannot_be_kept_stops_nothing(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compile_times, "write_json", full)
    assert [line.partition(" ")[0] for line in said(caplog)] == ["Compiling", "Compiled"] and not place.exists()
