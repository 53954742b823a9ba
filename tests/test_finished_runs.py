"""Runs that have come to their end: started again nothing is written, and extended they go on as longer ones would."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from learnedopt import Truncated, recipes, run
from learnedopt.core.registry import Choice
from learnedopt.core.sealed import read_record
from learnedopt.recipes import HeldOut, Recipe
from learnedopt.run_folder import record_length
from learnedopt.training.json_tracker import read_metrics
from learnedopt.training.tracking import Tracking

QUIET = Tracking("disabled")


def small(num_meta_steps: int, final_lr_fraction: float = 1.0, **changes: Any) -> Recipe:
    """Return a recipe whose checkpoints lie inside episodes."""
    recipe = recipes.meta_training("lstm-quadratic")
    return replace(
        recipe,
        rule=Choice("lstm", {"hidden_size": 2}),
        estimator=Truncated(2, horizon=6),
        num_meta_steps=num_meta_steps,
        num_tasks=2,
        meta=replace(recipe.meta, final_lr_fraction=final_lr_fraction),
        validation=HeldOut(num_tasks=2, num_steps=2, every=2),
        **changes,
    )


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["meta_loss"]) for row in read_metrics(folder / "metrics.jsonl") if "meta_loss" in row]


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in [folder, *folder.rglob("*")]}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done") / "run"
    run.train(small(4), folder, Tracking("offline"))
    return folder


def test_a_finished_run_says_so_and_nothing_is_written(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(done)
    found = run.train(small(4), done, Tracking("offline"))
    assert snapshot(done) == before
    told = capsys.readouterr().out
    assert told.startswith(f"{done} holds this run, finished after 4 meta-steps") and told.count("\n") == 1
    saved = state(done)
    assert found is not None and (found.meta_step, found.best_value) == (4, saved["best_value"])
    assert all(torch.equal(value, saved["theta"][key]) for key, value in found.theta.items())


@pytest.mark.parametrize("lost", ["theta.safetensors", "training.png"])
def test_a_run_that_lacks_a_file_is_not_finished(lost: str, tmp_path: Path) -> None:
    run.train(small(2), tmp_path, QUIET)
    before = (tmp_path / lost).read_bytes()
    (tmp_path / lost).unlink()
    run.train(small(2), tmp_path, QUIET)
    assert (tmp_path / lost).read_bytes() == before


def test_a_run_whose_end_was_not_recorded_is_not_finished(tmp_path: Path) -> None:
    run.train(small(2), tmp_path, QUIET)
    record = tmp_path / "metrics.jsonl"
    *lines, last = record.read_bytes().splitlines(keepends=True)
    for end in (b"", last[:-1], last.replace(b'"exit_code": 0', b'"exit_code": 143')):
        record.write_bytes(b"".join(lines) + end)
        assert not run.is_finished(tmp_path, small(2))
    record.write_bytes(b"".join(lines) + last)
    assert run.is_finished(tmp_path, small(2))


def test_a_run_that_is_extended_is_the_longer_run_to_the_bit(tmp_path: Path) -> None:
    run.train(small(8), tmp_path / "long", QUIET)
    parts = tmp_path / "parts"
    run.train(small(4), parts, QUIET)
    run_id = read_record(parts / "config.json")["run_id"]
    found = run.train(small(8), parts, QUIET, extend=True)
    assert found is not None and found.meta_step == 8
    assert losses(parts) == losses(tmp_path / "long") and [step for step, _ in losses(parts)] == [*range(1, 9)]
    ends = [state(folder) for folder in (parts, tmp_path / "long")]
    assert all(torch.equal(value, ends[1]["theta"][key]) for key, value in ends[0]["theta"].items())
    assert ends[0]["best_value"] == ends[1]["best_value"]
    about = read_record(parts / "config.json")
    assert about["recipe"] == run.configuration(small(8)) and about["run_id"] == run_id
    assert run.is_finished(parts, small(8))


def test_the_rate_of_an_extended_run_is_that_of_the_new_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tmp_path / "parts"
    run.train(small(4, 0.1), parts, QUIET)
    assert state(parts)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1 * small(4).meta.lr)
    rates = []
    step = torch.optim.Adam.step

    def noting(self: torch.optim.Adam, closure: None = None) -> Any:
        if any((p.grad != 1).any() for p in self.param_groups[0]["params"]):  # along ones a checkpoint is tried
            rates.append(self.param_groups[0]["lr"])
        return step(self, closure)

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.Adam, "step", noting)
        # Killed before the new length was on record, and again after it: the same.
        patched.setattr(run, "record_length", killed)
        with pytest.raises(KeyboardInterrupt):
            run.train(small(8, 0.1), parts, QUIET, extend=True)
        assert rates == [] and read_record(parts / "config.json")["recipe"] == run.configuration(small(4, 0.1))
        (parts / "training.png").unlink()  # as of one that was not finished
        with pytest.raises(ValueError, match="being extended from num_meta_steps=4 to 8 when it was stopped: repeat"):
            run.train(small(4, 0.1), parts, QUIET)
        patched.setattr(run, "record_length", record_length)
        run.train(small(8, 0.1), parts, QUIET, extend=True)
        resumed = [*rates]
        rates.clear()
        run.train(small(8, 0.1), tmp_path / "again", QUIET)
    assert resumed == pytest.approx(rates[4:], rel=1e-12) and len(set(resumed)) == 4 and resumed[0] > 0.5 * rates[0]


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (small(4), "has finished its num_meta_steps=4: name more to extend it, such as num_meta_steps=8"),
        (small(3), "is of num_meta_steps=4, and cannot be extended to 3: name more, such as num_meta_steps=8"),
        (small(8, seed=1, horizon=3), "can go on for longer, but not as another one: horizon, seed differ"),
    ],
    ids=["equal", "shorter", "another"],
)
def test_what_is_no_extension_is_refused(recipe: Recipe, told: str, done: Path) -> None:
    before = snapshot(done)
    with pytest.raises(ValueError, match=told):
        run.train(recipe, done, QUIET, extend=True)
    assert snapshot(done) == before


def test_where_there_is_nothing_to_extend_that_is_said(done: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run that could be extended"):
        run.train(small(8), tmp_path / "none", QUIET, extend=True)
    with pytest.raises(ValueError, match="no num_meta_steps of which there could be more"):
        run.train(recipes.make("fmrl-convex"), tmp_path / "none", QUIET, extend=True)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match=r"different: num_meta_steps\).* or let it go on for longer with --extend"):
        run.train(small(8), done, QUIET)


def test_what_no_tracker_can_do_is_said_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match="TensorBoard is not installed here"):
        run.train(small(2), tmp_path / "run", Tracking("disabled", tensorboard=True))
    assert not [*tmp_path.iterdir()]
