"""W&B with a server: what its real client sends to one that stands in for it, from runs, uploads and sweeps of ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_wandb_tracker import reports, train, wandb_home
from wandb_server import ENTITY, SWEEP, WandbServer

import train_meta
from learnedopt import cli
from learnedopt.sweep_file import read_sweep
from learnedopt.training.json_tracker import JsonLinesTracker, read_metrics
from learnedopt.training.wandb_tracker import WandbTracker

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
TINY = {
    "num_meta_steps": 2, "num_tasks": 2, "validation.num_tasks": 2, "validation.every": 1, "validation.num_steps": 2,
}  # fmt: skip
SMALL = {
    "lstm-quadratic": {"estimator.horizon": 4, "estimator.num_steps": 2, "rule.hidden_size": 2},
    "maml-sine": {"execution.compile": False},
    "meta-sgd-mnist": {"estimator.num_steps": 2},
}
__all__ = ["wandb_home"]  # the fixture


@pytest.fixture
def server() -> Iterator[WandbServer]:
    """Listen; and in the end have understood all that was asked."""
    with WandbServer() as listening:
        yield listening
    assert not listening.unknown


ONLINE = [
    "lstm-quadratic", *(f"{key}={value}" for key, value in {**TINY, **SMALL["lstm-quadratic"]}.items()),
    "--wandb", "online", "--project", "mine", "--entity", ENTITY,
]  # fmt: skip


@pytest.mark.usefixtures("wandb_home")
def test_a_run_that_goes_on_is_one_run(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = [*ONLINE, "--runs", str(tmp_path), "--group", "pilot", "--tags", "short,cpu", "--notes", "a first look"]
    log = JsonLinesTracker.log

    def stopped(self: JsonLinesTracker, metrics: Any, step: int) -> None:
        log(self, metrics, step)
        if step == 1 and not next(iter(server.runs.values())).exit_codes:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as said:
        for name, value in server.variables.items():
            said.setenv(name, value)
        said.setattr(JsonLinesTracker, "log", stopped)
        assert [train_meta.main(words) for _ in range(2)] == [143, 0]

    (trained,) = server.runs.values()
    about = [trained.said(name) for name in ("project", "entity", "groupName", "tags", "notes")]
    assert about == ["mine", ENTITY, "pilot", ["short", "cpu"], "a first look"]
    assert trained.exit_codes == [143, 0] and trained.config["num_meta_steps"] == 2
    steps = [row["_step"] for row in trained.history]
    assert steps == [*range(len(steps))]  # it goes on, and not anew
    validated = {row["meta_step"]: row["best_validation"] for row in trained.history if "best_validation" in row}
    record = read_metrics(tmp_path / "lstm-quadratic" / "metrics.jsonl")
    assert validated == {row["step"]: row["best_validation"] for row in record} and [*validated] == [0, 1, 2]
    assert [text for text in reports(caplog) if "W&B failed" in text] == []


@pytest.mark.long
@pytest.mark.usefixtures("wandb_home")
def test_an_evaluation_is_linked_to_its_training(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate = ["evaluate", str(tmp_path / "lstm-quadratic"), "--tasks", "2", "--steps", "2", "--baselines", "SGD"]
    with monkeypatch.context() as said:
        for name, value in {**server.variables, "WANDB_PROJECT": "mine"}.items():
            said.setenv(name, value)
        assert train_meta.main([*ONLINE, "--runs", str(tmp_path)]) == 0
        assert cli.main([*evaluate, "--out", str(tmp_path / "evaluated"), "--wandb", "online"]) == 0

    (run_id, trained), (_, evaluated) = server.runs.items()
    # What the evaluation used is the version that the training has logged, and not a copy.
    (theta,) = [id for id in trained.made if server.versions[id].kind == "model"]
    assert evaluated.used == [theta] and theta not in evaluated.made and evaluated.said("jobType") == "evaluate"
    used = evaluated.config["used/lstm-quadratic"]
    assert (used["run_id"], used["digest"]) == (run_id, server.versions[theta].digest)
    assert server.files[f"{theta}/theta.safetensors"] == (tmp_path / "lstm-quadratic/theta.safetensors").read_bytes()
    assert [text for text in reports(caplog) if "W&B failed" in text] == []


@pytest.mark.long
@pytest.mark.usefixtures("wandb_home")
def test_wandb_sync_joins_the_fragments_of_an_offline_run(tmp_path: Path, server: WandbServer) -> None:
    (tmp_path / "theta.safetensors").write_bytes(b"theta")
    for first in (1, 3):  # the second repeats a step
        tracker = WandbTracker("offline", project="mine", group="pilot", dir=tmp_path, run_id="kept")
        tracker.start({"seed": 0})
        train(tracker, first, first + 2)
        tracker.artifact("theta", [tmp_path / "theta.safetensors"], {})
        tracker.finish(exit_code=143 if first == 1 else 0)
    folders = [
        str(path) for path in sorted(tmp_path.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime)
    ]
    run_wandb(server, tmp_path, "sync", *folders)
    ((run_id, run),) = server.runs.items()
    assert (run_id, run.project, run.said("groupName"), run.exit_codes) == ("kept", "mine", "pilot", [143, 0])
    assert [row["meta_step"] for row in run.history if "meta_loss" in row] == [1, 2, 3, 3, 4, 5]
    steps = [row["_step"] for row in run.history]
    assert steps == [*range(len(steps))]
    assert [version.place[2] for version in server.versions.values() if version.kind == "model"] == ["theta"]
    assert b"theta" in server.files.values()  # from the copies that waited


def run_wandb(server: WandbServer, folder: Path, *words: str, **variables: str) -> str:
    """Run W&B's command line in a folder, and return what it said; an agent looks for news more often than it would."""
    code = "from wandb.wandb_agent import Agent; from wandb.cli.cli import cli; Agent.POLL_INTERVAL = 0.2; cli()"
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # its `python` is this one
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**server.environment, **path, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_an_exit_code_that_stands_for_a_signal_can_be_ended_by_it() -> None:
    code = (
        "from learnedopt.training.interrupts import end_by_signal; "
        "end_by_signal(0); end_by_signal(137); print('on', end=''); end_by_signal(143)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "on")  # 137 is SIGKILL, which nobody ends by himself


@pytest.mark.long
@pytest.mark.usefixtures("wandb_home")
@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_wandb_agent_runs_the_file_as_it_is(path: Path, tmp_path: Path, server: WandbServer) -> None:
    if path.stem == "meta-sgd-mnist" and "LEARNEDOPT_DATA" not in os.environ:
        pytest.skip("needs MNIST: set LEARNEDOPT_DATA")
    run_wandb(server, tmp_path, "sweep", "--entity", ENTITY, "--project", "swept", str(path))
    assert yaml.safe_load(server.sweep) == yaml.safe_load(path.read_text("utf-8"))
    drawn = dict(read_sweep(path).trials()[0].values)
    server.trials = {
        "one": {**drawn, **TINY, **SMALL[path.stem]},
        "two": {**drawn, **TINY, **SMALL[path.stem], "seed": 7},
    }
    values = dict(server.trials)
    said = run_wandb(server, tmp_path, "agent", f"{ENTITY}/swept/{SWEEP}")
    assert f"/usr/bin/env python -m learnedopt train {path.stem} " in said
    assert not server.trials and [*server.runs] == ["one", "two"]
    for run_id, run in server.runs.items():
        assert (run.project, run.said("sweep"), run.exit_codes) == ("swept", SWEEP, [0])
        assert {key: run.config[key] for key in values[run_id]} == values[run_id]  # as they were sent
        metric = yaml.safe_load(server.sweep)["metric"]["name"]
        record = read_metrics(tmp_path / "runs" / f"{path.stem}-{run_id}" / "metrics.jsonl")
        assert run.summary[metric] == record[-1][metric] == [row[metric] for row in run.history if metric in row][-1]


@pytest.mark.long
@pytest.mark.usefixtures("wandb_home")
def test_a_trial_that_the_server_stops_is_no_failure_to_the_agent(tmp_path: Path, server: WandbServer) -> None:
    run_wandb(server, tmp_path, "sweep", "--entity", ENTITY, "--project", "swept", str(FILES[0]))
    small = {**TINY, **SMALL["lstm-quadratic"]}
    server.trials = {"worse": {**small, "num_meta_steps": 10**6, "validation.every": 1000}, "better": small}
    server.stopped = {"worse"}
    run_wandb(server, tmp_path, "agent", f"{ENTITY}/swept/{SWEEP}", WANDB_AGENT_MAX_INITIAL_FAILURES="1")
    assert {name: run.exit_codes for name, run in server.runs.items()} == {"worse": [143], "better": [0]}
    assert (tmp_path / "runs" / "lstm-quadratic-worse" / "checkpoint.pt").exists()
