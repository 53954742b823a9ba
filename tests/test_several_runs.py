"""Several runs in one table, on the family that their records name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from learnedopt import checkpoint, optimizers, tasks
from learnedopt.evaluation.evaluate import BASELINES, compare
from learnedopt.evaluation.few_shot import adapt
from learnedopt.evaluation.runs import adapt_runs, compare_runs, families, labelled, shared_family

QUADRATIC = {"name": "quadratic", "options": {"dim": 3}}
SINE = {"name": "sine", "options": {"hidden": [4]}}
FEW: dict[str, Any] = {"num_steps": 3, "num_tasks": 4, "baselines": {"SGD": BASELINES["SGD"]}}


def saved(folder: Path, rate: float, **record: Any) -> checkpoint.Checkpoint:
    rule = optimizers.make("momentum", lr=rate, learn=("lr",))
    path = checkpoint.save(folder / f"{rate}", rule, rule.init_theta(torch.Generator()), record)
    return checkpoint.load_checkpoint(path)


def test_optimizers_share_the_table_and_the_tasks_of_their_family(tmp_path: Path) -> None:
    learned = {name: saved(tmp_path, rate, family=QUADRATIC) for name, rate in (("slow", 0.01), ("fast", 0.1))}
    found = compare_runs(learned, **FEW)
    assert found.candidates == ["slow", "fast"] and [*found.outcomes] == ["slow", "fast", "SGD"]
    assert found.settings["family"]["name"] == "quadratic" and found.settings["family"]["options"]["dim"] == 3
    for label, each in learned.items():
        alone = compare({label: (each.rule, each.theta)}, tasks.make("quadratic", dim=3), **FEW)
        assert torch.equal(found.outcomes[label].values["final_loss"], alone.outcomes[label].values["final_loss"])
    other = compare_runs(learned, "quadratic", {"dim": 5}, **FEW)
    assert other.settings["family"]["options"]["dim"] == 5


def test_learners_share_the_table_and_the_test_tasks_of_their_family(tmp_path: Path) -> None:
    learned = {name: saved(tmp_path, rate, family=SINE) for name, rate in (("slow", 0.01), ("fast", 0.1))}
    said: list[str] = []
    found = adapt_runs(learned, num_steps=2, num_tasks=3, report=said.append)
    assert said[0] == "Adapting slow to 3 tasks (0 of about 2 runs)"
    assert said[1].startswith("Adapting fast to 3 tasks (1 of about 2 runs, ")
    alone = adapt(learned["fast"].rule, learned["fast"].theta, families(learned)[0], 2, 3)
    assert torch.equal(found.adaptations["fast"].values["loss"], alone.values["loss"])
    with pytest.raises(ValueError, match="num_tasks=1"):
        adapt_runs(learned, num_tasks=1)
    misfit = optimizers.make("maml", template={"w": torch.zeros(7)}, lr=0.1)
    theta = misfit.init_theta(torch.Generator())
    path = checkpoint.save(tmp_path / "misfit", misfit, theta, {"family": SINE})
    with pytest.raises(ValueError, match=r"odd does not fit Sine.* \(odd was meta-trained on sine with"):
        adapt_runs({"odd": checkpoint.load_checkpoint(path)}, num_steps=1, num_tasks=2)


def test_fresh_tasks_and_those_to_tune_on_are_of_different_splits() -> None:
    fresh, others = families({}, "noisy-images", {"dataset": "mnist"})
    assert (fresh.meta_split, others.meta_split) == ("test", "train")  # pyright: ignore[reportAttributeAccessIssue]
    fresh, others = families({}, "noisy-images", {"dataset": "mnist", "meta_split": "valid"})
    assert (fresh.meta_split, others.meta_split) == ("valid", "train")  # pyright: ignore[reportAttributeAccessIssue]


def test_the_family_is_that_of_validation_without_the_split() -> None:
    record = {"family": {"name": "clusters", "options": {"shots": 1, "meta_split": "train"}}}
    record["validation"] = {"family_options": {"shots": 5}}
    assert shared_family({"a": record, "b": record}, {"ways": 3}) == ("clusters", {"shots": 5, "ways": 3})


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ({"a": {"family": QUADRATIC}, "b": {"family": SINE}}, r"\(a on quadratic; b on sine\): name one"),
        (
            {"a": {"family": QUADRATIC}, "b": {"family": {"name": "quadratic", "options": {"dim": 4, "rows": 2}}}},
            r"\(a on quadratic with dim=3, no rows; b on quadratic with dim=4, rows=2\)",
        ),
        ({"a": {"family": QUADRATIC}, "b": {}}, "b has no record of a family; name one with --family"),
        ({"a": {"family": ["quadratic"]}}, "the record of a is of no family"),
        (
            {"a": {"family": {"name": "image-folder", "options": {"root": "x"}}}},
            "the record of a names what is to be read: root='x'; a file does not choose that here: pass --set root=...",
        ),
    ],
    ids=["families", "options", "none", "damaged", "paths"],
)
def test_what_the_records_do_not_tell_is_said(records: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        shared_family(records)


def test_options_of_ones_own_may_make_them_alike() -> None:
    records = {"a": {"family": QUADRATIC}, "b": {"family": {"name": "quadratic", "options": {"dim": 4}}}}
    assert shared_family(records, {"dim": 5}) == ("quadratic", {"dim": 5})


def test_a_family_that_is_not_registered_names_the_plug_in(tmp_path: Path) -> None:
    family = {"name": "theirs", "options": {}}
    learned = {"a": saved(tmp_path, 0.1, family=family, imports=["their_module"])}
    with pytest.raises(ValueError, match=r"no task family 'theirs'.* pass --import their_module if you trust"):
        compare_runs(learned)


def test_checkpoints_are_called_by_their_names_or_paths() -> None:
    assert labelled(["runs/a", "b.safetensors"]) == {"a": "runs/a", "b": "b.safetensors"}
    assert labelled(["x/a", "y/a"]) == {"x-a": "x/a", "y-a": "y/a"}
    with pytest.raises(ValueError, match="the same checkpoint is named twice in x/a x/a"):
        labelled(["x/a", "x/a"])
