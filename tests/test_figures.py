"""Figures that are read rightly: what is on which axis, averages over whole episodes, marks, ticks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from learnedopt.config import as_config
from learnedopt.core.estimator import GradientEstimator
from learnedopt.estimators.evolution import EvolutionStrategies
from learnedopt.estimators.task_by_task import TaskByTask
from learnedopt.estimators.unrolled import Truncated, Unrolled
from learnedopt.evaluation import adaptation_plot, plots, style, training_plot
from learnedopt.evaluation.comparison import interval_of_means, summarise
from learnedopt.recipes import one_run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return the figures that are written from here on."""
    found: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        found.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def windowed_rows(num_rows: int) -> list[dict[str, Any]]:
    """Return meta-steps of five windows an episode, as of a loss that falls within it and not over the training."""
    rows: list[dict[str, Any]] = [
        {"step": i + 1, "meta_loss": (50.0, 20.0, 5.0, 3.0, 2.0)[i % 5]} for i in range(num_rows)
    ]
    return [{"step": 0, "validation": 90.0}, *rows[:-1], {**rows[-1], "validation": 80.0}]


def test_windows_and_whole_episodes_are_never_on_one_axis(tmp_path: Path, drawn: list[Figure]) -> None:
    training_plot.plot_training(tmp_path / "training.png", windowed_rows(700), windows=5, title="<A run>")
    above, below = drawn[0].axes
    assert above.get_ylabel() == "validation loss,\nwhole episodes"
    assert below.get_ylabel() == "meta-loss,\nwindows, 5 an episode"
    assert [np.asarray(line.get_ydata()).tolist() for line in above.lines] == [[90.0, 80.0]]
    assert np.asarray(below.lines[0].get_ydata()).max() == 50


@pytest.mark.parametrize("num_rows", [700, 23, 4])
def test_the_mean_is_over_whole_episodes(num_rows: int) -> None:
    steps, losses = training_plot.points(windowed_rows(num_rows), "meta_loss")
    _, means = training_plot.running_mean(steps, losses, 5)
    if num_rows > 5:
        assert means == pytest.approx([16.0] * len(means))  # of whole episodes all are the same
        assert max(training_plot.running_mean(steps, losses, 4)[1]) > 17  # and not over parts of them
    assert len(means) == len(training_plot.running_mean(steps, losses, 5)[0]) <= 500


def test_means_pass_over_what_is_not_finite() -> None:
    _, means = training_plot.running_mean([1.0, 2.0, 3.0, 4.0], [1.0, math.nan, 3.0, math.inf], 2)
    assert means == [1.0, 3.0, 3.0]
    assert math.isnan(training_plot.running_mean([1.0], [math.inf], 1)[1][0])


@pytest.mark.parametrize(
    ("estimator", "windows"),
    [
        (Truncated(20, horizon=100), 5),
        (Truncated(20), None),
        (Unrolled(7), 1),
        (EvolutionStrategies(10, 2, 0.1), 1),
        (EvolutionStrategies(10, 2, 0.1, horizon=30), 3),
        (TaskByTask(Unrolled(5), horizons=((5, 0.5), (10, 0.5))), 1),
    ],
    ids=["truncated", "endless", "whole", "es", "windowed-es", "task-by-task"],
)
def test_windows_an_episode_are_told_by_the_estimator(estimator: GradientEstimator, windows: int | None) -> None:
    assert training_plot.windows_of(as_config(estimator)) == windows


def test_trainings_of_one_step_and_diverged_ones_are_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    for rows in (windowed_rows(1), [{"step": 1, "meta_loss": 2.0}], [{"step": 1, "validation": 2.0}], windowed_rows(3)):
        path = training_plot.plot_training(tmp_path / "training.png", rows)
        assert np.asarray(Image.open(path).convert("RGB")).std() > 0
        ticks = [tick for axes in drawn[-1].axes for tick in axes.get_xticks()]
        assert ticks and all(tick == round(tick) for tick in ticks)
    rows = [{"step": 0, "validation": 2.0}, {"step": 1, "meta_loss": "NaN"}]
    with pytest.raises(ValueError, match="nothing to draw"):
        training_plot.plot_training(tmp_path / "none.png", [])
    assert training_plot.plot_training(tmp_path / "diverged.png", rows).exists()


def test_a_diverged_curve_ends_with_a_cross_and_flattens_no_other(tmp_path: Path, drawn: list[Figure]) -> None:
    curves = {
        "mine": [3.0, 1.0, 0.5, 0.4], "SGD": [3.0, 9.0, 1e4, 1e10], "back": [3.0, 1e4, 2.0, 1.0],
        "gone": [3.0, 2.0, math.nan, math.inf],
    }  # fmt: skip
    plots.plot_curves(tmp_path / "curves.png", curves, emphasis=["mine"])
    axes = drawn[0].axes[0]
    assert axes.get_ylim()[1] < 30
    crosses = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "x"]  # type: ignore[union-attr]
    assert crosses == [[[1.0, 9.0]], [[1.0, 2.0]]]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "mine", "SGD (off the scale: ×)", "back", "gone (diverged: ×)",
    ]  # fmt: skip


def test_bands_are_named_in_the_legend_and_not_drawn_of_what_diverges(tmp_path: Path, drawn: list[Figure]) -> None:
    curves = {"mine": [3.0, 1.0, 0.5], "SGD": [3.0, 9.0, 1e4]}
    bands = {label: ([0.5 * v for v in values], [2.0 * v for v in values]) for label, values in curves.items()}
    plots.plot_curves(tmp_path / "curves.png", curves, bands=bands, shaded="lowest to highest seed")
    (axes,) = drawn[0].axes
    legend = axes.get_legend()
    assert legend is not None and legend.get_texts()[-1].get_text() == "lowest to highest seed"
    assert len(axes.collections) == 1  # the other's mean says nothing, nor does its interval
    lines = {label: ([1, 2, 3], values) for label, values in curves.items()}
    plots.plot_panels(tmp_path / "panels.png", {"loss": lines}, "step", bands={"loss": {"mine": bands["mine"]}})
    assert drawn[1].legends[0].get_texts()[-1].get_text() == "95 % interval"


def test_no_two_lines_are_told_apart_by_colour_alone(tmp_path: Path, drawn: list[Figure]) -> None:
    count = len(style.COLOURS)
    assert len({style.look(i)["dashes"] for i in range(count)}) == count
    plots.plot_curves(tmp_path / "curves.png", {str(i): [i + 1.0] * 5 for i in range(count)})
    assert len({line.get_marker() for line in drawn[0].axes[0].lines}) == count
    plots.plot_curves(tmp_path / "long.png", {"a": [1.0] * 100})
    assert drawn[1].axes[0].lines[0].get_marker() == "None"


def test_several_lines_in_front_differ_and_a_long_title_stays_inside(tmp_path: Path, drawn: list[Figure]) -> None:
    curves = {str(i): [i + 1.0] * 5 for i in range(8)}
    plots.plot_curves(tmp_path / "curves.png", curves, emphasis=[*"012"], title="a long title of many words " * 4)
    (figure,) = drawn
    lines = figure.axes[0].lines
    assert [line.get_linewidth() for line in lines] == [2.8] * 3 + [1.6] * 5
    assert len({line.get_color() for line in lines[:3]}) == len({line.get_marker() for line in lines[:3]}) == 3
    assert len({style.look(i, True)["dashes"] for i in range(len(style.STRONG))}) == len(style.STRONG)
    (title,) = [text.get_window_extent() for text in figure.texts if text.get_text()]
    assert title.x0 >= 0 and title.x1 <= figure.bbox.x1 and title.y1 <= figure.bbox.y1


def test_the_course_of_one_run_is_seen_at_both_ends() -> None:
    steps, means = one_run.recent([[float(t) for t in range(1, 1001)]] * 2)
    assert steps[0] == 1 and steps[-1] == 1000 and means[0] == 1
    assert means[-1] == pytest.approx(sum(range(901, 1001)) / 100)
    assert steps == sorted({*steps}) and sum(step <= 100 for step in steps) > 30


def test_all_figures_and_weights_stay_below_a_megabyte() -> None:
    root = Path(__file__).parents[1]
    files = [*root.glob("docs/figures/*"), *root.glob("learnedopt/pretrained/*.safetensors")]
    assert len(files) > 20
    assert sum(path.stat().st_size for path in files) < 1e6


def test_few_shot_curves_are_zoomed_where_the_first_step_does_most(tmp_path: Path, drawn: list[Figure]) -> None:
    def points(values: list[float]) -> list[tuple[float, float, float]]:
        return [(v, v - 0.01, v + 0.01) for v in values]

    curves = {"short": ([0, 1, 2], points([0.2, 0.94, 0.95])), "long": ([*range(51)], points([0.2] + [0.93] * 50))}
    adaptation_plot.plot_adaptation(tmp_path / "zoomed.png", curves, ylabel="accuracy")
    whole, later = drawn[0].axes
    assert whole.get_ylim()[0] < 0.2 and later.get_ylim()[0] > 0.9 and later.get_xscale() == "log"
    slow = {"slow": ([0, 1, 2, 3], points([0.2, 0.4, 0.6, 0.9]))}
    adaptation_plot.plot_adaptation(tmp_path / "plain.png", slow, ylabel="accuracy")
    assert len(drawn[1].axes) == 1


@pytest.mark.parametrize(
    ("low", "high"), [(0.31, 0.36), (0.9, 2.4), (6.8, 31.0), (0.03, 1.5), (1.0, 900.0), (1e-6, 1e3)]
)
def test_every_logarithmic_axis_has_ticks(tmp_path: Path, drawn: list[Figure], low: float, high: float) -> None:
    plots.plot_lines(tmp_path / "lines.png", {"a": ([1, 2], [low, high])}, "x", "y", logy=True)
    axes = drawn[0].axes[0]
    bottom, top = axes.get_ylim()
    shown = [
        text.get_text()
        for tick, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        if bottom <= tick <= top
    ]
    assert len(shown) >= 3
    assert any("10^" in text for text in shown) is (low < 1e-3)  # plain numbers where they are short


def test_intervals_of_means_are_those_of_the_table() -> None:
    values = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = interval_of_means(values)
    for row, a, b in zip(values, low, high, strict=True):
        summary = summarise(row)
        assert (summary.low, summary.high) == pytest.approx((float(a), float(b)), rel=1e-12)
