"""The plug-in against the engine's inner step, bit by bit, and against what torch asks of its optimizers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plug_in_cases import bare
from problems import Anchored, Quadratic
from test_rules import RULES
from torch import Tensor, nn
from torch.nn import functional

import learnedopt
from learnedopt import InnerLoop, LearnedOptimizer, ModuleFamily, Tape, UpdateRule
from learnedopt.core import tree
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers import (
    LSTM,
    SGD,
    Adam,
    Clip,
    LearnedInit,
    LearnedRates,
    Momentum,
    Partition,
    make,
    per_tensor,
)
from learnedopt.plug_in.memory import Layout


class Net(nn.Module):
    """A small MLP with a factor on its logits: two matrices, two vectors and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.layer = nn.Linear(5, 6)
        self.layer2 = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer2(torch.tanh(self.layer(x)))


def data(seed: int, step: int, split: str) -> tuple[Tensor, Tensor]:
    """A batch whose second input is always 0, as an image's border is: its weights never get a gradient."""
    generator = torch.Generator().manual_seed(1000 * seed % 2**31 + 2 * step + (split == "valid"))
    inputs = torch.randn(7, 5, generator=generator) * torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    return inputs, torch.randint(3, (7,), generator=generator)


def net(seed: int = 3, dtype: torch.dtype | None = None) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().to(dtype)


def template() -> Params:
    return {k: p.detach().clone() for k, p in net(seed=8).named_parameters()}


def moved_theta(rule: UpdateRule) -> Theta:
    """Return a theta that is moved off the template, so that a learned start is not the model's own."""
    generator = torch.Generator().manual_seed(7)
    theta = rule.init_theta(generator)
    return {k: v + 0.1 * torch.randn(v.shape, generator=generator) if v.ndim else v for k, v in theta.items()}


def lstm(**options: Any) -> tuple[LSTM, Theta]:
    rule = LSTM(hidden_size=4, **options)
    return rule, moved_theta(rule)


def back_propagate(model: nn.Module, step: int, seed: int = 0) -> Tensor:
    """Leave the gradients of a step's loss on the model, and return the loss."""
    inputs, targets = data(seed, step, "train")
    dtype = next(model.parameters()).dtype
    loss = functional.cross_entropy(model(inputs.to(dtype)), targets)
    model.zero_grad()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        back_propagate(model, step)
        optimizer.step()


def values(model: nn.Module) -> Params:
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def memory(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the rule's memory, in order."""
    assert isinstance(optimizer, LearnedOptimizer)
    ((player, members),) = optimizer._parts()
    layout = Layout(player.begun(members), {m.name: m.param for m in members}, spread=player.rule.coordinatewise)
    state = layout.state({m.name: optimizer.state[m.param] for m in members})
    return [x.clone() for x in tree.leaves(state)]


def equal(first: Any, second: Any) -> bool:
    """Whether the leaves of two trees, tensors and numbers, agree in every bit, and in dtypes."""

    def same(a: Any, b: Any) -> bool:
        return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return all(same(a, b) for a, b in zip(tree.leaves(first), tree.leaves(second), strict=True))


class Greedy(UpdateRule):
    """Steps in proportion to the loss, remembers the best loss, and keeps the very tensors that it was given."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(0.3)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, {"best": torch.tensor(9.0), "before": params, "grads": params}

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        best = torch.minimum(state["best"].to(loss.dtype), loss)
        deltas = {
            k: -theta["lr"].to(g.dtype) * (best / loss) * (g + 0.1 * state["grads"][k]) + 0.01 * state["before"][k]
            for k, g in grads.items()
        }
        return deltas, {"before": params, "grads": grads, "best": best}


KINDS: dict[str, Callable[[Params], UpdateRule]] = {**RULES, "reads the loss": lambda t: Greedy()}


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Make each of the two the default dtype in turn."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_engines_bit_by_bit(kind: str, dtype: torch.dtype) -> None:
    rule = KINDS[kind](template())
    theta = moved_theta(rule)
    length = 5 if rule.reads_horizon else None
    loop = InnerLoop(ModuleFamily(Net, functional.cross_entropy, data), rule, horizon=length)
    tasks = {"seed": torch.tensor([5])}
    model = Net()
    model.load_state_dict(tree.squeeze(loop.family.init_params(tasks)))
    optimizer = bare(model.named_parameters(), (rule, theta), num_steps=length, adopt_start=True)
    start = values(model)
    for step in range(5):
        optimizer.step(loss=back_propagate(model, step, seed=5))
        optimizer.zero_grad(set_to_none=False)  # in place: what the rule remembers must not be the gradient itself
    carry = loop.run(theta, loop.start(tasks), 5, Tape.NONE).end
    assert not equal(start, carry.params)
    assert equal(values(model), tree.squeeze(carry.params))
    assert equal(memory(optimizer), tree.leaves(tree.squeeze(carry.state)))


def test_memory_in_another_dtype_than_the_parameters() -> None:
    """A float64 rule on a float32 model, and a float32 rule on a bfloat16 model."""
    rule, theta = lstm()
    for theta_dtype, param_dtype in ((torch.float64, torch.float32), (torch.float32, torch.bfloat16)):
        model = net(dtype=param_dtype)
        start = values(model)
        optimizer = bare(model.parameters(), (rule, {k: v.to(theta_dtype) for k, v in theta.items()}))
        train(model, optimizer, range(3))
        assert {x.dtype for x in memory(optimizer)} == {theta_dtype}
        assert {p.dtype for p in values(model).values()} == {param_dtype}
        assert all(not torch.equal(p, start[k]) for k, p in values(model).items())
        assert all(p.isfinite().all() for p in values(model).values())


def test_parameters_of_mixed_dtypes() -> None:
    generator = torch.Generator().manual_seed(1)
    half, full = (torch.randn(3, generator=generator).to(d).requires_grad_() for d in (torch.bfloat16, torch.float32))
    half.grad, full.grad = torch.tensor([0.5, -2.0, 0.0]).bfloat16(), torch.tensor([1.0, 3.0, -1.0])
    before = {"0": half.detach().clone(), "1": full.detach().clone()}
    grads = {"0": half.grad, "1": full.grad}
    adam = Adam(lr=0.1, beta2=0.9)
    for rule, theta in (lstm(), (adam, adam.init_theta(generator))):
        half.data, full.data = before["0"].clone(), before["1"].clone()
        bare([half, full], (rule, theta)).step()
        deltas, _ = rule.update(theta, grads, rule.init(theta, before)[1], before, torch.tensor(0.0))
        assert equal([half, full], [before["0"] + deltas["0"], before["1"] + deltas["1"]])
        assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)


# Groups, rates and schedulers.


def by_hand(model: Net, rule: UpdateRule, theta: Theta, rates: list[Callable[[int], float]]) -> None:
    """Take as many steps as there are rates for the layers' parameters; ``scale`` comes last, at rate 1."""
    named = {k: p for k, p in model.named_parameters() if k != "scale"} | {"scale": model.scale}
    _, state = rule.init(theta, {k: p.detach() for k, p in named.items()})
    for step, rate in enumerate(rates):
        loss = back_propagate(model, step)
        params, grads = ({k: f(p) for k, p in named.items()} for f in (Tensor.detach, lambda p: p.grad))
        with torch.no_grad():
            deltas, state = rule.update(theta, grads, state, params, loss)
            for k, p in named.items():
                p += (1.0 if k == "scale" else rate(step)) * deltas[k]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("as_tensor", [False, True])
def test_groups_have_a_rate_each_and_schedulers_change_it(as_tensor: bool) -> None:
    rule = Clip(LSTM(hidden_size=4), max_norm=0.1)  # the norm is one of all groups together
    theta = moved_theta(rule)
    model, reference = net(), net()
    layers = [p for k, p in model.named_parameters() if k != "scale"]
    lr = torch.tensor(0.5) if as_tensor else 0.5
    groups = [{"params": layers, "lr": lr}, {"params": [model.scale]}]
    optimizer = bare(groups, (rule, theta))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1 / (1 + step), lambda step: 1.0])
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    by_hand(reference, rule, theta, [lambda step: 0.5 / (1 + step)] * 4)
    torch.testing.assert_close(values(model), values(reference), rtol=1e-13, atol=1e-13)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.1, 1.0]


class Explosive(UpdateRule):
    """Moves by infinity, and counts."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"unused": torch.tensor(0.0)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, {"count": torch.tensor(0)}

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        return {k: torch.full_like(g, torch.inf) for k, g in grads.items()}, {"count": state["count"] + 1}


def test_a_rate_of_zero_moves_nothing() -> None:
    model = net()
    start = values(model)
    optimizer = bare(model.parameters(), (Explosive(), {"unused": torch.tensor(0.0)}), lr=0.0)
    train(model, optimizer, range(2))
    assert equal(values(model), start)
    assert equal(memory(optimizer), [torch.tensor(2)])
    optimizer.param_groups[0]["lr"] = 1.0
    train(model, optimizer, range(2, 3))
    assert all(p.isinf().all() for p in values(model).values())


@pytest.mark.parametrize("lr", [-0.1, float("nan")])
def test_rates_that_are_none(lr: float) -> None:
    with pytest.raises(ValueError, match=r"lr=.* must not be negative"):
        bare(net().parameters(), lstm(), lr=lr)


@pytest.mark.parametrize("option", ["fused", "capturable", "differentiable", "foreach", "momentum", "betas"])
def test_options_of_other_optimizers_are_refused(option: str) -> None:
    with pytest.raises(TypeError, match=rf"no option '{option}'.*lr, .* state_dtype and guard"):
        bare(net().parameters(), lstm(), **{option: True})
    with pytest.raises(TypeError, match=rf"group sets \['{option}'\]"):
        bare([{"params": net().parameters(), option: True}], lstm())


def test_group_options_that_are_switched_off_or_labels_pass() -> None:
    group = {"params": net().parameters(), "weight_decay": 0.0, "foreach": None, "label": "all"}
    assert bare([group], lstm()).param_groups[0]["label"] == "all"


def test_groups_are_added_later_where_the_rule_moves_each_parameter_by_itself() -> None:
    rule, theta = lstm()
    model, whole = net(), net()
    rest = [p for k, p in model.named_parameters() if k != "scale"]
    optimizer = bare([model.scale], (rule, theta))
    optimizer.add_param_group({"params": rest})
    train(model, optimizer, range(3))
    train(whole, bare(whole.parameters(), (rule, theta)), range(3))
    assert equal(values(model), values(whole))
    more = torch.ones(2, requires_grad=True)
    optimizer.add_param_group({"params": [more]})
    more.grad = torch.tensor([1.0, -2.0])
    alone = more.detach().clone().requires_grad_()
    alone.grad = more.grad.clone()
    train(model, optimizer, range(3, 4))
    train(whole, bare([alone], (rule, theta)), range(3, 4))
    assert torch.equal(more, alone)
    assert [optimizer.state[p]["step"] for p in (model.scale, more)] == [4, 1]


def test_groups_are_added_before_the_first_step_only_where_the_rule_ties_parameters() -> None:
    rule = Clip(LSTM(hidden_size=4), max_norm=0.1)
    model = net()
    optimizer = bare(model.parameters(), (rule, moved_theta(rule)))
    train(model, optimizer, range(1))
    more = {"params": [torch.ones(2, requires_grad=True)]}
    with pytest.raises(ValueError, match=r"Clip ties parameters together.*before the first step only"):
        optimizer.add_param_group(more)
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({**more, "rule": lstm()})  # of its own
    train(model, optimizer, range(1, 2))


def test_a_group_that_is_refused_leaves_no_trace() -> None:
    model = net()
    optimizer = bare([model.scale], lstm())
    for wrong in ({"params": [torch.ones(2, dtype=torch.cfloat, requires_grad=True)]}, {"params": [], "lr": -1.0}):
        with pytest.raises(ValueError, match=r"view_as_real|must not be negative"):
            optimizer.add_param_group(wrong)
        assert len(optimizer.param_groups) == 1
    train(model, optimizer, range(1))
    rule = LearnedInit(SGD(lr=0.1), {"scale": torch.tensor(2.0)})
    groups = [{"params": [(k, p)]} for k, p in model.named_parameters()]
    optimizer = bare(groups[:1], (rule, rule.init_theta(torch.Generator())), adopt_start=True)
    assert model.scale == 2
    with pytest.raises(ValueError, match="the learned start is one of parameters"):
        optimizer.add_param_group(groups[1])
    assert len(optimizer.param_groups) == 1


# Names.


@pytest.mark.usefixtures("float64")
def test_names_choose_the_rule_of_a_partition() -> None:
    rule = Partition({"biases": ("*.bias", SGD(lr=0.5)), "rest": ("*", SGD(lr=0.0))})
    theta = rule.init_theta(torch.Generator())
    model = net()
    start = values(model)
    optimizer = bare(model.named_parameters(), (rule, theta))
    train(model, optimizer, range(2))
    moved = {k for k, p in values(model).items() if not torch.equal(p, start[k])}
    assert moved == {"layer.bias", "layer2.bias"}
    with pytest.raises(ValueError, match="no parameter joins the groups"):
        bare(model.parameters(), (rule, theta))


def test_names_that_the_rule_does_not_know() -> None:
    rule = LearnedRates(template(), lr=0.1)
    theta = moved_theta(rule)
    model = net()
    with pytest.raises(ValueError, match=r"named_parameters\(\)"):
        back_propagate(model, 0)
        bare(model.parameters(), (rule, theta)).step()
    lstms = per_tensor(LSTM(hidden_size=2), template())
    with pytest.raises(ValueError, match=r"parameter '0' matches none"):
        bare(model.parameters(), (lstms, moved_theta(lstms)))


def test_names_must_be_unique() -> None:
    groups = [{"params": list(part.named_parameters())} for part in (nn.Linear(2, 2), nn.Linear(2, 2))]
    with pytest.raises(ValueError, match=r"names \['bias', 'weight'\] occur more than once"):
        bare(groups, lstm())


# The loss.


@pytest.mark.usefixtures("float64")
def test_a_closure_is_a_step_with_its_loss() -> None:
    theta = Greedy().init_theta(torch.Generator())
    model, reference = net(), net()
    optimizer, other = (bare(m.parameters(), (Greedy(), theta)) for m in (model, reference))
    with torch.no_grad():  # the closure needs gradients nevertheless
        losses = [optimizer.step(lambda step=step: back_propagate(model, step)) for step in range(3)]
    for step, loss in enumerate(losses):
        same = back_propagate(reference, step)
        assert torch.equal(loss, same)
        assert other.step(loss=same.item()) == same.item()
    assert equal(values(model), values(reference))


def test_a_rule_that_reads_the_loss_must_get_it() -> None:
    model = net()
    start = values(model)
    optimizer = bare(model.parameters(), (Greedy(), Greedy().init_theta(torch.Generator())))
    loss = back_propagate(model, 0)
    with pytest.raises(ValueError, match=r"Greedy\.update failed without the loss .*step\(loss=loss\)"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"shape \(2,\), but must be a scalar"):
        optimizer.step(loss=loss.expand(2))
    with pytest.raises(ValueError, match="a closure that returns the loss, and a loss"):
        optimizer.step(lambda: back_propagate(model, 0), loss=loss)
    assert equal(values(model), start) and not optimizer.state
    optimizer.step(loss=loss.reshape(1))
    assert not equal(values(model), start)


def test_other_errors_of_a_rule_are_its_own() -> None:
    class Broken(Greedy):
        def update(self, *args: Any) -> Any:
            raise TypeError("of the rule's own")

    model = net()
    optimizer = bare(model.parameters(), (Broken(), Greedy().init_theta(torch.Generator())))
    with pytest.raises(TypeError, match="of the rule's own"):
        optimizer.step(loss=back_propagate(model, 0))


# Gradients.


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "reads the loss"])
def test_a_parameter_without_a_gradient_stays_and_its_memory_too(kind: str) -> None:
    """A frozen layer in the middle, which then thaws: its own memory is as it was."""
    rule = KINDS[kind](template())
    model = net()
    optimizer = bare(
        model.named_parameters(),
        (rule, moved_theta(rule)),
        num_steps=9 if rule.reads_horizon else None,
        adopt_start=True,
    )
    frozen = model.layer.weight

    def step(number: int, thawed: bool) -> None:
        loss = back_propagate(model, number)
        if not thawed:
            frozen.grad = None
        optimizer.step(loss=loss)

    for number in range(2):
        step(number, True)
    start = values(model)
    (_, members), *_ = optimizer._parts()
    layout = Layout(optimizer._player.begun(members), {m.name: m.param for m in members}, spread=True)
    kept = {k: x.clone() for k, x in optimizer.state[frozen].items() if k not in {"step", *layout.common}}
    for number in range(2, 4):
        step(number, False)
    assert torch.equal(frozen, start["layer.weight"])
    assert kind == "iterate" or not equal(values(model), start)
    assert equal({k: optimizer.state[frozen][k] for k in kept}, kept)
    assert optimizer.state[frozen]["step"] == 2 and optimizer.state[model.layer.bias]["step"] == 4
    step(4, True)
    assert torch.equal(frozen, start["layer.weight"]) == (kind in ("iterate", "anil"))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RMSprop", "SGD"])
def test_experts_that_take_turns_are_moved_as_torch_moves_them(name: str) -> None:
    """Each parameter has its own age: corrections of averages are its own."""
    options: dict[str, Any] = {"lr": 0.01, **({"momentum": 0.9} if name == "SGD" else {})}
    options |= {"weight_decay": 0.1} if name == "AdamW" else {}
    rule = make({"SGD": "momentum"}.get(name, name.lower()), **options)
    model, reference = net(), net()
    other = getattr(torch.optim, name)(reference.parameters(), **options)
    optimizer = bare(model.parameters(), (rule, rule.init_theta(torch.Generator())))
    for step in range(8):
        for m, o in ((model, optimizer), (reference, other)):
            back_propagate(m, step)
            for i, p in enumerate(m.parameters()):
                if (step + i) % 3 == 0 or (step < 4 and i == 2):
                    p.grad = None
            o.step()
    torch.testing.assert_close(values(model), values(reference), rtol=1e-12, atol=1e-14)


def test_without_any_gradient_nothing_happens() -> None:
    model = net()
    optimizer = bare(model.parameters(), lstm())
    train(model, optimizer, range(1))
    optimizer.zero_grad()
    before, kept = values(model), memory(optimizer)
    optimizer.step()
    assert equal(values(model), before) and equal(memory(optimizer), kept)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(4, 3, sparse=True)
    optimizer = bare(table.parameters(), lstm())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of '0' is sparse .*sparse=False"):
        optimizer.step()


def test_parameters_on_several_devices_are_refused() -> None:
    here, there = torch.ones(2, requires_grad=True), torch.ones(2, device="meta", requires_grad=True)
    with pytest.raises(ValueError, match=r"lie on \['cpu', 'meta'\]"):
        bare([here, there], lstm())


# Theta and learned starts.


def test_theta_is_copied() -> None:
    rule, theta = lstm()
    leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
    model, reference = net(), net()
    optimizer = bare(model.parameters(), (rule, leaves))
    with torch.no_grad():
        for v in leaves.values():
            v.zero_()
    train(model, optimizer, range(2))
    train(reference, bare(reference.parameters(), (rule, theta)), range(2))
    assert equal(values(model), values(reference))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: (LSTM(hidden_size=5), lstm()[1]), ValueError, "does not fit the rule LSTM"),
        (lambda: (Momentum(lr=0.1), lstm()[1]), ValueError, r"does not fit the rule Momentum.*readout/bias"),
        (lambda: (Momentum(lr=0.1), {"lr": 0.1, "momentum": 0.9}), ValueError, "does not fit the rule Momentum"),
        (lambda: (Momentum(lr=0.1), None), ValueError, "got NoneType"),
        (lambda: LSTM(), TypeError, "a LSTM is no learned optimizer"),
        (lambda: (lstm()[1], LSTM()), TypeError, r"or \(rule, theta\)"),
        (lambda: 0.01, TypeError, "a float is no learned optimizer"),
        (lambda: "no-such-optimizer", FileNotFoundError, "no-such-optimizer"),
    ],
)
def test_rules_that_cannot_be_used(wrong: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bare(net().parameters(), wrong())


def test_a_checkpoint_is_the_rule_and_theta_that_were_saved(tmp_path: Path) -> None:
    rule, theta = lstm()
    path = learnedopt.save(tmp_path / "mine", rule, theta)
    trained = []
    for source in (path, str(path), (rule, theta)):
        model = net()
        train(model, bare(model.parameters(), source), range(3))
        trained.append(values(model))
    assert equal(trained[0], trained[2]) and equal(trained[1], trained[2])


def test_a_learned_start_is_adopted_only_if_allowed() -> None:
    rule = LearnedInit(Adam(lr=0.05), template())
    theta = moved_theta(rule)
    model = net()
    start = values(model)
    with pytest.raises(ValueError, match=r"overwrite the parameters \['layer.weight', .*adopt_start=True"):
        bare(model.named_parameters(), (rule, theta))
    assert equal(values(model), start)
    bare(model.named_parameters(), (rule, theta), adopt_start=True)
    assert equal(values(model), {k: theta[f"init/{k}"] for k in start})
    bare(model.named_parameters(), (rule, theta))  # already there: nothing would change


def test_a_learned_start_is_adopted_once() -> None:
    """Weights that are loaded after the construction are what is trained."""
    rule = LearnedInit(SGD(lr=0.1), template())
    model, reference = net(), net()
    start = values(model)
    optimizer = bare(model.named_parameters(), (rule, rule.init_theta(torch.Generator())), adopt_start=True)
    model.load_state_dict(start)
    train(model, optimizer, range(2))
    train(reference, torch.optim.SGD(reference.parameters(), 0.1), range(2))
    torch.testing.assert_close(values(model), values(reference))


def test_a_learned_start_of_another_model_is_refused() -> None:
    rule = make("maml", template=template())
    theta = moved_theta(rule)
    for parameters in (net().parameters(), nn.Linear(5, 6).named_parameters()):
        with pytest.raises(ValueError, match="the learned start is one of parameters"):
            bare(parameters, (rule, theta), adopt_start=True)
    anchored = Anchored()
    with pytest.raises(ValueError, match=r"starts from parameters \{'w': \(2, 2\), 'b': \(1,\)\}"):
        bare(net().parameters(), (anchored, anchored.init_theta(torch.Generator())), adopt_start=True)


@pytest.mark.usefixtures("float64")
def test_a_state_with_flags_counts_and_a_start_that_it_pulls_to() -> None:
    loop = InnerLoop(Quadratic(), Anchored())
    theta = loop.rule.init_theta(torch.Generator())
    tasks = loop.family.sample(1, torch.Generator().manual_seed(2))
    params = {k: p[0].clone().requires_grad_() for k, p in loop.family.init_params(tasks).items()}
    optimizer = bare(params.items(), (loop.rule, theta), adopt_start=True)
    for step in range(4):
        optimizer.zero_grad()
        loop.family.loss(params, tree.squeeze(loop.family.batch(tasks, step, "train"))).backward()
        optimizer.step()
        optimizer = copy.deepcopy((params, optimizer))
        params, optimizer = optimizer
    carry = loop.run(theta, loop.start(tasks), 4, Tape.NONE).end
    assert equal({k: p.detach() for k, p in params.items()}, tree.squeeze(carry.params))
    assert equal(memory(optimizer), tree.leaves(tree.squeeze(carry.state)))


class Wrong(Greedy):
    """Returns what it is made with."""

    def __init__(self, deltas: Callable[[Params], Any], state: Callable[[Any], Any]) -> None:
        self.deltas, self.state = deltas, state

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> Any:
        return self.deltas(grads), self.state(state)


@pytest.mark.parametrize(
    ("deltas", "state", "message"),
    [
        (lambda grads: dict(list(grads.items())[1:]), lambda state: state, "one delta of the same shape"),
        (lambda grads: {k: g.sum() for k, g in grads.items()}, lambda state: state, "one delta of the same shape"),
        (lambda grads: grads, lambda state: {"best": state["best"]}, "state of the same structure"),
        (lambda grads: grads, lambda state: {**state, "best": None}, "state of the same structure"),
    ],
)
def test_rules_that_break_the_contract(deltas: Any, state: Any, message: str) -> None:
    model = net()
    optimizer = bare(model.parameters(), (Wrong(deltas, state), Greedy().init_theta(torch.Generator())))
    start = values(model)
    back_propagate(model, 0)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert equal(values(model), start)


# Saving and copying.


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("param_dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "adam, fast", "sgd", "partition with a start", "an lstm per tensor"])
def test_training_goes_on_from_a_state_dict_as_if_it_had_not_stopped(kind: str, param_dtype: torch.dtype) -> None:
    rule = KINDS[kind](template())
    theta = moved_theta(rule)

    def make(model: Net) -> LearnedOptimizer:
        return bare(model.named_parameters(), (rule, theta), lr=0.7, adopt_start=True)

    model = net(dtype=param_dtype)
    optimizer = make(model)
    train(model, optimizer, range(3))
    saved, weights = through_a_file(optimizer.state_dict()), values(model)
    again = net(seed=4, dtype=param_dtype)
    other = make(again)
    again.load_state_dict(weights)
    other.load_state_dict(saved)
    assert equal(memory(other), memory(optimizer))
    assert equal(saved, optimizer.state_dict())
    train(model, optimizer, range(3, 6))
    train(again, other, range(3, 6))
    assert equal(values(again), values(model)) and equal(memory(other), memory(optimizer))
    assert equal(saved["state"], through_a_file(saved)["state"])


def test_a_state_dict_keeps_what_it_held() -> None:
    model = net()
    optimizer = bare(model.parameters(), lstm())
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    train(model, optimizer, range(2, 4))
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["lr"] = 0.1
    train(model, optimizer, range(4, 6))
    assert equal(saved, kept) and saved["param_groups"] == kept["param_groups"]
    assert saved["state"][0].keys() == kept["state"][0].keys()


def test_a_state_dict_before_the_first_step() -> None:
    rule, theta = lstm()
    model, reference = net(), net()
    optimizer = bare(model.parameters(), (rule, theta))
    assert optimizer.state[model.scale] == {}  # somebody looks, which makes an empty entry
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    train(model, optimizer, range(2))
    train(reference, bare(reference.parameters(), (rule, theta)), range(2))
    assert equal(values(model), values(reference))


@pytest.mark.parametrize(
    "other",
    [
        lambda m: bare(m.parameters(), (Adam(lr=0.1), Adam(lr=0.1).init_theta(torch.Generator()))),
        lambda m: bare(m.parameters(), lstm(num_layers=1)),
        lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
        lambda m: torch.optim.Adam(m.parameters()),
    ],
)
def test_a_state_dict_of_another_optimizer_is_refused(other: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    model = net()
    optimizer = bare(model.parameters(), lstm())
    train(model, optimizer, range(2))
    kept = memory(optimizer)
    stranger = other(model)
    train(model, stranger, range(1))
    with pytest.raises(ValueError, match="this state is not of LSTM with these parameters"):
        optimizer.load_state_dict(stranger.state_dict())
    assert equal(memory(optimizer), kept)


def test_a_state_dict_of_another_model_is_refused() -> None:
    model, small = net(), nn.Linear(2, 2)
    optimizer, other = bare(model.parameters(), lstm()), bare(small.parameters(), lstm())
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="doesn't match the size"):
        other.load_state_dict({"state": {}, "param_groups": optimizer.state_dict()["param_groups"]})
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["params"] = [0, 1]
    with pytest.raises(ValueError, match=r"this state is not of LSTM .*\(4, 2, 2\)"):
        other.load_state_dict(state_dict)


def test_hooks_of_the_users_change_what_is_loaded() -> None:
    model = net(dtype=torch.bfloat16)
    optimizer = bare(model.parameters(), lstm())
    train(model, optimizer, range(2))
    seen = []

    def double(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        found = {i: {k: v if k == "step" else 2 * v for k, v in e.items()} for i, e in state_dict["state"].items()}
        return {**state_dict, "state": found}

    kept = memory(optimizer)
    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.extend(memory(o)))
    for _ in range(2):  # hooks of a load are gone after it
        optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    assert equal(memory(optimizer), [4 * x for x in kept])
    assert equal(seen, [2 * x for x in kept] + [4 * x for x in kept])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(copied: Callable[[Any], Any]) -> None:
    model = net()
    optimizer = bare(model.named_parameters(), lstm(), lr=0.5)
    train(model, optimizer, range(2))
    before = values(model)
    again, other = copied((model, optimizer))
    train(again, other, range(2, 5))
    assert equal(values(model), before)
    train(model, optimizer, range(2, 5))
    assert equal(values(model), values(again)) and equal(memory(optimizer), memory(other))
    other.add_param_group({"params": [("more", torch.ones(2, requires_grad=True))]})
    assert len(other.param_groups) == 2 and len(optimizer.param_groups) == 1


def test_distributed_checkpoints_find_an_entry_for_every_parameter() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, again = net(dtype=torch.bfloat16), net(dtype=torch.bfloat16)
    source = lstm()
    optimizer, other = (bare(m.parameters(), source) for m in (model, again))
    train(model, optimizer, range(2))
    again.load_state_dict(model.state_dict())
    # It initialises a fresh optimizer by a step at rate 0, which must not move anything.
    set_optimizer_state_dict(again, other, get_optimizer_state_dict(model, optimizer))
    assert equal(values(again), values(model)) and equal(memory(other), memory(optimizer))
    train(model, optimizer, range(2, 4))
    train(again, other, range(2, 4))
    assert equal(values(again), values(model))


def test_gradient_scaling_and_hooks_of_torch() -> None:
    model, reference = net(), net()
    source, calls = lstm(), []
    optimizer, other = (bare(m.parameters(), source) for m in (model, reference))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        loss = functional.cross_entropy(model(data(0, step, "train")[0]), data(0, step, "train")[1])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        train(reference, other, range(step, step + 1))
    torch.testing.assert_close(values(model), values(reference))
    assert calls == ["after"] * 3


@pytest.mark.parametrize("kind", ["lstm", "adam", "general"])
def test_memory_that_is_kept_in_bfloat16(kind: str) -> None:
    """It is half as large between steps, and the run is nearly the same; a state dict serves both ways."""
    rule = KINDS[kind](template())
    theta = rule.init_theta(torch.Generator().manual_seed(2))
    runs = {}
    for dtype in (None, torch.bfloat16):
        model = net()
        optimizer = bare(model.parameters(), (rule, theta), num_steps=30, state_dtype=dtype)
        start = values(model)
        train(model, optimizer, range(10))
        runs[dtype] = values(model), optimizer
    moved = {k: (p - start[k]).norm() for k, p in runs[None][0].items()}
    assert all((p - runs[None][0][k]).norm() < 0.1 * moved[k] + 1e-6 for k, p in runs[torch.bfloat16][0].items())
    assert any(not torch.equal(p, runs[None][0][k]) for k, p in runs[torch.bfloat16][0].items())
    narrow = runs[torch.bfloat16][1]
    kept = narrow.state[model.layer.weight]
    assert all(x.dtype is torch.bfloat16 for x in kept.values() if isinstance(x, Tensor) and x.ndim >= 2)
    saved = through_a_file(narrow.state_dict())
    wide = bare(model.parameters(), (rule, theta), num_steps=30)
    wide.load_state_dict(saved)
    train(model, wide, range(10, 12))
    assert all(x.dtype is not torch.bfloat16 for x in memory(wide)) and all(
        p.isfinite().all() for p in model.parameters()
    )
    with pytest.raises(ValueError, match=r"state_dtype=torch\.float16"):
        bare(model.parameters(), (rule, theta), num_steps=30, state_dtype=torch.float16)
