"""The command ``learnedopt``: what it writes, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_wandb_tracker import records

import learnedopt
from learnedopt import cli, estimators, evaluate, inner_objectives, objectives, optimizers, recipes, tasks
from learnedopt.evaluation.comparison import MEASURES
from learnedopt.training.wandb_tracker import WandbTracker

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-c", "import sys; from learnedopt.cli import main; sys.exit(main())"]
QUICK = ["--family", "quadratic", "--set", "dim=3", "--steps", "12", "--tasks", "5", "--tuning-tasks", "3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a saved optimizer whose theta differs from its constructor's values."""
    path = tmp_path_factory.mktemp("checkpoints") / "learned-sgd.safetensors"
    return learnedopt.save(path, optimizers.make("sgd", lr=0.5), {"lr": torch.tensor(0.03)})


@pytest.fixture
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command in this process; return its one line of complaint."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_evaluate_writes_table_numbers_and_figure_and_logs_them_offline(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_NOTES", "of my own")
    monkeypatch.setenv("WANDB_PROJECT", "not-this")
    follow = "--wandb offline --project judged --entity me --group pilot --tags a,b --tensorboard"
    done = run("evaluate", str(checkpoint), *QUICK, "--seed", "4", "--out", str(tmp_path), *follow.split())
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    table = (tmp_path / "evaluation.md").read_text("utf-8")
    assert table in done.stdout and str(tmp_path / "evaluation.png") in done.stdout
    saved = json.loads((tmp_path / "evaluation.json").read_text("utf-8"))
    assert list(saved["optimizers"]) == ["learned-sgd", "SGD", "momentum", "Nesterov", "RMSprop", "Adam"]
    assert (
        saved["settings"]["family"]["options"] | {"dim": 3, "meta_split": "test"}
        == saved["settings"]["family"]["options"]
    )
    family = tasks.make("quadratic", dim=3)
    given = {"learned-sgd": (optimizers.make("sgd"), {"lr": torch.tensor(0.03)})}
    here = evaluate.compare(given, family, num_steps=12, num_tasks=5, num_tuning_tasks=3, seed=4)
    for label, outcome in here.outcomes.items():
        for name in MEASURES:
            measured = saved["optimizers"][label]["measures"][name]["mean"]
            assert measured == pytest.approx(float(outcome.values[name].mean()), rel=1e-6)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "evaluation.png").convert("L")))) > 20
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"final_loss/Adam/median" in record.read_bytes()
    assert list(record.parent.glob("files/media/images/loss_curves*.png"))
    (opened,) = [each.run for each in records(record) if each.HasField("run")]
    assert (opened.project, opened.entity, opened.run_group) == ("judged", "me", "pilot")
    assert ([*opened.tags], opened.notes, opened.job_type) == (["a", "b"], "of my own", "evaluate")
    (events,) = tmp_path.glob("tensorboard/events*")
    assert b"final_loss/Adam/median" in events.read_bytes()


def test_an_inner_objective_is_descended_with_its_theta(tmp_path: Path, no_wandb: None) -> None:
    family, like = tasks.make("quadratic", dim=3), {"x": torch.zeros(3)}
    rule, pull = optimizers.make("sgd", lr=0.03), inner_objectives.make("l2", template=like, strength=0.5)
    rate, strength = {"lr": torch.tensor(0.03)}, pull.init_theta(torch.Generator())
    assert strength
    learned = learnedopt.save(tmp_path / "pulled", rule, {**rate, **strength}, inner_objective=pull)
    assert cli.main(["evaluate", str(learned), *QUICK, "--seed", "4", "--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "evaluation.json").read_text("utf-8"))["optimizers"]["pulled"]["measures"]
    given = {"pulled": (rule, {**rate, **strength}, pull), "plain": (rule, rate)}
    here = evaluate.compare(given, family, num_steps=12, num_tasks=5, num_tuning_tasks=3, seed=4).outcomes
    means = {label: float(outcome.values["final_loss"].mean()) for label, outcome in here.items()}
    assert saved["final_loss"]["mean"] == pytest.approx(means["pulled"], rel=1e-6)
    assert means["pulled"] != pytest.approx(means["plain"], rel=1e-2)


def test_evaluate_tells_wandb_the_numbers_of_the_table(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[tuple[str, Any]] = []
    for name in ("start", "log", "figure", "artifact", "finish"):
        monkeypatch.setattr(WandbTracker, name, lambda self, *given, name=name, **_: said.append((name, given)))
    assert cli.main(["evaluate", str(checkpoint), *QUICK, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert [name for name, _ in said] == ["start", "log", "figure", "artifact", "finish"]
    saved = json.loads((tmp_path / "evaluation.json").read_text("utf-8"))
    (config,), (numbers, _), (_, figure), (name, paths, _), _ = (given for _, given in said)
    assert config == saved["settings"] and config["num_tasks"] == 5
    assert len(numbers) == 6 * 3 * 4
    for label, entry in saved["optimizers"].items():
        for measure, summary in entry["measures"].items():
            assert {k: numbers[f"{measure}/{label}/{k}"] for k in summary} == summary
    assert figure == tmp_path / "evaluation.png" and name == "evaluation-quadratic"
    assert sorted(path.suffix for path in paths) == [".json", ".md", ".png"]


def test_baselines_are_tuned_on_another_split(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_wandb: None
) -> None:
    seen = []

    def compare(given: object, family: object, **options: object) -> None:
        seen.append((family, options["tuning_family"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "compare", compare)
    folder = ["--out", str(tmp_path)]
    assert cli.main(["evaluate", str(checkpoint), "--family", "image-mlp", "--set", "hidden=[8]", *folder]) == 130
    assert cli.main(["evaluate", str(checkpoint), "--family", "image-mlp", "--set", "meta_split=valid", *folder]) == 130
    make = tasks.make
    assert seen == [
        (make("image-mlp", hidden=(8,), meta_split="test"), make("image-mlp", hidden=(8,), meta_split="train")),
        (make("image-mlp", meta_split="valid"), make("image-mlp", meta_split="train")),
    ]


def test_the_output_folder_is_named_after_the_run_and_keeps_its_evaluation(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_wandb: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", str(checkpoint), *QUICK, "--tune-for", "sum_of_losses"]) == 0
    folder = tmp_path / "runs" / "evaluate-learned-sgd-quadratic"
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "evaluation.md", "evaluation.png"]
    assert "lowest mean sum of losses on 3 other tasks" in (folder / "evaluation.md").read_text("utf-8")
    before = (folder / "evaluation.json").read_bytes()
    for name, value in {"steps": "13", "tuning-tasks": "4", "seed": "1", "baselines": "SGD", "set": "dim=4"}.items():
        capsys.readouterr()
        words = [*QUICK, "--tune-for", "sum_of_losses", f"--{name}", value]
        assert "is an evaluation with other settings (" in refusal(capsys, "compare", str(checkpoint), *words), name
    assert (folder / "evaluation.json").read_bytes() == before
    small = ["--steps", "2", "--tasks", "2", "--out", str(folder)]
    assert cli.main(["evaluate", str(checkpoint), "--few-shot", *QUICK[:4], *small]) == 0
    capsys.readouterr()
    small[1] = "3"
    told = refusal(capsys, "evaluate", str(checkpoint), "--few-shot", *QUICK[:4], *small)
    assert "few_shot.json is an evaluation with other settings (num_steps=2)" in told


def test_list_names_what_there_is() -> None:
    done = run("list")
    assert done.returncode == 0, done.stderr
    sections: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith(" "):
            assert len(line.split()) > 2, line  # what it is
            sections[[*sections][-1]].append(line.split()[0])
        else:
            sections[line] = []
    assert [*sections.values()] == [
        optimizers.names(), inner_objectives.names(), estimators.names(), objectives.names(), tasks.names(),
        recipes.names(), learnedopt.packaged(),
    ]  # fmt: skip


def test_cards_of_packaged_optimizers_and_of_a_file(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    assert cli.main(["card", "lstm-mnist", str(checkpoint)]) == 0
    assert capsys.readouterr().out == f"{learnedopt.card('lstm-mnist')}\n{learnedopt.card(checkpoint)}"
    assert "did you mean 'lstm-mnist'?" in refusal(capsys, "card", "lstm-mnits")
    assert "the following arguments are required: NAME" in refusal(capsys, "card")
    assert "unrecognized arguments: lstm-mnist" in refusal(capsys, "list", "lstm-mnist")


def test_bad_input_in_a_process_of_its_own(checkpoint: Path) -> None:
    done = run("evaluate", str(checkpoint), "--family", "quadratik")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("learnedopt evaluate: ") and done.stderr.count("\n") == 1
    assert "did you mean 'quadratic'?" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "quadratic", "--set", "dims=3"], "did you mean 'dim'?"),
        (["--family", "quadratic", "--set", "dim=three"], "dim='three' (str) is not of the option's type"),
        (["--family", "quadratic", "--set", "dim=0"], "dim=0 is not a count"),
        (["--family", "quadratic", "--set", "distribution=gausian"], "did you mean 'gaussian'?"),
        (["--family", "quadratic", "--set", "dim"], "--set 'dim' is not of the form KEY=VALUE"),
        (["--family", "quadratic", "--steps", "0"], "num_steps=0 is not a count"),
        (["--family", "quadratic", "--tasks", "1"], "at least 2"),
        (["--family", "quadratic", "--tasks", "many"], "--tasks='many' is not of the option's type int"),
        (["--family", "quadratic", "--tune-for", "loss"], "none of final_loss, sum_of_losses, last_ten; did"),
        (["--family", "quadratic", "--wandb", "ofline"], "did you mean 'offline'?"),
        (["--family", "quadratic", "--step", "5"], "did you mean --steps?"),
        ([], "has no record of a family; name one with --family"),
    ],
)
def test_bad_arguments_end_in_one_line(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, "evaluate", str(checkpoint), "--out", str(tmp_path), *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["evalute"], "did you mean evaluate?"), (["list", "--al"], "unrecognized arguments: --al"), ([], "COMMAND")],
)
def test_bad_commands_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(capsys, *arguments)


@pytest.mark.parametrize("module", ["learnedopt", "learnedopt.cli"])
def test_python_runs_the_command_as_a_module(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "list", "--al"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("learnedopt list: unrecognized arguments: --al"), done.stderr


def test_checkpoints_that_cannot_be_used(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = checkpoint.read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[: len(content) - 2])
    (tmp_path / "foreign.safetensors").write_bytes(b"PK\x03\x04 not a checkpoint")
    where = ["--family", "quadratic", "--out", str(tmp_path / "out")]
    for name in ("short", "foreign"):
        assert "is corrupt or cut short" in refusal(capsys, "evaluate", str(tmp_path / f"{name}.safetensors"), *where)
    assert "neither a checkpoint file" in refusal(capsys, "evaluate", str(tmp_path / "missing"), *where)
    assert not (tmp_path / "out").exists()


def test_a_misspelt_packaged_name_is_answered_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("learnedopt.checkpoint.packaged", lambda: ["lstm-mnist", "lstm-quadratic"])
    assert "did you mean 'lstm-mnist'?" in refusal(capsys, "evaluate", "lstm-mnits", "--family", "quadratic")


def test_an_optimizer_of_other_shapes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_wandb: None
) -> None:
    rule = optimizers.make("meta-sgd", template={"x": torch.zeros(7)})
    path = learnedopt.save(tmp_path / "seven", rule, rule.init_theta(torch.Generator().manual_seed(0)))
    assert cli.main(["evaluate", str(path), *QUICK, "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "template" in err and err.count("\n") == 1
    assert not (tmp_path / "evaluation.json").exists()


def test_help_is_not_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--help"]) == 0
    assert "--tuning-tasks" in capsys.readouterr().out
