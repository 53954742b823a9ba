"""Sweeps: the files that W&B runs, and the runner that needs no server, with processes of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_wandb_tracker import history, records, run_file

import train_meta
from learnedopt import cli, recipes, sweeps
from learnedopt.config import INTERCHANGEABLE, override
from learnedopt.core.files import exclusive
from learnedopt.sweep_file import Halving, read_sweep
from learnedopt.sweeps import command_of, require_settings, run_sweep
from learnedopt.training.json_tracker import read_metrics

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
TRIAL = str(ROOT / "tests" / "sweep_trial.py")


def written(path: Path, **changes: Any) -> Path:
    """Write a sweep over rate, and return its path."""
    command = ["${env}", "python", "${program}", "demo-like", "${args_no_hyphens}"]
    sweep = {
        "name": "rates", "program": TRIAL, "command": command,
        "method": "grid", "metric": {"name": "best_validation"}, "parameters": {"rate": {"values": [1, 2, 3, 5, 8]}},
    }  # fmt: skip
    kept = {key: value for key, value in {**sweep, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(kept), "utf-8")
    return path


def rows(folder: Path) -> Mapping[str, list[dict[str, Any]]]:
    """Return the metrics of every trial by its value of rate."""
    told = {path.parent.name: read_metrics(path) for path in folder.glob("*/metrics.jsonl")}
    tried = json.loads((folder / "sweep.json").read_text("utf-8"))
    return {str(each["values"]["rate"]): told[each["names"][0]] for each in tried if each["names"][0] in told}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_files_are_such_as_wandb_agent_runs(path: Path) -> None:
    from wandb.sdk.launch.sweeps import utils

    sweep = read_sweep(path)
    settings = sweep.trials()
    require_settings(sweep, settings)
    (name,) = [word for word in sweep.command if word in recipes.names()]
    for trial in settings[:3]:
        # What the agent makes of a trial is what the local runner makes, and is taken by the recipe.
        agent = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in trial.values.items()}})
        words = ["/usr/bin/env", sys.executable, "-m", "learnedopt", "train", name]  # no script, so any folder will do
        assert command_of(sweep, trial) == [*words, *agent["args_no_hyphens"]]
        assert override(recipes.make(name), agent["args_no_hyphens"], INTERCHANGEABLE) != recipes.make(name)
    assert sweep.metric == "best_validation" and not sweep.maximize


def test_a_trial_has_a_folder_of_its_own_and_tells_the_metric_that_the_files_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = [
        "num_meta_steps=2", "num_tasks=2", "validation.num_tasks=2", "validation.every=1", "validation.num_steps=2",
        "estimator.horizon=4", "estimator.num_steps=2", "rule.hidden_size=2",
    ]  # fmt: skip
    # As wandb agent starts a trial, and starts it again.
    for variable in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(variable)
    said = {"SWEEP_ID": "sweep", "RUN_ID": "trial", "MODE": "offline", "DIR": str(tmp_path), "ENTITY": "me"}
    for variable, value in {**said, "PROJECT": "swept"}.items():
        monkeypatch.setenv(f"WANDB_{variable}", value)
    for _ in range(2):
        assert train_meta.main(["lstm-quadratic", *tiny, "--runs", str(tmp_path)]) == 0
    values = [row["best_validation"] for row in read_metrics(tmp_path / "lstm-quadratic-trial" / "metrics.jsonl")]
    found = records(run_file(tmp_path))
    (run,) = [record.run for record in found if record.HasField("run")]
    assert (run.run_id, run.project, run.entity, run.sweep_id) == ("trial", "swept", "me", "sweep")
    assert [row["best_validation"] for row in history(found) if "best_validation" in row] == values
    assert len(values) == 3 and values == sorted(values, reverse=True)  # no sawtooth: the start, and after each step
    assert {read_sweep(path).metric for path in FILES} == {"best_validation"}


def test_a_grid_runs_in_as_many_processes_as_it_may_and_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = {"rate": {"values": [1, 3, 13]}, "seed": {"values": [0, 1]}}
    file = written(tmp_path / "rates.yaml", parameters=parameters)
    result = run_sweep(file, tmp_path, processes=2)
    assert [(each.values, each.state, len(each.names)) for each in result.tried] == [
        ({"rate": 3}, "finished", 2), ({"rate": 1}, "finished", 2), ({"rate": 13}, "failed", 2),
    ]  # fmt: skip
    best = result.best
    assert best is not None and best.mean == pytest.approx(1 / 9 + 0.05) and best.standard_error == pytest.approx(0.05)
    best_row = (tmp_path / "rates" / "sweep.md").read_text("utf-8").splitlines()[2]
    assert best_row.replace(" ", "").split("|")[1:5] == ["0.1611", "0.05", "finished", "3"]
    spans = [
        (told[0]["at"], told[-1]["at"]) for path in tmp_path.rglob("metrics.jsonl") if (told := read_metrics(path))
    ]
    assert max(sum(a <= at <= b for a, b in spans) for at, _ in spans) <= 2
    before = {path: path.read_bytes() for path in tmp_path.rglob("metrics.jsonl") if path.read_bytes()}
    capsys.readouterr()
    assert cli.main(["sweep", str(file), "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Best: rate=3\n" in out and out.count("rate=13 seed") == 2 and "rate=3 seed" not in out  # the failed alone
    assert {path: path.read_bytes() for path in before} == before


def test_where_all_trials_fail_the_end_of_a_log_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = {"seed": {"values": [0, 1]}, "rate": {"value": 13}}
    file = written(tmp_path / "rates.yaml", parameters=parameters)
    assert cli.main(["sweep", str(file), "--runs", str(tmp_path)]) == 1
    table, why, end, _ = capsys.readouterr().out.rsplit("\n", 3)
    name = read_sweep(file).trials()[0].name
    assert why == f"{name} failed: a rate of 13 is too high ({tmp_path / 'rates' / name}.log)"
    assert end == "No setting was trained to its end."
    assert table.splitlines()[-1].replace(" ", "").startswith("|-||failed|13|")


def test_trials_that_do_not_tell_the_metric_end_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "rates.yaml", metric={"name": "best_validaton"})
    assert [cli.main(["sweep", str(file), "--runs", str(tmp_path)]) for _ in range(2)] == [2, 2]
    err, records = capsys.readouterr().err, [*tmp_path.rglob("metrics.jsonl")]
    assert err.count("has finished without the metric 'best_validaton'; did you mean 'best_validation'?") == 2
    assert len(records) == 1  # no second one was begun
    best = run_sweep(written(file), tmp_path).best
    assert best is not None and best.values == {"rate": 3}


def test_halving_stops_the_worse_and_the_others_go_on_where_they_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "_LOOK", 0.1)
    halving = {"type": "hyperband", "min_iter": 3, "eta": 2}
    parameters = {"rate": {"values": [1, 2, 3, 5, 8]}, "waits": {"value": 1}}
    file = written(tmp_path / "rates.yaml", early_terminate=halving, parameters=parameters)
    result = run_sweep(file, tmp_path, processes=2)
    told = rows(tmp_path / "rates")
    assert {rate: len(steps) for rate, steps in told.items()} == {"1": 3, "2": 9, "3": 9, "5": 3, "8": 3}
    assert all([row["step"] for row in steps] == [*range(len(steps))] for steps in told.values())
    assert [(each.values["rate"], each.state) for each in result.tried][:2] == [(3, "finished"), (2, "finished")]
    assert {each.state for each in result.tried[2:]} == {"dropped"}


def test_a_sweep_that_is_stopped_stops_its_trials_and_goes_on_where_they_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "rates.yaml", parameters={"rate": {"value": 4}, "waits": {"value": 1}})

    def interrupting(run: Path, metric: str, count: int | None) -> bool:
        if told(run, metric, 3):
            raise KeyboardInterrupt
        return False

    told = sweeps._told
    monkeypatch.setattr(sweeps, "_LOOK", 0.1)
    monkeypatch.setattr(sweeps, "_told", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(file, tmp_path)
    (record,) = tmp_path.glob("rates/*/metrics.jsonl")
    assert '"exit_code": 143' in record.read_text("utf-8").splitlines()[-1]
    monkeypatch.setattr(sweeps, "_told", told)
    best = run_sweep(file, tmp_path).best
    assert best is not None and best.mean == pytest.approx(1 + 1 / 9)
    assert [row["step"] for row in read_metrics(record)] == [*range(9)]


@pytest.mark.parametrize(
    ("said", "number", "expected"),
    [
        ({"min_iter": 3}, 27, Halving((3, 9, 27), 3)),
        ({"min_iter": 3, "eta": 2}, 5, Halving((3, 6, 12), 2)),
        ({"max_iter": 27, "s": 2}, 5, Halving((3, 9), 3)),
        ({"min_iter": 3}, 1, Halving((), 3)),
    ],
)
def test_when_settings_are_dropped(said: dict[str, int], number: int, expected: Halving, tmp_path: Path) -> None:
    file = written(tmp_path / "rates.yaml", early_terminate={"type": "hyperband", **said})
    assert read_sweep(file).halving(number) == expected


def test_settings_drawn_at_random_are_the_same_again_and_spread(tmp_path: Path) -> None:
    parameters = {
        "rate": {"distribution": "log_uniform_values", "min": 0.001, "max": 1.0}, "size": {"min": 1, "max": 4},
        "share": {"min": 0.0, "max": 0.5}, "kind": {"values": ["a", "b"]}, "fixed": {"value": 7},
    }  # fmt: skip
    sweep = read_sweep(written(tmp_path / "rates.yaml", method="random", parameters=parameters))
    drawn = sweep.trials(200)
    assert drawn[:50] == sweep.trials(50) and drawn != sweep.trials(200, seed=1)
    assert len({trial.name for trial in drawn}) == 200
    values = [trial.values for trial in drawn]
    assert 0.4 < sum(each["rate"] < 10**-1.5 for each in values) / 200 < 0.6  # the middle of three decades
    assert {each["size"] for each in values} == {1, 2, 3, 4} and {each["kind"] for each in values} == {"a", "b"}
    assert all(0.001 <= each["rate"] <= 1 and 0 <= each["share"] <= 0.5 and each["fixed"] == 7 for each in values)
    few = read_sweep(written(tmp_path / "few.yaml", method="random", parameters={"kind": {"values": ["a", "b"]}}))
    assert len(few.trials(5)) == 2  # there are no more
    with pytest.raises(ValueError, match="say how many, or set run_cap"):
        few.trials()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "bayes"}, "method='bayes' needs W&B's server"),
        ({"method": "successive-halving"}, "write method: random and early_terminate: .type: hyperband"),
        ({"metric": {"name": "meta_loss"}}, "metric.name='meta_loss' is of other tasks.*write best_validation"),
        ({"program": "absent.py"}, "starts absent.py, and there is no such file in .*-m, learnedopt, train"),
        ({"metrics": {}}, "'metrics', which the local runner does not know; did you mean 'metric'"),
        ({"command": None}, "it lacks command"),
        ({"parameters": {"validation.num_steps": {"values": [1]}}}, "changes what is measured"),
        ({"parameters": {"rate": {"min": 0.1, "max": 1.0}}}, "a grid needs values"),
        ({"parameters": {"rate": {"mu": 0.1, "sigma": 1.0}}}, "neither value, values, nor min and max"),
        ({"method": "random", "parameters": {"rate": {"min": "1e-3", "max": 1.0}}}, "YAML wants 1.0e-3"),
        ({"early_terminate": {"type": "median"}}, "is not hyperband"),
        ({"early_terminate": {"type": "hyperband"}}, "needs either min_iter or max_iter"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 3, "eta": 1}}, "early_terminate.eta=1"),
        ({"command": ["python", "train_meta.py", "demo", "${args_json}"]}, r"\$\{args_json\}"),
        ({"program": None, "command": ["${program}"]}, "there is no program"),
        ({"command": ["python", "x.py", "demo", "${args}"]}, "Recipe has no 'rate'"),
        ({"name": "a/b"}, "the name of the sweep"),
        ({"metric": "best_validation"}, "metric='best_validation' names none"),
        ({"metric": {"name": "best_validation", "goal": "max"}}, "metric.goal='max' is neither"),
        ({"parameters": [1]}, r"parameters=\[1\] are no fields"),
        ({"parameters": {3: {"value": 1}}}, "are no fields"),
        ({"parameters": {"rate": {"values": 3}}}, "rate.values=3 is no list"),
        ({"command": "train it"}, "command='train it' is no list of words"),
        ({"run_cap": "two"}, "run_cap='two' is not a count"),
        ({"method": "random", "parameters": {"rate": {"min": 2.0, "max": 1.0}}}, "is no range"),
    ],
)
def test_a_file_that_cannot_work_is_refused_before_anything_runs(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "rates.yaml", **changes)
    assert cli.main(["sweep", str(file), "--runs", str(tmp_path), "--trials", "2"]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and err.startswith("learnedopt sweep: ") and err.count("\n") == 1
    assert [*tmp_path.iterdir()] == [file]


def test_two_runners_of_one_sweep_do_not_start_the_same_trials(tmp_path: Path) -> None:
    file = written(tmp_path / "rates.yaml")
    (tmp_path / "rates").mkdir()
    with exclusive(tmp_path / "rates"), pytest.raises(ValueError, match="another process is at work in"):
        run_sweep(file, tmp_path)
    assert [path.name for path in (tmp_path / "rates").iterdir()] == ["lock"]


def test_trials_of_a_runner_that_was_killed_are_waited_for_and_not_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "rates.yaml", parameters={"rate": {"value": 4}, "waits": {"value": 1}})
    sweep, held = read_sweep(file), sweeps._held
    (trial,) = sweep.trials()
    run = tmp_path / "rates" / trial.name
    run.parent.mkdir()
    left = sweeps._start(sweep, run.parent, trial)  # what a SIGKILL of the runner leaves
    give_up = time.monotonic() + 30
    while not sweeps._told(run, sweep.metric, 3):
        assert left.poll() is None and time.monotonic() < give_up
        time.sleep(0.02)

    looked: list[bool] = []

    def seen(folder: Path) -> bool:
        looked.append(held(folder))
        if looked == [True]:
            left.terminate()
        return looked[-1]

    monkeypatch.setattr(sweeps, "_held", seen)
    best = run_sweep(file, tmp_path).best
    assert left.wait(30) == 143 and f"{trial.name} is still at work" in capsys.readouterr().out
    assert best is not None and best.state == "finished"
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [*range(9)]
    assert "Timeout" not in (tmp_path / "rates" / f"{trial.name}.log").read_text("utf-8")  # none found it held


def test_what_another_recipe_came_to_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    words = ["python", "${program}", "demo-like", "${args_no_hyphens}"]
    one = read_sweep(written(tmp_path / "rates.yaml", command=words)).trials()
    other = read_sweep(written(tmp_path / "rates.yaml", command=[*words[:2], "other", words[3]])).trials()
    assert not {trial.name for trial in one} & {trial.name for trial in other}
    assert [trial.values for trial in one] == [trial.values for trial in other]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminal hangs up here")
def test_a_terminal_that_closes_leaves_no_trial_behind(tmp_path: Path) -> None:
    file = written(tmp_path / "rates.yaml", parameters={"rate": {"value": 4}, "waits": {"value": 1}})
    words = [sys.executable, "-m", "learnedopt.sweeps", str(file), "--runs", str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as runner:
        give_up = time.monotonic() + 60
        while not any('"step": 2' in path.read_text("utf-8") for path in tmp_path.glob("rates/*/metrics.jsonl")):
            assert runner.poll() is None and time.monotonic() < give_up
            time.sleep(0.02)
        runner.send_signal(signal.SIGHUP)
        assert runner.wait(30) == 128 + signal.SIGHUP
    (record,) = tmp_path.glob("rates/*/metrics.jsonl")
    assert '"exit_code": 143' in record.read_text("utf-8").splitlines()[-1]
