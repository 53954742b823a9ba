"""Typed overrides of nested settings: what they change, and what each wrong one is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import pytest

from learnedopt.config import Choice, nearest, nearest_or_all, override, read_value


class Colour(Enum):
    RED = "red"
    GREEN = "green"


@dataclass(frozen=True)
class Square:
    side: int = 1
    colour: Colour = Colour.RED


@dataclass(frozen=True)
class Box:
    side: int
    height: float
    colour: Colour = Colour.GREEN

    def __post_init__(self) -> None:
        if self.height % self.side:
            raise ValueError(f"height={self.height} is no multiple of {self.side}")


@dataclass(frozen=True)
class Circle:
    radius: float = 2.0
    inside: Any = field(default_factory=Square)


@dataclass(frozen=True)
class Settings:
    name: str = "one"
    count: int = 3
    limit: float | None = 1.5
    flag: bool = False
    sizes: tuple[int, ...] = (1, 2)
    table: dict[str, Any] = field(default_factory=dict)
    mode: Literal["slow", "fast"] = "slow"
    shape: Any = field(default_factory=lambda: Box(2, 8.0))
    family: Choice = field(default_factory=lambda: Choice("quadratic", {"dim": 10, "noise": 0.1}))
    also: Choice | None = None


KINDS = ((Square, Box, Circle), (Settings,))


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("name=two=2", {"name": "two=2"}),
        ("name=", {"name": ""}),
        ("name=[1]", {"name": "[1]"}),
        ("count=-4", {"count": -4}),
        ("limit=1e-3", {"limit": 0.001}),
        ("limit=2", {"limit": 2.0}),
        ("limit=null", {"limit": None}),
        ("flag=true", {"flag": True}),
        ("sizes=[4,5,6]", {"sizes": (4, 5, 6)}),
        ("table={'a': None, 'b': [1, None]}", {"table": {"a": None, "b": [1, None]}}),
        ('table={"a": null}', {"table": {"a": None}}),
        ("mode=fast", {"mode": "fast"}),
        ("shape.side=4", {"shape": Box(4, 8.0)}),
        ("shape.colour=RED", {"shape": Box(2, 8.0, Colour.RED)}),
        ("shape=Square", {"shape": Square(2, Colour.GREEN)}),  # the fields in common are kept
        ("shape=Circle", {"shape": Circle()}),
        ("family=image-mlp", {"family": Choice("image-mlp")}),
        ("family.hidden=[40]", {"family": Choice("quadratic", {"dim": 10, "noise": 0.1, "hidden": [40]})}),
        ("family.noise=null", {"family": Choice("quadratic", {"dim": 10, "noise": None})}),
    ],
)
def test_an_override_replaces_one_field_typed(assignment: str, expected: dict[str, Any]) -> None:
    changed = override(Settings(), [assignment], KINDS)
    assert changed == Settings(**expected)
    assert [type(v) for v in vars(changed).values()] == [type(v) for v in vars(Settings(**expected)).values()]
    assert Settings() == override(Settings(), [])


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        # Neither is valid after the first alone.
        (["shape.side=3", "shape.height=9"], {"shape": Box(3, 9.0)}),
        (["shape.height=9", "shape.side=3"], {"shape": Box(3, 9.0)}),
        (["count=4", "count=5"], {"count": 5}),
        (["shape.side=7", "shape=Square", "shape.side=5"], {"shape": Square(5, Colour.GREEN)}),
        (["shape=Circle", "shape.inside.side=6"], {"shape": Circle(inside=Square(6))}),
        (
            ["shape=Circle", "shape.inside=Box", "shape.inside.height=4", "shape.inside.side=2"],
            {"shape": Circle(inside=Box(2, 4.0, Colour.RED))},
        ),
        (["family.dim=3", "family=sine", "family.dim=4"], {"family": Choice("sine", {"dim": 4})}),
        (["also=l2"], {"also": Choice("l2")}),
        (["also.strength=0.5", "also=l2"], {"also": Choice("l2", {"strength": 0.5})}),
        (["also=l2", "also=null"], {"also": None}),
    ],
)
def test_overrides_are_applied_at_once(assignments: list[str], expected: dict[str, Any]) -> None:
    for given in (assignments, [*assignments, "name=x"]):
        changed = override(Settings(), given, KINDS)
        assert changed == Settings(**{"name": changed.name, **expected})


def test_a_required_field_of_another_class_can_be_given_or_is_asked_for() -> None:
    before = Settings(shape=Square(3))
    assert override(before, ["shape=Box", "shape.height=6"], KINDS).shape == Box(3, 6.0, Colour.RED)
    with pytest.raises(ValueError, match=r"^Box needs shape\.height: set that too$"):
        override(before, ["shape=Box"], KINDS)


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("cuont=1", r"no setting 'cuont': Settings has no 'cuont'; did you mean 'count'\?"),
        ("shape.heigth=1", r"no setting 'shape\.heigth': Box has no 'heigth'; did you mean 'height'\?"),
        ("shape.side.deep=1", r"no setting 'shape\.side\.deep': 'shape\.side' is 2, which has no fields"),
        ("family.options.dim=3", r"'family\.options\.dim' names the options of 'quadratic', .*directly: 'family\.dim'"),
        ("family.dim.deep=1", r"'family\.dim\.deep' reaches into an option of 'quadratic'; set 'family\.dim'"),
        ("also.strength=1", r"no setting 'also\.strength': 'also' is None, which has no fields"),
        ("family=null", r"family='null' names nothing, and the setting needs a name"),
        ("count", r"'count' is not of the form key=value"),
        ("=1", r"'=1' is not of the form key=value"),
        ("count=three", r"count='three' is not of the setting's type int$"),
        ("count=1.5", r"count='1\.5' is not of the setting's type int$"),
        ("count=true", r"count='true' is not of the setting's type int$"),
        ("count=null", r"count='null' is not of the setting's type int$"),
        ("limit=much", r"limit='much' is not of the setting's type float \| null$"),
        ("flag=3", r"flag='3' is none of true, false$"),
        ("sizes=[a]", r"sizes='\[a\]' is not of the setting's type \(int, \.\.\.\)$"),
        ("mode=fsat", r"mode='fsat' is none of slow, fast; did you mean 'fast'\?"),
        ("shape.colour=red", r"colour='red' is none of RED.*; did you mean 'RED'\?"),
        ("shape=Boxx", r"shape='Boxx' is none of Square, Box, Circle; did you mean 'Box'\?"),
        ("shape=square", r"shape='square' is none of .*; did you mean 'Square'\?"),
        ("shape.side=3", r"^shape.height=8\.0 is no multiple of 3$"),  # the settings' own refusal, as it is
    ],
)
def test_a_wrong_override_is_told_the_nearest_right_one(assignment: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        override(Settings(), [assignment], KINDS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("True", True),
        ("false", False),
        ("None", None),
        ("3", 3),
        ("1e-3", 0.001),
        ("(20,)", (20,)),
        ("[4, 'a']", [4, "a"]),
        ("mnist", "mnist"),
        ("a-b", "a-b"),
        ("__import__('os')", "__import__('os')"),  # a text, never called
    ],
)
def test_options_are_read_as_literals_or_text(text: str, value: Any) -> None:
    found = read_value(text)
    assert found == value and type(found) is type(value)


def test_nearest() -> None:
    assert nearest("LSTM-mnits", ["demo", "lstm-mnist"]) == "; did you mean 'lstm-mnist'?"
    assert nearest("rl", ["seed", "lr"]) == "; did you mean 'lr'?"
    assert nearest("xyzzy", ["seed", "lr", "family"]) == "" == nearest("x", []) == nearest_or_all("x", [])
    assert nearest_or_all("xyzzy", ["seed", "lr"]) == "; there are seed, lr"
