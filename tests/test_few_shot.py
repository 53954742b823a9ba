"""Few-shot evaluation: adaptation step by step on fixed tasks, its summary, files and figure, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

import learnedopt
from benchmarks import results_few_shot, results_sine
from learnedopt import (
    BootstrappedTarget,
    Carry,
    Execution,
    FinalLoss,
    HessianFree,
    Implicit,
    InnerLoop,
    Tape,
    TaskFamily,
    Tasks,
    Theta,
    cli,
    optimizers,
    tasks,
)
from learnedopt.checkpoint import load_checkpoint
from learnedopt.config import recorded_solver
from learnedopt.core.registry import Choice
from learnedopt.core.tree import Params
from learnedopt.estimators.unrolled import Unrolled
from learnedopt.evaluation.comparison import summarise
from learnedopt.evaluation.few_shot import (
    ACCURACY,
    LOSS,
    Adaptation,
    FewShot,
    adapt,
    sample_fixed,
    show,
)
from learnedopt.objectives.error_rate import ErrorRate
from learnedopt.recipes import HeldOut, MetaLearning, Recipe
from learnedopt.run import build
from learnedopt.run import train as train_recipe
from learnedopt.tasks import registry
from learnedopt.training.wandb_tracker import WandbTracker
from tests import problems

FLOAT = torch.float64


@dataclass(frozen=True)
class Clusters(TaskFamily):
    """Classify points around random centres: linear logits, a support of ``shots`` a class, three queries a class."""

    ways: int = 3
    shots: int = 1
    width: int = 4
    meta_split: str = "train"

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        centres = torch.randn(num_tasks, self.ways, 1, self.width, generator=generator, dtype=FLOAT)
        noise = torch.randn(num_tasks, self.ways, self.shots + 3, self.width, generator=generator, dtype=FLOAT)
        return {"points": centres + 0.6 * noise}

    def init_params(self, tasks: Tasks) -> Params:
        return {"weight": tasks["points"].new_zeros(len(tasks["points"]), self.ways, self.width)}

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        points = tasks["points"][:, :, : self.shots] if split == "train" else tasks["points"][:, :, self.shots :]
        targets = torch.arange(self.ways).repeat_interleave(points.shape[2]).expand(len(points), -1)
        return {"inputs": points.flatten(1, 2), "targets": targets}

    def outputs(self, params: Params, batch: Any) -> Tensor:
        return functional.linear(batch["inputs"], params["weight"])

    def loss(self, params: Params, batch: Any) -> Tensor:
        return functional.cross_entropy(self.outputs(params, batch), batch["targets"])

    def metrics(self, params: Params, batch: Any) -> dict[str, Tensor]:
        return {ACCURACY: (self.outputs(params, batch).argmax(-1) == batch["targets"]).double().mean()}


def learned(family: TaskFamily, **options: Any) -> tuple[learnedopt.UpdateRule, Theta]:
    """Return Meta-SGD with a start and rates out of the ordinary."""
    generator = torch.Generator().manual_seed(5)
    template = {k: p[0] for k, p in family.init_params(family.sample(1, generator)).items()}
    rule = optimizers.make("meta-sgd", template=template, lr=0.5, **options)
    theta = rule.init_theta(generator)
    return rule, {k: v + 0.3 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in theta.items()}


# Adaptation


def test_adaptation_equals_gradient_descent_by_hand() -> None:
    family = Clusters(shots=2)
    rule, theta = learned(family)
    found = adapt(rule, theta, family, 3, 7, seed=2)
    drawn = sample_fixed(family, 7, 2)
    support, query = (family.batch(drawn, 0, split) for split in ("train", "valid"))
    for task in range(7):
        (start,) = (v for k, v in theta.items() if k.startswith("init/"))
        (rates,) = (v for k, v in theta.items() if "lr/" in k)
        weight = start.clone()
        for step in range(4):
            logits = query["inputs"][task] @ weight.T
            loss = functional.cross_entropy(logits, query["targets"][task])
            right = (logits.argmax(1) == query["targets"][task]).double().mean()
            torch.testing.assert_close(found.values[LOSS][step, task], loss, rtol=1e-12, atol=0)
            assert float(found.values[ACCURACY][step, task]) == float(right)
            inputs, onehot = support["inputs"][task], functional.one_hot(support["targets"][task], 3).double()
            grad = ((inputs @ weight.T).softmax(1) - onehot).T @ inputs / len(inputs)
            weight = weight - rates * grad
    assert found.steps == (0, 1, 2, 3) and found.measure == ACCURACY
    assert found.values[LOSS][-1].mean() < found.values[LOSS][0].mean()


@pytest.mark.parametrize("size", [1, 4, 2**31])
def test_neither_chunk_changes_the_numbers(size: int) -> None:
    family = Clusters()
    rule, theta = learned(family)
    whole = adapt(rule, theta, family, 2, 11, seed=1)
    parts = adapt(rule, theta, family, 2, 11, seed=1, chunk=4, execution=Execution(chunk_size=size))
    for name, values in whole.values.items():
        assert values.shape == (3, 11)
        torch.testing.assert_close(parts.values[name], values, rtol=1e-12, atol=1e-14)


def test_the_tasks_depend_on_the_seed_alone() -> None:
    family = Clusters()
    rule, theta = learned(family)
    torch.manual_seed(3)
    same = [adapt(rule, theta, family, steps, 5, seed=1).values[LOSS][0] for steps in (0, 2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], adapt(rule, theta, family, 0, 5, seed=2).values[LOSS][0])
    # Another method, another number of steps: the same tasks, as the loss at a common start shows.
    sgd = optimizers.make("sgd", lr=0.1, learn=())
    others = adapt(sgd, {}, family, 1, 5, seed=1).values[LOSS][0]
    torch.testing.assert_close(others, torch.full((5,), math.log(3), dtype=FLOAT))  # zero weights


def test_more_steps_than_any_training_and_a_solver_in_place_of_steps() -> None:
    family = Clusters(shots=2)
    rule, theta = learned(family)
    seen = []

    def solver(loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> Carry:
        seen.append((num_steps, len(carry.params["weight"])))
        return loop.run(theta, carry, num_steps, Tape.NONE).end

    stepwise = adapt(rule, theta, family, 40, 6)
    solved = adapt(rule, theta, family, 40, 6, inner=solver, chunk=4)
    assert seen == [(40, 1)] * 6 and solved.steps == (0, 40)
    seen.clear()
    adapt(rule, theta, family, 3, 6, inner=solver, chunk=4, execution=Execution(chunk_size=3))
    assert seen == [(3, 3), (3, 1), (3, 2)]
    for name, values in solved.values.items():
        torch.testing.assert_close(values, stepwise.values[name][[0, -1]], rtol=1e-10, atol=1e-12)


def test_a_family_without_metrics_reports_its_loss() -> None:
    family = tasks.make("linear-regression", dtype="float64")
    found = adapt(*learned(family), family, 2, 5)
    assert found.measure == LOSS and [*found.values] == [LOSS]
    assert adapt(optimizers.make("sgd", learn=()), {}, problems.Quadratic(), 1, 3).measure == "length"


def test_a_loss_that_is_not_finite_is_shown_as_such() -> None:
    family = tasks.make("linear-regression", dtype="float64")
    diverged = adapt(optimizers.make("sgd", lr=1e200, learn=()), {}, family, 4, 3)
    table = FewShot({}, {"SGD": diverged}).markdown()
    assert "nan" in table or "inf" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 5), "num_steps=-1 is not a count"),
        ((3, 1), "num_tasks=1 is not a count; pass an integer of at least 2"),
    ],
)
def test_bad_counts_are_refused(arguments: tuple[int, int], message: str) -> None:
    family = Clusters()
    with pytest.raises(ValueError, match=message):
        adapt(*learned(family), family, *arguments)
    with pytest.raises(ValueError, match="num_steps=0 is not a count"):
        adapt(*learned(family), family, 0, inner=lambda loop, theta, carry, num_steps: carry)


def test_a_start_of_other_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="the learned start is one of parameters"):
        adapt(*learned(Clusters(ways=4)), Clusters(), 1, 2)


# The objective that picks the model


def test_the_error_rate_is_one_minus_the_accuracy() -> None:
    family = Clusters()
    rule, theta = learned(family)
    loop = InnerLoop(family, rule)
    drawn = sample_fixed(family, 9, 4)
    rollout = loop.run(theta, loop.start(drawn), 2, Tape.NONE)
    accuracy = adapt(rule, theta, family, 2, 9, seed=4).values[ACCURACY][-1]
    assert float(ErrorRate()(loop, theta, rollout)) == pytest.approx(1 - float(accuracy.mean()), abs=1e-15)
    assert 0 < float(accuracy.mean()) < 1


def test_the_error_rate_needs_an_accuracy() -> None:
    family = tasks.make("linear-regression")
    loop = InnerLoop(family, optimizers.make("sgd", learn=()))
    rollout = loop.run({}, loop.start(sample_fixed(family, 2, 0)), 1, Tape.NONE)
    with pytest.raises(ValueError, match="LinearRegression has none; use FinalLoss"):
        ErrorRate()(loop, {}, rollout)


# What is shown


def test_summary_files_and_figure(tmp_path: Path) -> None:
    family = Clusters()
    rule, theta = learned(family)
    sgd = optimizers.make("sgd", lr=0.2, learn=())
    adaptations = {"learned": adapt(rule, theta, family, 3, 20), "SGD": adapt(sgd, {}, family, 1, 20)}
    found = FewShot({"note": "here"}, adaptations)
    paths = found.save(tmp_path)
    saved = json.loads(paths["json"].read_text("utf-8"))
    assert saved["settings"] == {"note": "here"} and saved["methods"]["learned"]["steps"] == [0, 1, 2, 3]
    summary = summarise(adaptations["learned"].values[ACCURACY][-1])
    assert saved["methods"]["learned"]["measures"][ACCURACY][-1] == vars(summary)
    table = paths["md"].read_text("utf-8")
    cell = f"{100 * summary.mean:.2f} ± {100 * (summary.high - summary.mean):.2f} %"
    assert f"| learned | 3     | {cell}" in table and table.startswith("20 fixed tasks")
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:]][2:] == ["learned", "SGD"]
    with Image.open(paths["png"]) as figure:
        assert figure.format == "PNG" and figure.width > 400
        # The bands: paler than the lines, and there.
        colours = {colour for _, colour in figure.convert("RGB").getcolors(maxcolors=2**20) or []}
        assert any(min(c) > 200 and max(c) - min(c) > 15 for c in colours)


def test_the_loss_is_the_table_where_there_is_no_accuracy() -> None:
    values = torch.tensor([[5.0, 6.0, 7.0, 8.0, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0]], dtype=FLOAT)
    table = FewShot({}, {"MAML": Adaptation((0, 1), {LOSS: values})}).markdown()
    assert "| method | steps | loss" in table and "3 ± 2 " in table and "7 ± 2 " in table  # t = 2.776


# The command


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FAMILIES.registered, "clusters", Clusters)
    monkeypatch.setenv("WANDB_MODE", "disabled")


def train(folder: Path, name: str = "maml", family_options: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Meta-train a few meta-steps on ``clusters`` and return the run's folder."""
    recipe = Recipe(
        name=name, family=Choice("clusters", {"shots": 2}), rule=Choice("meta-sgd", {"lr": 0.5}),
        estimator=Unrolled(1), objective=FinalLoss(), num_meta_steps=20, num_tasks=4,
        meta=MetaLearning(lr=0.05),
        validation=HeldOut(ErrorRate(), 1, 30, every=10, family_options=family_options or {}),
    )  # fmt: skip
    train_recipe(replace(recipe, **changes), folder / name)
    return folder / name


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(["evaluate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_a_run_is_evaluated_on_the_test_tasks_of_its_family(
    clusters: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [train(tmp_path), train(tmp_path, "rates", num_meta_steps=10)]
    wanted = ["--few-shot", "--steps", "3", "--tasks", "25", "--seed", "6", "--out", str(tmp_path / "out")]
    assert cli.main(["evaluate", *map(str, runs), *wanted, "--wandb", "offline", "--group", "my-shots"]) == 0
    said = capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "few_shot.json").read_text("utf-8"))
    assert [*saved["methods"]] == ["maml", "rates"]
    options = {"ways": 3, "shots": 2, "width": 4, "meta_split": "test"}
    assert saved["settings"]["family"] == {"name": "clusters", "options": options}
    for run in runs:
        here = adapt(*learnedopt.load(run), Clusters(shots=2, meta_split="test"), 3, 25, seed=6)
        assert saved["methods"][run.name]["measures"][ACCURACY] == [vars(s) for s in here.summaries(ACCURACY)]
    assert (tmp_path / "out" / "few_shot.md").read_text("utf-8") in said
    (record,) = (tmp_path / "out").glob("wandb/offline-run-*/run-*.wandb")
    logged = record.read_bytes()
    assert b"my-shots" in logged
    assert all(name in logged for name in (b"accuracy/maml/mean", b"accuracy/rates/low", b"loss/maml/median"))
    assert list(record.parent.glob("files/media/images/adaptation*.png"))


def test_the_tracker_is_told_the_course(clusters: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tmp_path)
    said: list[tuple[str, Any]] = []
    for name in ("start", "log", "figure", "artifact", "finish"):
        monkeypatch.setattr(WandbTracker, name, lambda self, *given, name=name, **_: said.append((name, given)))
    out = tmp_path / "out"
    assert cli.main(["evaluate", str(run), "--few-shot", "--steps", "2", "--tasks", "4", "--out", str(out)]) == 0
    assert [name for name, _ in said] == ["start", "log", "log", "log", "figure", "artifact", "finish"]
    saved = json.loads((out / "few_shot.json").read_text("utf-8"))["methods"]["maml"]["measures"]
    for _, (numbers, step) in said[1:4]:
        assert numbers == {f"{m}/maml/{k}": v for m, course in saved.items() for k, v in course[step].items()}


def test_family_and_options_are_the_users(clusters: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tmp_path, family_options={"shots": 1})
    monkeypatch.chdir(tmp_path)

    def options(*arguments: str) -> dict[str, Any]:
        assert cli.main(["evaluate", str(run), "--few-shot", "--steps", "1", "--tasks", "3", *arguments]) == 0
        path = Path("runs/evaluate-maml-clusters/few_shot.json")
        saved = json.loads(path.read_text("utf-8"))
        path.unlink()  # else the next one, with other settings, is refused
        return saved["settings"]["family"]["options"]

    assert options() == {"ways": 3, "shots": 1, "width": 4, "meta_split": "test"}  # as the model was chosen
    assert options("--set", "shots=5")["shots"] == 5
    assert options("--family", "clusters", "--set", "shots=3", "--set", "meta_split=valid") == {
        "ways": 3, "shots": 3, "width": 4, "meta_split": "valid",
    }  # fmt: skip


def test_a_run_is_adapted_by_the_solver_that_it_was_trained_with(
    clusters: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solver = HessianFree(2)
    run = train(
        tmp_path, "newton", rule=Choice("maml", {"lr": 0.1}), num_meta_steps=2,
        inner_objective=Choice("proximal", {"strength": 0.5, "learn": True}),
        estimator=Implicit(2, inner=solver, tolerance=math.inf),
    )  # fmt: skip
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["evaluate", str(run), "--few-shot", "--steps", "2", "--tasks", "9", *out]) == 0
    assert f"by {solver}" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "few_shot.json").read_text("utf-8"))
    assert saved["settings"]["inner"] == {"newton": str(solver)}
    rule, objective, theta, _ = load_checkpoint(run)
    assert "strength" in theta
    family = Clusters(shots=2, meta_split="test")
    by = {
        inner: adapt(rule, theta, family, 2, 9, inner=inner, inner_objective=objective).values[LOSS][-1]
        for inner in (None, solver)
    }
    assert saved["methods"]["newton"]["measures"][LOSS][-1]["mean"] == pytest.approx(float(by[solver].mean()))
    assert float((by[solver] - by[None]).abs().max()) > 1e-3
    found = {"type": "HessianFree", "num_cg_iterations": 3}
    both = {"type": "Combined", "back_propagated": {"type": "Implicit", "inner": found}}
    assert recorded_solver({"estimator": both}) == HessianFree(3)
    assert recorded_solver({}) is None and recorded_solver({"estimator": "mine"}) is None
    assert "num_steps=0 is not a count" in refusal(
        capsys, str(run), "--few-shot", "--steps", "0", "--out", str(tmp_path / "none")
    )
    with pytest.raises(ValueError, match="cannot be made again from the record"):
        recorded_solver({"estimator": {"type": "Implicit", "inner": "<function solve>"}})
    with pytest.raises(ValueError, match="cannot be made again from the record"):
        recorded_solver({"estimator": {"inner": {"type": "HessianFree", "num_lines": 3}}})


def test_bad_input_ends_in_one_line(clusters: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(train(tmp_path)), ["--out", str(tmp_path / "out")]
    told = refusal(capsys, run, "--few-shot", "--family", "clusters", "--set", "width=5", *out)
    assert "maml does not fit" in told and "(3, 4)" in told and "(3, 5)" in told
    assert "meta-trained on clusters with {'shots': 2}" in told
    assert "named twice" in refusal(capsys, run, run, "--few-shot", *out)
    assert "--tune-for has no effect" in refusal(capsys, run, "--few-shot", "--tune-for", "last_ten", *out)
    assert "num_tasks=1 is not a count" in refusal(capsys, run, "--few-shot", "--tasks", "1", *out)
    assert "num_steps=-2 is not a count" in refusal(capsys, run, "--few-shot", "--steps", "-2", *out)
    rule = optimizers.make("sgd", lr=0.1)
    plain = learnedopt.save(tmp_path / "plain", rule, rule.init_theta(torch.Generator()))
    assert "has no record of a family; name one with --family" in refusal(capsys, str(plain), "--few-shot", *out)
    assert not (tmp_path / "out").exists()


# Recipes


def test_validation_may_take_other_options_than_training(clusters: None, tmp_path: Path) -> None:
    target = BootstrappedTarget(num_target_steps=3, step_size=0.5, split="train")
    run = train(
        tmp_path, "reptile", {"shots": 1}, rule=Choice("maml", {"lr": 0.5}), estimator=Unrolled(0), objective=target
    )
    theta = learnedopt.load(run)[1]
    metadata = json.loads((run / "theta.json").read_text("utf-8"))["metadata"]
    family = Clusters(shots=1, meta_split="valid")
    recipe = Recipe(
        "reptile", Choice("clusters", {"shots": 2}), Choice("maml", {"lr": 0.5}), Unrolled(0), target, 20,
        validation=HeldOut(ErrorRate(), 1, 30, every=10, family_options={"shots": 1}),
    )  # fmt: skip
    _, validation = build(recipe)
    assert validation.loop.family == family
    assert validation.measure(theta) == pytest.approx(metadata["best_validation"], abs=1e-15)


def test_reptile_moves_towards_where_the_tasks_went() -> None:
    """``theta += eps (x_K - theta)``, the mean over tasks, is a step against the estimate (Nichol et al. 2018)."""
    family = Clusters(shots=4)
    generator = torch.Generator().manual_seed(1)
    template = {"weight": torch.randn(3, 4, generator=generator, dtype=FLOAT)}
    rule = optimizers.make("maml", template=template, lr=0.3)
    loop = InnerLoop(family, rule)
    theta = rule.init_theta(generator)
    carry = loop.start(family.sample(5, generator))
    found = Unrolled(0).estimate(loop, theta, BootstrappedTarget(6, 0.3, split="train"), carry)
    ends = loop.run(theta, carry, 6, Tape.NONE).end.params["weight"]
    (gradient,) = found.grads.values()
    torch.testing.assert_close(-gradient, ends.mean(0) - template["weight"], rtol=1e-12, atol=1e-14)


# The scripts behind the published numbers


def test_results_are_of_the_runs_that_are_there(
    clusters: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results_few_shot, "NUM_TASKS", 20)
    monkeypatch.setattr(results_few_shot, "FIGURE", tmp_path / "figure.png")
    train(tmp_path, "maml-omniglot", {"shots": 1}, family=Choice("clusters", {"shots": 2, "width": 5}))
    monkeypatch.setattr("sys.argv", ["results_few_shot.py", "--runs", str(tmp_path)])
    results_few_shot.main()
    said = capsys.readouterr().out
    assert said.count("| not run") == len(results_few_shot.RECIPES) - 1
    family = Clusters(shots=1, width=5, meta_split="test")
    values = adapt(*learnedopt.load(tmp_path / "maml-omniglot"), family, 3, 20).values[ACCURACY]
    assert f"| 5       | 20         | 3     | {show(ACCURACY, summarise(values[-1]))}" in said
    assert (tmp_path / "figure.png").exists()


def test_sine_results_are_of_the_pairs_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results_sine, "NUM_TASKS", 20)
    monkeypatch.setattr("sys.argv", ["results_sine.py", "--runs", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        results_sine.main()
    assert stop.value.code == 2 and "no pair of maml-sine and meta-sgd-sine" in capsys.readouterr().err

    family = tasks.make("sine", hidden=(4,))
    template = {k: p[0] for k, p in family.init_params(family.sample(1, torch.Generator())).items()}
    names = ["maml-sine", "meta-sgd-sine", "maml-sine-seed1", "meta-sgd-sine-seed1", "maml-sine-5"]
    for i, name in enumerate(names):
        rule = optimizers.make("maml" if name.startswith("maml") else "meta-sgd", template=template)
        record = {"family": {"name": "sine", "options": {"shots": 10, "hidden": [4]}}, "seed": i // 2, "num_tasks": 4}
        theta = rule.init_theta(torch.Generator().manual_seed(i))
        learnedopt.save(tmp_path / name / "theta.safetensors", rule, theta, record)
    results_sine.main()
    said = capsys.readouterr().out
    assert said.count("MAML, seed 1, trained with 10 shots, 4 tasks") == 1 and "seed 2" not in said
    values = adapt(*learnedopt.load(tmp_path / "maml-sine"), family, 1, 20).values[LOSS][1]
    assert f"{summarise(values).mean:.3f} ± {summarise(values).high - summarise(values).mean:.3f}" in said
    assert "mean over 2 seeds (maml-sine, maml-sine-seed1)" in said
    record["family"]["options"]["shots"] = 5
    learnedopt.save(tmp_path / "meta-sgd-sine-5" / "theta.safetensors", rule, theta, {**record, "num_tasks": 25})
    results_sine.main()
    said = capsys.readouterr().out
    assert "end in '-5' were trained differently: they are no pair" in said and "mean over 2 seeds" in said
