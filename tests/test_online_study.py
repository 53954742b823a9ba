"""Studies of hyperparameters learned while one run goes on: what they count, keep and refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from learnedopt.core.carry import Tape
from learnedopt.core.objective import FinalLoss
from learnedopt.core.registry import Choice
from learnedopt.estimators.unrolled import Truncated
from learnedopt.objectives.target_matching import BootstrappedTarget
from learnedopt.recipes import make, online
from learnedopt.recipes.online import Fixed, Learned, Method, OnlineLearning
from learnedopt.training.tracker import NullTracker

RATE, MOMENTUM = 0.01, 0.3
RULE = Choice(
    "reparametrized",
    {
        "rule": {"name": "momentum", "options": {"lr": RATE, "momentum": MOMENTUM}},
        "scales": {"lr": "log", "momentum": "logit"},
    },
)
WINDOW = Truncated(3, tape=Tape.FULL)
STILL = 1e-30  # a meta-rate that moves nothing


def study(**methods: Method) -> OnlineLearning:
    """Return a small study; 14 steps end within a window of 3 as within one of 3 + 3."""
    family = Choice("quadratic", {"dim": 3, "start_scale": 1.0, "dtype": "float64"})
    return OnlineLearning(
        name="small", family=family, rule=RULE, methods=methods, num_steps=14, num_tasks=2, seeds=(0, 1),
        tuning_seeds=(5,),
    )  # fmt: skip


def learned(objective: Any, *rates: float) -> Learned:
    return Learned(WINDOW, objective, rates or (STILL,))


def measured(folder: Path, each: OnlineLearning) -> dict[str, Any]:
    each.run(folder, NullTracker())
    return json.loads((folder / "small.json").read_text())


@pytest.mark.parametrize(
    "objective",
    [FinalLoss(), BootstrappedTarget(4, 0.01), BootstrappedTarget(4, 0.01, continue_from="rollout")],
    ids=["ordinary", "from the bootstrap", "from the rollout"],
)
def test_each_step_of_a_run_is_counted_once(objective: Any, tmp_path: Path) -> None:
    still = Fixed(Choice("momentum", {"momentum": MOMENTUM}), (RATE,))
    found = measured(tmp_path, study(fixed=still, learned=learned(objective)))
    assert found["learned"]["totals"] == pytest.approx(found["fixed"]["totals"], rel=1e-6)  # theta is in float32
    assert found["learned"]["curve"] == pytest.approx(found["fixed"]["curve"], rel=1e-6)
    assert found["fixed"]["totals"][0] != found["fixed"]["totals"][1]
    assert len(found["learned"]["curve"]) == 14


def test_the_best_rate_is_chosen_on_other_seeds_and_a_run_that_diverges_costs_infinitely_much(tmp_path: Path) -> None:
    sgd = Fixed(Choice("sgd"), (1e-4, 1e-3, 1e-2, 1e2))
    found = measured(tmp_path, replace(study(sgd=sgd, learned=learned(FinalLoss(), STILL, 0.1, 1e4)), num_steps=300))
    assert float(found["sgd"]["tried"]["100.0"]) == float("inf") == float(found["learned"]["tried"]["10000.0"])
    assert found["sgd"]["rate"] == 1e-2 and not found["sgd"]["at_edge"]
    assert found["learned"]["rate"] == 0.1
    assert found["sgd"]["cumulative_loss"] == pytest.approx(sum(found["sgd"]["totals"]) / 2)
    table = (tmp_path / "small.md").read_text()
    assert table.index("learned") < table.index("sgd") and " ± " in table
    assert (tmp_path / "small.png").exists()


def test_what_was_run_before_is_not_run_again_and_what_differs_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = study(learned=learned(FinalLoss()))
    found = measured(tmp_path, first)
    asked: list[Any] = []
    cost = OnlineLearning._cost
    monkeypatch.setattr(OnlineLearning, "_cost", lambda *given: asked.append(given[1:]) or cost(*given))
    assert measured(tmp_path, first) == found and not asked
    more = learned(FinalLoss(), STILL, 0.1)
    measured(tmp_path, study(renamed=more))
    assert {rate for _, rate, _ in asked} == {0.1}
    for other in (learned(BootstrappedTarget(1, 0.01)), replace(learned(FinalLoss()), estimator=Truncated(2))):
        asked.clear()
        measured(tmp_path, study(learned=other))
        assert len(asked) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning_seeds": (1, 5)}, r"\[1\] are in both"),
        ({"seeds": (0,)}, "an interval needs two"),
        ({"tuning_seeds": ()}, "rates are chosen on seeds"),
        ({"methods": {}}, "needs methods"),
        ({"methods": {"sgd": Fixed(Choice("sgd"), ())}}, "each rates to choose from"),
        ({"num_steps": 0}, "num_steps=0"),
    ],
)
def test_a_study_that_could_say_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(study(sgd=Fixed(Choice("sgd"), (0.1,))), **changes)


@pytest.mark.parametrize("name", ["bmg-quadratic", "bmg-mnist-permuted"])
def test_both_meta_gradients_are_tuned_alike(name: str) -> None:
    recipe = make(name)
    assert isinstance(recipe, OnlineLearning) and recipe.name == name
    tried = {len(method.rates) for method in recipe.methods.values() if isinstance(method, online.Learned)}
    assert len(tried) == 1
