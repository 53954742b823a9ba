"""What estimators carry, in files and back: any nest, made of classes that the reader brings and no others."""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from learnedopt.core.carry import Carry
from learnedopt.training import carries

CPU = torch.device("cpu")


class Pair(NamedTuple):
    """A named tuple of a user."""

    first: Any
    second: Any


@dataclass(frozen=True)
class Noise:
    """A dataclass of a user."""

    seed: int
    scale: Any = 1.0


def everything() -> Any:
    return {
        "numbers": [1, -(2**80), 1.5, math.inf, True, False, None],
        "tensors": (torch.arange(3), torch.tensor(1 / 3, dtype=torch.float64), torch.zeros(0), torch.tensor([True])),
        "empty": ({}, [], ()),
        3: OrderedDict(b=Pair(Noise(7, torch.ones(2)), None), a=Carry({}, {"w": torch.ones(1, 2)}, ((),), 5)),
    }


def through_a_file(carry: Any, classes: carries.Classes, home: torch.device = CPU) -> Any:
    buffer = io.BytesIO()
    torch.save(carries.pack(carry, home), buffer)
    buffer.seek(0)
    return carries.unpack(torch.load(buffer, map_location="cpu", weights_only=True), classes, CPU)


def test_every_nest_comes_back_from_a_file_as_it_was() -> None:
    carry = everything()
    carries.require_plain(carry, "Any")
    found = through_a_file(carry, carries.classes_of(carry))
    pairs = [*zip(carries.leaves(carry), carries.leaves(found), strict=True)]
    for (path, a), (other, b) in pairs:
        assert path == other and type(a) is type(b)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b
    assert repr(found) == repr(carry)
    # A path is the expression that reaches the leaf.
    assert all(a is eval(path, {"carry": carry}) for (path, a), _ in pairs)
    assert [path for (path, _), _ in pairs][-3:] == [
        "carry[3]['b'].second", "carry[3]['a'].params['w']", "carry[3]['a'].step"
    ]  # fmt: skip


def test_a_packed_tensor_is_no_view_and_has_no_graph() -> None:
    whole = torch.zeros(1000, 2, requires_grad=True)
    packed = carries.pack([whole[:1].exp()], CPU)[2][0]
    assert packed.untyped_storage().nbytes() == 8 and not packed.requires_grad


def test_a_tensor_stays_where_it_was_unless_that_was_the_home_of_theta() -> None:
    away = carries.pack({"seed": torch.tensor(3)}, torch.device("meta"))
    assert carries.unpack(away, {}, torch.device("meta"))["seed"].device == CPU
    home = carries.pack({"seed": torch.tensor(3)}, CPU)
    assert carries.unpack(home, {}, torch.device("meta"))["seed"].device == torch.device("meta")


def test_classes_are_the_readers_own() -> None:
    carry = Pair(Noise(1), 2)
    mine = carries.classes_of(carry)
    assert set(mine.values()) == {Pair, Noise}
    with pytest.raises(ValueError, match=r"holds .*:Noise, of which this training's carries have none"):
        through_a_file(carry, {k: v for k, v in mine.items() if v is Pair})
    with pytest.raises(TypeError, match=r"the carry of Mine holds \['.*:Noise'\], which are not in what Mine\.start"):
        carries.require_plain(carry, "Mine", {k: v for k, v in mine.items() if v is Pair})
    carries.require_plain(carry, "Mine", mine)
    # Moved to another module since, which is no reason; of other fields, which is one.
    moved = {name.replace(__name__, "elsewhere"): kind for name, kind in mine.items()}
    assert through_a_file(carry, moved) == carry
    changed = dict.fromkeys(mine, make_dataclass("Noise", ["seed", "scale", "more"]))
    with pytest.raises(
        ValueError, match=r"has the fields \['seed', 'scale'\], the present one \['seed', 'scale', 'more'\]"
    ):
        through_a_file(Noise(1), changed)


def test_what_cannot_be_made_of_its_fields_is_no_nest() -> None:
    @dataclass
    class Derived:
        seed: int
        twice: int = field(init=False, default=0)

    class Table(dict[str, int]):
        """A dict of another class."""

    for strange in (Derived(1), Table(a=1), torch.ones(2).max(0), Path("a"), int):
        with pytest.raises(TypeError, match=r"at carry\['x'\]"):
            carries.require_plain({"x": strange}, "Mine")
