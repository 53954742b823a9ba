"""Cards: the packaged ones are whole and on the page, memory and horizons are the rules' own, files tell theirs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import learnedopt
from learnedopt import HorizonWarning, LearnedOptimizer, cards, checkpoint, optimizers
from learnedopt.core.fingerprint import fingerprint
from learnedopt.optimizers import LSTM, Adam, LearnedInit, Momentum, Partition

NAMES = learnedopt.packaged()
WHOLE = {**dict.fromkeys(cards.FIELDS, "something"), cards.HOLDS_UP_TO: 7}


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_optimizer_has_a_card_that_both_its_files_and_the_page_hold(name: str) -> None:
    path = Path(checkpoint.__file__).parent / "pretrained" / f"{name}.json"
    written, card = json.loads(path.read_text("utf-8"))["metadata"]["card"], learnedopt.card(name)
    assert written == {**card.sentences, cards.HOLDS_UP_TO: card.holds_up_to}
    page = (Path(__file__).parents[1] / "docs" / "packaged.md").read_text("utf-8")
    assert page == cards.document() and str(card) in page
    assert all(text in page for text in card.sentences.values())
    assert card.fingerprint == fingerprint(*learnedopt.load(name)) and card.fingerprint in page


@pytest.mark.parametrize(
    ("name", "state_bytes", "reads_horizon", "trained", "holds"),
    [
        ("lstm-mnist", 2 * 2 * 20 * 4, False, 100, 100),  # h and c of two layers of 20 units, in float32
        ("lstm-quadratic", 2 * 2 * 20 * 4, False, 100, 100),
        ("tensor-gru-quadratic", 2 * 4, False, 100, 1000),  # the last gradient and the last step
        ("normalised-mlp-mnist", 4 * 4, True, 100, 100),  # three means of gradients and one of squares
        ("normalised-lstm-mnist", 4 * 4 + 2 * 10 * 4, True, 100, 200),  # and h and c of ten units
        ("general", 4 * 4, True, 800, 2000),
    ],
)
def test_what_packaged_optimizers_need(
    name: str, state_bytes: float, reads_horizon: bool, trained: int, holds: int
) -> None:
    card = learnedopt.card(name)
    # The rest is what a rule keeps for a row, a tensor or the model, here shared out among 64 x 64.
    assert card.state_bytes == pytest.approx(state_bytes, abs=0.05)
    assert (card.reads_horizon, card.trained_steps, card.holds_up_to) == (reads_horizon, trained, holds)
    assert cards.trained_horizon(card) == max(trained, holds)


def test_adam_keeps_what_the_cards_say_it_does() -> None:
    parameter = torch.zeros(64, 64, requires_grad=True)
    parameter.grad = torch.ones(64, 64)
    adam = torch.optim.Adam([parameter])
    adam.step()
    floats = sum(x.numel() for x in adam.state[parameter].values() if x.dim())
    assert floats == cards.ADAM_FLOATS * parameter.numel()
    rule = Adam(lr=0.1)
    assert cards.state_bytes(rule, rule.init_theta(torch.Generator())) == pytest.approx(4 * cards.ADAM_FLOATS, abs=0.01)


def test_memory_of_rules_that_are_made_for_certain_parameters() -> None:
    template = {"w": torch.ones(5, 2), "b": torch.ones(2)}
    start = LearnedInit(Momentum(lr=0.1), template)
    assert cards.state_bytes(start, start.init_theta(torch.Generator())) == 4.0
    parts = Partition({"body": ("body.*", Momentum(lr=0.1)), "head": ("head", Momentum(lr=0.1))})
    assert cards.state_bytes(parts, parts.init_theta(torch.Generator())) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fails": ""}, r"this is no card: without \['fails'\]"),
        ({"fails": None}, r"this is no card: without \['fails'\]"),
        ({"author": "me"}, r"with \['author'\] that cards do not have"),
        ({"summary": "two\nlines"}, "is no line of at most 160"),
        ({"holds_up_to": "ever"}, "holds_up_to='ever' is not a count"),
        ({"holds_up_to": 0}, "holds_up_to=0 is not a count"),
    ],
)
def test_a_card_that_lacks_something_is_refused(change: dict[str, Any], message: str) -> None:
    assert cards.check_card(WHOLE) == WHOLE
    with pytest.raises(ValueError, match=message):
        cards.check_card({**WHOLE, **change})


@pytest.mark.parametrize("written", [None, "text", []])
def test_what_is_no_card_at_all_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match=r"this is no card: without \['summary', .*'holds_up_to'\]"):
        cards.check_card(written)


def test_a_file_without_a_record_says_so(tmp_path: Path) -> None:
    rule = LSTM(hidden_size=3)
    path = learnedopt.save(tmp_path / "mine", rule, rule.init_theta(torch.Generator()))
    card = learnedopt.card(path)
    assert (card.name, card.rule, card.state_bytes) == (str(path), "lstm", 2 * 2 * 3 * 4)
    assert card.trained_steps is None and card.holds_up_to is None and cards.trained_horizon(card) is None
    assert "no configuration of a meta-training" in str(card) and "12 floats a parameter" in str(card)
    assert cards.past_horizon(card, 10**9) is None


def test_the_description_beside_a_checkpoint_is_not_taken_for_it(tmp_path: Path) -> None:
    rule = LSTM(hidden_size=3)
    path = learnedopt.save(tmp_path / "mine", rule, rule.init_theta(torch.Generator()))
    with pytest.raises(ValueError, match=r"mine\.json is no safetensors file; did you mean .*mine\.safetensors\?"):
        learnedopt.card(path.with_suffix(".json"))


def test_a_file_says_what_its_configuration_does(tmp_path: Path) -> None:
    rule, theta, metadata = checkpoint.load_with_metadata("lstm-mnist")
    del metadata["card"]
    card = learnedopt.card(learnedopt.save(tmp_path / "run" / "theta", rule, theta, metadata).parent)
    for text in ("`image-mlp`", "batch_size=128", "900 meta-steps of 4 tasks", "up to 100 steps", "41.68"):
        assert text in str(card)
    assert cards.trained_horizon(card) == 100
    assert card.fingerprint == learnedopt.card("lstm-mnist").fingerprint


@pytest.mark.parametrize(
    ("estimator", "steps"),
    [
        ({"type": "Unrolled", "num_steps": 7}, 7),
        ({"type": "Truncated", "num_steps": 5, "horizon": 20}, 20),
        ({"type": "Truncated", "num_steps": 5, "horizon": None}, None),
        ({"type": "EvolutionStrategies", "num_steps": 5, "horizon": None}, 5),
        ({"type": "PersistentES", "num_steps": 5, "horizon": 30}, 30),
        ({"type": "TaskByTask", "estimator": {"type": "Unrolled", "num_steps": 9}, "horizons": None}, 9),
        ({"type": "TaskByTask", "estimator": {"num_steps": 9}, "horizons": [[40, 0.5], [80, 0.2], [60, 0.3]]}, 80),
        ({"type": "Combined", "back_propagated": {"type": "Truncated", "num_steps": 4, "horizon": 8}}, 8),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else str(value),
)
def test_steps_of_a_meta_training(estimator: dict[str, Any], steps: int | None, tmp_path: Path) -> None:
    rule = Momentum(lr=0.1)
    metadata = {"estimator": estimator}
    card = learnedopt.card(learnedopt.save(tmp_path / "m", rule, rule.init_theta(torch.Generator()), metadata))
    assert card.trained_steps == steps


@pytest.mark.parametrize(
    ("name", "within", "past", "message"),
    [
        (
            "lstm-mnist",
            100,
            101,
            "lstm-mnist was trained on, or holds in, runs of at most 100 steps, and this is step 101",
        ),
        ("general", 2000, 5000, "at most 2,000 steps, and is told num_steps=5,000"),
    ],
)
def test_what_a_run_past_the_horizon_is_warned_of(name: str, within: int, past: int, message: str) -> None:
    card = learnedopt.card(name)
    assert cards.past_horizon(card, within) is None
    assert message in str(cards.past_horizon(card, past))


def stepped(optimizer: LearnedOptimizer, num_steps: int) -> list[warnings.WarningMessage]:
    """Take steps at a gradient of ones, and return what was warned of meanwhile."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(num_steps):
            optimizer.step()
    return found


def test_a_run_that_leaves_what_is_known_is_warned_of_once() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = LearnedOptimizer(model.parameters(), "lstm-mnist", lr=1e-6, guard=False)
    assert stepped(optimizer, 100) == []
    saved = optimizer.state_dict()
    (warned,) = stepped(optimizer, 20)
    assert warned.category is HorizonWarning and "this is step 101" in str(warned.message)
    assert warned.filename == __file__
    again = LearnedOptimizer(model.parameters(), "lstm-mnist", lr=1e-6, guard=False)
    again.load_state_dict(saved)
    assert len(stepped(again, 3)) == 1


def test_parameters_that_come_late_are_not_warned_of_again() -> None:
    early, late = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = LearnedOptimizer([early], "lstm-mnist", lr=1e-6, guard=False)
    assert stepped(optimizer, 50) == []
    optimizer.add_param_group({"params": [late]})
    assert len(stepped(optimizer, 60)) == 1
    assert stepped(optimizer, 50) == []
    assert optimizer.state[late]["step"] == 110


def test_a_horizon_beyond_what_is_known_is_warned_of_before_the_first_step() -> None:
    params = list(torch.nn.Linear(2, 2).parameters())
    with pytest.warns(
        HorizonWarning, match="general was trained on, or holds in, runs of at most 2,000 steps"
    ) as warned:
        LearnedOptimizer(params, "general", num_steps=2001)
    assert len(warned) == 1 and warned[0].filename == __file__
    LearnedOptimizer(params, "general", num_steps=2000)


def test_a_theta_without_a_card_is_not_warned_of() -> None:
    optimizer = LearnedOptimizer(
        torch.nn.Linear(2, 2).parameters(), learnedopt.load("lstm-mnist"), lr=1e-6, guard=False
    )
    assert stepped(optimizer, 102) == []


def test_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'general'"):
        learnedopt.card("genral")
    with pytest.raises(FileNotFoundError, match="neither a checkpoint file"):
        learnedopt.card(tmp_path)


def test_every_rule_of_the_registry_has_a_card(tmp_path: Path) -> None:
    template = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    for name in optimizers.names():
        rule = optimizers.example(name, template)
        theta = rule.init_theta(torch.Generator().manual_seed(0))
        assert str(learnedopt.card(learnedopt.save(tmp_path / name, rule, theta))).startswith(f"## {tmp_path / name}")
