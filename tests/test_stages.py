"""Recipes in stages: chains from nothing, their resume, theta of another rule, mixtures and averages as recipes say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import Killed, Killer, same

import learnedopt
import train_meta
from learnedopt import EvolutionStrategies, LogMeans, TaskByTask, Unrolled, recipes
from learnedopt import run as runs
from learnedopt.config import INTERCHANGEABLE, override
from learnedopt.core.registry import Choice
from learnedopt.recipes import HeldOut, MetaLearning, Recipe
from learnedopt.stages import start_theta
from learnedopt.training.json_tracker import read_metrics
from learnedopt.training.tracker import Trackers
from learnedopt.training.tracking import Tracking

MIXTURE = Choice(
    "mixture",
    {
        "members": (
            (0.5, {"name": "quadratic", "options": {"dim": 3}}),
            (0.5, {"name": "rescaled", "options": {"family": {"name": "quadratic", "options": {"dim": 2}}}}),
        )
    },
)


def first() -> Recipe:
    """Return the first stage: the hand-designed core, by evolution strategies, on a mixture."""
    return Recipe(
        name="core",
        family=MIXTURE,
        rule=Choice("normalised", {}),
        estimator=TaskByTask(EvolutionStrategies(3, 2, 0.1), max_task_grad_norm=1.0),
        objective=LogMeans(),
        num_meta_steps=2,
        num_tasks=2,
        meta=MetaLearning(lr=0.1, optimizer=Choice("adam", {"betas": (0.8, 0.95)}), average=0.3),
        validation=HeldOut(LogMeans(), num_steps=4, num_tasks=2, every=2),
        horizon=3,
        checkpoint_every=1,
    )


def second() -> Recipe:
    """Return the second stage: a network joins."""
    return replace(
        first(),
        name="whole",
        rule=Choice("normalised-mlp", {"hidden": 2}),
        estimator=TaskByTask(Unrolled(3), ((2, 0.5), (4, 0.5)), max_task_grad_norm=1.0),
        meta=MetaLearning(lr=0.05, average=0.5, rollback_above=3.0),
        after=first(),
        start_partly=True,
    )


def theta_of(folder: Path) -> Any:
    return learnedopt.load(folder)[1]


def killing(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    trackers = runs.trackers

    def made(recipe: Any, *args: Any) -> Trackers:
        found = trackers(recipe, *args)
        return Trackers([found, Killer(at)]) if recipe.name == name else found

    monkeypatch.setattr(runs, "trackers", made)


def test_a_chain_trains_from_nothing_each_stage_in_a_folder_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = runs.train(second(), tmp_path / "run", Tracking("disabled"))
    assert result is not None and result.meta_step == 2
    before = theta_of(tmp_path / "run" / "core")
    told = capsys.readouterr().out
    assert f"whole comes after core, in {tmp_path / 'run' / 'core'}." in told
    assert "hidden/weight" in told and "'log_rate'" in told
    # The stage alone gives the same theta, and the next one starts from it.
    runs.train(first(), tmp_path / "alone", Tracking("disabled"))
    assert same(theta_of(tmp_path / "alone"), before)
    loop = runs.build(second())[0]
    start = start_theta(second(), loop, tmp_path / "run")
    own = loop.init_theta(torch.Generator().manual_seed(0))
    assert start is not None and start.keys() == own.keys() > before.keys()
    assert all(torch.equal(v, before[k] if k in before else own[k]) for k, v in start.items())
    assert any(not torch.equal(before[k], own[k]) for k in before)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all({"rollbacks", "dropped", "clipped", "instead"} <= row.keys() for row in rows[1:])
    config = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))["recipe"]
    assert config == runs.configuration(second()) and config["after"]["rule"] == {"name": "normalised", "options": {}}


@pytest.mark.parametrize(("stage", "at"), [("core", 1), ("core", 2), ("whole", 1)])
def test_a_chain_that_is_killed_goes_on_exactly_and_finished_stages_are_left_alone(
    stage: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs.train(second(), tmp_path / "whole", Tracking("disabled"))
    with monkeypatch.context() as patched:
        killing(patched, stage, at)
        with pytest.raises(Killed):
            runs.train(second(), tmp_path / "killed", Tracking("disabled"))
    done = tmp_path / "killed" / "core" / "theta.safetensors"
    written = done.stat().st_mtime_ns if done.exists() else None
    assert (written is not None) == (stage == "whole")
    found = runs.train(second(), tmp_path / "killed", Tracking("disabled"))
    assert whole is not None and found is not None and same(found._asdict(), whole._asdict())
    assert written is None or done.stat().st_mtime_ns == written
    # Finished: the same once more, and nothing of the first stage is touched.
    record = (tmp_path / "killed" / "core" / "metrics.jsonl").read_bytes()
    again = runs.train(second(), tmp_path / "killed", Tracking("disabled"))
    assert again is not None and same(again._asdict(), whole._asdict())
    assert (tmp_path / "killed" / "core" / "metrics.jsonl").read_bytes() == record


def test_another_first_stage_is_another_run(tmp_path: Path) -> None:
    runs.train(second(), tmp_path, Tracking("disabled"))
    changed = override(second(), ["after.num_meta_steps=3"], INTERCHANGEABLE)
    assert changed.after is not None and changed.after.num_meta_steps == 3
    with pytest.raises(ValueError, match=r"another configuration \(different: after\)"):
        runs.train(changed, tmp_path, Tracking("disabled"))


def test_the_command_trains_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "make", lambda name: second())
    words = ["whole", "--runs", str(tmp_path), "--wandb", "disabled", "--set", "num_meta_steps=1"]
    assert train_meta.main([*words, "--set", "after.num_meta_steps=1"]) == 0
    assert theta_of(tmp_path / "whole").keys() > theta_of(tmp_path / "whole" / "core").keys()


def test_the_horizons_of_training_and_validation_are_told() -> None:
    loop, validation = runs.build(first())
    assert loop.horizon == 3 and validation.loop.horizon == 4
    none = replace(first(), horizon=None)
    with pytest.raises(ValueError, match="a recipe's horizon"):
        runs.build(none)
    assert runs.build(replace(none, rule=Choice("sgd", {})))[1].loop.horizon is None


def test_all_of_a_theta_is_taken_where_the_names_are_the_same(tmp_path: Path) -> None:
    longer = replace(second(), rule=Choice("normalised", {}), start_partly=False)
    result = runs.train(longer, tmp_path, Tracking("disabled"))
    assert result is not None and result.theta.keys() == theta_of(tmp_path / "core").keys()
    loop = runs.build(longer)[0]
    assert same(start_theta(longer, loop, tmp_path), theta_of(tmp_path / "core"))
    from_run = replace(longer, after=None, start=str(tmp_path / "core"))
    assert same(start_theta(from_run, loop, tmp_path), theta_of(tmp_path / "core"))


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "both": (lambda: replace(second(), start="runs/x"), "both from start='runs/x' and after the recipe 'core'"),
    "partly of nothing": (lambda: replace(first(), start_partly=True), "start_partly=True says how theta is taken"),
    "average": (lambda: MetaLearning(average=2.0), r"average=2\.0 is the share"),
    "rollback alone": (lambda: MetaLearning(rollback_above=2.0), "goes back to the average of theta"),
    "horizon": (lambda: replace(first(), horizon=0), "horizon=0"),
    "another rule": (
        lambda: replace(second(), start_partly=False),
        r"whole comes after core, whose theta is another rule's: \[\] are not .* \['hidden/bias', .*start_partly",
    ),
    "nothing in common": (
        lambda: replace(second(), rule=Choice("sgd", {})),
        r"has no name in common with this rule's \['lr'\]",
    ),
    "other sizes": (
        lambda: replace(second(), after=replace(second(), name="before", rule=Choice("normalised-mlp", {"hidden": 3}))),
        r"shapes differ \(there, here\): .*'hidden/bias': \(\(3,\), \(2,\)\)",
    ),
    "a rule of one shape": (
        lambda: replace(first(), rule=Choice("meta-sgd", {})),
        "the rule 'meta-sgd' has meta-parameters for every tensor or coordinate, and the families of 'mixture' differ",
    ),
    "a comparison": (
        lambda: replace(first(), compare=True),
        "compare=true sets core beside tuned optimizers on one fam",
    ),
    "an estimator of one shape": (lambda: replace(first(), estimator=Unrolled(3)), "tasks of a mixture .*TaskByTask"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_chains_are_refused_before_the_first_step(case: str, tmp_path: Path) -> None:
    make, told = BAD[case]
    with pytest.raises(ValueError, match=told):
        runs.train(make(), tmp_path / "run", Tracking("disabled"))
    assert not [*tmp_path.rglob("checkpoint.pt")] and not [*tmp_path.rglob("theta.safetensors")]
