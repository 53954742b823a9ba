"""The scripts behind the tables of learned rules: their nets, schedules and ratios are what they are said to be."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from learnedopt import InnerLoop, Tape, optimizers
from learnedopt.evaluation.evaluate import sample_tasks
from learnedopt.evaluation.nets import UNSEEN, Net
from learnedopt.evaluation.suite import Protocol, run_suite
from learnedopt.evaluation.suite_table import collect

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
KNOWN = {net.name: net for net in UNSEEN}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # scripts import one another as they do when run
    for name in ("results_suite", "results_normalised", "results_wall_clock"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(request.param)


def begin(net: Net, seed: int = 3) -> tuple[dict[str, torch.Tensor], list[Any]]:
    family = net.make()
    drawn = sample_tasks(family, 1, "a test", seed)
    start = {name: value[0] for name, value in family.init_params(drawn).items()}
    batches = [family.batch(drawn, step, "train") for step in range(net.num_steps)]
    return start, [{name: value[0] for name, value in batch.items()} for batch in batches]


@pytest.mark.usefixtures("data_root")
@pytest.mark.parametrize("script", ["results_wall_clock"], indirect=True)
def test_modules_of_the_wall_clock_are_the_suites_nets(script: ModuleType) -> None:
    for name in script.NETS:
        net = KNOWN[name]
        start, batches = begin(replace(net, num_steps=2))
        model = script.module(net)
        script.put(model, start)
        for batch in batches:
            found = functional.cross_entropy(model(batch["inputs"]), batch["targets"])
            torch.testing.assert_close(found, net.make().loss(start, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("data_root")
@pytest.mark.parametrize("script", ["results_wall_clock"], indirect=True)
def test_both_loops_of_the_wall_clock_are_the_engines(script: ModuleType) -> None:
    net = Net("small", "image-mlp", {"hidden": (8,), "activation": "tanh", "batch_size": 16}, 24)
    start, batches = begin(net)
    family, drawn = net.make(), sample_tasks(net.make(), 1, "a test", 3)
    adamw = optimizers.Scheduled(optimizers.make("adamw", lr=0.02, weight_decay=0.3), "cosine")
    general = optimizers.make("general")
    ways = (
        (adamw, lambda model: script.by_adamw(model, batches, {"lr": 0.02, "weight_decay": 0.3})),
        (general, lambda model: script.by_rule(model, batches, (general, general.init_theta(torch.Generator())))),
    )
    for rule, train in ways:
        loop, theta = InnerLoop(family, rule, horizon=24), rule.init_theta(torch.Generator())
        expected = loop.run(theta, loop.start(drawn), 24, Tape.NONE).losses
        model = script.module(net)
        script.put(model, start)
        found = train(model)
        assert (found.seconds.diff() > 0).all() and len(found.losses) == 24
        np.testing.assert_allclose(found.losses, expected.squeeze().double(), rtol=2e-4)


@pytest.mark.parametrize("script", ["results_wall_clock"], indirect=True)
def test_a_level_that_is_not_reached_takes_for_ever(script: ModuleType) -> None:
    seconds = torch.tensor([1.0, 3.0, 4.0])
    assert script.reached(seconds, 2.0) == 3.0 and math.isinf(script.reached(seconds, math.inf))


@pytest.mark.parametrize("script", ["results_normalised"], indirect=True)
def test_the_table_of_the_normalised_rules_pairs_tasks(script: ModuleType, tmp_path: Path) -> None:
    net, rule = Net("bowl", "quadratic", {"dim": 3}, 30), optimizers.make("sgd", lr=0.02)
    small = {name: replace(script.named(name)[name], rates=(0.01, 0.03)) for name in script.BASELINES}
    given = {"mine": (rule, {"lr": torch.tensor(0.02)})}
    protocol = Protocol(num_seeds=4, num_tuning_tasks=5, num_final=1, tune_for="last_ten")
    run_suite(given, [net], small, folder=tmp_path, protocol=protocol)
    results = collect(tmp_path).results
    ours, theirs = (results["bowl"][label].losses.numpy() for label in ("mine", "Nesterov, linear end"))
    logs = np.log(ours[-10:].mean(0) / theirs[-10:].mean(0))
    row = next(line for line in script.table(results).splitlines() if "| mine" in line)
    assert f"{math.exp(logs.mean()):.3f} ±" in row and f"{ours.sum(0).mean():.4g} ±" in row
    assert f"{ours[-10:].mean():.4g} ±" in row
    tried = results["bowl"]["Nesterov"].record
    assert tried["last_ten"] == pytest.approx(results["bowl"]["Nesterov"].losses[-10:].mean(0).tolist(), rel=1e-4)
    assert script.draw(tmp_path / "figure.png", results).stat().st_size > 10_000


@pytest.mark.parametrize("script", ["results_normalised"], indirect=True)
def test_settings_differ_in_one_thing_and_can_be_made(script: ModuleType) -> None:
    own = script.SETTINGS[0].net
    for each in script.SETTINGS[1:]:
        others = [k for k, v in each.net.options.items() if own.options.get(k) != v]
        assert len(others) + (each.net.num_steps != own.num_steps) == 1, each
        each.net.make()
