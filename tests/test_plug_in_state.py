"""What torch asks of an optimizer's state, of every packaged rule and the hand-designed ones: files, copies, hooks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plug_in_cases import (
    ALL,
    PACKAGED,
    Net,
    equal,
    loss_of,
    made,
    memory,
    rule_of,
    source,
    take,
    through_a_file,
    train,
    values,
)
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from learnedopt import LearnedOptimizer

every = pytest.mark.parametrize("name", ALL)


def plain(params: list[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    return [p for _, p in params]


def named(params: list[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    return params


def pair(name: str, given: Callable[[Any], Any] = named) -> tuple[Net, LearnedOptimizer]:
    model = Net()
    return model, made(name, given(list(model.named_parameters())), lr=0.7)


# Files.


@every
@pytest.mark.parametrize("cut", [0, 3])
def test_a_run_goes_on_from_a_file_to_the_bit(name: str, cut: int) -> None:
    model, optimizer = pair(name)
    train(model, optimizer, range(cut))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again, other = pair(name)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert equal(other.state_dict(), saved["optimizer"])
    for one, its in ((model, optimizer), (again, other)):
        train(one, its, range(cut, cut + 3))
    assert equal(values(again), values(model)) and equal(memory(other), memory(optimizer))


@every
@pytest.mark.parametrize(("saves", "loads"), [(named, plain), (plain, named)], ids=["to plain", "to named"])
def test_named_and_unnamed_parameters_load_each_others_state(name: str, saves: Any, loads: Any) -> None:
    """The rule ``general`` tells kinds of tensors by their names, so that its steps differ; its memory does not."""
    model, optimizer = pair(name, saves)
    train(model, optimizer, range(3))
    again, other = pair(name, loads)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert equal(memory(other), memory(optimizer))
    train(again, other, range(3, 5))
    if rule_of(name).coordinatewise:
        train(model, optimizer, range(3, 5))
        assert equal(values(again), values(model)) and equal(memory(other), memory(optimizer))


@every
def test_a_state_dict_is_laid_out_by_parameter(name: str) -> None:
    model, optimizer = pair(name)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    assert [*saved["state"]] == [0, 1, 2, 3, 4] and saved["param_groups"][0]["params"] == [0, 1, 2, 3, 4]
    for index, (parameter, kept) in enumerate(zip(model.parameters(), saved["state"].values(), strict=True)):
        assert kept["step"] == 2
        sizes = {x.numel() for k, x in kept.items() if isinstance(x, torch.Tensor) and not k.startswith("rule.")}
        # What lies with a parameter is as many numbers for each of its own, or few for the whole tensor.
        own, rows = parameter.numel(), [*parameter.shape]
        assert all(size % own == 0 or size <= 64 or size in rows for size in sizes), (index, sizes)


@every
def test_what_was_saved_does_not_move_with_later_steps(name: str) -> None:
    model, optimizer = pair(name)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    train(model, optimizer, range(2, 4))
    assert equal(saved, kept)
    optimizer.load_state_dict(saved)
    train(model, optimizer, range(4, 6))
    assert equal(saved, kept)


@every
def test_what_was_saved_stays_where_a_parameter_rests_before_it_goes_on(name: str) -> None:
    model = Net()
    optimizer = made(name, list(model.named_parameters()))  # of rate 1: steps are taken in place
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    loss = loss_of(model, 3)
    model.head.weight.grad = None
    take(optimizer, loss)
    train(model, optimizer, range(4, 7))
    assert equal(saved, kept)


@every
def test_memory_that_was_put_there_by_hand_is_what_counts(name: str) -> None:
    model, twin = Net(), Net()
    optimizer, other = (made(name, list(net.named_parameters())) for net in (model, twin))
    train(model, optimizer, range(3))
    train(twin, other, range(3))
    for entry in optimizer.state.values():  # as those do who keep it elsewhere between steps
        entry.update({k: x.clone() for k, x in entry.items() if isinstance(x, torch.Tensor)})
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert equal(values(model), values(twin)) and equal(memory(optimizer), memory(other))


@every
def test_a_rate_and_other_options_of_groups_are_loaded(name: str) -> None:
    model, optimizer = pair(name)
    optimizer.param_groups[0].update(lr=0.25, weight_decay=0.5, label="all")
    train(model, optimizer, range(1))
    _, other = pair(name)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    group = other.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["label"]) == (0.25, 0.5, "all")


# Copies.


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("cut", [0, 2])
def test_copies_go_on_alone(name: str, copied: Callable[[Any], Any], cut: int) -> None:
    model, optimizer = pair(name)
    train(model, optimizer, range(cut))
    before, kept = values(model), memory(optimizer)
    again, other = copied((model, optimizer))
    train(again, other, range(cut, cut + 2))
    assert equal(values(model), before) and equal(memory(optimizer), kept)
    train(model, optimizer, range(cut, cut + 2))
    assert equal(values(again), values(model)) and equal(memory(other), memory(optimizer))
    public = {k for k in vars(optimizer) if not k.startswith("_")}
    assert public == {k for k in vars(other) if not k.startswith("_")}


# Hooks.


@every
def test_step_hooks_of_one_optimizer_and_of_all(name: str) -> None:
    model, optimizer = pair(name)
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("all, before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all, after")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]
    train(model, optimizer, range(1))
    for handle in handles:
        handle.remove()
    train(model, optimizer, range(1, 2))
    assert calls == ["all, before", "before", "after", "all, after"]


def test_a_step_hook_may_change_what_step_is_given() -> None:
    """Here the loss of ``tensor-gru-quadratic``, which reads it."""
    (model, optimizer), (again, other) = pair("tensor-gru-quadratic"), pair("tensor-gru-quadratic")
    optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "loss": 3.0}))
    for step in range(2):
        loss_of(model, step)
        optimizer.step()
        loss_of(again, step)
        other.step(loss=3.0)
    assert equal(values(again), values(model))


@every
def test_state_dict_hooks(name: str) -> None:
    model, optimizer = pair(name)
    train(model, optimizer, range(1))
    order: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: order.append("second, before"))
    optimizer.register_state_dict_pre_hook(lambda _: order.append("first, before"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "note": "mine"})
    saved = optimizer.state_dict()
    assert order == ["first, before", "second, before"] and saved["note"] == "mine"
    _, other = pair(name)
    other.register_load_state_dict_pre_hook(lambda _, given: {k: v for k, v in given.items() if k != "note"})
    other.register_load_state_dict_post_hook(lambda loaded: order.append(f"{memory(loaded)[0]['step']}"))
    other.load_state_dict(saved)
    assert order[2:] == ["1"]
    assert equal(memory(other), memory(optimizer))


# Types and kinds of parameters.


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_types_of_parameters(name: str, dtype: torch.dtype) -> None:
    """The same run as in float32, up to the rounding of the parameters, with a memory that is no narrower."""
    model, optimizer = pair(name)
    other = Net().to(dtype)
    again = made(name, list(other.named_parameters()), lr=0.7)
    train(model, optimizer, range(4))
    train(other, again, range(4))
    narrowest = min(
        (
            x.dtype
            for kept in memory(again)
            for x in kept.values()
            if isinstance(x, torch.Tensor) and x.is_floating_point()
        ),
        key=lambda t: torch.finfo(t).bits,
        default=torch.float32,
    )
    assert torch.finfo(narrowest).bits >= 32
    start, tolerance = values(Net()), 0.2 if dtype is torch.bfloat16 else 0.05
    for k, p in values(model).items():
        assert values(other)[k].dtype == dtype
        moved, same = p - start[k], values(other)[k].float() - start[k]
        rounding = 8 * torch.finfo(dtype).eps * float(p.abs().max())
        assert float((moved - same).norm()) <= tolerance * float(moved.norm()) + rounding * p.numel() ** 0.5


@every
def test_a_model_that_changes_its_type_goes_on(name: str) -> None:
    model, optimizer = pair(name)
    train(model, optimizer, range(2))
    model.double()
    before = values(model)
    train(model, optimizer, range(2, 4))
    after = values(model)
    assert all(p.dtype == torch.float64 and p.isfinite().all() for p in after.values())
    assert all(not torch.equal(p, before[k]) for k, p in after.items())


@every
def test_parameters_that_cannot_be_trained_are_let_be(name: str) -> None:
    """A table of integers and a frozen layer among the parameters, as ``model.parameters()`` has them."""
    model, optimizer = pair(name)
    other = Net()
    other.register_parameter("table", nn.Parameter(torch.arange(4), requires_grad=False))
    other.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
    again = made(name, list(other.named_parameters()), lr=0.7)
    train(model, optimizer, range(3))
    train(other, again, range(3))
    found = values(other)
    assert torch.equal(found.pop("table"), torch.arange(4)) and torch.equal(found.pop("frozen"), torch.ones(2))
    assert equal({k: found[k] for k in sorted(found)}, dict(sorted(values(model).items())))


class Lazy(nn.Module):
    """A net whose first layer gets its shape from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LazyLinear(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(x)))


@every
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_parameters_that_are_not_there_yet(name: str) -> None:
    model = Lazy()
    optimizer = made(name, model.named_parameters())
    model(torch.zeros(1, 5))
    again = copy.deepcopy(model)
    other = made(name, again.named_parameters())
    train(model, optimizer, range(3))
    train(again, other, range(3))
    assert equal(values(again), values(model))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_parameters_that_come_after_the_first_step() -> None:
    for name in ("general", "lstm-mnist"):
        model = nn.ModuleDict({"early": Net(), "late": Lazy()})
        optimizer = made(name, model.named_parameters())
        train(model["early"], optimizer, range(2))
        loss_of(model["late"], 2)
        before = values(model)
        if rule_of(name).coordinatewise:
            optimizer.step()
            assert not equal(values(model), before)
        else:
            with pytest.raises(ValueError, match=r"ties parameters together, and began without .*late.layer.weight"):
                optimizer.step()
            assert equal(values(model), before)


@every
def test_parameters_of_no_numbers_and_empty_groups(name: str) -> None:
    model, optimizer = pair(name, plain)
    other, nothing = Net(), nn.Parameter(torch.zeros(0))
    groups: list[dict[str, Any]] = [{"params": list(other.parameters())}, {"params": []}]
    again = made(name, groups, lr=0.7)
    again.add_param_group({"params": [nothing]})
    for step in range(3):
        train(model, optimizer, [step])
        loss = loss_of(other, step)
        nothing.grad = torch.zeros(0)
        take(again, loss)
    assert equal(values(other), values(model)) and nothing.shape == (0,)


# Gradients that are not there.


@every
def test_without_gradients_a_step_is_nothing(name: str) -> None:
    model, optimizer = pair(name)
    for cut in range(2):
        train(model, optimizer, range(2 * cut))
        before, kept = values(model), memory(optimizer)
        optimizer.zero_grad()
        optimizer.step()
        assert equal(values(model), before) and equal(memory(optimizer), kept)


@every
def test_a_parameter_without_a_gradient_keeps_its_value_and_its_memory(name: str) -> None:
    model, optimizer = pair(name)
    train(model, optimizer, range(2))
    before, kept = values(model), memory(optimizer)
    loss = loss_of(model, 2)
    model.head.weight.grad = None
    take(optimizer, loss)
    names = [k for k, _ in model.named_parameters()]
    out = names.index("head.weight")
    assert equal(memory(optimizer)[out], kept[out]) and torch.equal(model.head.weight, before["head.weight"])
    assert all(not torch.equal(p, before[k]) for k, p in values(model).items() if k != "head.weight")
    assert [one["step"] for one in memory(optimizer)] == [2 if i == out else 3 for i in range(5)]


@every
def test_groups_after_the_first_step(name: str) -> None:
    """Coordinatewise rules begin with the new parameters; others say that they cannot, unless a rule comes along."""
    model = Net()
    head = [(k, p) for k, p in model.named_parameters() if k.startswith("head")]
    rest = [(k, p) for k, p in model.named_parameters() if not k.startswith("head")]
    optimizer = made(name, head)
    train(model, optimizer, range(2))
    before = values(model)
    if rule_of(name).coordinatewise:
        optimizer.add_param_group({"params": rest, "lr": 0.5})
    else:
        with pytest.raises(ValueError, match=r"before the first step only.*rule of its own"):
            optimizer.add_param_group({"params": rest})
        assert len(optimizer.param_groups) == 1
        train(model, optimizer, range(2, 3))
        assert all(torch.equal(p, before[k]) for k, p in rest)
        optimizer.add_param_group({"params": rest, "rule": source("adam")})
    train(model, optimizer, range(3, 5))
    assert all(not torch.equal(p, before[k]) for k, p in values(model).items())
    assert memory(optimizer)[-1]["step"] == 2 and memory(optimizer)[0]["step"] > 2


def test_which_packaged_rules_take_groups_late() -> None:
    assert {name for name in PACKAGED if rule_of(name).coordinatewise} == {"lstm-mnist", "lstm-quadratic"}
