"""What version 0.1 wrote still loads and goes on: checkpoints, runs, configurations; its rule ``imaml`` as two parts.

``data/version_0_1`` was written by it: checkpoints of the format ``learnedopt-rule-1``, and runs stopped before their
end. ``expected.json`` has the thetas, and what the same version found when it went on with the runs.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import learnedopt
from learnedopt import BootstrappedTarget, FinalLoss, KLDivergence, cli, inner_objectives, optimizers, recipes
from learnedopt.checkpoint import load_checkpoint
from learnedopt.config import as_config, split_imaml, up_to_date
from learnedopt.core.inner_objective import TaskLoss
from learnedopt.core.tree import Theta
from learnedopt.run import configuration
from learnedopt.run_folder import find_run
from learnedopt.training.json_tracker import read_metrics

DATA = Path(__file__).resolve().parent / "data" / "version_0_1"
EXPECTED = json.loads((DATA / "expected.json").read_text("utf-8"))
RUNS = {
    "lstm-quadratic": [
        "num_meta_steps=8", "num_tasks=2", "validation.num_tasks=2", "validation.num_steps=4", "validation.every=2",
        "estimator.num_steps=2", "estimator.horizon=6", "rule.hidden_size=2", "family.dim=3", "meta.lr=0.05",
    ],
    "imaml-regression": [
        "num_meta_steps=6", "num_tasks=2", "validation.num_tasks=2", "validation.num_steps=20", "validation.every=2",
        "estimator.num_steps=20", "estimator.tolerance=1e9", "estimator.solver.num_iterations=4", "family.dim=2",
        "inner_objective.learn=true", "inner_objective.per=tensor", "meta.lr=0.05",
    ],
}  # fmt: skip


def command(name: str, runs: Path, *more: str) -> list[str]:
    sets = [word for assignment in (*RUNS[name], *more) for word in ("--set", assignment)]
    return ["train", name, "--runs", str(runs), "--wandb", "disabled", *sets]


def assert_theta(found: Theta, expected: dict[str, Any], rtol: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(value), rtol=rtol, atol=rtol / 10)


# Checkpoints


def test_a_checkpoint_loads() -> None:
    rule, theta, metadata = learnedopt.checkpoint.load_with_metadata(DATA / "lstm.safetensors")
    assert rule == optimizers.make("lstm", hidden_size=2, output_scale=0.02) and metadata == {"task": "sine"}
    assert_theta(theta, EXPECTED["thetas"]["lstm"])
    assert isinstance(load_checkpoint(DATA / "lstm.safetensors").inner_objective, TaskLoss)


@pytest.mark.parametrize("per", ["scalar", "coordinate", "fixed"])
def test_imaml_loads_as_maml_with_a_proximal_inner_objective(per: str, tmp_path: Path) -> None:
    path, expected = DATA / f"imaml-{per}.safetensors", EXPECTED["thetas"][f"imaml-{per}"]
    rule, inner_objective, theta, metadata = load_checkpoint(path)
    assert_theta(theta, expected)
    template = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    assert optimizers.describe(rule) == optimizers.describe(optimizers.make("maml", template=template, lr=0.25))
    options = {} if per == "fixed" else {"learn": True, "per": per}
    proximal = inner_objectives.make("proximal", template=template, strength=0.5, **options)
    assert inner_objectives.describe(inner_objective) == inner_objectives.describe(proximal)
    assert metadata == {"estimator": {"type": "Implicit", "inner": None}}
    own = learnedopt.load(path)[1]
    assert_theta(own, {name: value for name, value in expected.items() if name.startswith("init/")})
    again = load_checkpoint(learnedopt.save(tmp_path / "again", rule, theta, metadata, inner_objective))
    assert_theta(again.theta, expected)
    assert optimizers.describe(again.rule) == optimizers.describe(rule)
    assert inner_objectives.describe(again.inner_objective) == inner_objectives.describe(proximal)


def test_a_loaded_imaml_pulls_to_its_start_as_it_did() -> None:
    _, inner_objective, theta, _ = load_checkpoint(DATA / "imaml-scalar.safetensors")
    penalty = inner_objective.penalty
    assert penalty is not None
    params = {name: theta[f"init/{name}"] + 0.5 for name in ("w", "b")}
    found = penalty.gradient(theta, params)
    assert found is not None
    for name in ("w", "b"):
        torch.testing.assert_close(found[name], torch.full_like(params[name], 0.51 * 0.5))


def test_imaml_inside_another_rule_is_refused(tmp_path: Path) -> None:
    with safe_open(str(DATA / "imaml-fixed.safetensors"), framework="pt") as file:
        config = json.loads(file.metadata()["learnedopt"])
        theta = {f"rule/{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    config["rule"] = {"name": "clip", "options": {"rule": config["rule"], "max_value": 1.0}}
    path = tmp_path / "clipped.safetensors"
    save_file(theta, path, metadata={"learnedopt": json.dumps(config)})
    with pytest.raises(ValueError, match=r"clipped\.safetensors describes .* no update rule 'imaml' any more"):
        load_checkpoint(path)


def test_imaml_by_name_names_its_two_parts() -> None:
    with pytest.raises(ValueError, match=r"make\(\"maml\".*inner_objectives\.make\(\"proximal\""):
        optimizers.make("imaml", template={"w": torch.zeros(2)})


# Runs


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_to_where_it_would_have_come(name: str, tmp_path: Path) -> None:
    shutil.copytree(DATA / "runs", tmp_path / "runs")
    folder, expected = tmp_path / "runs" / name, EXPECTED["runs"][name]
    run_id = json.loads((folder / "config.json").read_text("utf-8"))["run_id"]
    assert cli.main(command(name, tmp_path / "runs")) == 0
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, len(expected["meta_losses"]) + 1)]
    assert [row["meta_loss"] for row in rows] == pytest.approx(expected["meta_losses"], rel=1e-5)
    found = load_checkpoint(folder)
    assert found.metadata["best_validation"] == pytest.approx(expected["best_validation"], rel=1e-5)
    assert_theta(found.theta, expected["best_theta"], rtol=1e-5)
    assert_theta(torch.load(folder / "checkpoint.pt", weights_only=True)["theta"], expected["theta"], rtol=1e-5)
    assert json.loads((folder / "config.json").read_text("utf-8"))["run_id"] == run_id


@pytest.mark.parametrize(
    ("name", "change", "differs"),
    [
        ("lstm-quadratic", ["seed=4"], "seed"),
        ("lstm-quadratic", ["inner_objective=l2", "inner_objective.strength=0.5"], "inner_objective"),
        ("imaml-regression", ["inner_objective.strength=0.5"], "inner_objective"),
        ("imaml-regression", ["rule.lr=0.2"], "rule"),
    ],
)
def test_a_run_of_another_configuration_is_refused(
    name: str, change: list[str], differs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(DATA / "runs", tmp_path / "runs")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert cli.main(command(name, tmp_path / "runs", *change)) == 2
    assert f"another configuration (different: {differs})" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# Configurations


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    joined_later: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Any
    also_later: str = "none"


def test_fields_that_joined_later_count_as_their_defaults() -> None:
    saved = {"type": "Outer", "count": 3, "inner": {"type": "Inner", "rate": 0.1}}
    now = Outer(3, Inner(0.1))
    assert up_to_date(saved, now) == as_config(now)
    for other in (Outer(3, Inner(0.2)), Outer(3, Inner(0.1, (1,))), Outer(3, Inner(0.1), "some"), Outer(4, Inner(0.1))):
        assert up_to_date(saved, other) != as_config(other)
    # A required field has no default that a run of before could have had, and another class no fields in common.
    assert "count" not in up_to_date({"type": "Outer", "inner": None}, now)
    assert up_to_date({"type": "Other"}, now) == {"type": "Other"}


def bootstrapped(split: str = "valid") -> dict[str, Any]:
    """Return a bootstrapped target as version 0.2 wrote it."""
    matching = {"type": "KLDivergence"}
    return {"type": "BootstrappedTarget", "num_target_steps": 3, "step_size": 0.5, "split": split, "matching": matching}


def test_a_bootstrapped_target_was_an_objective_of_its_own() -> None:
    now = Outer(3, BootstrappedTarget(3, 0.5, matching=KLDivergence()), "none")
    assert up_to_date({"type": "Outer", "count": 3, "inner": bootstrapped()}, now) == as_config(now)
    for other in (
        BootstrappedTarget(2, 0.5, matching=KLDivergence()),
        BootstrappedTarget(3, 0.5),
        BootstrappedTarget(3, 0.5, matching=KLDivergence("reverse")),
        BootstrappedTarget(3, 0.5, matching=KLDivergence(), continue_from="rollout"),
        FinalLoss(),
    ):
        changed = Outer(3, other, "none")
        assert up_to_date({"type": "Outer", "count": 3, "inner": bootstrapped()}, changed) != as_config(changed)


def test_a_run_towards_a_bootstrapped_target_is_found_again(tmp_path: Path) -> None:
    recipe = recipes.meta_training("reptile-omniglot")
    recorded = configuration(recipe)
    assert recorded["objective"]["type"] == "TargetMatching"
    objective = recipe.objective
    recorded["objective"] = {
        "type": "BootstrappedTarget", "num_target_steps": objective.target.num_target_steps,
        "step_size": objective.target.step_size, "split": "train", "matching": {"type": "SquaredDistance"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"run_id": "abc", "recipe": recorded}), "utf-8")
    (tmp_path / "checkpoint.pt").touch()
    assert find_run(tmp_path, recipe) == "abc"
    recorded["objective"]["num_target_steps"] += 1
    (tmp_path / "config.json").write_text(json.dumps({"run_id": "abc", "recipe": recorded}), "utf-8")
    with pytest.raises(ValueError, match=r"another configuration \(different: objective\)"):
        find_run(tmp_path, recipe)


def test_imaml_in_a_configuration_is_split_with_its_defaults() -> None:
    assert split_imaml({"name": "imaml", "options": {"learn_strength": True, "strengths": "tensor"}}) == (
        {"name": "maml", "options": {"lr": 0.1}},
        {"name": "proximal", "options": {"strength": 1.0, "learn": True, "per": "tensor"}},
    )
    for other in ({"name": "maml", "options": {"lr": 0.1}}, {"name": "imaml"}, "imaml", None):
        assert split_imaml(other) == (other, None)


@pytest.mark.parametrize("name", [name for name in recipes.names() if "imaml" in name])
def test_recipes_of_implicit_maml_name_its_two_parts(name: str) -> None:
    recipe = recipes.meta_training(name)
    assert recipe.rule.name == "maml" and recipe.inner_objective is not None
    assert recipe.inner_objective.name == "proximal" and recipe.inner_objective.options.keys() == {"strength"}
