"""Fields of recipes on the command line: spellings, YAML, what wins, what help lists, and users' own modules."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from learnedopt import cli, recipes
from learnedopt.cli_fields import fields_of
from learnedopt.config import INTERCHANGEABLE, as_config, override
from learnedopt.training.tracking import Tracking


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Return the configuration that ``train --print_config`` prints."""
    assert cli.main(["train", *words, "--print_config"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return yaml.safe_load(out)


@pytest.mark.parametrize("words", ["--meta.lr=1e-3", "--meta.lr 1e-3", "meta.lr=1e-3", "--set meta.lr=1e-3"])
def test_a_field_is_set_in_four_spellings(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = as_config(override(recipes.make("demo"), ["meta.lr=0.001"], INTERCHANGEABLE))
    assert printed(capsys, *words.split(), "demo") == wanted == printed(capsys, "demo", *words.split())


def test_of_spellings_the_last_wins_whatever_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    spellings = ["--set seed=1", "--seed 2", "seed=3", "--seed=4", "--set=seed=5"]
    for last in range(5):
        words = " ".join([*spellings[last + 1 :], *spellings[: last + 1]]).split()
        assert printed(capsys, "demo", *words)["seed"] == last + 1


@pytest.mark.parametrize("name", recipes.names())
def test_a_printed_configuration_is_read_back(name: str) -> None:
    recipe = recipes.make(name)
    wanted = as_config(recipe)
    fields = [*fields_of(recipe)]
    assert len(fields) >= len(dataclasses.fields(recipe)) - 1
    for field in fields:  # a help that says the name again says nothing
        name = field.path.rpartition(".")[2]
        assert field.about and field.about.rstrip(".").lower().replace(" ", "_") != name, field.path
    written = yaml.safe_load(yaml.safe_dump(wanted))
    assert as_config(override(recipe, [written], INTERCHANGEABLE)) == wanted
    plain = recipes.make("demo")
    if isinstance(recipe, recipes.Recipe) and recipe.after is None:  # all of it, onto another recipe's
        assert as_config(override(plain, [written], INTERCHANGEABLE)) == wanted


def test_recipe_then_files_then_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.json"
    first.write_text(
        "seed: 1\nnum_tasks: 11\nmeta: {lr: 1e-1, max_grad_norm: null}\nrule: {options: {num_layers: 1}}\n"
    )
    second.write_text('{"num_tasks": 12, "estimator": {"type": "Unrolled", "num_steps": 7}, "family": "sine"}')
    found = printed(capsys, "demo", "--seed=2", "--config", str(first), f"--config={second}", "family.hidden=[3]")
    assert (found["seed"], found["num_tasks"], found["num_meta_steps"]) == (2, 12, 700)
    assert found["meta"]["lr"] == 0.1 and found["meta"]["max_grad_norm"] is None
    assert found["rule"] == {"name": "lstm", "options": {"preprocess_factor": None, "num_layers": 1}}
    assert found["estimator"]["type"] == "Unrolled" and found["estimator"]["num_steps"] == 7
    assert found["family"] == {"name": "sine", "options": {"hidden": [3]}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: one", "seed='one' is not of the setting's type int"),
        ("sede: 1", "no setting 'sede': Recipe has no 'sede'; did you mean 'seed'?"),
        ("meta: {rl: 1}", "no setting 'meta.rl': MetaLearning has no 'rl'; did you mean 'lr'?"),
        ("meta: 3", "meta=3 cannot be: meta is a group of settings; set these, such as meta.lr"),
        ("estimator: {type: Unroled}", "estimator='Unroled' is none of Unrolled,"),
        ("validation: {type: Recipe}", "validation='Recipe' cannot be: validation is a group"),
        ("family: {dim: 3}", "{'dim': 3} is no configuration of a choice: it has a name, and maybe options"),
        ("family: 3", "family=3 names nothing"),
        ("type: Study", "this is the configuration of a Study, and what it would change is a Recipe"),
        ("3: 4", "{3: 4} is no configuration: what it names are no words"),
        ("meta: {3: 4}", "{3: 4} is no configuration: what it names are no words"),
        ("rule: {options: {3: 4}}", "is no configuration of a choice"),
        ("- seed", "holds no fields: write key: value"),
        ("{", "is no YAML"),
        ("", "holds no fields"),
    ],
)
def test_a_wrong_file_ends_in_one_line(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    assert cli.main(["train", "demo", "--config", str(tmp_path / "wrong.yaml")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and told in err, err


@pytest.mark.parametrize("name", ["demo", "imaml-hf-omniglot", "general", "bootstrapped-mnist", "bmg-quadratic"])
def test_help_lists_every_field_with_type_value_and_meaning(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", name, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    paths = [field.path for field in fields_of(recipes.make(name))]
    top = {field.name for field in dataclasses.fields(recipes.make(name))} - {"after"}
    assert top - {path.partition(".")[0] for path in paths} <= {"methods"}  # a study's methods are of YAML alone
    for path in set(paths) - {"name"}:  # --name is the run's folder
        assert f" --{path} {path.rpartition('.')[2].upper()} " in said, path
    if name != "bmg-quadratic":
        rate = recipes.meta_training(name).meta.lr
        assert f"--meta.lr LR the learning rate that training begins with. (type: float, default: {rate})" in said


def test_help_follows_what_is_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "demo", "estimator=Implicit", "objective=FinalLoss", "--family=sine", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--estimator.solver.num_iterations" in said and "--family.hidden" in said
    assert "--estimator.horizon" not in said and "--family.dim" not in said


def test_what_is_said_of_following_a_run_reaches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("learnedopt.run.train", lambda *given, **options: seen.append((given, options)))
    words = "--project p --entity e --group g --tags a,b --notes n --tensorboard --log-every 5 --wandb offline --extend"
    assert cli.main(["train", "demo", "--runs", str(tmp_path), *words.split()]) == 0
    ((recipe, folder, tracking, _), options) = seen[0]
    assert recipe == recipes.make("demo") and folder == tmp_path / "demo" and options == {"extend": True}
    assert tracking == Tracking("offline", "p", "e", "g", ("a", "b"), "n", True, 5)
    assert cli.main(["train", "demo", "--runs", str(tmp_path), "--smoke", "meta.lr=0.5"]) == 0
    small, folder, tracking, _ = seen[1][0]
    assert small == recipes.smoke(override(recipes.make("demo"), ["meta.lr=0.5"], INTERCHANGEABLE))
    assert tracking == Tracking() and folder == tmp_path / "demo-smoke"


def test_what_the_command_line_says_is_not_shrunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "long.yaml").write_text("{num_meta_steps: 600, num_tasks: 64}")
    words = f"demo --smoke --config {tmp_path / 'long.yaml'} num_meta_steps=30 estimator=Unrolled".split()
    found = printed(capsys, *words)
    assert (found["num_meta_steps"], found["num_tasks"], found["estimator"]["type"]) == (30, 2, "Unrolled")
    assert found["estimator"]["num_steps"] == 5 and found["name"] == "demo-smoke"


@pytest.mark.parametrize("words", ["train --list", "check --list", "list", "card general", "train my-own --help"])
def test_modules_of_ones_own_are_imported_by_every_command(
    words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[list[str]] = []
    monkeypatch.setattr("learnedopt.plugins.load", lambda modules: said.append([*modules]) or register(monkeypatch))
    assert cli.main([*words.split(), "--import", "mine", "--import=theirs"]) == 0
    assert said == [["mine", "theirs"]]
    assert ("my-own" in capsys.readouterr().out) == ("list" in words)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "_registered", {"my-own": lambda: recipes.make("demo")})


def test_the_general_help_is_said_whatever_else_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--import", "json", "--help"]) == 0
    assert "--extend" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (TypeError("rate\nis no number"), 2)])
def test_what_ends_the_making_of_a_recipe_is_one_line(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(name: str) -> None:
        raise error

    monkeypatch.setattr(recipes, "make", make)
    assert cli.main(["train", "demo"]) == code
    err = capsys.readouterr().err
    assert err == f"learnedopt train: {' '.join(str(error).split()) or 'interrupted'}\n"
