"""The faults of ``make soak`` in short: real processes that meet some of them, and the judges of the others."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import train_meta
from benchmarks import soak, soak_faults, soak_memory, soak_signals
from benchmarks.soak_round import Round, Wrong
from benchmarks.soak_runs import TRAININGS, Training, differences, torn
from learnedopt.core.files import exclusive
from learnedopt.training.interrupts import Interrupts

TRAINING = TRAININGS["learned start, truncated"]


def train(training: Training, runs: Path) -> int:
    sets = [word for setting in training.settings for word in ("--set", setting)]
    return train_meta.main([training.recipe, "--runs", str(runs), "--name", "run", "--wandb", "disabled", *sets])


class Here(Round):
    """A round whose training is finished in this process, which has imported everything."""

    def finish(self) -> None:
        assert train(self.training, self.runs) == 0
        self.compare()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run that nothing disturbs."""
    runs = tmp_path_factory.mktemp("whole")
    assert train(TRAINING, runs) == 0
    return runs / "run"


@pytest.fixture
def round(whole: Path, tmp_path: Path) -> Here:
    return Here(TRAINING, tmp_path / "runs", whole, tmp_path, random.Random(0))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a terminal that closes is one of Unix")
def test_a_terminal_that_closes_leaves_a_checkpoint(round: Here) -> None:
    assert soak_signals.close_terminal(round) == {"outcome": "stopped", "code": 129}


def test_a_disk_without_room_stops_a_training_in_one_line(round: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_faults, "_mount", lambda folder, options: folder.mkdir(parents=True))  # a limit instead
    found = soak_faults.fill_disk(round)
    assert (found["outcome"], found["code"]) == ("stopped", 74) and "File too large" in found["message"]


def test_a_second_start_in_one_folder_says_so_and_disturbs_nothing(round: Here) -> None:
    found = soak_faults.start_twice(round)
    assert found["outcome"] == "survived"
    assert found["message"].startswith("learnedopt train: another process is at work in FOLDER;")


def test_a_clock_that_jumps_changes_nothing(round: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    real, jumps = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: real() + jumps.uniform(-4e8, 4e8))
    round.finish()


def test_a_folder_that_cannot_be_written_is_refused_before_anything(
    round: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: FileLock) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere else
    round.folder.mkdir(parents=True)
    with (
        pytest.raises(PermissionError, match=r"run cannot be written .*Read-only.*; make it writable"),
        exclusive(round.folder),
    ):
        pass
    assert train(TRAINING, round.runs) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not [*round.folder.iterdir()]


# Signals, without a process


STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("first", STOPPING)
@pytest.mark.parametrize("second", STOPPING)
@pytest.mark.parametrize("patient", [False, True])
def test_only_a_second_ctrl_c_does_not_wait(first: signal.Signals, second: signal.Signals, patient: bool) -> None:
    before = [signal.getsignal(number) for number in STOPPING]
    with Interrupts(patient=patient) as interrupts:
        signal.raise_signal(first)
        assert interrupts.number == first
        if second == signal.SIGINT and not patient:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(second)
        else:
            signal.raise_signal(second)
            assert interrupts.number == first
            with pytest.raises(KeyboardInterrupt if first == signal.SIGINT else SystemExit) as ended:
                interrupts.deliver()
            assert first == signal.SIGINT or ended.value.code == 128 + first
    assert [signal.getsignal(number) for number in STOPPING] == before


@pytest.mark.parametrize("number", STOPPING)
def test_after_the_last_meta_step_a_signal_is_raised_at_once(number: signal.Signals) -> None:
    with Interrupts() as interrupts:
        interrupts.deliver()
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            signal.raise_signal(number)
        if number != signal.SIGINT:
            signal.raise_signal(number)  # the tracker may still finish


def test_a_sighup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert interrupts.number is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# What judges the rounds


def change_theta(folder: Path) -> None:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    next(iter(state["theta"].values())).view(-1)[0] += 1e-7
    torch.save(state, folder / "checkpoint.pt")


def lose_a_row(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:20] + lines[21:]))


def leave_a_partial(folder: Path) -> None:
    (folder / ".checkpoint.pt.killed.partial").write_bytes(b"half")


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "theta": (change_theta, "the checkpoint differs"),
    "row": (lose_a_row, "the record differs"),
    "partial": (leave_a_partial, "is left"),
    "figure": (lambda folder: (folder / "training.png").unlink(), "no training.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_is_not_the_undisturbed_one_is_found_out(change: str, round: Here) -> None:
    shutil.copytree(round.whole, round.folder)
    round.compare()
    CHANGES[change][0](round.folder)
    with pytest.raises(Wrong, match=CHANGES[change][1]):
        round.compare()


@pytest.mark.parametrize("name", ["checkpoint.pt", "theta.safetensors", "config.json", "theta.json"])
def test_a_torn_file_is_found_out(name: str, round: Here) -> None:
    shutil.copytree(round.whole, round.folder)
    assert torn(round.folder) == []
    whole = (round.folder / name).read_bytes()
    (round.folder / name).write_bytes(whole[: len(whole) // 2])
    assert len(torn(round.folder)) == 1 and torn(round.folder)[0].startswith(name)
    assert differences(round.folder, round.whole)


def samples(minutes: float, **growth: float) -> list[dict[str, float]]:
    """Return samples of a training that holds the same all the time, beside what grows by so much a second."""
    held = {"rss": 5e8, "own": 4e8, "children_rss": 4e7, "threads": 3, "handles": 10, "children": 2}
    times = [10.0 * i for i in range(int(6 * minutes))]
    return [{"seconds": t, **{k: v + t * growth.get(k, 0) for k, v in held.items()}} for t in times]


def test_what_a_long_training_holds_is_judged() -> None:
    flat = soak_memory.verdict(samples(60))
    assert flat["passed"] and flat["growth"] == 0
    assert soak_memory.verdict(samples(60, rss=3000))["passed"]  # 1.8 % in an hour
    assert not soak_memory.verdict(samples(60, rss=4000))["passed"]
    assert not soak_memory.verdict(samples(60, children_rss=4000))["passed"]
    for name in ("threads", "handles", "children"):
        assert not soak_memory.verdict(samples(60, **{name: 0.001}))["passed"], name
    assert not soak_memory.verdict(samples(6))["passed"]  # too short


def test_a_cycle_has_every_fault_and_kills_every_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEARNEDOPT_DATA", "somewhere")
    rounds = soak.plan([])
    assert [name for fault, name in rounds if fault == "SIGKILL"] == [*TRAININGS]
    assert [fault for fault, _ in rounds if fault != "SIGKILL"] == [*soak_faults.OTHERS]
    monkeypatch.delenv("LEARNEDOPT_DATA")
    assert not any("data" in fault or TRAININGS[name].data for fault, name in soak.plan([]))
