"""Who is told of a run: the user's variables and words, how often, theta's statistics, TensorBoard."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_wandb_tracker import records

from learnedopt import FinalLoss, InnerLoop, MetaTrainer, Unrolled, optimizers, recipes, tasks
from learnedopt.training.tensorboard_tracker import TensorBoardTracker
from learnedopt.training.thinned import Thinned, statistics
from learnedopt.training.tracker import Metrics, NullTracker, Tracker, Trackers
from learnedopt.training.tracking import Tracking, trackers
from learnedopt.training.wandb_variables import folder_name, identity

SAID = {
    "WANDB_PROJECT": "my-project", "WANDB_ENTITY": "my-team", "WANDB_RUN_GROUP": "my-group", "WANDB_NAME": "my-name",
    "WANDB_TAGS": "a,b", "WANDB_NOTES": "my notes",
}  # fmt: skip


@pytest.fixture
def no_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave none of W&B's variables, and give it an empty home folder."""
    import os

    for variable in [*filter(lambda name: name.startswith("WANDB_"), os.environ), "RANK", "XDG_DATA_HOME"]:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def opened(tracking: Tracking, wandb: Path) -> Any:
    """Return what the one file in W&B's folder ``wandb`` says of a run that is followed so."""
    made = trackers(recipes.make("demo"), wandb.parent / "run", tracking, "own-id")
    made.start({"seed": 1})
    made.finish()
    (path,) = wandb.glob("wandb/*run-*/*.wandb")
    return next(record.run for record in records(path) if record.HasField("run"))


@pytest.mark.usefixtures("no_variables")
def test_the_users_variables_come_before_our_defaults_and_what_is_passed_before_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for variable, value in {**SAID, "WANDB_DIR": str(tmp_path / "one"), "WANDB_RUN_ID": "other"}.items():
        monkeypatch.setenv(variable, value)
    run = opened(Tracking(), tmp_path / "one")
    assert (run.project, run.entity, run.run_group, run.display_name) == (
        "my-project",
        "my-team",
        "my-group",
        "my-name",
    )
    assert ([*run.tags], run.notes, run.job_type, run.run_id) == (["a", "b"], "my notes", "meta-train", "own-id")
    assert "WANDB_RUN_ID is not taken: the run keeps its own id own-id" in caplog.text
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "two"))
    passed = Tracking(project="p", entity="e", group="g", tags=("t",), notes="n")
    run = opened(passed, tmp_path / "two")
    assert (run.project, run.entity, run.run_group, [*run.tags], run.notes) == ("p", "e", "g", ["t"], "n")


def test_what_a_run_is_called() -> None:
    trial = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "trial"}
    assert (identity("own", {"WANDB_RUN_ID": "x"}), identity("own", trial)) == ("own", "trial")
    assert (folder_name("demo", {"WANDB_RUN_ID": "x"}), folder_name("demo", trial)) == ("demo", "demo-trial")
    with pytest.raises(ValueError, match="log_every=0"):
        Tracking(log_every=0)


class Kept(NullTracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.figures: list[str] = []

    def log(self, metrics: Any, step: int) -> None:
        self.rows.append((step, dict(metrics)))

    def figure(self, name: str, path: Path) -> None:
        self.figures.append(f"{name} after row {len(self.rows)}")


def test_rows_are_thinned_but_for_validations_and_the_last() -> None:
    kept = Kept()
    thinned = Thinned([kept], 3)
    thinned.log({"validation": 9.0}, 0)
    for step in range(1, 9):
        thinned.log({"meta_loss": float(step)} | ({"validation": 1.0} if step == 5 else {}), step)
    thinned.figure("loss", Path("loss.png"))
    thinned.finish()
    assert [step for step, _ in kept.rows] == [0, 3, 5, 6, 8] and kept.figures == ["loss after row 5"]
    # No loss is left out of the means: 1 to 3, 4 to 6.
    assert [row.get("mean_meta_loss") for _, row in kept.rows] == [None, 2.0, None, 5.0, None]
    thinned.log({"meta_loss": 7.0}, 7)
    thinned.rewind(6)
    thinned.finish()
    assert len(kept.rows) == 5


def test_a_training_tells_the_statistics_of_theta_after_each_step() -> None:
    kept = Kept()
    loop = InnerLoop(tasks.make("quadratic", dim=3), optimizers.make("lstm", hidden_size=2, num_layers=1))
    trainer = MetaTrainer(loop, Unrolled(2), FinalLoss(), tracker=Thinned([kept], 2), num_tasks=2)
    last = trainer.run(4).theta
    assert [step for step, _ in kept.rows] == [2, 4]
    told = kept.rows[-1][1]
    assert told["theta/norm"] == pytest.approx(math.sqrt(sum(float(t.square().sum()) for t in last.values())), rel=1e-6)
    for name, tensor in last.items():
        assert told[f"theta/{name}/mean"] == pytest.approx(float(tensor.mean()), rel=1e-5, abs=1e-7)
        assert told[f"theta/{name}/std"] == pytest.approx(float(tensor.std(correction=0)), rel=1e-5, abs=1e-7)
    assert kept.rows[0][1]["theta/norm"] != told["theta/norm"]
    odd = statistics({"empty": torch.empty(0), "bad": torch.tensor([math.nan, 1.0])})
    assert math.isnan(odd["theta/bad/mean"]) and not any("empty" in name for name in odd)


def test_tensorboard_reads_a_run_that_went_on_as_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (4, 3), "red").save(tmp_path / "loss.png")
    folder = tmp_path / "tensorboard"
    for first, last in ((1, 4), (3, 5)):  # stopped at 4, and went on from the checkpoint of 2
        tracker = TensorBoardTracker(folder)
        made: Tracker = Trackers([tracker])
        made.rewind(first - 1 if first > 1 else -1)
        made.start({"seed": 3})
        for step in range(first, last + 1):
            made.log({"meta_loss": 10.0 * first + step, "inner_loss": [5.0, float(step)], "failed": "task 2"}, step)
        made.figure("loss", tmp_path / "loss.png")
        made.lines("losses", {"lstm": [3.0, 1.0], "a/b": [3.0, 2.0]}, "inner step")
        made.finish()
    with pytest.raises(ValueError, match="not open"):
        tracker.log({"meta_loss": 1.0}, 6)
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert [(e.step, e.value) for e in found.Scalars("meta_loss")] == [(1, 11), (2, 12), (3, 33), (4, 34), (5, 35)]
    assert [e.value for e in found.Scalars("inner_loss/last")] == [1, 2, 3, 4, 5]
    assert (found.Images("loss")[-1].width, found.Images("loss")[-1].step) == (4, 5)
    assert b'"seed": 3' in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    beside = EventAccumulator(str(folder / "losses_a-b")).Reload()
    assert [(e.step, e.value) for e in beside.Scalars("losses")][-2:] == [(0, 3.0), (1, 2.0)]


def test_without_tensorboard_its_absence_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"not installed here .*learnedopt\[tensorboard\]"):
        trackers(recipes.make("demo"), tmp_path, Tracking("disabled", tensorboard=True), "id")


@pytest.mark.parametrize(("losses", "mean"), [((math.inf, -math.inf), math.nan), ((1e308, 1e308), math.inf)])
def test_losses_that_have_no_mean_do_not_end_the_telling(losses: tuple[float, float], mean: float) -> None:
    told: dict[int, Any] = {}

    class Kept(NullTracker):
        def log(self, metrics: Metrics, step: int) -> None:
            told[step] = metrics["mean_meta_loss"]

    thinned = Thinned([Kept()], every=2)
    for step, loss in enumerate((*losses, 1.0, 3.0), start=1):
        thinned.log({"meta_loss": loss}, step)
    assert told == {2: pytest.approx(mean, nan_ok=True), 4: 2.0}
