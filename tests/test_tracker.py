"""The fan-out, the console and the record: what they write, that it survives kills and resumes, and stops nobody."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from learnedopt.training.json_tracker import JsonLinesTracker, read_metrics
from learnedopt.training.tracker import ConsoleTracker, NullTracker, Rewindable, Tracker, Trackers

ROOT = Path(__file__).resolve().parent.parent


class Broken:
    """A tracker whose every call fails, and that counts them."""

    calls = 0

    def _fail(self) -> None:
        self.calls += 1
        raise OSError("no space left")

    def start(self, config: dict[str, Any]) -> None:
        self._fail()

    def log(self, metrics: object, step: int) -> None:
        self._fail()

    def figure(self, name: str, path: Path) -> None:
        self._fail()

    def artifact(self, name: str, paths: list[Path], metadata: dict[str, Any]) -> None:
        self._fail()

    def finish(self, exit_code: int = 0) -> None:
        self._fail()


def train(tracker: Tracker, first: int, last: int) -> None:
    """Log the meta-steps ``first`` to ``last`` as a training would."""
    for step in range(first, last + 1):
        tracker.log({"meta_loss": 1 / step, "inner_loss": [1.0, 1 / step]}, step)


# The fan-out


def test_a_failing_sink_is_reported_once_and_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, record = Broken(), JsonLinesTracker(tmp_path / "metrics.jsonl")
    trackers = Trackers([broken, NullTracker(), record])
    trackers.start({"seed": 0})
    train(trackers, 1, 3)
    trackers.figure("loss", tmp_path / "loss.png")
    trackers.artifact("theta", [tmp_path / "theta.safetensors"], {"rule": "lstm"})
    trackers.rewind(2)
    trackers.finish()
    assert [row["step"] for row in read_metrics(record.path)] == [1, 2]
    assert broken.calls == 7  # every call but rewind, which it does not have
    assert len(caplog.records) == 1
    assert "Broken failed in start() with OSError: no space left" in caplog.text


def test_what_can_be_rewound() -> None:
    assert isinstance(JsonLinesTracker(Path("x")), Rewindable)
    assert isinstance(Trackers([]), Rewindable)
    assert not isinstance(ConsoleTracker(), Rewindable)


# The console


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Shows the time that it is set to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_console_prints_sentences_when_piped(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    console = ConsoleTracker(total=3, clock=clock)
    console.start({"recipe": "lstm-quadratic", "seed": 3, "num_meta_steps": 20, "rule": {"hidden": 20}})
    metrics = {"meta_loss": 0.123456, "grad_norm": 12.3456, "step_ms": 34.56, "skipped": 0, "inner_loss": [2.0, 1.0]}
    console.log({"validation": 0.5}, 0)
    clock.now = 12.0
    console.log(metrics, 1)
    clock.now = 16.0
    console.log({**metrics, "meta_loss": 9.0}, 2)  # too early
    clock.now = 22.0
    console.log({**metrics, "meta_loss": math.nan, "skipped": 1}, 3)  # with the validation of meta-step 0
    clock.now = 24.0
    console.log({**metrics, "meta_loss": 0.25}, 4)  # too early, so shown before what follows it
    console.figure("loss", Path("runs/a/loss.png"))
    console.finish(143)
    console.finish()
    out = capsys.readouterr().out
    # The pace is that since the end of the first meta-step, whose 12 seconds may have been a compiler's.
    assert out.splitlines() == [
        "Meta-training starts with recipe=lstm-quadratic, seed=3, num_meta_steps=20.",
        "Meta-step 0 of 20: validation 0.5.",
        "Meta-step 1 of 20: meta-loss 0.1235, validation 0.5, gradient norm 12.3, 0 skipped.",
        "Meta-step 3 of 20 (0.2 meta-steps/s, 85 s left): meta-loss nan, validation 0.5, gradient norm 12.3, "
        "1 skipped.",
        "Meta-step 4 of 20 (0.25 meta-steps/s, 64 s left): meta-loss 0.25, validation 0.5, gradient norm 12.3, "
        "0 skipped.",
        "Figure loss is at runs/a/loss.png.",
        "Meta-training stopped with exit code 143 after meta-step 4.",
    ]
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out)


def test_console_rewrites_its_line_on_a_terminal() -> None:
    terminal, clock = Terminal(), Clock()
    console = ConsoleTracker(interval=0, stream=terminal, clock=clock)
    console.log({"validation": 3.0}, 0)
    console.log({"meta_loss": 2.0}, 1)
    clock.now = 0.5
    console.log({"meta_loss": 1.0}, 2)
    console.finish()
    assert terminal.getvalue() == (
        "Meta-step 0: validation 3.\n\r\x1b[KMeta-step 1: meta-loss 2, validation 3."
        "\r\x1b[KMeta-step 2 (2 meta-steps/s): meta-loss 1, validation 3.\n"
        "Meta-training ended after meta-step 2.\n"
    )


def test_a_line_that_would_wrap_on_the_terminal_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    terminal = Terminal()
    ConsoleTracker(stream=terminal).log({"meta_loss": 2.0, "grad_norm": 0.123456}, 1)
    assert terminal.getvalue() == "\r\x1b[KMeta-step 1: meta-loss 2, gra"


def test_a_long_training_that_is_piped_says_little(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    console = ConsoleTracker(clock=clock)
    console.start({"num_meta_steps": 172_800})
    for step in range(1, 86_401):  # a day of one meta-step a second
        clock.now = step
        console.log({"meta_loss": 1.0}, step)
    lines = capsys.readouterr().out.splitlines()[1:]
    steps = [int(line.split()[1]) for line in lines]
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert steps[0] == 1 and gaps[0] == 10 and max(gaps) == 600 and len(steps) < 250
    assert "(1 meta-steps/s, 2 d 0 h left)" in lines[1] and "(1 meta-steps/s, 24 h 9 min left)" in lines[-1]


def test_a_console_serves_a_training_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    console = ConsoleTracker(interval=0, clock=clock)
    for first, last in ((1, 2), (3, 4)):
        console.start({"num_meta_steps": last})
        clock.now += 1000  # a break that is no part of the pace
        for step in range(first, last + 1):
            clock.now += 60
            console.log({"meta_loss": 1.0}, step)
        console.finish()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "Meta-step 4 of 4 (0.0167 meta-steps/s, 0 s left): meta-loss 1.",
        "Meta-training ended after meta-step 4.",
    ]
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (5969, "99 min"), (6000, "1 h 40 min"), (172_800, "2 d 0 h")],
)
def test_time_left_is_told_in_two_units_at_most(seconds: float, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    console = ConsoleTracker(interval=0, total=1002, clock=clock)
    console.log({}, 1)
    clock.now = seconds / 1000 or 1e-9
    console.log({}, 2)
    assert f", {told} left)" in capsys.readouterr().out


def test_console_refuses_a_negative_interval() -> None:
    with pytest.raises(ValueError, match="interval"):
        ConsoleTracker(interval=-1)


# The record


def test_record_holds_what_was_said(tmp_path: Path) -> None:
    record = JsonLinesTracker(tmp_path / "run" / "metrics.jsonl")
    record.start({"lr": 1e-3, "out": tmp_path, "hidden": (20, 20), "clip": math.inf})
    record.log({"meta_loss": 0.1, "skipped": 2, "inner_loss": [1 / 3, math.nan, -math.inf]}, 1)
    record.log({"meta_loss": math.nan, "validation": math.inf}, 2)
    record.figure("loss", tmp_path / "loss.png")
    record.artifact("theta", [tmp_path / "theta.safetensors"], {"rule": "lstm", "best": math.nan})
    record.finish(143)
    record.finish()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    start, *_, figure, artifact, finish = [
        json.loads(line, parse_constant=refuse) for line in record.path.read_text("utf-8").splitlines()
    ]
    assert start["config"] == {"lr": 1e-3, "out": str(tmp_path), "hidden": [20, 20], "clip": "Infinity"}
    assert figure == {"event": "figure", "step": 2, "name": "loss", "path": str(tmp_path / "loss.png")}
    assert artifact["paths"] == [str(tmp_path / "theta.safetensors")]
    assert artifact["metadata"] == {"rule": "lstm", "best": "NaN"}
    assert finish == {"event": "finish", "step": 2, "exit_code": 143}
    first, second = read_metrics(record.path)
    assert (first["step"], first["meta_loss"], first["skipped"]) == (1, 0.1, 2)
    assert first["inner_loss"][0] == 1 / 3 and math.isnan(first["inner_loss"][1])
    assert first["inner_loss"][2] == -math.inf
    assert math.isnan(second["meta_loss"]) and second["validation"] == math.inf


def test_resume_leaves_each_step_once_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    killed = JsonLinesTracker(path)
    killed.start({"seed": 0})
    train(killed, 1, 7)
    killed.figure("loss", tmp_path / "loss.png")  # of step 7: the resumed run makes it again
    with open(path, "ab") as file:
        file.write(b'{"step": 8, "meta_lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]

    resumed = JsonLinesTracker(path)
    resumed.rewind(5)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    resumed.start({"seed": 0})
    train(resumed, 6, 9)
    resumed.rewind(8)  # of an open file
    train(resumed, 9, 10)
    resumed.finish()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["meta_loss"] for row in rows] == [1 / step for step in range(1, 11)]
    events = [json.loads(line).get("event") for line in path.read_text("utf-8").splitlines()]
    assert [event for event in events if event] == ["start", "start", "finish"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_record_goes_back_to_before_the_start(tmp_path: Path) -> None:
    record = JsonLinesTracker(tmp_path / "metrics.jsonl")
    record.start({})
    record.log({"validation": 2.0}, 0)
    record.log({"meta_loss": 1.0}, 1)
    record.rewind(0)
    assert [row["step"] for row in read_metrics(record.path)] == [0]
    record.rewind(-1)
    assert read_metrics(record.path) == []
    record.finish()
    assert json.loads(record.path.read_text("utf-8").splitlines()[-1]) == {
        "event": "finish",
        "step": None,
        "exit_code": 0,
    }


def test_start_alone_cuts_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "meta_loss": 2.0}\n{"step": 2')
    record = JsonLinesTracker(path)
    record.start({})
    record.log({"meta_loss": 1.0}, 2)
    assert read_metrics(path) == [{"step": 1, "meta_loss": 2.0}, {"step": 2, "meta_loss": 1.0}]
    record.finish()


def test_every_finished_line_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = f"""
import os, signal
from pathlib import Path
from learnedopt.training.json_tracker import JsonLinesTracker
record = JsonLinesTracker(Path({str(path)!r}))
record.start({{}})
for step in range(1, 101):
    record.log({{"meta_loss": 1 / step}}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 101))


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = JsonLinesTracker(tmp_path / "metrics.jsonl")
    record.start({})
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda fd, data: write(fd, data[:9]))
        with pytest.raises(OSError, match="only 9 of"):
            record.log({"meta_loss": 2.0}, 1)
    record.log({"meta_loss": 1.0}, 2)
    assert read_metrics(record.path) == [{"step": 2, "meta_loss": 1.0}]
    record.finish()


def test_record_refuses_what_it_cannot_keep(tmp_path: Path) -> None:
    record = JsonLinesTracker(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not open"):
        record.log({"meta_loss": 1.0}, 1)
    record.start({})
    with pytest.raises(ValueError, match="step"):
        record.log({"step": 1.0}, 1)
    record.finish()
    for foreign in (b'{"step": 1}\nloss,step\n', b"[1, 2]\n"):
        record.path.write_bytes(foreign)
        with pytest.raises(ValueError, match=r"line \d of .* is not"):
            record.rewind(0)
        assert record.path.read_bytes() == foreign
