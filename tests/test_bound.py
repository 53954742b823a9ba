"""Steps made ready once against the same steps made ready each time, and what tells the plug-in to make new ones."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plug_in_cases import bare
from test_normalised_kernel import RULES, TOLERANCE, drawn
from torch import Tensor, nn

from learnedopt import LearnedOptimizer
from learnedopt.core import tree
from learnedopt.core.horizon import HorizonWarning
from learnedopt.core.rule import Bound, Kernel
from learnedopt.optimizers import SGD, General, LearnedInit
from learnedopt.optimizers.kernels import lanes as lanes_module
from learnedopt.optimizers.kernels.frame_kernel import FrameBound, FrameKernel

every_rule = pytest.mark.parametrize("kind", RULES)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
AWKWARD = {"none.weight": (0, 4), "none.bias": (0,), "nothing.weight": (3, 0), "row.weight": (1, 70), "scale": ()}
HORIZON = 6


def started(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any, Any]:
    """Return a rule that has a clock, theta, parameters and the state of a run in its first steps."""
    rule = RULES[kind].within(HORIZON)
    theta, _, _, params = drawn(RULES[kind], (), dtype)
    params |= {name: torch.randn(shape, dtype=dtype) for name, shape in AWKWARD.items()}
    return rule, theta, params, rule.init(theta, params)[1]


def gradients(params: Any, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    found = [0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params.values()]
    return [g.mT.contiguous().mT if step == 2 and g.ndim >= 2 else g for g in found]  # of any strides


@torch.no_grad()
@every_dtype
@every_rule
def test_bound_steps_are_those_in_place_to_the_bit_and_the_updates(kind: str, dtype: torch.dtype) -> None:
    rule, theta, params, state = started(kind, dtype)
    own, plain, updated = (copy.deepcopy((params, state)) for _ in range(3))
    bound = rule.kernel.bound(theta, own[1], own[0])
    assert isinstance(bound, Bound)
    for step in range(HORIZON + 2):
        grads = gradients(params, step)
        named = dict(zip(params, grads, strict=True))
        versions = [p._version for p in own[0].values()]
        assert bound.step(grads)
        assert all(p._version > v for p, v in zip(own[0].values(), versions, strict=True))
        assert rule.kernel.step_in_place(theta, named, plain[1], plain[0], None)
        torch.testing.assert_close(own, plain, rtol=0, atol=0, equal_nan=True)
        deltas, after = rule.update(theta, named, updated[1], updated[0], torch.zeros(()))
        updated = ({k: p + deltas[k] for k, p in updated[0].items()}, after)
    assert int(own[1].step) == HORIZON + 2
    torch.testing.assert_close(own, updated, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@torch.no_grad()
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, theta, params, state = started("general")
    alone, shared = (copy.deepcopy((params, state)) for _ in range(2))
    bounds = [rule.kernel.bound(theta, *each[::-1]) for each in (alone, shared)]
    for step in range(3):
        assert bounds[0].step(gradients(params, step))
    monkeypatch.setattr(lanes_module, "SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for step in range(3):
        assert bounds[1].step(gradients(params, step))
    torch.testing.assert_close(shared, alone, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_it_keeps_no_gradient() -> None:
    rule, theta, params, state = started("normalised-mlp")
    bound, grads = rule.kernel.bound(theta, state, params), gradients(params, 0)
    assert bound.step(grads)
    references = [weakref.ref(g) for g in grads]
    del grads
    assert [reference() for reference in references] == [None] * len(references)


class Foreign(Tensor):
    """A subclass that C knows nothing of."""


NOT_SERVED: dict[str, Callable[[Tensor], Tensor]] = {
    "another dtype": lambda g: g.float(),
    "sparse": lambda g: g.to_sparse(),
    "another device": lambda g: g.to("meta"),
    "a subclass": lambda g: g.as_subclass(Foreign),
}


@torch.no_grad()
@pytest.mark.parametrize("what", NOT_SERVED)
def test_gradients_that_it_does_not_serve_leave_everything_as_it_was(what: str) -> None:
    rule, theta, params, state = started("general")
    bound, before = rule.kernel.bound(theta, state, params), copy.deepcopy((params, state))
    grads = gradients(params, 0)
    assert not bound.step([*grads[:3], NOT_SERVED[what](grads[3]), *grads[4:]])
    with torch.enable_grad():
        assert not bound.step(grads)
    torch.testing.assert_close((params, state), before, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=r"a step was given a grad of shape .* for a parameter of shape \(70,\)"):
        bound.step([*grads[:2], grads[2][1:], *grads[3:]])
    torch.testing.assert_close((params, state), before, rtol=0, atol=0, equal_nan=True)
    assert bound.step(grads)


@torch.no_grad()
def test_where_there_are_no_such_steps() -> None:
    rule, theta, params, state = started("general")
    assert Kernel().bound(theta, state, params) is None
    turned = params | {"wide.weight": params["wide.weight"].mT.contiguous().mT}
    assert rule.kernel.bound(theta, state, turned) is None
    assert rule.kernel.bound(theta, state, tree.to(params, None, torch.float32)) is None
    half = tree.to(params, None, torch.bfloat16)
    assert rule.kernel.bound(theta, rule.init(theta, half)[1], half) is None
    with torch.enable_grad():
        assert rule.kernel.bound(theta, state, params) is None
    with pytest.raises(ValueError, match="made by init for these parameters"):
        rule.kernel.bound(theta, state, params | {"wide.weight": params["wide.weight"][1:].clone()})


# The plug-in.


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 70),
        nn.Tanh(),
        nn.Linear(70, 3),
        nn.Linear(3, 3),
    )


def optimizer_of(model: nn.Module, rule: Any = None, **options: Any) -> LearnedOptimizer:
    rule = General() if rule is None else rule
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    return bare(model.named_parameters(), (rule, theta), num_steps=20, **options)


def step(model: nn.Module, optimizer: LearnedOptimizer, number: int, **options: Any) -> None:
    generator = torch.Generator().manual_seed(number)
    optimizer.zero_grad()
    inputs = torch.randn(5, 1, 6, 6, generator=generator)
    model(inputs.contiguous(memory_format=torch.channels_last)).square().mean().backward()
    optimizer.step(**options)


def nothing(model: nn.Module, optimizer: LearnedOptimizer) -> None:
    pass


def look(model: nn.Module, optimizer: LearnedOptimizer) -> None:
    optimizer.state_dict()


def load(model: nn.Module, optimizer: LearnedOptimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def half_a_step(model: nn.Module, optimizer: LearnedOptimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.5
    step(model, optimizer, 99)
    optimizer.param_groups[0]["lr"] = 1.0


def no_gradient(model: nn.Module, optimizer: LearnedOptimizer) -> None:
    step(model, optimizer, 99)
    next(model.parameters()).grad = None
    optimizer.step()


def move_parameters(model: nn.Module, optimizer: LearnedOptimizer) -> None:
    """As ``vector_to_parameters`` and ``Module.to`` do."""
    for p in model.parameters():
        p.data = p.data.clone()


def turn_parameters(model: nn.Module, optimizer: LearnedOptimizer) -> None:
    """To where the same numbers have other places in the same memory."""
    square = model.get_parameter("7.weight")
    square.data = square.data.t()


def move_memory(model: nn.Module, optimizer: LearnedOptimizer) -> None:
    for memory in optimizer.state.values():
        memory.update({k: x.clone() for k, x in memory.items() if isinstance(x, Tensor)})


def put_memory(model: nn.Module, optimizer: LearnedOptimizer) -> None:
    for param, memory in list(optimizer.state.items()):
        optimizer.state[param] = copy.deepcopy(memory)


def change_values(model: nn.Module, optimizer: LearnedOptimizer) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)


def change_theta(model: nn.Module, optimizer: LearnedOptimizer) -> None:
    optimizer._player.theta = {k: x - 0.1 for k, x in optimizer.theta.items()}


EVENTS = {
    each.__name__: each
    for each in (
        nothing, look, load, half_a_step, no_gradient, move_parameters, turn_parameters, move_memory, put_memory,
        change_values, change_theta,
    )
}  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
def test_the_plug_in_steps_as_without_and_its_state_dict_is_the_same(
    event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, one_step = [], FrameBound.step

    def trained() -> tuple[Any, Any]:
        model = conv_net()
        optimizer = optimizer_of(model)
        for number in range(8):
            if number == 5:
                EVENTS[event](model, optimizer)
            step(model, optimizer, number)
        return dict(model.named_parameters()), optimizer.state_dict()

    monkeypatch.setattr(FrameBound, "step", lambda *args, **told: calls.append(1) or one_step(*args, **told))
    found = trained()
    count = len(calls)
    assert count >= (4 if event == "turn_parameters" else 6)  # what is not contiguous is not served
    monkeypatch.setattr(FrameKernel, "bound", Kernel.bound)
    expected = trained()
    assert len(calls) == count
    torch.testing.assert_close((found[0], found[1]["state"]), (expected[0], expected[1]["state"]), rtol=0, atol=0)
    assert found[1]["param_groups"] == expected[1]["param_groups"]
    counts = {memory["step"] for memory in found[1]["state"].values()}
    assert (len(counts) == 1) == (event != "no_gradient")


def test_what_was_given_away_stays_and_copies_go_their_own_way() -> None:
    model = conv_net()
    optimizer = optimizer_of(model)
    for number in range(4):
        step(model, optimizer, number)
    given, twin = optimizer.state_dict(), copy.deepcopy((model, optimizer))
    kept = copy.deepcopy(given)
    for number in range(4, 8):
        step(model, optimizer, number)
    torch.testing.assert_close(given["state"], kept["state"], rtol=0, atol=0)
    for number in range(4, 8):
        step(*twin, number)
    torch.testing.assert_close(dict(twin[0].named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)
    torch.testing.assert_close(twin[1].state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


def test_a_bound_step_warns_past_the_horizon_and_refuses_what_is_no_loss() -> None:
    model = conv_net()
    optimizer = optimizer_of(model)
    for number in range(20):
        step(model, optimizer, number, loss=torch.tensor(1.0))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="must be a scalar"):
        optimizer.step(loss=torch.zeros(2))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.warns(HorizonWarning, match="step 21 is past the num_steps=20") as seen:
        step(model, optimizer, 20)
    assert seen[0].filename == __file__


def test_wrapped_rules_hand_it_on_and_others_have_none() -> None:
    model = nn.Linear(3, 2)
    wrapped = LearnedInit(General(), {k: p.detach().clone() for k, p in model.named_parameters()})
    for rule, bound in ((wrapped, True), (SGD(), False)):
        optimizer = optimizer_of(model, rule)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert bool(optimizer._together[0].ready) == bound
        assert optimizer.state_dict()["state"][0]["step"] == 3
