"""The benchmarks: what competes computes the same, and what does not is found out."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

import learnedopt
from benchmarks import bench, report, scaling, suite
from benchmarks import results_plug_in as plug_in
from benchmarks.suite import Competitor, Size, difference

# The peers import what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SMALL = {
    "maml-mlp": Size(steps=2, tasks=2),
    "imaml-mlp": Size(steps=2, tasks=2),
    "lstm-mlp": Size(steps=3),
    "lstm-quadratics": Size(steps=3, tasks=2),
    "lstm-step": Size(units=100),
    "normalised-step": Size(units=100),
    "adam-1000": Size(steps=4),
    "pes-small-mlp": Size(steps=2, units=4),
}


@pytest.mark.parametrize("name", SMALL)
def test_competitors_compute_the_same(name: str) -> None:
    found = bench.check(bench.WORKLOADS[name], SMALL[name])
    numbers = {k: d for k, d in found.items() if isinstance(d, float)}
    assert len(numbers) >= 2 and all(d <= bench.AGREE for d in numbers.values()), found


def test_a_wrong_gradient_and_an_absent_package_are_said() -> None:
    workload = bench.WORKLOADS["lstm-quadratics"]
    right = workload.competitors["learnedopt"]

    def wrong(size: Size) -> suite.Call:
        return lambda: [1.01 * x for x in right.build(size)()]

    others = {"wrong": Competitor(wrong), "absent": Competitor(wrong, needs="no_such_package")}
    changed = dataclasses.replace(workload, competitors={**workload.competitors, **others})
    found = bench.check(changed, SMALL["lstm-quadratics"])
    assert found["wrong"] == pytest.approx(0.01, rel=1e-6) and found["absent"] == "not installed"


def test_of_some_packages_only_the_module_that_is_needed_runs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavy_peer" / "part").mkdir(parents=True)
    for folder in ("heavy_peer", "heavy_peer/part"):
        (tmp_path / folder / "__init__.py").write_text("raise ImportError('data sets')", encoding="utf-8")
    (tmp_path / "heavy_peer" / "part" / "light.py").write_text("value = 3", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    competitor = Competitor(lambda size: list, needs="heavy_peer.part.light")
    assert suite.absent(competitor) == "does not import: data sets"
    monkeypatch.setattr(suite, "BARE", ("heavy_peer", "no_such_package"))
    with monkeypatch.context() as entered:  # what is entered here is to be gone afterwards
        entered.setattr("sys.modules", dict(sys.modules))
        assert suite.peer("heavy_peer.part.light").value == 3 and suite.absent(competitor) is None
    assert suite.absent(dataclasses.replace(competitor, needs="no_such_package.light")) == "not installed"


def test_the_difference_sees_small_tensors_and_forgives_round_off() -> None:
    large, small, noise = torch.full((3,), 1e3), torch.tensor([1.0]), torch.tensor([1e-13])
    expected = [large, small, noise]
    assert difference([large, 1.5 * small, noise], expected) == pytest.approx(0.5)
    assert difference([large, small, -noise], expected) < 1e-6
    with pytest.raises(ValueError, match="cannot be compared"):
        difference([large, small], expected)


def test_ratios_are_taken_turn_by_turn() -> None:
    workload = bench.WORKLOADS["lstm-mlp"]
    times = {"learnedopt": [1.0, 10.0, 2.0], "higher": [3.0, 30.0, 4.0]}
    measured = {
        k: report.Measured(cpu_ms=x, wall_ms=x, peak=peak, first_s=[0.1], difference=1e-15)
        for (k, x), peak in zip(times.items(), (2e6, 8e6), strict=True)
    }
    excluded = {"nn.LSTMCell loop": "not installed"}
    workload = dataclasses.replace(workload, per=(4, "inner step"))
    text = report.section(report.Results(workload, measured, excluded, None, 1.0))
    assert "| learnedopt | 2 | 2 | 2 | 1e-15 | 3.00 × speed, 0.25 × memory |" in text
    assert "| nn.LSTMCell loop | not installed |" in text
    assert "CPU µs per inner step: learnedopt 500, higher 1,000." in text


def test_the_page_keeps_its_other_part(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    report.write_part("scaling", "# Scaling")
    report.write_part("benchmarks", "# Benchmarks")
    report.write_part("benchmarks", "# Benchmarks again")
    text = report.PAGE.read_text("utf-8")
    assert [line for line in text.splitlines() if line.startswith("#")] == ["# Benchmarks again", "# Scaling"]


def test_exponents_are_slopes_of_the_last_points() -> None:
    sizes = [1.0, 10.0, 100.0, 1e3, 1e4]
    assert scaling.exponent(sizes, [50.0, *(3 * x**1.5 for x in sizes[1:])]) == pytest.approx(1.5)


def test_the_cells_beside_the_plug_in_are_the_packaged_lstm() -> None:
    ours, cells = (plug_in.matrix(400) for _ in range(2))
    start = ours.detach().clone()
    for param, label in ((ours, "lstm-mnist"), (cells, plug_in.CELL)):
        optimizer = plug_in.competitors()[label](param)
        for _ in range(3):
            optimizer.step()
    torch.testing.assert_close(cells, ours, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours, start, atol=1e-3)


def test_memory_that_optimizers_keep_is_what_their_cards_say() -> None:
    for label in plug_in.competitors():
        kept, _ = plug_in.memory(label, 10_000)
        floats = 80 if label == plug_in.CELL else 4 if label == plug_in.BARE else 2
        if label in learnedopt.packaged():
            size = learnedopt.card(label).state_bytes
            assert size is not None
            floats = size / 4
        assert kept * plug_in.MB / 4e4 == pytest.approx(floats, rel=0.01)


def test_goals_of_the_plug_in_that_are_missed() -> None:
    times = {plug_in.ADAM: 2.0, plug_in.CELL: 1000.0, "lstm-mnist": 99.0, "normalised": 15.0}
    points = {label: plug_in.Point(ms, 1.0, 1.0) for label, ms in {**times, "normalised-mlp-mnist": 18.0}.items()}
    assert plug_in.missed(points) == ["normalised-mlp-mnist: 9, goal 8"]
    assert "| lstm-mnist | 99 | 49.5 | 1 | 1 |" in plug_in.table(1_000_000, points)
