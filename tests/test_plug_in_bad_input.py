"""What the plug-in cannot take is refused in words, and leaves parameters and memory as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plug_in_cases import (
    ALL,
    HAND_DESIGNED,
    Net,
    bare,
    equal,
    learned,
    loss_of,
    made,
    memory,
    rule_of,
    source,
    train,
    values,
)
from torch import Tensor, nn

import learnedopt
from learnedopt.optimizers import LSTM, SGD, Adam, Momentum

every = pytest.mark.parametrize("name", ALL)


# Names, rules and theta.


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("genral", "general"), ("lstm_mnist", "lstm-mnist"), ("normalized-mlp-mnist", "normalised-mlp-mnist")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    for call in (lambda: bare(Net().parameters(), name), lambda: learnedopt.load(name)):
        with pytest.raises(FileNotFoundError, match=f"did you mean '{nearest}'"):
            call()


def test_theta_of_another_rule() -> None:
    momentum, adam = Momentum(lr=0.1), Adam(lr=0.1)
    theta = momentum.init_theta(torch.Generator())
    with pytest.raises(ValueError, match="does not fit the rule LSTM"):
        bare(Net().parameters(), (LSTM(), theta))
    with pytest.raises(ValueError, match="does not fit the rule Adam"):
        bare(Net().parameters(), (adam, theta))


@pytest.mark.parametrize("guard", [False, True], ids=["bare", "guarded"])
def test_a_group_that_was_removed(guard: bool) -> None:
    model = Net()
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = learnedopt.LearnedOptimizer(groups, "lstm-quadratic", guard=guard)
    loss_of(model, 0)
    optimizer.step()
    before = values(model)
    del optimizer.param_groups[0]
    with pytest.raises(ValueError, match=r"made with .* parameter groups and has"):
        optimizer.step()
    assert equal(values(model), before)


def test_a_rule_of_a_group_is_as_the_optimizers() -> None:
    model = Net()
    params = list(model.parameters())
    with pytest.raises(FileNotFoundError, match="did you mean 'general'"):
        learned(SGD(lr=0.1), [{"params": params, "rule": "genral"}])
    with pytest.raises(ValueError, match="does not fit the rule LSTM"):
        learned(SGD(lr=0.1), [{"params": params, "rule": (LSTM(), {})}])
    with pytest.raises(TypeError, match="is no learned optimizer"):
        learned(SGD(lr=0.1), [{"params": params, "rule": 0.1}])


# Parameters.


@every
def test_no_parameters_at_all(name: str) -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        made(name, [])


@every
def test_complex_parameters(name: str) -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.cfloat))]
    with pytest.raises(ValueError, match=r"complex64.*view_as_real"):
        made(name, params)
    optimizer = made(name, params[:1])
    with pytest.raises(ValueError, match=r"complex64.*view_as_real"):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda: torch.ones(2, requires_grad=True), TypeError, "should be an iterable of Tensors or dicts"),
        (lambda: [1.0], TypeError, "can only optimize Tensors"),
        (lambda: [torch.ones(2, requires_grad=True) * 2], ValueError, "can't optimize a non-leaf Tensor"),
        (lambda: [{"params": {nn.Parameter(torch.ones(2))}}], TypeError, "ordered collections"),
        (lambda: [("a", nn.Parameter(torch.ones(2))), nn.Parameter(torch.ones(2))], ValueError, "with/without names"),
    ],
)
def test_what_torch_refuses_itself(params: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        learned(SGD(lr=0.1), params())


def test_parameters_twice() -> None:
    one = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        learned(SGD(lr=0.1), [{"params": [one]}, {"params": [one]}])
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        learned(SGD(lr=0.1), [one, one])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr=-0.1 must not be negative"),
        ({"lr": float("nan")}, "lr=nan must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        ({"lr": torch.tensor([0.1, 0.1])}, "1-element|one number|scalar"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    for call in (
        lambda: learned(SGD(lr=0.1), Net().parameters(), **options),
        lambda: learned(SGD(lr=0.1), [{"params": Net().parameters(), **options}]),
    ):
        with pytest.raises(ValueError, match=message):
            call()


class Labelled(Tensor):
    """A tensor of a class that nobody here knows."""


@pytest.mark.parametrize("name", ["general", "lstm-mnist", "adam"])
def test_unknown_subclasses_of_tensors(name: str) -> None:
    strange = torch.ones(2, 3).as_subclass(Labelled).requires_grad_()
    with pytest.raises((TypeError, ValueError, NotImplementedError), match="Labelled"):
        made(name, [strange])
    optimizer = made(name, Net().parameters())
    with pytest.raises((TypeError, ValueError, NotImplementedError), match="Labelled"):
        optimizer.add_param_group({"params": [strange]})
    assert len(optimizer.param_groups) == 1 and torch.equal(strange.as_subclass(Tensor), torch.ones(2, 3))


# What a step needs.


def test_a_rule_that_reads_the_loss_is_told_how_to_pass_it() -> None:
    model = Net()
    optimizer = made("tensor-gru-quadratic", model.parameters())
    for steps in range(2):
        train(model, optimizer, range(steps))
        before, kept = values(model), memory(optimizer)
        loss_of(model, 5)
        with pytest.raises(ValueError, match=r"step\(loss=loss\) or step\(closure\)"):
            optimizer.step()
        assert equal(values(model), before) and equal(memory(optimizer), kept)


@pytest.mark.parametrize("name", [name for name in ALL if rule_of(name).reads_horizon])
def test_a_rule_that_reads_the_horizon_is_not_made_without(name: str) -> None:
    model = Net()
    before = values(model)
    with pytest.raises(ValueError, match=r"LearnedOptimizer\(\.\.\., num_steps=T\)"):
        bare(model.parameters(), source(name))
    assert equal(values(model), before)


@pytest.mark.parametrize("num_steps", [0, -3, 2.5, True])
def test_a_horizon_that_is_none(num_steps: Any) -> None:
    with pytest.raises(ValueError, match="num_steps="):
        bare(Net().parameters(), "general", num_steps=num_steps)


def test_a_loss_by_position_works_or_is_told_apart() -> None:
    """``step(loss)``: torch's first argument is a closure."""
    model, again = Net(), Net()
    optimizer, other = (made("tensor-gru-quadratic", m.parameters()) for m in (model, again))
    loss, same = loss_of(model, 0), loss_of(again, 0)
    before = values(model)
    try:
        optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError) as error:
        assert "step(loss=" in str(error)
        assert equal(values(model), before)
    else:
        other.step(loss=same)
        assert equal(values(again), values(model))


@every
def test_a_loss_and_a_closure(name: str) -> None:
    model = Net()
    optimizer = made(name, model.parameters())
    before = values(model)
    with pytest.raises(ValueError, match="pass one of them"):
        optimizer.step(lambda: loss_of(model, 0), loss=1.0)
    assert equal(values(model), before) and optimizer.state_dict()["state"] == {}


@every
def test_a_loss_that_is_no_scalar(name: str) -> None:
    model = Net()
    optimizer = made(name, model.parameters())
    train(model, optimizer, range(1))
    before, kept = values(model), memory(optimizer)
    loss_of(model, 1)
    with pytest.raises(ValueError, match="must be a scalar"):
        optimizer.step(loss=torch.ones(3))
    assert equal(values(model), before) and equal(memory(optimizer), kept)


@every
def test_sparse_gradients(name: str) -> None:
    table = nn.Embedding(4, 3, sparse=True)
    optimizer = made(name, table.parameters())
    before = values(table)
    loss = table(torch.tensor([1])).square().sum()
    loss.backward()
    with pytest.raises(ValueError, match=r"is sparse .*sparse=False"):
        optimizer.step(loss=loss)
    assert equal(values(table), before)


# State dicts of others.


def others(name: str, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Return optimizers whose state is not that of ``name``."""
    params = list(model.parameters())
    found: dict[str, torch.optim.Optimizer] = {
        "torch.optim.Adam": torch.optim.Adam(params, foreach=False),
        "torch.optim.SGD": torch.optim.SGD(params, 0.1, momentum=0.9),
    }
    return found | {other: made(other, params) for other in ALL if other != name}


@every
def test_the_state_of_every_other_optimizer(name: str) -> None:
    model = Net()
    optimizer = made(name, model.parameters())
    train(model, optimizer, range(2))
    for label, other in others(name, model).items():
        train(model, other, range(1))
        saved, before, kept = other.state_dict(), values(model), memory(optimizer)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        with pytest.raises(ValueError, match=r"."):
            optimizer.load_state_dict(saved)
            pytest.fail(f"{name} loaded the state of {label}")
        assert equal(values(model), before) and equal(memory(optimizer), kept)
        assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


@every
def test_the_state_of_another_theta(name: str) -> None:
    """Of the same rule and the same shapes; before and after its first step."""
    rule = rule_of(name)
    theta = source(name)[1] if name in HAND_DESIGNED else learnedopt.load(name)[1]
    moved = {k: 0.99 * v for k, v in theta.items()}
    model = Net()
    optimizer = made(name, model.parameters())
    options = {"num_steps": optimizer.num_steps}
    for steps in range(2):
        other = bare(model.parameters(), (rule, moved), **options)
        train(model, other, range(steps))
        before, kept = values(model), memory(optimizer)
        with pytest.raises(ValueError, match=r"theta"):
            optimizer.load_state_dict(other.state_dict())
        assert equal(values(model), before) and equal(memory(optimizer), kept)
        train(model, optimizer, range(1))


@every
def test_the_state_of_another_model(name: str) -> None:
    model, small = Net(), nn.Linear(2, 2)
    optimizer, other = made(name, model.parameters()), made(name, small.parameters())
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"doesn't match the size|this state is not of .* with these parameters"):
        other.load_state_dict(saved)
    assert memory(other) == [{}] * 2
    shapes = [(6, 5), (6,), (3, 6), (4,), ()]  # one is another
    strangers = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    other = made(name, strangers)
    if any(isinstance(x, Tensor) and x.dim() for one in memory(optimizer) for x in one.values()):
        with pytest.raises(ValueError, match=r"this state is not of .* with these parameters"):
            other.load_state_dict(saved)
        assert memory(other) == [{}] * 5


@pytest.mark.parametrize("name", [name for name in ALL if rule_of(name).reads_horizon])
def test_the_state_of_another_horizon(name: str) -> None:
    model = Net()
    optimizer, other = (
        made(name, model.parameters()),
        bare(model.parameters(), source(name), num_steps=70),
    )
    train(model, other, range(1))
    with pytest.raises(ValueError, match="this state is of a training of 70 steps"):
        optimizer.load_state_dict(other.state_dict())
    assert memory(optimizer) == [{}] * 5


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no step": lambda saved: saved["state"][0].pop("step"),
    "no entry": lambda saved: saved["state"].pop(0),
    "a foreign entry": lambda saved: saved["state"][1].update(foreign=torch.ones(3)),
    "a word for a step": lambda saved: saved["state"][1].update(step="two"),
    "half a step": lambda saved: saved["state"][1].update(step=1.5),
    "fewer than no steps": lambda saved: saved["state"][1].update(step=-1),
}


def means_something(name: str, damage: str) -> bool:
    """Whether what is left is a state too: of coordinatewise rules, of a parameter that has not been moved yet."""
    return rule_of(name).coordinatewise and (damage == "no entry" or (damage == "no step" and name == "sgd"))


@every
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_states(name: str, damage: str) -> None:
    model = Net()
    optimizer = made(name, model.parameters())
    train(model, optimizer, range(2))
    saved, kept = copy.deepcopy(optimizer.state_dict()), memory(optimizer)
    DAMAGES[damage](saved)
    if means_something(name, damage):
        other = made(name, model.parameters())
        other.load_state_dict(saved)
        train(model, other, range(2, 4))
        assert [one["step"] for one in memory(other)] == [2, 4, 4, 4, 4]
        return
    with pytest.raises(ValueError, match="this state is not of"):
        optimizer.load_state_dict(saved)
    assert equal(memory(optimizer), kept)
