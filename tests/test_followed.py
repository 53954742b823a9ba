"""Evaluations in W&B: which training what is evaluated came from, and the baselines in the same chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_wandb_tracker import history, records, run_file, settings

import learnedopt
import train_meta
from learnedopt import tasks
from learnedopt.evaluation import evaluate
from learnedopt.evaluation.few_shot import FewShot, adapt
from learnedopt.followed import show_comparison, show_few_shot
from learnedopt.training.tracking import Tracking
from learnedopt.training.wandb_tracker import WandbTracker

TINY = [
    "num_meta_steps=2", "num_tasks=2", "validation.num_tasks=2", "validation.every=1", "validation.num_steps=2",
    "estimator.horizon=4", "estimator.num_steps=2", "rule.hidden_size=2", "family.dim=3",
]  # fmt: skip


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a tiny training that W&B was told of; none of W&B's variables are set."""
    import os

    for variable in [*filter(lambda name: name.startswith("WANDB_"), os.environ), "RANK", "XDG_DATA_HOME"]:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [word for assignment in TINY for word in ("--set", assignment)]
    assert (
        train_meta.main(["lstm-quadratic", "--runs", str(tmp_path), "--name", "mine", "--wandb", "offline", *words])
        == 0
    )
    return tmp_path / "mine"


def chart(found: list[Any], name: str, folder: Path) -> dict[str, list[float]]:
    """Return the lines of a chart by label."""
    (row,) = [row for row in history(found) if f"{name}_table.path" in row]
    table = json.loads((run_file(folder).parent / "files" / row[f"{name}_table.path"]).read_text("utf-8"))["data"]
    lines: dict[str, list[float]] = {}
    for _, label, value in table:
        lines.setdefault(label, []).append(value)
    return lines


def test_an_evaluation_is_linked_to_its_training_and_shows_the_baselines_beside_it(
    trained: Path, tmp_path: Path
) -> None:
    family, (rule, theta) = tasks.make("quadratic", dim=3), learnedopt.load(trained)
    found = evaluate.compare({"mine": (rule, theta)}, family, num_steps=4, num_tasks=3, num_tuning_tasks=2)
    told = {"family": {"name": "quadratic"}}
    found = evaluate.Comparison({**told, **found.settings}, found.outcomes, found.differences)
    out = tmp_path / "out"
    show_comparison(Tracking("offline", tags=("judged",)), out, {"mine": str(trained)}, found, found.save(out))

    training = records(run_file(trained))
    (theirs,) = [r.artifact for r in training if r.HasField("artifact") and r.artifact.type == "model"]
    (run_id,) = {r.run.run_id for r in training if r.HasField("run")}
    here = records(run_file(out))
    used = settings(here)["used/mine"]
    assert used == {
        "checkpoint": str(trained), "run_id": run_id, "meta_step": 2, "artifact": "lstm-quadratic",
        "digest": theirs.digest,
    }  # fmt: skip
    assert theirs.name == "lstm-quadratic"
    (opened,) = [r.run for r in here if r.HasField("run")]
    assert (opened.run_group, opened.job_type, [*opened.tags]) == ("mine", "evaluate", ["judged"])
    lines = chart(here, "losses", out)
    assert [*lines] == ["mine", "SGD", "momentum", "Nesterov", "RMSprop", "Adam"]
    assert lines["Adam"] == pytest.approx(found.outcomes["Adam"].curve.tolist())

    shots = adapt(rule, theta, family, 2, 3)
    few = FewShot(told, {"mine": shots, "packaged": shots})
    labels = {"mine": str(trained), "packaged": "lstm-quadratic"}
    show_few_shot(Tracking("offline"), tmp_path / "few", labels, few, few.save(tmp_path / "few"))
    here = records(run_file(tmp_path / "few"))
    assert settings(here)["used/packaged"]["run_id"] is None and settings(here)["used/mine"] == used
    assert chart(here, "loss_by_steps", tmp_path / "few")["packaged"] == pytest.approx(
        [summary.mean for summary in shots.summaries("loss")]
    )


def test_a_link_that_the_server_refuses_costs_nothing_else(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no such project")

    monkeypatch.setattr(WandbTracker, "_use", refuse)
    shots = adapt(*learnedopt.load(trained), tasks.make("quadratic", dim=3), 2, 3)
    few = FewShot({"family": {"name": "quadratic"}}, {"mine": shots})
    show_few_shot(Tracking("offline"), tmp_path / "few", {"mine": str(trained)}, few, few.save(tmp_path / "few"))
    assert "W&B failed while recording the use of lstm-quadratic: ValueError: no such project" in caplog.text
    here = records(run_file(tmp_path / "few"))
    assert chart(here, "loss_by_steps", tmp_path / "few").keys() == {"mine"}
    assert [r.artifact.name for r in here if r.HasField("artifact") and r.artifact.type == "model"]
