"""Comparisons with tuned baselines: against brute force by ``torch.optim``, and every number again by numpy."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from learnedopt import Execution, TaskFamily, optimizers
from learnedopt.evaluation.comparison import MEASURES, Comparison, Outcome, summarise
from learnedopt.evaluation.evaluate import BASELINES, Baseline, TuningWarning, compare, hand_designed, measure, tune
from learnedopt.evaluation.plots import plot_curves, plot_lines, plot_panels

pytestmark = pytest.mark.usefixtures("float64")

TORCH = {
    "SGD": lambda x, lr: torch.optim.SGD([x], lr),
    "momentum": lambda x, lr: torch.optim.SGD([x], lr, momentum=0.9),
    "Nesterov": lambda x, lr: torch.optim.SGD([x], lr, momentum=0.9, nesterov=True),
    "RMSprop": lambda x, lr: torch.optim.RMSprop([x], lr),
    "Adam": lambda x, lr: torch.optim.Adam([x], lr),
}
SGD_ALONE = {"SGD": BASELINES["SGD"]}
EMPHASIS = (0xD5, 0x5E, 0x00)


class Bowls(TaskFamily):
    """Quadratics whose train loss changes with the step and differs from the valid loss; keeps what it sampled."""

    def __init__(self) -> None:
        self.sampled: list[dict[str, Tensor]] = []
        self.num_batches = 0

    def sample(self, num_tasks: int, generator: torch.Generator) -> dict[str, Tensor]:
        matrix = torch.randn(num_tasks, 4, 4, generator=generator)
        self.sampled.append({"W": matrix, "y": torch.randn(num_tasks, 4, generator=generator)})
        return self.sampled[-1]

    def init_params(self, tasks: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": torch.ones_like(tasks["y"])}

    def batch(self, tasks: dict[str, Tensor], step: int, split: str) -> dict[str, Tensor]:
        self.num_batches += 1
        return {"W": tasks["W"], "y": tasks["y"] + (0.1 * math.sin(step) if split == "train" else 0.3)}

    def loss(self, params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return (batch["W"] @ params["x"] - batch["y"]).square().sum()


def by_torch(name: str, lr: float, family: Bowls, tasks: dict[str, Tensor], num_steps: int) -> dict[str, np.ndarray]:
    """Train each task by ``torch.optim``; return measures (num_tasks,) and train losses (num_steps, num_tasks)."""
    losses, finals = [], []
    for i in range(len(tasks["y"])):
        task = {k: v[i] for k, v in tasks.items()}
        x = torch.ones(4, requires_grad=True)
        optimizer, seen = TORCH[name](x, lr), []
        for step in range(num_steps):
            optimizer.zero_grad()
            loss = family.loss({"x": x}, family.batch(task, step, "train"))
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses.append(seen)
        finals.append(family.loss({"x": x}, family.batch(task, num_steps, "valid")).item())
    seen = np.array(losses).T
    measures = {"final_loss": np.array(finals), "sum_of_losses": seen.sum(0), "last_ten": seen[-10:].mean(0)}
    return {k: np.where(np.isfinite(v), v, np.inf) for k, v in measures.items()} | {"losses": seen}


def small_comparison(**options: Any) -> Comparison:
    """Compare two hand-set optimizers with two tuned ones on few steps."""
    learned = optimizers.make("adam", lr=0.3)
    given = {
        "one": (optimizers.make("sgd", lr=0.02, learn=()), {}),
        "two": (learned, learned.init_theta(torch.Generator())),
    }
    baselines = {name: BASELINES[name] for name in ("SGD", "Adam")}
    settings: dict[str, Any] = {"num_steps": 15, "num_tasks": 9, "num_tuning_tasks": 4, "baselines": baselines}
    return compare(given, Bowls(), **(settings | options))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("by", ["final_loss", "last_ten"])
def test_tuned_baseline_equals_brute_force_by_torch(name: str, by: Any) -> None:
    family, tuning_family = Bowls(), Bowls()
    comparison = compare(
        {}, family, tuning_family=tuning_family, num_steps=14, num_tasks=3, num_tuning_tasks=4,
        baselines={name: BASELINES[name]}, tune_for=by,
    )  # fmt: skip
    outcome = comparison.outcomes[name]
    assert outcome.tuning is not None
    assert set(BASELINES[name].rates) < set(outcome.tuning.scores)
    (others,), (fresh,) = tuning_family.sampled, family.sampled
    scores = {rate: by_torch(name, rate, family, others, 14)[by].mean() for rate in outcome.tuning.scores}
    for rate, score in scores.items():
        assert outcome.tuning.scores[rate] == pytest.approx(score, rel=1e-10), rate
    assert outcome.tuning.rate == min(scores, key=scores.__getitem__)
    expected = by_torch(name, outcome.tuning.rate, family, fresh, 14)
    for measured in MEASURES:
        np.testing.assert_allclose(outcome.values[measured].numpy(), expected[measured], rtol=1e-10)
    np.testing.assert_allclose(outcome.curve.numpy(), expected["losses"].mean(1), rtol=1e-10)


def test_every_grid_has_at_least_13_values_and_is_logarithmic() -> None:
    for baseline in BASELINES.values():
        assert len(baseline.rates) >= 13
        np.testing.assert_allclose(np.diff(np.log10(baseline.rates)), 0.5, rtol=1e-12)


def test_tuning_tasks_are_other_tasks_and_the_seed_chooses_both() -> None:
    drawn = []
    for seed in (0, 1):
        family = Bowls()  # for both purposes
        compare({}, family, num_steps=1, num_tasks=8, num_tuning_tasks=8, seed=seed, baselines=SGD_ALONE)
        drawn += [sampled["y"] for sampled in family.sampled]
    every = torch.cat(drawn)
    assert every.shape == (32, 4)
    assert len(every.unique(dim=0)) == 32
    again = Bowls()
    compare({}, again, num_steps=1, num_tasks=8, num_tuning_tasks=8, seed=1, baselines=SGD_ALONE)
    assert torch.equal(torch.cat([sampled["y"] for sampled in again.sampled]), every[16:])


def test_number_of_tuning_tasks_follows_the_size_of_a_task() -> None:
    small = compare({}, Bowls(), num_steps=1, num_tasks=20, baselines=SGD_ALONE)
    alone = compare({}, Bowls(), num_steps=1, num_tasks=20, baselines=SGD_ALONE, execution=Execution(chunk_size=1))
    assert (small.settings["num_tuning_tasks"], alone.settings["num_tuning_tasks"]) == (20, 8)


def test_execution_changes_no_number() -> None:
    one, together = (small_comparison(execution=Execution(chunk_size=n)) for n in (1, 5))
    for label, outcome in one.outcomes.items():
        for name in MEASURES:
            torch.testing.assert_close(together.outcomes[label].values[name], outcome.values[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("n", "quantile"), [(4, 3.182446), (8, 2.364624), (30, 2.045230), (100, 1.984217), (2000, 1.961152)]
)
def test_summary_against_numpy_and_a_table_of_students_t(n: int, quantile: float) -> None:
    values = np.random.default_rng(n).lognormal(size=n)
    summary = summarise(torch.tensor(values))
    assert summary.mean == pytest.approx(values.mean(), rel=1e-12)
    assert summary.median == pytest.approx(np.median(values), rel=1e-12)
    half = quantile * values.std(ddof=1) / math.sqrt(n)
    assert summary.mean - summary.low == pytest.approx(half, rel=2e-3 if n == 4 else 1e-4)
    assert summary.high - summary.mean == pytest.approx(summary.mean - summary.low, rel=1e-9)


def test_paired_differences_are_to_the_best_baseline_of_each_measure() -> None:
    comparison = small_comparison()
    found = [(d.measure, d.candidate) for d in comparison.differences]
    assert found == [(name, label) for name in MEASURES for label in ("one", "two")]
    assert comparison.candidates == ["one", "two"]
    for difference in comparison.differences:
        values = {label: outcome.values[difference.measure].numpy() for label, outcome in comparison.outcomes.items()}
        assert difference.baseline == min(("SGD", "Adam"), key=lambda label: values[label].mean())
        paired = values[difference.candidate] - values[difference.baseline]
        half = 2.306004 * paired.std(ddof=1) / 3  # Student's t at 8 degrees of freedom
        summary = difference.summary
        assert summary.mean == pytest.approx(paired.mean(), rel=1e-12)
        assert summary.high - summary.mean == pytest.approx(half, rel=1e-4)


def test_saved_table_and_json_hold_the_numbers(tmp_path: Path) -> None:
    comparison = small_comparison()
    paths = comparison.save(tmp_path)
    saved = json.loads(paths["json"].read_text())
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in paths["md"].read_text().splitlines()
        if line.startswith("|")
    ]
    assert "9 fresh tasks" in paths["md"].read_text() and saved["settings"]["num_tuning_tasks"] == 4
    table = {row[0]: row for row in rows[2:6]}
    assert list(table) == ["one", "two", "SGD", "Adam"]
    for label, outcome in comparison.outcomes.items():
        entry = saved["optimizers"][label]
        assert entry["learning_rate"] == (outcome.tuning.rate if outcome.tuning else None)
        assert table[label][1] == (f"{outcome.tuning.rate:.3g}" if outcome.tuning else "")
        np.testing.assert_array_equal(entry["curve"], outcome.curve.numpy())
        for i, name in enumerate(MEASURES):
            values = outcome.values[name].numpy()
            assert entry["measures"][name]["mean"] == pytest.approx(values.mean(), rel=1e-12)
            mean, half = (float(x) for x in table[label][2 + 2 * i].split("±"))
            assert mean == pytest.approx(values.mean(), rel=1e-3)
            assert half == pytest.approx(2.306004 * values.std(ddof=1) / 3, rel=6e-2)  # shown with two digits
            assert float(table[label][3 + 2 * i]) == pytest.approx(np.median(values), rel=1e-3)
    for row, d in zip(rows[8:], comparison.differences, strict=True):
        assert row[:3] == [d.candidate, d.baseline, d.measure.replace("_", " ")]
        assert float(row[3]) == pytest.approx(d.summary.mean, rel=1e-3)


def test_diverged_runs_count_as_infinite_and_are_reported(tmp_path: Path) -> None:
    wild = {"wild": (optimizers.make("sgd", lr=1e3, learn=()), {})}
    comparison = compare(wild, Bowls(), num_steps=200, num_tasks=3, baselines=SGD_ALONE)
    outcome = comparison.outcomes["wild"]
    assert outcome.num_diverged == 3 and comparison.outcomes["SGD"].num_diverged == 0
    assert all(v.isinf().all() and (v > 0).all() for v in outcome.values.values())
    tuning = comparison.outcomes["SGD"].tuning
    assert tuning is not None and math.isinf(tuning.scores[100.0]) and tuning.rate < 1
    paths = comparison.save(tmp_path)
    saved = json.loads(paths["json"].read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert saved["optimizers"]["wild"]["measures"]["final_loss"]["median"] == "Infinity"
    assert "| wild" in paths["md"].read_text() and "inf" in paths["md"].read_text()


def test_one_diverged_task_leaves_the_median() -> None:
    outcome = Outcome({name: torch.tensor([1.0, 4.0, math.inf, 2.0]) for name in MEASURES}, torch.zeros(0))
    assert outcome.num_diverged == 1
    summary = summarise(outcome.values["final_loss"])
    assert (summary.mean, summary.median) == (math.inf, 3.0) and math.isnan(summary.low)


@pytest.mark.parametrize("best", [3e-7, 2.0, 4.5e5])
def test_tuning_extends_the_grid_and_refines_around_the_winner(best: float) -> None:
    tuning = tune(lambda rate: abs(math.log10(rate / best)), BASELINES["SGD"].rates)
    assert abs(math.log10(tuning.rate / best)) <= 0.0625 + 1e-9  # half of an eighth of a decade
    assert not tuning.at_edge
    assert tuning.rate == min(tuning.scores, key=tuning.scores.__getitem__)


def test_tuning_passes_over_nan() -> None:
    tuning = tune(lambda rate: math.nan if rate > 0.05 else -rate, (0.001, 0.01, 0.1, 1.0))
    assert 0.01 < tuning.rate < 0.05
    assert tuning.scores[0.1] == math.inf


def test_winner_at_the_edge_of_the_extended_grid_is_a_warning() -> None:
    timid = Baseline(hand_designed("sgd").make, (1e-12, 2e-12, 4e-12))
    with pytest.warns(TuningWarning, match=r"timid: the best learning rate 1\.02e-09 is at the edge"):
        comparison = compare({}, Bowls(), num_steps=3, num_tasks=2, baselines={"timid": timid})
    tuning = comparison.outcomes["timid"].tuning
    assert tuning is not None and tuning.at_edge
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tune(lambda rate: abs(rate - 2), (1.0, 2.0, 3.0)).at_edge


def test_baseline_that_always_diverges_is_an_error() -> None:
    explosive = Baseline(hand_designed("sgd").make, (1e30, 1e31))
    with pytest.raises(ValueError, match=r"explosive: every learning rate from 1e\+22 to 1e\+31 diverged"):
        compare({}, Bowls(), num_steps=30, num_tasks=2, baselines={"explosive": explosive})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune_for": "final"}, "tune_for='final' is none of final_loss"),
        ({"num_tasks": 1}, "num_tasks=1 is not a count; pass an integer of at least 2"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_tuning_tasks": 0}, "num_tuning_tasks=0"),
        ({"baselines": {"one": BASELINES["SGD"]}}, r"\['one'\] name both"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_comparison(**options)


def test_theta_of_another_rule_is_refused_before_any_run() -> None:
    family, rule = Bowls(), optimizers.make("sgd", lr=0.1)
    right = rule.init_theta(torch.Generator())
    with pytest.raises(ValueError, match="not one of SGD"):
        compare({"right": (rule, right), "wrong": (rule, {"rate": right["lr"]})}, family, num_steps=50, num_tasks=2)
    assert family.num_batches <= 3  # what the first candidate's check looks at


@pytest.mark.parametrize("rates", [(), (0.1,), (0.1, 0.1), (1.0, 0.1), (0.0, 1.0), (-1.0, 1.0)])
def test_rates_that_are_no_grid_are_refused(rates: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="is no grid"):
        Baseline(hand_designed("sgd").make, rates)


def test_measure_casts_theta_to_the_dtype_of_the_execution() -> None:
    rule = optimizers.make("sgd", lr=0.01)
    family, execution = Bowls(), Execution(dtype=torch.float32)
    tasks = family.sample(2, torch.Generator().manual_seed(3))
    outcome = measure((rule, rule.init_theta(torch.Generator())), family, tasks, 5, execution)
    exact = measure((rule, rule.init_theta(torch.Generator())), family, tasks, 5, Execution())
    assert outcome.curve.dtype == torch.float64
    assert not torch.equal(outcome.curve, exact.curve)
    torch.testing.assert_close(outcome.curve, exact.curve, rtol=1e-4, atol=0)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def share(image: np.ndarray, colour: tuple[int, int, int]) -> float:
    """Return the share of pixels of exactly that colour."""
    return float((image == np.array(colour)).all(-1).mean())


def test_loss_curves_are_drawn_with_the_candidate_in_front(tmp_path: Path) -> None:
    curves = {"mine": [3.0, 1.0, math.inf, 0.1], "other": [3.0, 2.0, 1.5, 1.2]}
    image = pixels(plot_curves(tmp_path / "deep" / "curves.png", curves, emphasis=["mine"], title="Both"))
    assert share(image, EMPHASIS) > 1e-3 and share(image, (0x00, 0x72, 0xB2)) > 1e-3
    assert share(image, (255, 255, 255)) < 0.99
    plain = pixels(plot_curves(tmp_path / "plain.png", curves))
    assert share(plain, EMPHASIS) == 0
    exploding = {**curves, "mine": [3.0, 1.0, 1e250, 0.1]}
    assert np.array_equal(pixels(plot_curves(tmp_path / "exploding.png", exploding)), plain)
    for at, value in (("ends", 1e9), ("gone", math.inf)):  # diverged for good, which is said
        ending = pixels(plot_curves(tmp_path / f"{at}.png", {**curves, "mine": [3.0, 1.0, 0.5, value]}))
        assert not np.array_equal(
            ending, pixels(plot_curves(tmp_path / "cut.png", {**curves, "mine": [3.0, 1.0, 0.5]}))
        )
    banded = plot_curves(
        tmp_path / "banded.png", curves, bands={"other": ([-1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 2.0, 2.0])}
    )
    assert not np.array_equal(pixels(banded), plain)
    linear = pixels(plot_curves(tmp_path / "linear.png", {**curves, "mine": [3.0, 1.0, -1.0, 0.1]}))
    assert not np.array_equal(linear, plain)


def test_lines_are_drawn(tmp_path: Path) -> None:
    lines = plot_lines(
        tmp_path / "lines.png", {"a": ([1, 10, 100], [1e-3, 1e-2, 0.0]), "b": ([1, 10], torch.tensor([2.0, 3.0]))},
        "steps", "error", logx=True, logy=True,
    )  # fmt: skip
    assert share(pixels(lines), (0x00, 0x72, 0xB2)) > 1e-4


def test_nothing_to_draw_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_curves(tmp_path / "none.png", {"a": [math.nan, math.inf], "b": []})
    with pytest.raises(ValueError, match="'a' has 2 x values but 3 y values"):
        plot_lines(tmp_path / "none.png", {"a": ([1, 2], [1, 2, 3])}, "x", "y")
    assert list(tmp_path.iterdir()) == []


def test_panels_share_their_legend_and_none_is_empty(tmp_path: Path) -> None:
    line = ([1, 2, 3], [1.0, 10.0, 100.0])
    path = plot_panels(tmp_path / "two.png", {"loss": {"a": line}, "sum": {"a": line}}, "step", logy=["loss"])
    assert path.stat().st_size > 5000
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_panels(tmp_path / "empty.png", {"loss": {"a": line}, "sum": {"a": ([1], [math.nan])}}, "step")
