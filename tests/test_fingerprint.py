"""Fingerprints: one for what steps alike, another for whatever differs."""

from __future__ import annotations

import enum
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import learnedopt
from learnedopt import optimizers
from learnedopt.core.fingerprint import fingerprint
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers import LSTM, Adam, Clip, LearnedInit, RMSprop

TEMPLATE = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}


def drawn(rule: UpdateRule, seed: int = 0) -> Theta:
    return rule.init_theta(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", optimizers.names())
def test_a_rule_that_was_saved_and_loaded_has_the_same(name: str, tmp_path: Path) -> None:
    rule = optimizers.example(name, TEMPLATE)
    theta = drawn(rule)
    again = learnedopt.load(learnedopt.save(tmp_path / "mine", rule, theta))
    assert fingerprint(*again) == fingerprint(rule, theta)
    assert len(fingerprint(rule, theta)) == 16 and set(fingerprint(rule, theta)) <= set("0123456789abcdef")


def test_all_rules_and_all_packaged_thetas_differ() -> None:
    rules = [optimizers.example(name, TEMPLATE) for name in optimizers.names()]
    described = {str(optimizers.describe(rule)) for rule in rules}  # "maml" and "learned-rates" name one class
    assert len({fingerprint(rule, drawn(rule)) for rule in rules}) == len(described)
    packaged = learnedopt.packaged()
    assert len({fingerprint(*learnedopt.load(name)) for name in packaged}) == len(packaged)


def test_it_is_the_same_in_another_process() -> None:
    code = (
        "import learnedopt; from learnedopt.core.fingerprint import fingerprint;"
        "print(fingerprint(*learnedopt.load('general')))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint(*learnedopt.load("general"))


def test_it_does_not_depend_on_type_order_or_layout() -> None:
    rule = LSTM(hidden_size=3)
    theta = drawn(rule)
    changed = {k: v.double() for k, v in reversed(theta.items())}
    name = "lstm1/weight"
    changed[name] = changed[name].T.contiguous().T
    assert not changed[name].is_contiguous()
    assert fingerprint(rule, changed) == fingerprint(rule, theta)


def _nudged(theta: Theta) -> Theta:
    value = theta["lstm2/bias"]
    return {**theta, "lstm2/bias": torch.cat([torch.nextafter(value[:1], torch.tensor(9.0)), value[1:]])}


def _swapped(theta: Theta) -> Theta:
    return {**theta, "lstm1/bias": theta["lstm2/bias"], "lstm2/bias": theta["lstm1/bias"]}


def _reshaped(theta: Theta) -> Theta:
    return {**theta, "lstm1/weight": theta["lstm1/weight"].reshape(-1)}


@pytest.mark.parametrize("change", [_nudged, _swapped, _reshaped])
def test_another_theta_has_another(change: Callable[[Theta], Theta]) -> None:
    rule = LSTM(hidden_size=3)
    theta = drawn(rule)
    assert fingerprint(rule, change(theta)) != fingerprint(rule, theta)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LSTM(hidden_size=3), LSTM(hidden_size=3, output_scale=0.2)),
        (LSTM(hidden_size=3), Clip(LSTM(hidden_size=3), 1.0)),
        (Clip(LSTM(hidden_size=3), 1.0), Clip(LSTM(hidden_size=3), 2.0)),
        (RMSprop(lr=0.1), RMSprop(lr=0.1, centered=True)),
    ],
)
def test_options_count_and_nested_ones_too(one: UpdateRule, other: UpdateRule) -> None:
    theta = drawn(one)
    assert fingerprint(one, theta) != fingerprint(other, theta)


def test_options_count_as_numbers_and_templates_by_their_shapes() -> None:
    assert fingerprint(Adam(lr=1), drawn(Adam(lr=1))) == fingerprint(Adam(lr=1.0), drawn(Adam(lr=1.0)))
    ones = {k: torch.ones_like(v) for k, v in TEMPLATE.items()}
    theta = drawn(LearnedInit(Adam(lr=0.1), TEMPLATE))
    one, other = (fingerprint(LearnedInit(Adam(lr=0.1), template), theta) for template in (TEMPLATE, ones))
    assert one == other


@dataclass(frozen=True)
class Odd(UpdateRule):
    """A rule with an option of any kind."""

    option: Any = None

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, ()

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        return grads, state


class Word(enum.Enum):
    """An option that is one of two."""

    ONE = 1
    TWO = 2


ODD = {
    "enumerations": (Word.ONE, Word.TWO),
    "dtypes": (torch.float32, torch.bfloat16),
    "functions": (torch.tanh, torch.relu),
    "own functions": (drawn, fingerprint),
    "classes": (Adam, Odd),
}


@pytest.mark.parametrize("kind", ODD)
def test_options_of_rare_kinds_count(kind: str) -> None:
    one, two = (fingerprint(Odd(option=option), {}) for option in ODD[kind])
    assert one != two
    assert one == fingerprint(Odd(option=ODD[kind][0]), {})
