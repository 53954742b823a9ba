"""Diagnoses of estimators: numbers against closed forms, the rule that recommends, the command, and bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import FLOAT, Mix, Quadratic
from torch import Tensor

import learnedopt
from learnedopt import (
    Execution,
    FinalLoss,
    FirstOrder,
    ForwardMode,
    InnerLoop,
    MeanLogLoss,
    PersistentES,
    SumOfLosses,
    Tape,
    TaskByTask,
    TaskFamily,
    Tasks,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    cli,
    optimizers,
)
from learnedopt.config import INTERCHANGEABLE
from learnedopt.estimators import perturbations
from learnedopt.estimators.evolution import EvolutionStrategies
from learnedopt.evaluation.diagnose import diagnose, first_sentence
from learnedopt.evaluation.diagnose_numbers import Accuracy, Truth, accuracy_of, truth_of
from learnedopt.evaluation.diagnose_plans import HINTS, Facts, spelled, suggested, windows_of
from learnedopt.evaluation.diagnose_report import Diagnosis, Row, distrust, recommend

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch's own forward mode
]
RATE = 0.3


class Distance(TaskFamily):
    """``(x - c)^2 / 2`` in one dimension from x = 0: after k steps of SGD ``x - c = -(1 - lr)^k c``.

    ``c`` is 1 or -1 with equal chances, or normal.
    """

    def __init__(self, *, alike: bool = True) -> None:
        self.alike = alike

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        c = torch.randn(num_tasks, 1, generator=generator, dtype=FLOAT)
        return {"c": c.sign() if self.alike else c}

    def init_params(self, tasks: Tasks) -> dict[str, Tensor]:
        return {"x": torch.zeros_like(tasks["c"])}

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        return tasks["c"]

    def loss(self, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        return 0.5 * (params["x"] - batch).square().sum()


def of_distance(objective: Any, estimators: Mapping[str, Any] | None, **options: Any) -> Diagnosis:
    family = Distance(alike=options.pop("alike", True))
    loop = InnerLoop(family, optimizers.make("sgd"), Execution(chunk_size=64))
    given: dict[str, Any] = {"horizon": 4, "num_tasks": 3, "num_batches": 4, **options}
    theta = {"lr": torch.tensor(given.pop("rate", RATE), dtype=FLOAT)}
    return diagnose(loop, objective, theta, estimators=estimators, **given)


def found(row: Row) -> Accuracy:
    assert row.accuracy is not None, row.refused
    return row.accuracy


def sum_of_losses(num_steps: int, window: int) -> float:
    """Return the derivative of the sum of losses with respect to the rate, summed over windows that are cut off."""
    keep = 1 - RATE
    starts = [(k - 1) // window * window for k in range(1, num_steps + 1)]
    return -sum((k - s) * keep ** (2 * k - 1) for k, s in zip(range(1, num_steps + 1), starts, strict=True))


def test_the_truth_and_a_truncated_bias_are_those_of_the_closed_form() -> None:
    diagnosis = of_distance(SumOfLosses(), {"whole": Unrolled(4), "cut": Truncated(2, 4, Tape.FULL)})
    scale = float(scale_of_rate())
    assert diagnosis.truth.norm == pytest.approx(abs(sum_of_losses(4, 4)) * scale, rel=1e-12)
    expected = 1 - sum_of_losses(4, 2) / sum_of_losses(4, 4)
    assert 0.2 < expected < 1  # not close to none
    row = diagnosis.row("cut")
    assert row.biased and row.bias == pytest.approx(expected, rel=1e-12) and row.num_windows == 2
    assert found(row).variance == pytest.approx(0, abs=1e-20)  # all tasks are alike
    assert diagnosis.row("whole").bias < 1e-12


def scale_of_rate() -> Tensor:
    loop = InnerLoop(Distance(), optimizers.make("sgd"))
    return loop.theta_scale({"lr": torch.tensor(RATE, dtype=FLOAT)})["lr"]


def test_windows_of_a_mean_are_averaged_and_exact_windows_add_up() -> None:
    own = {"forward, windows": ForwardMode(2, 4), "forward": ForwardMode(4)}
    for objective in (SumOfLosses(), MeanLogLoss()):
        diagnosis = of_distance(objective, own, alike=False)
        for label in own:
            assert diagnosis.row(label).bias < 1e-9
            assert found(diagnosis.row(label)).cosine_of_mean == pytest.approx(1, abs=1e-12)


def test_persistent_es_of_an_episode_is_not_biased_and_truncated_is() -> None:
    # Rates stay where the loss is close to quadratic in them: what is left of smoothing is far below noise.
    estimators = {"pes": PersistentES(2, 4, num_pairs=32, sigma=1e-3), "cut": Truncated(2, 4, Tape.FULL)}
    diagnosis = of_distance(SumOfLosses(), estimators, num_batches=40, num_truth_batches=40)
    pes, cut = diagnosis.row("pes"), diagnosis.row("cut")
    assert not pes.biased and pes.num_windows == 2
    assert abs(found(pes).bias_squared) < 0.1 * found(cut).bias_squared


def test_the_variance_of_evolution_strategies_is_that_of_the_formula() -> None:
    # After one step the loss is quadratic in the rate: a pair gives n^2 f', of variance 2 f'^2 for one entry.
    pairs = 8
    estimators = {"es": EvolutionStrategies(1, pairs, 0.1)}
    diagnosis = of_distance(FinalLoss(), estimators, horizon=1, num_batches=120, num_truth_batches=120)
    row = diagnosis.row("es")
    assert not row.biased
    assert found(row).variance == pytest.approx(2 / pairs, rel=0.3)
    assert found(row).bias_error > 0 and found(row).cosine[0] == pytest.approx(1)  # of one entry: its sign


def test_the_variance_over_tasks_is_that_of_the_formula() -> None:
    # f' = -T (1 - lr)^(2 T - 1) c^2 with c normal: c^2 has mean 1 and variance 2, over the tasks of a batch.
    diagnosis = of_distance(FinalLoss(), {"whole": Unrolled(4)}, alike=False, num_batches=60, num_tasks=5)
    assert found(diagnosis.row("whole")).variance == pytest.approx(2 / 5, rel=0.35)
    assert diagnosis.truth.uncertainty == pytest.approx(math.sqrt(2 / 5 / 240), rel=0.25)
    assert diagnosis.truth.norm == pytest.approx(4 * (1 - RATE) ** 7 * float(scale_of_rate()), rel=0.1)


def test_identical_estimators_have_no_bias_and_the_same_row() -> None:
    loop = InnerLoop(Quadratic(), optimizers.make("adam"), Execution(chunk_size=8))
    same = {"whole": Unrolled(5), "segments": Unrolled(5, segment=2), "by task": TaskByTask(Unrolled(5))}
    diagnosis = diagnose(loop, FinalLoss(), horizon=5, num_tasks=4, num_batches=4, estimators=same)
    first = found(diagnosis.rows[0])
    assert first.variance > 1e-3
    for row in diagnosis.rows:
        assert row.bias < 1e-9 and found(row).cosine_of_mean == pytest.approx(1, abs=1e-12)
        assert found(row).variance == pytest.approx(first.variance, rel=1e-9)
        assert found(row).cosine == pytest.approx(first.cosine)
        assert row.seconds > 0 and row.peak_bytes > 0
    assert diagnosis.row("segments").peak_bytes != diagnosis.row("whole").peak_bytes


def test_of_families_of_several_shapes_only_tasks_by_themselves_are_estimated() -> None:
    loop = InnerLoop(Mix(Quadratic(), Distance()), optimizers.make("sgd", lr=0.1))
    diagnosis = diagnose(loop, FinalLoss(), horizon=2, num_tasks=3, num_batches=3)
    told = [row.label for row in diagnosis.rows if row.refused is None]
    assert told == ["task by task", "task by task, clipped"]
    assert diagnosis.row("task by task").bias < 1e-12
    assert "cannot be run together" in str(diagnosis.row("unrolled").refused)


def test_lengths_are_of_gradients_with_respect_to_theta_over_its_scale() -> None:
    loop = InnerLoop(Quadratic(), optimizers.make("normalised"), Execution(chunk_size=8), horizon=3)
    theta = loop.init_theta(torch.Generator())
    scale = loop.theta_scale(theta)
    assert any((x != 1).any() for x in scale.values())
    lengths = []
    for batch in range(3):
        tasks = loop.family.sample(2, perturbations.generator(5, 1, batch))
        grads = Unrolled(3).estimate(loop, theta, FinalLoss(), loop.start(tasks)).grads
        lengths.append(float(torch.stack([(g * scale[k]).square().sum() for k, g in grads.items()]).sum().sqrt()))
    given: dict[str, Any] = {"num_tasks": 2, "num_batches": 3, "num_truth_batches": 3, "seed": 5}
    truth = diagnose(loop, FinalLoss(), theta, horizon=3, estimators={"whole": Unrolled(3)}, **given).truth
    assert truth.median_length == pytest.approx(sorted(lengths)[1], rel=1e-9)
    assert truth.mean_length == pytest.approx(sum(lengths) / 3, rel=1e-9)


def test_noise_is_not_called_bias() -> None:
    source = torch.Generator().manual_seed(0)
    exact = torch.ones(400, 30, dtype=FLOAT)
    noisy = exact + 3 * torch.randn(400, 30, generator=source, dtype=FLOAT)
    norm = math.sqrt(30)
    pure = accuracy_of(noisy, exact, norm, 1.0)
    assert abs(pure.bias_squared) < 3 * pure.bias_error
    assert pure.variance == pytest.approx(9, rel=0.05) and pure.error == pytest.approx(9, rel=0.05)
    # Shifted by a quarter of the length, and the standard error is that of many repeats.
    many = [accuracy_of(exact[:40] * 1.25 + noisy[i : i + 40] - 1, exact[:40], norm, 0.0) for i in range(0, 400, 40)]
    values = torch.tensor([each.bias_squared for each in many])
    assert values.mean() == pytest.approx(1 / 16, abs=3 * float(values.std()) / math.sqrt(10))
    told = sum(each.bias_error for each in many) / len(many)
    assert float(values.std()) / 2 < told < 2 * float(values.std())


def test_estimates_that_are_not_finite_are_counted_and_not_averaged() -> None:
    class Broken(learnedopt.GradientEstimator):
        calls = 0

        def estimate(self, loop: InnerLoop, theta: Theta, objective: Any, carry: Any) -> learnedopt.Estimate:
            own = Unrolled(4).estimate(loop, theta, objective, carry)
            Broken.calls += 1
            return own._replace(grads={k: g * math.nan for k, g in own.grads.items()}) if Broken.calls == 2 else own

    diagnosis = of_distance(SumOfLosses(), {"broken": Broken(), "whole": Unrolled(4)}, num_batches=5)
    row = diagnosis.row("broken")
    assert row.num_not_finite == 1 and row.bias < 1e-12
    assert diagnosis.recommendation.verdicts["broken"] == "not finite in 1 batches"
    assert diagnosis.recommendation.chosen == "whole"


def test_a_mistake_in_an_estimator_is_not_told_as_its_refusal() -> None:
    class Mistaken(learnedopt.GradientEstimator):
        def estimate(self, loop: InnerLoop, theta: Theta, objective: Any, carry: Any) -> learnedopt.Estimate:
            raise TypeError("'int' object is not iterable")

    with pytest.raises(TypeError, match="is not iterable"):
        of_distance(SumOfLosses(), {"mistaken": Mistaken(), "whole": Unrolled(4)})


def test_every_kind_of_estimator_has_a_hint_and_is_in_the_table() -> None:
    assert {*HINTS} == {*INTERCHANGEABLE[0]}
    tried = suggested(Facts(4, 1, 1.0))
    kinds = {type(each) for each in tried.values()}
    assert kinds == {*HINTS}
    diagnosis = of_distance(SumOfLosses(), None)
    assert [row.label for row in diagnosis.rows] == [*tried]
    text = diagnosis.to_markdown()
    assert all(label in text for label in tried)
    for row in diagnosis.rows:
        assert (row.refused is None) == (row.accuracy is not None)
    refused = {row.label: row.refused for row in diagnosis.rows if row.refused}
    assert all(label.startswith("implicit") for label in refused) and len(refused) == 4
    assert "SumOfLosses reads the losses along the way" in refused["implicit, CG 10"]
    assert json.loads(json.dumps(diagnosis.to_json()))["recommendation"]["chosen"] == diagnosis.recommendation.chosen


def test_windows_of_a_final_loss_are_refused_with_the_reason() -> None:
    row = of_distance(FinalLoss(), {"cut": Truncated(2, 4), "last": TruncatedBackprop(4, 2)}).rows
    assert row[0].refused is not None and "neither the sum nor the mean" in row[0].refused
    last = 1 - sum((1 - RATE) ** 7 for _ in range(2)) / sum((1 - RATE) ** 7 for _ in range(4))
    assert row[1].bias == pytest.approx(last, rel=1e-9)  # two of four equal terms


@pytest.mark.parametrize(("horizon", "windows"), [(100, [50, 20, 5]), (20, [10, 4, 1]), (7, [1]), (1, [])])
def test_windows_divide_the_episode(horizon: int, windows: list[int]) -> None:
    assert Facts(horizon, 1, 1.0).windows == windows
    for tried in suggested(Facts(horizon, 1, 1.0)).values():
        assert isinstance(tried, str) or horizon % windows_of(tried, horizon) == 0


def a_row(label: str, bias: float, variance: float, cost: float = 1.0, megabytes: float = 1.0, **more: Any) -> Row:
    error = bias**2 + variance * cost
    numbers = Accuracy(bias**2, 0.1 * bias**2, variance, error, (error,) * 4, (0.5, 0.4, 0.5, 0.6), 0.5)
    return Row(label, f"{label}()", accuracy=numbers, seconds=cost, peak_bytes=int(megabytes * 1e6), **more)


KNOWN = Truth(1.0, 0.1, 1.1, 1.0, 16, 0, 1.0)


def test_the_rule_takes_the_smallest_error_that_fits() -> None:
    exact, cut = a_row("exact", 0.0, 0.4, megabytes=90), a_row("cut", 0.3, 0.1)
    noisy, huge = a_row("noisy", 0.0, 3.0), a_row("biased", 1.0, 0.01)
    broken = a_row("broken", 0.0, 0.0, num_not_finite=2)
    no = Row("no", "", refused="does not work")
    chosen = recommend([exact, cut, noisy, huge, broken, no], KNOWN)
    assert (chosen.chosen, chosen.runner_up) == ("cut", "exact")
    assert chosen.verdicts["exact"] == "2.11x the error, mostly noise for its time"
    assert "mostly bias" in chosen.verdicts["biased"] and "noise" in chosen.verdicts["noisy"]
    assert chosen.verdicts["broken"] == "not finite in 2 batches" and chosen.verdicts["no"] == "does not work"
    better = a_row("exact", 0.0, 0.05, megabytes=90)
    assert recommend([better, cut], KNOWN).chosen == "exact"
    limited = recommend([better, cut], KNOWN, memory_limit=50_000_000)
    assert limited.chosen == "cut" and "over the limit" in limited.verdicts["exact"]
    assert recommend([broken, no], KNOWN).chosen is None


def test_errors_that_batches_cannot_tell_apart_are_said_to_be() -> None:
    best, other = a_row("best", 0.0, 1.0), a_row("other", 0.0, 1.5)
    assert recommend([best, other], KNOWN).verdicts["other"].startswith("1.5x")
    loose = Row("loose", "", accuracy=found(other)._replace(left_out=(0.5, 1.0, 2.0, 4.0)), seconds=1.0)
    chosen = recommend([best, loose], KNOWN)
    assert chosen.verdicts["loose"] == "not told apart from the one taken" and "cannot tell apart" in chosen.text


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        (KNOWN._replace(num_not_finite=1), "not finite"),
        (KNOWN._replace(uncertainty=1.0), "about 64"),
        (KNOWN._replace(uncertainty=math.inf), "many more"),
        (KNOWN._replace(mean_length=4.0), "chaotic"),
    ],
    ids=["explodes", "noise", "optimum", "heavy"],
)
def test_nothing_is_recommended_where_the_truth_is_not_to_be_trusted(truth: Truth, said: str) -> None:
    chosen = recommend([a_row("exact", 0.0, 0.4)], truth)
    assert chosen.chosen is None and said in chosen.text


def test_where_the_exact_gradient_explodes_all_is_said_and_nothing_chosen(tmp_path: Path) -> None:
    diagnosis = of_distance(FinalLoss(), {"whole": Unrolled(200)}, horizon=200, rate=400.0, num_batches=3)
    assert diagnosis.truth.num_not_finite == 12 and diagnosis.recommendation.chosen is None
    assert diagnosis.rows[0].num_not_finite == 3 and diagnosis.rows[0].accuracy is None
    assert {*diagnosis.save(tmp_path)} == {"json", "md"} and "explodes" in (tmp_path / "diagnosis.md").read_text()


def test_where_the_truth_is_not_known_numbers_are_over_a_batch_s_length(tmp_path: Path) -> None:
    # From a learned start in the middle of the targets: their gradients add up to nothing.
    start = optimizers.make("maml", template={"x": torch.zeros(1, dtype=FLOAT)}, lr=RATE)
    given: dict[str, Any] = {"num_tasks": 1, "num_batches": 4, "estimators": {"whole": Unrolled(2)}}
    diagnosis = diagnose(InnerLoop(Distance(), start), FinalLoss(), horizon=2, **given)
    truth = diagnosis.truth
    assert not truth.known and truth.unit == truth.median_length > 0
    assert "is not known" in diagnosis.to_markdown() and diagnosis.recommendation.chosen is None
    assert truth.unit == pytest.approx((1 - RATE) ** 4)
    assert found(diagnosis.rows[0]).variance > 0.5 and "png" in diagnosis.save(tmp_path)


def test_the_truth_counts_what_is_not_finite_and_sees_heavy_tails() -> None:
    assert distrust(truth_of(torch.ones(6, 2, dtype=FLOAT), 1.0)) is None
    exact = torch.ones(6, 2, dtype=FLOAT)
    exact[3, 1] = math.inf
    truth = truth_of(exact, 1.0)
    assert truth.num_not_finite == 1 and truth.norm == pytest.approx(math.sqrt(2))
    tail = torch.ones(400, 1, dtype=FLOAT)
    tail[:100] = 50.0
    assert "few batches decide" in str(distrust(truth_of(tail, 1.0)))


TINY = ("--set", "family.dim=2", "--set", "rule=sgd", "--set", "rule.lr=0.05", "--tasks", "4", "--batches", "3")


def test_the_command_writes_table_numbers_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["diagnose", "demo", *TINY, "--horizon", "2", "--out", str(tmp_path / "new")]
    assert cli.main([*arguments, "--set", "estimator.num_steps=1", "--set", "estimator.horizon=2"]) == 0
    table = (tmp_path / "new" / "diagnosis.md").read_text("utf-8")
    assert table in capsys.readouterr().out
    saved = json.loads((tmp_path / "new" / "diagnosis.json").read_text("utf-8"))
    assert saved["settings"]["recipe"] == "demo" and saved["settings"]["num_tasks"] == 4
    own = [row for row in saved["rows"] if row["label"] == "the recipe's"]
    assert [row["estimator"] for row in own] == ["Truncated(num_steps=1, horizon=2, tape=Tape.FULL)"]
    assert (tmp_path / "new" / "diagnosis.png").stat().st_size > 5000


def test_the_command_diagnoses_at_a_trained_theta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theta = learnedopt.save(tmp_path / "trained", optimizers.make("sgd"), {"lr": torch.tensor(0.4)})
    lengths = []
    for more in ((), ("--theta", str(theta))):
        out = tmp_path / f"out{len(lengths)}"
        assert cli.main(["diagnose", "demo", *TINY, *SHORT, *more, "--out", str(out)]) == 0
        lengths.append(json.loads((out / "diagnosis.json").read_text("utf-8"))["truth"]["median_length"])
    assert lengths[0] != pytest.approx(lengths[1], rel=0.1)


SHORT = ("--set", "estimator=Unrolled", "--set", "estimator.num_steps=1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("dmo",), "demo"),
        (("demo", "--horizon", "0"), "horizon=0 is not a count"),
        (("demo", "--batches", "1"), "variance"),
        (("demo", "--tasks", "0"), "num_tasks=0"),
        (("demo", "--truth-batches", "2"), "num_truth_batches=2"),
        (("demo", "--budget", "0"), "seconds of compute"),
        (("demo", "--memory-limit", "inf"), "--memory-limit='inf' is not finite"),
        (("demo", "--memory-limit", "0"), "--memory-limit 0.0 is no size"),
        (("demo", "--theta", "tensor-gru-quadratic"), "another rule's"),
        (("demo", "--theta", "nowhere"), "nowhere"),
        (("fmrl-convex",), "several methods"),
    ],
    ids=[
        "recipe",
        "horizon",
        "batches",
        "tasks",
        "truth",
        "budget",
        "memory",
        "no memory",
        "theta",
        "no theta",
        "study",
    ],
)
def test_bad_input_of_the_command_is_answered_in_one_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["diagnose", *arguments, "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and "Traceback" not in err + out


def test_a_diagnosis_without_estimators_or_of_another_theta_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no estimator applies.*episodes of 7 steps"):
        of_distance(SumOfLosses(), {"other": Unrolled(7)})
    with pytest.raises(ValueError, match="no estimator applies"):
        of_distance(SumOfLosses(), {})
    loop = InnerLoop(Distance(), optimizers.make("sgd"))
    with pytest.raises(ValueError, match="memory_limit=0 is not a count"):
        diagnose(loop, FinalLoss(), horizon=2, memory_limit=0)
    with pytest.raises(ValueError, match="momentum"):
        diagnose(loop, FinalLoss(), {"momentum": torch.tensor(0.1)}, horizon=2)


def test_what_is_not_of_this_episode_says_so() -> None:
    with pytest.raises(ValueError, match="episodes of 7 steps"):
        windows_of(Truncated(1, 7), 4)
    with pytest.raises(ValueError, match="draws a horizon"):
        windows_of(TaskByTask(Unrolled(4), ((2, 1.0),)), 4)
    assert windows_of(Truncated(2, None), 4) == 2
    assert spelled(FirstOrder(3)) == "Unrolled(num_steps=3, tape=Tape.FIRST_ORDER)"
    assert first_sentence("no; do. that") == "no" and first_sentence("of 0.1 steps.") == "of 0.1 steps"
