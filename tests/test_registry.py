"""The class behind the registries: a kind of thing is a table of a few lines. Rules and families: see their tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import learnedopt
from learnedopt import FinalLoss, GradientEstimator, estimators, objectives, optimizers
from learnedopt.config import INTERCHANGEABLE, override
from learnedopt.core.group import Group
from learnedopt.core.inner_objective import InnerObjective, TaskLoss
from learnedopt.core.registry import Registry
from learnedopt.core.tree import Params
from learnedopt.recipes import HeldOut


@dataclass(frozen=True, eq=False)
class Pull(InnerObjective):
    """A user's own, with every kind of option."""

    template: Params
    strength: float = 1.0
    per: Literal["scalar", "tensor"] = "scalar"
    also: InnerObjective | None = None


TABLE = {"task-loss": "inner_objective:TaskLoss"}
RETIRED = {"weight-decay": 'make("ridge")'}


def registry(templated: bool = True) -> Registry[InnerObjective]:
    """Return a third registry, as one of inner objectives is."""
    return Registry(
        InnerObjective, "inner objective", "inner objectives", "learnedopt.core", TABLE, templated, RETIRED
    )  # fmt: skip


def template() -> Params:
    return {"w": torch.ones(2, 3), "b": torch.ones(2, dtype=torch.float64)}


def test_a_third_kind_of_thing_is_made_described_and_built_again() -> None:
    objectives = registry()
    assert isinstance(objectives.make("task-loss"), TaskLoss)
    assert objectives.describe(TaskLoss()) == {"name": "task-loss", "options": {}}
    objectives.register("pull", Pull)
    nested = {"name": "pull", "options": {"strength": 0.5}}
    made: Any = objectives.make("pull", template=template(), also=nested, per="tensor")
    assert made.also.strength == 0.5 and made.also.template.keys() == {"w", "b"}  # the template went on to it
    described = json.loads(json.dumps(objectives.describe(made)))
    assert described["options"]["template"]["b"] == {"shape": [2], "dtype": "float64"}
    again: Any = objectives.build(described)
    assert objectives.describe(again) == described and (again.per, again.also.strength) == ("tensor", 0.5)
    assert all(isinstance(p, Tensor) and not p.any() for p in again.template.values())


def test_what_is_defined_again_takes_its_place() -> None:
    first, second = (dataclass(frozen=True)(type("Mine", (FinalLoss,), {"__module__": "my_module"})) for _ in range(2))
    ours = Group(FinalLoss, "meta-objective", "meta-objectives", {})
    for each in (first, first, second):
        ours.register(each)
    assert [*ours] == [second]
    options = registry()
    for each in (first, second):
        options.register("mine", each)
    assert options.registered == {"mine": second}
    elsewhere = dataclass(frozen=True)(type("Mine", (FinalLoss,), {"__module__": "another_module"}))
    with pytest.raises(ValueError, match="already registered"):
        ours.register(elsewhere)
    options.register("sum", lambda: TaskLoss())
    with pytest.raises(ValueError, match="already registered"):
        options.register("sum", lambda: TaskLoss())


def test_registries_do_not_share_what_users_register() -> None:
    first, second = registry(), registry()
    first.register("pull", Pull)
    assert first.names() == ["task-loss", "pull"] and second.names() == ["task-loss"]


def test_where_nothing_takes_templates_one_is_an_option_like_any_other() -> None:
    objectives = registry(templated=False)
    with pytest.raises(ValueError, match="'task-loss' has no option 'template'"):
        objectives.make("task-loss", template=template())
    objectives.register("pull", Pull)
    made: Any = objectives.make("pull", template=template())
    assert made.template.keys() == {"w", "b"}


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda r: r.make("task-los"), r"no inner objective 'task-los'; did you mean 'task-loss'\? All inner"),
        (lambda r: r.make("weight-decay"), r"no inner objective 'weight-decay' any more: make\(\"ridge\"\)"),
        (lambda r: r.register("weight-decay", Pull), "'weight-decay' of inner objectives is already registered"),
        (lambda r: r.build({"name": "task-loss"}), "no configuration of inner objectives"),
        (lambda r: r.describe(Pull({})), r"Pull is not registered.*learnedopt\.core\.register\('<name>', Pull\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(call: Callable[[Registry[InnerObjective]], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call(registry())


def weighed(loop: Any, theta: Any, rollout: Any) -> Tensor:
    return rollout.losses.mean()


@dataclass(frozen=True)
class Untold:
    """A meta-objective with a type that its module does not know."""

    scale: Nowhere = 1.0  # type: ignore[name-defined] # noqa: F821 # pyright: ignore[reportUndefinedVariable]

    def __call__(self, loop: Any, theta: Any, rollout: Any) -> Tensor:
        return rollout.losses.mean()


@dataclass(frozen=True)
class Typed(Untold):
    type: str = "mean"


class Undecorated(GradientEstimator):
    def estimate(self, loop: Any, theta: Any, objective: Any, carry: Any) -> Any: ...


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: estimators.register(Undecorated), "pass the class of a gradient estimator .*that is a dataclass"),
        (lambda: objectives.register(type("More", (Untold,), {})), "pass the class of a meta-objective .*dataclass"),
        (lambda: objectives.register(Typed), "Typed has a field 'type', under which records keep the class"),
        (lambda: estimators.register(FinalLoss), "FinalLoss.*a subclass of GradientEstimator"),
        (lambda: objectives.register(Pull), "Pull.*pass the class of a meta-objective"),
        (lambda: objectives.register(weighed), "weighed.*pass the class"),  # pyright: ignore[reportArgumentType]
        (
            lambda: objectives.register(dataclass(frozen=True)(type("FinalLoss", (Untold,), {}))),
            "the name 'FinalLoss' of meta-objectives is already registered; give the class another one",
        ),
    ],
    ids=[
        "no dataclass",
        "a dataclass's child",
        "a field of records",
        "an objective",
        "no function",
        "a function",
        "a name that is taken",
    ],
)
def test_what_recipes_could_not_say_by_its_name_is_refused(call: Callable[[], Any], told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        call()


def test_fields_whose_types_cannot_be_told_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(INTERCHANGEABLE[1], "registered", {})
    assert objectives.register(Untold) is objectives.register(Untold) is Untold and objectives.names()[-1] == "Untold"
    with pytest.raises(ValueError, match=r"types of Untold's fields cannot be told: name 'Nowhere' is not defined"):
        override(HeldOut(), ["objective=Untold"], INTERCHANGEABLE)


@pytest.mark.parametrize("name", ["Averaged", "Entropic", "Euclidean", "Iterate", "MirrorDescent"])
def test_the_parts_of_online_learning_are_importable_from_the_package_itself(name: str) -> None:
    assert name in learnedopt.__all__ and getattr(learnedopt, name) is getattr(optimizers, name)
