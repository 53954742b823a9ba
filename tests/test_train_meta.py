"""The command that meta-trains: every recipe end to end, overrides, what a run leaves behind, and bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image

import learnedopt
import train_meta
from learnedopt import (
    GMRES,
    BootstrappedTarget,
    Combined,
    ConjugateGradient,
    EvolutionStrategies,
    FinalLoss,
    Implicit,
    KLDivergence,
    LastIterate,
    LogMeans,
    MeanLogLoss,
    PersistentES,
    RegularizedSolution,
    SumOfLossesSolver,
    Tape,
    TargetMatching,
    TaskByTask,
    TaskLoss,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    checkpoint,
    recipes,
)
from learnedopt.config import INTERCHANGEABLE, override
from learnedopt.core.files import exclusive
from learnedopt.core.registry import Choice
from learnedopt.recipes import Recipe
from learnedopt.run import build, configuration
from learnedopt.training.json_tracker import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TINY = ["num_meta_steps=2", "num_tasks=2", "validation.num_tasks=2", "validation.num_steps=2", "validation.every=1"]
TINY_WINDOWS = [*TINY, "estimator.num_steps=2", "estimator.horizon=4"]


def configured(name: str, *assignments: str) -> Recipe:
    return override(recipes.meta_training(name), assignments, INTERCHANGEABLE)


def command(name: str, runs: Path, *assignments: str) -> list[str]:
    sets = [word for assignment in assignments for word in ("--set", assignment)]
    return [name, "--runs", str(runs), "--wandb", "disabled", *sets]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Recipes


def test_the_recipes_are_listed_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_meta.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names()
    assert all(re.fullmatch(r"\S+ +[A-Z].{20,}\.", line) and len(line) <= 140 for line in lines)
    assert {"lstm-quadratic", "lstm-mnist", "meta-sgd-mnist", "bootstrapped-mnist", "imaml-regression"} <= set(
        recipes.names()
    )
    assert all(recipes.make(name).name == name for name in recipes.names())


def tiny(recipe: Recipe) -> list[str]:
    """Return the settings that make a recipe as small as it can be, those of its earlier stages included."""
    sets = [*TINY]
    if recipe.family.name == "image-mlp":
        sets += ["family.batch_size=4", "family.hidden=[3]"]
    if isinstance(recipe.estimator, Truncated):
        sets += ["estimator.num_steps=2", "estimator.horizon=4"]
    if isinstance(recipe.estimator, EvolutionStrategies | PersistentES):
        sets += ["estimator.num_steps=2", "estimator.num_pairs=2"]
    if isinstance(recipe.estimator, PersistentES):
        sets += ["estimator.horizon=4"]
    if isinstance(recipe.estimator, TaskByTask):
        sets += ["estimator.estimator.num_steps=2", "horizon=2"]
        sets += ["estimator.horizons=[[2, 1.0]]"] if recipe.estimator.horizons else []
        sets += ["estimator.instead.num_steps=2"] if recipe.estimator.instead is not None else []
    if recipe.family.name == "omniglot":
        sets += ["family.width=2", "family.queries=2"]
    if isinstance(recipe.estimator, Unrolled) and recipe.estimator.num_steps > 0:
        sets += ["estimator.num_steps=2"]
    if recipe.execution.compile:  # what a compiler takes a minute for is tested elsewhere
        sets += ["execution.compile=false"]
    return sets if recipe.after is None else [*sets, *(f"after.{each}" for each in tiny(recipe.after))]


@pytest.mark.parametrize("name", [name for name in recipes.names() if isinstance(recipes.make(name), Recipe)])
def test_every_recipe_runs(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    recipe = recipes.meta_training(name)
    sets = tiny(recipe)
    if recipe.family.name in ("image-mlp", "noisy-images", "omniglot", "mixture"):
        request.getfixturevalue("data_root")
    if recipe.start is not None:  # goes on from another run: here from that run's recipe, just as tiny
        first = next(n for n in recipes.names() if recipe.start == f"runs/{n}")
        assert train_meta.main(command(first, tmp_path, *sets)) == 0
        sets += [f"start={tmp_path / first}"]
    assert train_meta.main(command(name, tmp_path, *sets)) == 0

    folder = tmp_path / name
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and "validation" in rows[0]
    expected = {"meta_loss", "grad_norm", "step_ms", "skipped", "inner_loss", "validation", "best_validation"}
    assert all(expected <= row.keys() and row["skipped"] == 0 and row["grad_norm"] > 0 for row in rows[1:])
    config = json.loads((folder / "config.json").read_text("utf-8"))["recipe"]
    assert config == configuration(configured(name, *sets))
    rule, inner_objective, theta, _ = checkpoint.load_checkpoint(folder)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["theta"].keys() == theta.keys() != set()
    assert isinstance(inner_objective, TaskLoss) == (recipe.inner_objective is None)
    described = json.loads((folder / "theta.json").read_text("utf-8"))
    assert described["rule"] == learnedopt.optimizers.describe(rule)
    assert described["metadata"]["best_validation"] == min(row["validation"] for row in rows)
    assert described["metadata"]["meta_step"] == 2 and described["metadata"]["family"] == config["family"]
    with Image.open(folder / "training.png") as figure:
        assert figure.format == "PNG" and figure.width > 400
    assert (folder / "evaluation.png").exists() == (folder / "evaluation.md").exists() == recipe.compare
    assert not [*folder.glob(".*")] and not (folder / "wandb").exists()


def test_validation_solves_as_the_estimator_does(data_root: Path) -> None:
    for name in ("imaml-omniglot", "imaml-hf-omniglot", "imaml-hf-omniglot-paper"):
        recipe = recipes.meta_training(name)
        assert isinstance(recipe.estimator, Implicit)
        validation = build(recipe)[1]
        assert validation.inner == recipe.estimator.inner and (validation.inner is None) == (name == "imaml-omniglot")
        assert validation.num_steps == recipe.estimator.num_steps


def test_the_best_theta_is_what_is_saved(tmp_path: Path) -> None:
    # Every meta-step lowers the learning rate by 0.03: past the best one, and below 0.
    sets = [*TINY_WINDOWS, "num_meta_steps=4", "rule=sgd", "rule.lr=0.1", "meta.lr=0.03", "meta.final_lr_fraction=1"]
    assert train_meta.main(command("lstm-quadratic", tmp_path, *sets)) == 0
    folder = tmp_path / "lstm-quadratic"
    validations = [row["validation"] for row in read_metrics(folder / "metrics.jsonl")]
    best = min(range(5), key=validations.__getitem__)
    saved, last = learnedopt.load(folder)[1], torch.load(folder / "checkpoint.pt", weights_only=True)["theta"]
    assert best < 4 and not torch.equal(saved["lr"], last["lr"])
    _, validation = build(configured("lstm-quadratic", *sets))
    assert validation.measure(saved) == validations[best] and validation.measure(last) == validations[4]


def test_a_run_shorter_than_the_validation_interval_is_validated_at_its_end(tmp_path: Path) -> None:
    assert train_meta.main(command("lstm-quadratic", tmp_path, *TINY_WINDOWS, "validation.every=100")) == 0
    rows = read_metrics(tmp_path / "lstm-quadratic" / "metrics.jsonl")
    assert ["validation" in row for row in rows] == [True, False, True]


# Overrides


def test_nested_typed_overrides_reach_the_configuration() -> None:
    recipe = configured(
        "lstm-mnist", "estimator.num_steps=10", "rule.output_scale=0.01", "family.hidden=[40]",
        "meta.max_grad_norm=null", "execution.chunk_size=4", "execution.dtype=torch.float64",
        "estimator.tape=FIRST_ORDER", "estimator.horizon=90", "seed=3", "compare=true",
    )  # fmt: skip
    assert recipe.estimator == Truncated(10, horizon=90, tape=Tape.FIRST_ORDER)
    assert configured("lstm-mnist", "estimator.horizon=null").estimator == Truncated(20, None, Tape.FULL)
    exchanged = configured("maml-sine", "estimator=Truncated", "estimator.num_steps=3").estimator
    assert isinstance(exchanged, Truncated) and exchanged.horizon is None
    assert recipe.rule.options["output_scale"] == 0.01 and recipe.meta.max_grad_norm is None
    assert recipe.execution.chunk_size == 4 and recipe.execution.dtype is torch.float64
    assert recipe.seed == 3 and recipe.compare is True
    loop, validation = build(recipe)
    options = recipes.meta_training("lstm-mnist").family.options
    assert loop.family == learnedopt.tasks.make("image-mlp", **{**options, "hidden": (40,)})
    assert loop.rule == learnedopt.optimizers.make("lstm", preprocess_factor=10.0, output_scale=0.01)
    assert validation.loop.family != loop.family and validation.loop.rule is loop.rule


@pytest.mark.parametrize(
    ("assignments", "field", "expected"),
    [
        (["estimator=Unrolled", "estimator.num_steps=5"], "estimator", Unrolled(5)),
        (["estimator=Unrolled", "estimator.segment=4"], "estimator", Unrolled(20, segment=4)),
        (["estimator=TruncatedBackprop", "estimator.num_backward_steps=2"], "estimator", TruncatedBackprop(20, 2)),
        (
            ["estimator=Implicit", "estimator.solver=GMRES", "estimator.tolerance=1e-4"],
            "estimator",
            Implicit(20, GMRES(10), tolerance=1e-4),
        ),
        (
            ["estimator=Implicit", "estimator.solver.num_iterations=3"],
            "estimator",
            Implicit(20, ConjugateGradient(3)),
        ),
        (
            [
                "estimator=Combined",
                "estimator.back_propagated=Unrolled",
                "estimator.back_propagated.num_steps=3",
                "estimator.perturbed=TruncatedBackprop",
                "estimator.perturbed.num_steps=3",
                "estimator.perturbed.num_backward_steps=2",
                "estimator.decay=0.5",
            ],
            "estimator",
            Combined(Unrolled(3), TruncatedBackprop(3, 2), 0.5),
        ),
        (
            [
                "estimator=TaskByTask",
                "estimator.estimator=Unrolled",
                "estimator.estimator.num_steps=3",
                "estimator.horizons=[[3, 0.5], [6, 0.5]]",
                "estimator.max_task_grad_norm=0.3",
            ],
            "estimator",
            TaskByTask(Unrolled(3), ((3, 0.5), (6, 0.5)), max_task_grad_norm=0.3),
        ),
        (["objective=MeanLogLoss"], "objective", MeanLogLoss()),
        (["objective=LogMeans", "objective.weight_last=0.25"], "objective", LogMeans(0.25)),
        (
            [
                "objective=BootstrappedTarget",
                "objective.num_target_steps=2",
                "objective.step_size=0.5",
                "objective.matching=KLDivergence",
                "objective.split=train",
            ],
            "objective",
            BootstrappedTarget(2, 0.5, split="train", matching=KLDivergence()),
        ),
        (
            [
                "objective=TargetMatching",
                "objective.target=LastIterate",
                "objective.target.num_steps=3",
                "objective.continue_from=rollout",
                "objective.matching=KLDivergence",
                "objective.matching.direction=reverse",
            ],
            "objective",
            TargetMatching(LastIterate(3), KLDivergence("reverse"), "rollout"),
        ),
        (
            [
                "objective=TargetMatching",
                "objective.target=RegularizedSolution",
                "objective.target.solver=SumOfLossesSolver",
                "objective.target.num_steps=2",
                "objective.target.strength=0.5",
            ],
            "objective",
            TargetMatching(RegularizedSolution(SumOfLossesSolver(), 2, 0.5)),
        ),
        (["family=linear-regression"], "family", Choice("linear-regression")),
        (["rule=adam", "rule.learn=('lr',)"], "rule", Choice("adam", {"learn": ("lr",)})),
    ],
)
def test_estimators_objectives_rules_and_families_are_replaced_by_name(
    assignments: list[str], field: str, expected: Any
) -> None:
    changed = configured("lstm-quadratic", *assignments)
    assert getattr(changed, field) == expected
    assert configured("lstm-quadratic", "validation.objective=FinalLoss").validation.objective == FinalLoss()


def test_a_target_is_changed_where_it_is() -> None:
    name = "bootstrapped-mnist"
    assert configured(name).objective == BootstrappedTarget(6, 1.0)
    found = configured(name, "objective.target.num_target_steps=4", "objective.target.step_size=2").objective
    assert found == BootstrappedTarget(4, 2.0)
    assert configured(name, "objective.target=LastIterate", "objective.target.num_steps=2").objective == (
        TargetMatching(LastIterate(2))
    )
    # By its name of before, what is not named again is as it was by default.
    again = configured(name, "objective=BootstrappedTarget", "objective.num_target_steps=2", "objective.step_size=0.1")
    assert again.objective == BootstrappedTarget(2, 0.1)


def test_another_rule_estimator_and_objective_train(tmp_path: Path) -> None:
    sets = [
        *TINY,
        "rule=adam",
        "estimator=Unrolled",
        "estimator.num_steps=3",
        "objective=FinalLoss",
        "num_meta_steps=3",
    ]
    assert train_meta.main(command("lstm-quadratic", tmp_path, *sets, "execution.chunk_size=1")) == 0
    rule, theta = learnedopt.load(tmp_path / "lstm-quadratic")
    assert rule == learnedopt.optimizers.make("adam") and "betas" not in theta
    rows = read_metrics(tmp_path / "lstm-quadratic" / "metrics.jsonl")
    assert [len(row.get("inner_loss", ())) for row in rows] == [0, 3, 3, 3]


# Bad input

RUN = "lstm-quadratic"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], r"name a recipe \(learnedopt train --list shows all\)"),
        (["lstm-mnits"], r"there is no recipe 'lstm-mnits'; did you mean 'lstm-mnist'\? \(.* --list shows all\)"),
        ([RUN, "--sets", "a=1"], r"unrecognized arguments: --sets=a=1; did you mean --set\? .*"),
        ([RUN, "--wandb", "ofline"], r"--wandb='ofline' is none of online, .*; did you mean 'offline'\? .*"),
        ([RUN, "--set", "num_meta_steps"], r"'num_meta_steps' is not of the form key=value.*"),
        (
            [RUN, "--set", "num_metasteps=3"],
            r"there is no setting 'num_metasteps': .*did you mean 'num_meta_steps'\?",
        ),
        ([RUN, "--set", "estimator.num_step=3"], r".*'estimator\.num_step': Truncated .*did you mean 'num_steps'\?"),
        ([RUN, "--set", "num_tasks=many"], r"num_tasks='many' is not of the setting's type int"),
        ([RUN, "--set", "estimator.num_steps=1.5"], r"estimator\.num_steps='1\.5' is not of the setting's type int"),
        ([RUN, "--set", "estimator.tape=FUL"], r".*'FUL' is none of NONE, FIRST_ORDER, FULL; did you mean 'FULL'\?"),
        ([RUN, "--set", "estimator.tape=NONE"], r"estimator\.tape=<Tape\.NONE.*use Tape\.FULL or Tape\.FIRST_ORDER"),
        ([RUN, "--set", "estimator=Unroled"], r"estimator='Unroled' is none of .*; did you mean 'Unrolled'\? .*"),
        (
            [RUN, "--set", "objective=SumOfLoss"],
            r"objective='SumOfLoss' is none of .*; did you mean 'SumOfLosses'\? .*",
        ),
        (
            [RUN, "--set", "objective=BootstrappedTarget"],
            r".*needs objective\.num_target_steps and objective\.step_size.*",
        ),
        ([RUN, "--set", "objective=TargetMatching"], r"TargetMatching needs objective\.target: set that too"),
        (
            [RUN, "--set", "objective=TargetMatching", "--set", "objective.target=Bootstrp"],
            r"objective\.target='Bootstrp' is none of Bootstrap, .*; did you mean 'Bootstrap'\?",
        ),
        (
            [RUN, "--set", "estimator.horizon=90"],
            r"estimator\.horizon=90 is not a multiple of the .*num_steps=20.*80 or 100",
        ),
        ([RUN, "--set", "family=quadratik"], r"there is no task family 'quadratik'; did you mean 'quadratic'\?.*"),
        ([RUN, "--set", "family.dimm=3"], r"'quadratic' has no option 'dimm'; did you mean 'dim'\?.*"),
        ([RUN, "--set", "family.dim=ten"], r"'quadratic': dim='ten' \(str\) is not of the option's type.*"),
        ([RUN, "--set", "family.dim=-1"], r"family\.dim=-1 is not a count.*"),
        ([RUN, "--set", "rule=lstmm"], r"there is no update rule 'lstmm'; did you mean 'lstm'\?.*"),
        ([RUN, "--set", "rule.hidden=3"], r"'lstm' has no option 'hidden'; did you mean 'hidden_size'\?.*"),
        ([RUN, "--set", "num_meta_steps=0"], r"num_meta_steps=0 is not a count; .*at least 1"),
        ([RUN, "--set", "num_tasks=-4"], r"num_tasks=-4 is not a count.*"),
        ([RUN, "--set", "checkpoint_every=0"], r"checkpoint_every=0 is not a count.*"),
        ([RUN, "--set", "validation.num_tasks=0"], r"validation\.num_tasks=0 is not a count.*"),
        ([RUN, "--set", "meta.lr=-1"], r"meta\.lr=-1\.0 is a learning rate and must be positive"),
        ([RUN, "--set", "meta.final_lr_fraction=-1"], r"meta\.final_lr_fraction=-1\.0 must not be negative.*"),
        ([RUN, "--set", "meta.max_grad_norm=0"], r"meta\.max_grad_norm=0\.0 must be positive, or null.*"),
        ([RUN, "--set", "execution.chunk_size=0"], r"execution\.chunk_size=0 is not a .*"),
        ([RUN, "--set", "execution.device=gpu"], r"execution\.device='gpu' cannot be used here.*"),
        ([RUN, "--set", "seed=-1"], r"seed=-1 is not a count.*"),
    ],
)
def test_bad_input_ends_in_one_line_and_creates_nothing(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = train_meta.main(arguments)
    said = capsys.readouterr()
    assert code == 2 and said.out == ""
    assert re.fullmatch(rf"learnedopt(?: train)?: {told}\n", said.err), said.err
    assert not [*tmp_path.iterdir()]


def test_bad_wandb_mode_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "of")
    assert train_meta.main([RUN, "--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("learnedopt train: WANDB_MODE='of' is not a W&B mode")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("assignments", "told"),
    [
        (["rule=sgd", "rule.learn=()"], "neither rule nor inner objective has meta-parameters"),
        (["estimator=Implicit", "rule=maml", "inner_objective=proximal"], "SumOfLosses reads the losses along the way"),
        (["estimator=Unrolled", "estimator.num_steps=0"], "have no path to the objective"),
        (["validation.objective=BootstrappedTarget"], "needs validation.objective.num_target_steps"),
    ],
)
def test_what_only_the_engine_can_see_ends_in_one_line_too_and_the_folder_stays_free(
    assignments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_meta.main(command(RUN, tmp_path, *TINY, *assignments)) == 2
    said = capsys.readouterr().err
    assert told in said and re.fullmatch(r"learnedopt train: .*\n", said)
    assert train_meta.main(command(RUN, tmp_path, *TINY_WINDOWS)) == 0  # the right command, in the same folder


def test_a_training_that_diverges_ends_with_code_1_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [*TINY_WINDOWS, "rule=sgd", "rule.lr=1e30", "num_meta_steps=20", "validation.every=20"]
    assert train_meta.main(command(RUN, tmp_path, *sets)) == 1
    assert re.fullmatch(r"learnedopt train: 10 meta-gradients in a row were not finite.*\n", capsys.readouterr().err)
    rows = read_metrics(tmp_path / RUN / "metrics.jsonl")
    assert [row["skipped"] for row in rows if row["step"] > 0] == [*range(1, 11)]
    assert not (tmp_path / RUN / "theta.safetensors").exists()


def test_a_folder_of_another_configuration_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_meta.main(command(RUN, tmp_path, *TINY_WINDOWS)) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert train_meta.main(command(RUN, tmp_path, *TINY_WINDOWS, "num_tasks=3", "rule.hidden_size=4")) == 2
    told = r"learnedopt train: .*lstm-quadratic holds a run with another .* \(different: num_tasks, rule\); .*\n"
    assert re.fullmatch(told, capsys.readouterr().err)
    assert contents(tmp_path) == before
    other = [*command(RUN, tmp_path, *TINY_WINDOWS, "num_tasks=3"), "--name", "other"]
    assert train_meta.main(other) == 0
    assert (tmp_path / "other" / "theta.safetensors").exists()
    (tmp_path / RUN / ".checkpoint.pt.killed.partial").write_bytes(b"half")
    assert train_meta.main(command(RUN, tmp_path, *TINY_WINDOWS)) == 0  # the same configuration goes on
    assert not [*(tmp_path / RUN).glob(".*")]
    assert (tmp_path / RUN / "theta.safetensors").read_bytes() == before[tmp_path / RUN / "theta.safetensors"]


def test_a_folder_where_another_process_trains_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_meta.main(command(RUN, tmp_path, *TINY_WINDOWS)) == 0
    hold = "import sys; from pathlib import Path; from learnedopt.core.files import exclusive\n"
    hold += "with exclusive(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / RUN)], **pipes) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        (tmp_path / RUN / ".checkpoint.pt.theirs.partial").write_bytes(b"half")
        before = contents(tmp_path)
        capsys.readouterr()
        assert train_meta.main(command(RUN, tmp_path, *TINY_WINDOWS)) == 2
        assert re.fullmatch(r"learnedopt train: another process is at work in .*; wait .*\n", capsys.readouterr().err)
        assert contents(tmp_path) == before
        (tmp_path / RUN / "checkpoint.pt").unlink()
        (tmp_path / RUN / "metrics.jsonl").unlink()  # as in a run that has only begun
        before = contents(tmp_path)
        assert train_meta.main(command(RUN, tmp_path, *TINY_WINDOWS, "seed=5")) == 2
        assert contents(tmp_path) == before
        other.kill()
    assert train_meta.main(command(RUN, tmp_path, *TINY_WINDOWS)) == 0  # a killed process holds nothing
    assert not [*(tmp_path / RUN).glob(".*")]


def test_a_file_system_without_locks_gives_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FileLock) -> None:
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with (
        pytest.warns(UserWarning, match=r"cannot be locked \(no locks here\): let no other process"),
        exclusive(tmp_path),
    ):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": {}}', '{"recipe": 3, "run_id": "a"}', "\udcff"])
def test_a_damaged_configuration_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / RUN
    folder.mkdir()
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    before = contents(tmp_path)
    assert train_meta.main(command(RUN, tmp_path, *TINY_WINDOWS)) == 2
    assert re.fullmatch(r"learnedopt train: .*config\.json is no run's configuration .*\n", capsys.readouterr().err)
    assert contents(tmp_path) == before


def test_runs_that_cannot_be_written_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").write_text("a file")
    assert train_meta.main(command(RUN, tmp_path / "runs", *TINY_WINDOWS)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_script_itself_ends_without_a_traceback(tmp_path: Path) -> None:
    arguments = [RUN, "--runs", str(tmp_path), "--set", "estimator.horizon=90"]
    done = subprocess.run([sys.executable, ROOT / "train_meta.py", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"learnedopt train: estimator\.horizon=90 .*\n", done.stderr)
