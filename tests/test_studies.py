"""Studies: each runs end to end, made tiny; what was finished is not computed again; figures and trackers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import train_meta
from learnedopt import recipes
from learnedopt.recipes import Study, study
from learnedopt.run import carry_out, configuration, train
from learnedopt.training.json_tracker import read_metrics
from learnedopt.training.tracker import NullTracker, Tracker
from learnedopt.training.tracking import Tracking

TINY: dict[str, list[str]] = {
    "hyper-fashion": [
        "num_steps=60", "last=20", "seeds=[0,1]", "tuning_seeds=[100]", "adam_rates=[0.005]", "sgd_rates=[0.1]",
        "starts=[0.1]",
    ],
    "optimistic-conv": [
        "num_steps=50", "last=20", "seeds=[0]", "tuning_seeds=[100]", "batch_size=16", "starts=[0.1]", "betas=[0.01]",
        "adam_rates=[0.005]", "sgd_rates=[0.1,0.2]", "momentum_rates=[0.02]",
    ],
    "aruba-omniglot": [
        "num_meta_steps=2", "num_tuning_steps=1", "num_tasks=2", "lrs=(0.1,)", "aruba_lrs=(0.1,)", "zetas=(0.03,)",
        "num_valid_tasks=2", "num_test_tasks=4", "num_test_steps=2", "width=4",
    ],
    "bmg-quadratic": ["num_steps=20", "num_tasks=2", "seeds=[0,1]"],
    "bmg-mnist-permuted": ["num_steps=8", "seeds=[0,1]", "tuning_seeds=[5]"],
    "optimistic-convex": ["num_steps=60", "dim=6"],
    "fmrl-convex": [
        "num_tasks=3", "num_losses=4", "radii=[0.1,0.4]", "num_tasks_a_radius=3", "seeds=[0,1]", "num_experts=3",
    ],
    "fmrl-fashion": ["shots=[1,2]", "num_tasks=3", "seeds=[0]", "num_features=5"],
}  # fmt: skip
"""Study -> settings that make it run in seconds. Whoever adds a study adds a line."""
STUDIES = [name for name in recipes.names() if isinstance(recipes.make(name), Study)]


def command(name: str, runs: Path, *assignments: str) -> list[str]:
    sets = [word for assignment in assignments for word in ("--set", assignment)]
    return [name, "--runs", str(runs), "--wandb", "disabled", *sets]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_says_how_fast_and_goes_on(
    name: str, tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "_WORTH_A_LINE", 0.0)
    assert train_meta.main(command(name, tmp_path, *TINY[name])) == 0
    paces = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Computed ")]
    last = re.search(r": (\d+) of about (\d+) runs, \S+ a second, about 0 s left\.$", paces[-1])
    assert last is not None and last[1] == last[2] != "0"
    total = last[2]
    assert all(f" of about {total} runs, " in line for line in paces)
    folder = tmp_path / name
    assert (folder / f"{name}.png").stat().st_size > 5000
    assert (told := read_metrics(folder / "metrics.jsonl"))
    written = {path: path.read_bytes() for path in folder.rglob("*.json")}
    assert len(written) > 1  # the configuration, and numbers
    assert train_meta.main(command(name, tmp_path, *TINY[name])) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == written
    assert read_metrics(folder / "metrics.jsonl") == told  # once, not once a run
    assert "Computed " not in capsys.readouterr().out


def test_what_was_finished_is_remembered(tmp_path: Path) -> None:
    path, calls = tmp_path / "a" / "b.json", []

    def compute() -> dict[str, object]:
        calls.append(1)
        return {"x": (1.5, float("inf"))}

    first, second = study.remember(path, compute), study.remember(path, compute)
    assert first == second == {"x": [1.5, "Infinity"]} and len(calls) == 1


def test_what_was_found_does_not_count_in_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "_WORTH_A_LINE", 0.0)
    study.remember(tmp_path / "a/old.json", lambda: 1)
    parts = study.Parts(tmp_path, 10)
    assert parts.remember("a/old.json", lambda: 2, 6) == 1
    assert [parts.remember(f"a/{n}.json", lambda n=n: n, n) for n in (3, 1)] == [3, 1]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("Computed 3 in 0 s: 3 of about 4 runs, ") and ": 4 of about 4 runs, " in second


@dataclass(frozen=True)
class _Blank(Study):
    fails: bool = False

    def run(self, folder: Path, tracker: Tracker) -> None:
        tracker.log({"value": 1.0}, 1)
        if self.fails:
            raise KeyboardInterrupt


class _Noted(NullTracker):
    code: int | None = None

    def finish(self, exit_code: int = 0) -> None:
        self.code = exit_code


@pytest.mark.parametrize(("fails", "error", "code"), [(False, RuntimeError, 1), (True, KeyboardInterrupt, 130)])
def test_a_study_that_does_not_end_well_says_so(
    fails: bool, error: type[BaseException], code: int, tmp_path: Path
) -> None:
    tracker = _Noted()
    with pytest.raises(error):
        carry_out(_Blank("blank", fails=fails), tmp_path, tracker)
    assert tracker.code == code


def test_a_study_of_other_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="without its figure"):
        train(_Blank("blank"), tmp_path, Tracking("disabled"))
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["recipe"] == configuration(_Blank("blank"))
    with pytest.raises(ValueError, match="another configuration"):
        train(_Blank("blank", num_threads=2), tmp_path, Tracking("disabled"))


@dataclass(frozen=True)
class _CutShort(Study):
    def run(self, folder: Path, tracker: Tracker) -> None:
        study.remember(folder / "runs" / "part.json", lambda: self.num_threads)
        raise KeyboardInterrupt


def test_parts_of_a_study_of_other_settings_are_not_taken_for_its_own(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(_CutShort("short"), tmp_path, Tracking("disabled"))
    with pytest.raises(ValueError, match="another configuration"):  # though no number was told yet
        train(_CutShort("short", num_threads=2), tmp_path, Tracking("disabled"))


@pytest.mark.parametrize(
    ("name", "assignment", "message"),
    [
        ("hyper-fashion", "seeds=[]", "seeds is empty"),
        ("optimistic-conv", "betas=[]", "betas is empty"),
        ("aruba-omniglot", "zetas=()", "zetas is empty"),
        ("fmrl-convex", "radii=[]", "radii is empty"),
        ("fmrl-convex", "single_radii=[0.0,1.0]", "must be positive"),
        ("fmrl-convex", "num_tasks=0", "num_tasks=0"),
        ("fmrl-fashion", "seeds=[]", "seeds is empty"),
        ("fmrl-fashion", "fal_radius=0.0", "must be positive"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(
    name: str, assignment: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_meta.main(command(name, tmp_path, assignment)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / name).exists()


def test_a_study_cannot_be_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from learnedopt import cli

    monkeypatch.setattr(recipes, "make", lambda name: _Blank(name))
    assert cli.main(["check", "blank"]) == 2
    assert "sets several methods side by side" in capsys.readouterr().err
