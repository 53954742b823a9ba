"""The suite of nets: runs of many thetas against single ones, grids, files that are gone on with, tables by numpy."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluate import Bowls, pixels, share
from torch import Tensor

from learnedopt import Execution, optimizers
from learnedopt.cli import main
from learnedopt.core import tree
from learnedopt.core.rule import UpdateRule
from learnedopt.core.sealed import read_record
from learnedopt.evaluation import lanes, suite_table
from learnedopt.evaluation.evaluate import Candidate, compare, measure, sample_tasks
from learnedopt.evaluation.grids import FEW, HARD_BASELINES, MAIN_BASELINES, Grid, Point, grid, named, search
from learnedopt.evaluation.nets import GROWTH, SUITES, UNSEEN, Net, chosen, dealt
from learnedopt.evaluation.suite import Protocol, judged, result_path, run_suite
from learnedopt.evaluation.suite_table import Suite, collect, steps_to_reach, thinned
from learnedopt.execution.captured import CapturedStep
from learnedopt.training.tracking import Tracking

pytestmark = pytest.mark.usefixtures("float64")

SMALL = (
    Net("small bowl", "quadratic", {"dim": 3}, 25),
    Net("logistic", "logistic", {"dim": 4}, 22),
)
RATES = (0.003, 0.01, 0.03, 0.1)
GRIDS = {
    "Adam, default": grid("adam", (1e-3,)),
    "Adam": grid("adam", RATES),
    "AdamW + cosine": grid("adamw", RATES, "cosine", {"weight_decay": (0.0, 0.3)}),
}
PROTOCOL = Protocol(num_seeds=3, num_tuning_tasks=6, num_final=2)


def candidate(lr: float = 0.02) -> Candidate:
    rule = optimizers.ScheduleFree(lr=lr, warmup_steps=3)
    return rule, rule.init_theta(torch.Generator())


class Drifting(Bowls):
    """One whose valid loss changes with the step."""

    def batch(self, tasks: dict[str, Tensor], step: int, split: str) -> dict[str, Tensor]:
        return super().batch(tasks, step, "train") if split == "train" else {**tasks, "y": tasks["y"] * math.cos(step)}


# Many thetas at once

MANY: dict[str, tuple[UpdateRule, list[dict[str, float]]]] = {
    "scheduled adamw": (
        optimizers.Scheduled(optimizers.AdamW(learn=("lr", "weight_decay")), "cosine"),
        [{"lr": lr, "weight_decay": wd} for lr in (0.01, 0.1) for wd in (0.0, 0.5)],
    ),
    "schedule-free": (optimizers.ScheduleFree(learn=("lr",), beta1=0.6), [{"lr": lr} for lr in (0.01, 0.1, 0.3)]),
    "momentum": (optimizers.Momentum(), [{"lr": 0.01, "momentum": m} for m in (0.0, 0.9)]),
}


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("name", MANY)
def test_each_theta_trains_as_it_does_alone(name: str, chunk_size: int | None) -> None:
    rule, values = MANY[name]
    family, num_steps = Bowls(), 12
    drawn = family.sample(4, torch.Generator().manual_seed(1))
    thetas = lanes.points(rule, values)
    found = lanes.train(rule, thetas, family, drawn, num_steps, Execution(chunk_size, vet=False))
    assert found.losses.shape == (num_steps, 4, len(values)) and found.final.shape == (4, len(values))
    for i, theta in enumerate(thetas):
        alone = measure((rule, theta), family, drawn, num_steps, Execution())
        torch.testing.assert_close(found.losses[:, :, i].mean(1), alone.curve, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.final[:, i], alone.values["final_loss"], rtol=1e-12, atol=0)
    assert (found.final.std(1) > 0).all()


def test_the_last_loss_is_a_mean_over_held_out_batches_at_what_the_rule_keeps() -> None:
    rule, family = optimizers.ScheduleFree(learn=("lr",), beta1=0.6), Drifting()
    drawn = family.sample(3, torch.Generator().manual_seed(1))
    (theta,) = lanes.points(rule, [{"lr": 0.3}])
    found = lanes.train(rule, [theta], family, drawn, 9, Execution(vet=False), num_final=3)
    for i in range(3):
        own = tree.narrow(drawn, i, i + 1)
        params, state = rule.init(theta, {k: p[0] for k, p in family.init_params(own).items()})
        for step in range(9):
            batch = tree.squeeze(family.batch(own, step, "train"))
            grads, loss = torch.func.grad_and_value(family.loss)(params, batch)
            deltas, state = rule.update(theta, grads, state, params, loss)
            params = {k: p + deltas[k] for k, p in params.items()}
        kept = rule.result(theta, params, state)
        expected = [family.loss(kept, tree.squeeze(family.batch(own, 9 + j, "valid"))) for j in range(3)]
        assert float(found.final[i, 0]) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-12)
        assert float(expected[0]) != pytest.approx(float(expected[1]), rel=1e-6)


def test_what_cannot_be_run_together_is_refused() -> None:
    rule, family = optimizers.SGD(learn=()), Bowls()
    drawn = family.sample(2, torch.Generator())
    with pytest.raises(ValueError, match="SGD: nothing to tell runs apart by"):
        lanes.train(rule, [{}], family, drawn, 3, Execution())
    with pytest.raises(ValueError, match=r"Scheduled has the meta-parameters \['rule/lr'\], got values of \['rate'\]"):
        lanes.points(optimizers.Scheduled(optimizers.SGD()), [{"rate": 0.1}])
    with pytest.raises(ValueError, match="not one of SGD"):
        lanes.train(optimizers.SGD(), [{"rate": torch.tensor(0.1)}], family, drawn, 3, Execution())


def test_batches_are_drawn_once_while_there_is_room() -> None:
    family = Bowls()
    kept = lanes.Remembered(family, torch.device("cpu"))
    drawn = kept.sample(2, torch.Generator().manual_seed(0))
    for _ in range(3):
        for step in (0, 1):
            for split in ("train", "valid"):
                found = kept.batch(drawn, step, split)
                torch.testing.assert_close(found, Bowls().batch(drawn, step, split), rtol=0, atol=0)
    assert family.num_batches == 4
    other = tree.tree_map(lambda x: x + 1, drawn)
    torch.testing.assert_close(kept.batch(other, 0, "train"), Bowls().batch(other, 0, "train"), rtol=0, atol=0)
    kept.__dict__["_room"][0] = 0
    before = family.num_batches
    for _ in range(2):
        kept.batch(drawn, 9, "train")
    assert family.num_batches == before + 2


def test_a_graph_is_refused_off_the_gpu() -> None:
    rule, family = optimizers.SGD(), Bowls()
    with pytest.raises(ValueError, match="only on a GPU"):
        lanes.train(rule, lanes.points(rule, [{"lr": 0.1}]), family, family.sample(2, torch.Generator()), 3,
                    Execution(vet=False), graph=True)  # fmt: skip


class Played:
    """A stand-in for a graph: what was captured is computed again, into the same memory."""

    def __init__(self, captured: CapturedStep, loss: Tensor) -> None:
        self.captured, self.loss = captured, loss

    def replay(self) -> None:
        self.loss.copy_(self.captured._advance())


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_a_captured_step_is_the_step(device: str) -> None:
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss = (params["x"] - batch).square().mean()
        moved = {"x": params["x"] - 0.1 * (params["x"] - batch) + 0.01 * state[0] * state[1]}
        return moved, (state[0] + 1, params["x"], state[2]), loss  # it remembers where it was, and what never changes

    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(5, generator=generator).to(device) for _ in range(7)]
    start = {"x": draw[0]}, (torch.zeros((), device=device), draw[1], draw[2])
    batches = draw[3:]
    if device == "cpu":  # as the constructor makes one, but for the graph
        captured = CapturedStep.__new__(CapturedStep)
        captured.__dict__ |= {
            "_fn": step, "_batch": batches[0].clone(), "_held": tree.tree_map(torch.clone, start),
            "_loss": torch.zeros(()),
        }  # fmt: skip
        captured.__dict__["_graph"] = Played(captured, captured.__dict__["_loss"])
    else:
        captured = CapturedStep(step, *start, batches[0])
    expected, found = start, start
    for batch in batches:
        *moved, loss = step(expected[0], expected[1], batch)
        *taken, own = captured(found[0], found[1], batch)
        torch.testing.assert_close(own, loss)
        expected, found = (moved[0], moved[1]), (taken[0], taken[1])
    torch.testing.assert_close(found, expected)
    assert float(start[1][0]) == 0 and float(found[1][0]) == 4  # what it was called with is left alone


# Grids


def bowl_in_logs(best: dict[int, tuple[float, float]]) -> Any:
    """A score with a best rate and value for each choice, and a record of what it was asked."""
    asked: list[tuple[list[Point], bool]] = []

    def score(points: Sequence[Point], few: bool) -> list[float]:
        asked.append(([*points], few))
        return [best[p.choice][1] + math.log10(p.rate / best[p.choice][0]) ** 2 for p in points]

    return score, asked


@pytest.mark.parametrize("place", [3e-7, 0.02, 40.0])
def test_a_search_brackets_the_best_rate_of_the_best_choice(place: float) -> None:
    score, asked = bowl_in_logs({0: (place * 3, 1.0), 1: (place, 0.4), 2: (0.01, 5.0)})
    at = Grid(lambda n: optimizers.SGD(), RATES, ({}, {"a": 1.0}, {"a": 2.0}))
    found = search(score, at)
    step = math.log10(RATES[1] / RATES[0])
    assert found.best.choice == 1 and not found.at_edge
    assert abs(math.log10(found.best.rate / place)) <= step / 8 + 1e-9
    assert found.best == min(found.scores, key=found.scores.__getitem__)
    assert {point.choice for point in found.scores} == {0, 1}  # the worst is not tried on all tasks
    assert [few for _, few in asked] == sorted((few for _, few in asked), reverse=True) and len(asked[0][0]) == 12


def test_a_search_passes_over_what_is_no_number_and_says_when_nothing_is() -> None:
    at = Grid(lambda n: optimizers.SGD(), RATES)

    def cliff(points: Sequence[Point], few: bool) -> list[float]:
        return [math.nan if p.rate > 0.02 else -p.rate for p in points]

    found = search(cliff, at)
    assert found.screened[Point(0.1, 0)] == math.inf and 0.01 < found.best.rate <= 0.02
    with pytest.raises(ValueError, match=r"every learning rate from 0\.003 to 0\.1 diverged"):
        search(lambda points, few: [math.inf] * len(points), at)
    with pytest.raises(ValueError, match="diverged"):
        search(lambda points, few: [1.0 if few else math.nan] * len(points), at)


@pytest.mark.parametrize("rates", [(), (0.1, 0.1), (1.0, 0.1), (0.0, 1.0)])
def test_rates_that_are_no_grid_are_refused(rates: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="is no grid"):
        Grid(lambda n: optimizers.SGD(), rates)


def test_every_hard_baseline_can_be_made_and_told_its_values() -> None:
    assert {"Adam", "AdamW + cosine", "Muon + cosine"} <= {*MAIN_BASELINES} < {*HARD_BASELINES}
    for label, at in HARD_BASELINES.items():
        rule = at.make(40)
        thetas = lanes.points(rule, [at.values(Point(at.rates[0], c)) for c in range(len(at.choices))])
        assert {*thetas[0]} == {*rule.init_theta(torch.Generator())}
        assert rule.reads_horizon == ("cosine" in label or "linear" in label)
    assert named("main") is MAIN_BASELINES and named("none") == {} and [*named("SGD; Adam")] == ["SGD", "Adam"]
    with pytest.raises(ValueError, match=r"there is no Adan; did you mean 'Adam'. use main, all, none, or some of"):
        named("Adam;Adan")


def test_compare_takes_grids_and_tunes_them_as_measured_one_by_one() -> None:
    family = Bowls()
    found = compare({}, family, num_steps=14, num_tasks=3, num_tuning_tasks=6, baselines={"W": GRIDS["AdamW + cosine"]})
    tuning = found.outcomes["W"].tuning
    assert tuning is not None and not tuning.at_edge and len(tuning.scores) >= 9
    drawn = next(x for x in family.sampled if len(x["y"]) == 6)
    rule = GRIDS["AdamW + cosine"].make(14)
    for rate, score in tuning.scores.items():
        (theta,) = lanes.points(rule, [{"lr": rate, **tuning.others}])
        alone = measure((rule, theta), family, drawn, 14, Execution()).values["final_loss"].mean()
        assert score == pytest.approx(float(alone), rel=1e-10)
    assert tuning.rate == min(tuning.scores, key=tuning.scores.__getitem__)
    assert found.describe()["optimizers"]["W"]["chosen"] == tuning.others


# The runner


def run(folder: Path, candidates: dict[str, Candidate] | None = None, **options: Any) -> list[str]:
    lines: list[str] = []
    candidates = {"mine": candidate()} if candidates is None else candidates
    settings: dict[str, Any] = {"nets": SMALL, "baselines": GRIDS, "protocol": PROTOCOL} | options
    run_suite(candidates, folder=folder, report=lines.append, **settings)
    return lines


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert len(run(folder)) == 8
    finally:
        torch.set_default_dtype(before)
    return folder


def record(folder: Path, net: Net, label: str) -> dict[str, Any]:
    return json.loads(result_path(folder, net, label).read_text())


def test_results_are_those_of_single_runs_on_tasks_of_their_own(done: Path) -> None:
    for net in SMALL:
        family = lanes.Remembered(net.make(), torch.device("cpu"))
        tuning, fresh = (sample_tasks(family, n, f"suite {w}", 0) for n, w in ((6, "tuning"), (3, "fresh")))
        at = record(done, net, "AdamW + cosine")
        rule = GRIDS["AdamW + cosine"].make(net.num_steps)

        def trained(values: dict[str, float], drawn: Any, rule: UpdateRule = rule, net: Net = net) -> Any:
            return judged(
                lanes.train(rule, lanes.points(rule, [values]), net.make(), drawn, net.num_steps, Execution(1),
                            num_final=2)
            )  # fmt: skip

        choices = GRIDS["AdamW + cosine"].choices
        for rate, choice, score in at["tried"]:
            alone = trained({"lr": rate, **choices[choice]}, tuning)["last_twenty"].mean()
            assert score == pytest.approx(float(alone), rel=1e-9)
        for rate, choice, score in at["screened"]:
            few = tree.narrow(tuning, 0, FEW)
            assert score == pytest.approx(float(trained({"lr": rate, **choices[choice]}, few)["last_twenty"].mean()))
        best = min(at["tried"], key=lambda each: each[2])
        assert at["values"] == {"lr": best[0], **choices[best[1]]}
        for measured, values in trained(at["values"], fresh).items():
            np.testing.assert_allclose(at[measured], values[:, 0].numpy(), rtol=1e-9)
        assert np.shape(at["losses"]) == (3, net.num_steps)
        last = np.array(at["losses"])[:, -20:].mean(1)
        np.testing.assert_allclose(last, at["last_twenty"], rtol=1e-4)  # five digits are kept
        assert record(done, net, "Adam, default")["tried"] == []


def test_what_is_there_is_not_run_again_and_what_is_of_another_run_is_refused(done: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in done.glob("results/*/*.json")}
    assert len(times) == 8
    assert run(done) == [f"{net.name}: all 4 results are there" for net in SMALL]
    with pytest.raises(ValueError, match=r"mine\.json is a result with other theta; remove it"):
        run(done, {"mine": candidate(0.03)})
    with pytest.raises(ValueError, match="with other rates; remove it"):
        run(done, baselines={**GRIDS, "Adam": replace(GRIDS["Adam"], rates=(0.1, 0.2))})
    with pytest.raises(ValueError, match="with other num_seeds"):
        run(done, protocol=replace(PROTOCOL, num_seeds=2))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    lines = run(done, {"mine": candidate(), "Adam 2": candidate(0.1)})
    assert len(lines) == 2 and all("Adam 2" in line for line in lines)
    for net in SMALL:
        result_path(done, net, "Adam 2").unlink()


def test_two_folders_of_half_the_nets_are_one_of_all(done: Path, tmp_path: Path) -> None:
    for net in SMALL:
        run(tmp_path, nets=(net,))
    names = sorted(path.relative_to(done) for path in done.glob("results/*/*.json"))
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.glob("results/*/*.json"))
    for name in names:
        one, other = (read_record(folder / name) for folder in (done, tmp_path))
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baselines": {"mine": GRIDS["Adam"]}}, r"\['mine'\] name both"),
        ({"graphs": "some"}, "graphs='some' is none of none, baselines, all"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)
    with pytest.raises(ValueError, match="num_seeds=1"):
        Protocol(num_seeds=1)
    with pytest.raises(ValueError, match="tune_for='final'"):
        Protocol(tune_for="final")  # pyright: ignore[reportArgumentType]


# Tables


def test_ratios_are_those_of_numpy(done: Path) -> None:
    found = collect(done, [net.name for net in SMALL])
    assert [*found.results] == [net.name for net in SMALL]
    assert found.candidates == ["mine"] and found.baselines == [*GRIDS]
    logs = []
    for net in SMALL:
        ours, theirs = (np.log(record(done, net, label)["last_twenty"]) for label in ("mine", "Adam"))
        logs.append(ours - theirs)
        ratio = found.ratio(net.name, "mine", "Adam")
        half = 4.302653 * logs[-1].std(ddof=1) / math.sqrt(3)  # Student's t at 2 degrees of freedom
        expected = np.exp([logs[-1].mean(), logs[-1].mean() - half, logs[-1].mean() + half])
        assert ratio is not None
        np.testing.assert_allclose([*ratio], expected, rtol=2e-2)
        assert ratio.mean == pytest.approx(expected[0], rel=1e-12)
    mean = found.geometric_mean("mine", "Adam")
    assert mean is not None and mean.mean == pytest.approx(float(np.exp(np.mean(logs))), rel=1e-12)
    summary = found.summary("mine")["to Adam"]
    assert summary["worst"] == pytest.approx(float(np.exp(np.mean(logs, 1)).max()), rel=1e-12)
    assert summary["median"] == pytest.approx(float(np.median(np.exp(np.mean(logs, 1)))), rel=1e-12)
    assert summary["worst_net"] == SMALL[int(np.mean(logs, 1).argmax())].name
    assert found.ratio(SMALL[0].name, "mine", "Muon + cosine") is None


def test_the_share_of_steps_to_a_level() -> None:
    falling = torch.arange(40.0, 0.0, -1.0)[:, None] * torch.tensor([1.0, 1.0, 1.0])
    level = torch.tensor([20.5, 35.0, 0.1])  # the mean of 40 - k + 1 ... in a window of 4 is 41 - step + 1.5
    assert steps_to_reach(falling, level, window=4).tolist() == [22.0, 8.0, math.inf]
    own = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) + torch.linspace(3, 0, 50)[:, None]
    assert steps_to_reach(own, own[-20:].mean(0)).tolist() == [50.0, 50.0]
    assert steps_to_reach(torch.ones(3, 1), torch.ones(1)).tolist() == [3.0]


def test_thinned_curves_keep_all_losses_in_their_means() -> None:
    losses = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    steps, values = thinned(losses)
    assert len(steps) == len(values) <= 60 and steps[0] == 1 and steps == sorted(steps) and steps[-1] <= 500
    assert torch.equal(values[0], losses[0])
    short, same = thinned(losses[:7])
    assert short == [1, 2, 3, 4, 5, 6, 7] and torch.equal(same, losses[:7])


def made_up(**by: list[float]) -> Suite:
    """A suite of one net, with these last losses, and curves that end at them."""
    results = {}
    for label, values in by.items():
        last = torch.tensor(values)
        kind = {"kind": "candidate"} if label == "mine" else {"kind": "baseline", "tried": [[0.1, 0, 1.0]]}
        own = {**kind, "num_diverged": int(last.isinf().sum()), "values": {"lr": 0.1}, "at_edge": False}
        curve = torch.linspace(3.0, 1.0, 30)[:, None] * last.clamp(max=9.0)
        results[label.replace("_", " + ")] = suite_table.Result(own, last, 2 * last, curve)
    return Suite({"net": results})


def test_diverged_runs_count_against_a_candidate_and_never_for_it(tmp_path: Path) -> None:
    inf = math.inf
    ratio = made_up(mine=[1.0, inf, 1.0], Adam=[2.0, 2.0, 2.0]).ratio("net", "mine", "Adam")
    assert ratio is not None and ratio.mean == inf
    favoured = made_up(mine=[1.0, 1.0, 1.0], Adam=[1.0, inf, 1.0]).ratio("net", "mine", "Adam")
    assert favoured is not None and favoured.mean == 1.0
    both = made_up(mine=[1.0, inf, 1.0], Adam=[2.0, inf, 2.0]).ratio("net", "mine", "Adam")
    assert both is not None and both.mean == inf
    found = made_up(mine=[1.0, inf, 1.0], Adam=[2.0, 2.0, 2.0], AdamW_cosine=[0.5, 0.5, 0.5])
    assert found.best_tuned("net") == "AdamW + cosine" and found.steps_to_reach("net", "mine") == inf
    paths = found.save(tmp_path)
    text = paths["md"].read_text()
    assert "never" in text and "inf" in text and "| **worst net**" in text and "1 diverged" in text
    saved = json.loads(paths["json"].read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert saved["nets"]["net"]["mine"]["num_diverged"] == 1
    assert saved["summaries"]["mine"]["to Adam"]["worst"] == "Infinity"


def test_the_table_holds_the_numbers_and_the_figures_show_them(done: Path, tmp_path: Path) -> None:
    found = collect(done)
    paths = found.save(tmp_path)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in paths["md"].read_text().splitlines()]
    table = {row[0]: row for row in rows if len(row) == 10}
    for net in SMALL:
        ratio = found.ratio(net.name, "mine", "Adam")
        assert ratio is not None and float(table[net.name][3].split("±")[0]) == pytest.approx(ratio.mean, abs=6e-4)
        assert table[net.name][1] == str(net.num_steps) and table[net.name][-1] == "0"
        steps = found.steps_to_reach(net.name, "mine")
        assert steps is not None
        assert table[net.name][7] == ("never" if math.isinf(steps) else f"{steps:.2f} T")
    mean = found.geometric_mean("mine", "AdamW + cosine")
    assert mean is not None and table["**geometric mean**"][4].startswith(f"{mean.mean:.3f}")
    assert table["**median**"][4] == f"{found.summary('mine')['to AdamW + cosine']['median']:.3f}"
    saved = json.loads(paths["json"].read_text())
    curve = saved["nets"][SMALL[0].name]["mine"]["curve"]
    assert len(curve["steps"]) == len(curve["mean"]) and np.shape(curve["seeds"]) == (3, len(curve["mean"]))
    np.testing.assert_allclose(np.mean(curve["seeds"], 0), curve["mean"], rtol=1e-4)
    assert share(pixels(paths["curves"]), (0xD5, 0x5E, 0x00)) > 1e-3  # the candidate's line
    matrix = pixels(paths["png"])
    assert len(np.unique(matrix.reshape(-1, 3), axis=0)) > 50 and share(matrix, (255, 255, 255)) < 0.95


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results"):
        collect(tmp_path)


# The nets


def test_the_suites_are_whole_and_can_be_made() -> None:
    assert len(UNSEEN) == 15 and len(GROWTH) == 6
    paths = [result_path("x", net, "general") for nets in SUITES.values() for net in nets]
    assert len({*paths}) == len(paths) == 21
    for net in (*UNSEEN, *GROWTH):
        family: Any = net.make()
        assert family.held_out and family.meta_split == ("train" if "fashion" in str(net.options) or "'mnist'" in
                                                         str(net.options) else "test")  # fmt: skip
    untouched = [net for net in UNSEEN if "text" in net.name or "Omniglot" in net.name]
    assert len(untouched) >= 5 and {100, 2000} <= {net.num_steps for net in UNSEEN}


def test_nets_are_chosen_by_name_or_number_and_dealt_out_whole() -> None:
    assert chosen("unseen") is UNSEEN
    assert chosen("unseen", ["4", UNSEEN[0].name]) == (UNSEEN[0], UNSEEN[3])
    with pytest.raises(ValueError, match=r"no net 'mlp' in unseen; there are, by number: mlp 64-64"):
        chosen("unseen", ["mlp"])
    with pytest.raises(ValueError, match="no suite 'seen'; there are unseen, growth"):
        chosen("seen")
    shares = dealt(UNSEEN, 4)
    assert sorted(net.name for each in shares for net in each) == sorted(net.name for net in UNSEEN)
    assert len(dealt(SMALL, 9)) == 2


# The commands


def test_the_command_runs_a_suite_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learnedopt.evaluation.nets.SUITES", {"unseen": SMALL})
    command = ["evaluate", "lstm-quadratic", "--suite", "unseen", "--nets", "1", "--baselines", "Adam, default",
               "--tasks", "2", "--out", str(tmp_path), "--wandb", "disabled"]  # fmt: skip
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "small bowl: lstm-quadratic" in first and "| **geometric mean**" in first
    assert {path.name for path in tmp_path.glob("suite*")} == {
        "suite.json",
        "suite.md",
        "suite.png",
        "suite-curves.png",
    }
    told: list[Any] = []
    monkeypatch.setattr("learnedopt.followed.show_suite", lambda *given: told.append(given[0]))
    assert main([*command, "--tags", "a,b"]) == 0
    assert "all 2 results are there" in capsys.readouterr().out
    assert told == [Tracking("disabled", tags=("a", "b"))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "seen"], "no suite 'seen'"),
        (["--suite", "unseen", "--family", "quadratic"], "--family has no effect with --suite"),
        (["--suite", "unseen", "--few-shot"], "exclude each other"),
        (["--family", "quadratic", "--nets", "1"], "--nets has no effect without --suite"),
        (["--family", "quadratic", "--baselines", "Adan"], "there is no Adan; did"),
        (["--suite", "unseen", "--tune-for", "last_two"], "tune_for='last_two' is none of last_twenty, last_ten"),
    ],
)
def test_what_the_command_cannot_do_is_said(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["evaluate", "lstm-quadratic", *options, "--out", str(tmp_path / "out"), "--wandb", "disabled"]) != 0
    assert re.search(message, capsys.readouterr().err)


def test_the_script_runs_a_suite_and_makes_its_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learnedopt.evaluation.nets.SUITES", {"unseen": SMALL})
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "results_suite.py"
    command = ["--folder", str(tmp_path), "--baselines", "Adam, default", "--seeds", "2", "--tuning-tasks", "2"]
    for more in (["--candidates", "lstm=lstm-quadratic"], ["--tables-only"]):
        monkeypatch.setattr(sys, "argv", [str(script), *command, *more])
        runpy.run_path(str(script), run_name="__main__")
        out = capsys.readouterr().out
        assert "### lstm" in out and "suite-curves.png" in out
    assert len([*tmp_path.glob("results/*/*.json")]) == 4
