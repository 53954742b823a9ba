"""The plug-in beside torch's own optimizers, to torch's own values: groups, schedulers, closures, late parameters.

torch keeps the settings that it tests its optimizers with in ``torch.testing._internal.common_optimizers``. That module
is private and needs a package of its own, so they are spelled out in ``plug_in_cases.TWINS``. What of torch's tests
does not apply, and why, is in docs/torch_optim.md; what is refused of it is tested in test_plug_in_bad_input.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plug_in_cases import TWINS, Net, both, learned, loss_of, train, values
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from learnedopt import LearnedOptimizer
from learnedopt.optimizers import SGD, Adam, Momentum

pytestmark = pytest.mark.usefixtures("float64")
Scheduler = Callable[[torch.optim.Optimizer], Any]


def assert_same(ours: nn.Module, own: nn.Module) -> None:
    torch.testing.assert_close(values(ours), values(own), rtol=1e-11, atol=1e-13)


# Values, groups and rates.


@pytest.mark.parametrize("name", TWINS)
def test_every_setting_that_torch_tests_has_torchs_values(name: str) -> None:
    ours, own = Net(), Net()
    start = values(ours)
    optimizer, other = both(name, 0.03, ours.named_parameters(), own.named_parameters())
    train(ours, optimizer, range(8))
    train(own, other, range(8))
    assert_same(ours, own)
    assert all(not torch.equal(p, start[k]) for k, p in values(ours).items())


def groups_of(model: Net, **of_first: Any) -> list[dict[str, Any]]:
    return [
        {"params": list(model.layer.parameters()), "lr": 0.2, **of_first},
        {"params": [*model.head.parameters(), model.scale]},
    ]


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_a_rate_for_each_group(name: str, as_tensor: bool) -> None:
    ours, own = Net(), Net()
    rate = {"lr": torch.tensor(0.2)} if as_tensor else {}
    optimizer, _ = both(name, 0.03, groups_of(ours, **rate), groups_of(own))
    _, other = both(name, 0.03, groups_of(ours), groups_of(own))
    train(ours, optimizer, range(5))
    train(own, other, range(5))
    assert_same(ours, own)


@pytest.mark.parametrize("option", [{"weight_decay": 0.4}, {"maximize": True}], ids=["weight_decay", "maximize"])
def test_options_of_one_group(option: dict[str, Any]) -> None:
    ours, own = Net(), Net()
    optimizer = learned(Adam(lr=1.0), groups_of(ours, **option), lr=0.03)
    other = torch.optim.AdamW(groups_of(own, **option), lr=0.03, weight_decay=0.0)
    train(ours, optimizer, range(5))
    train(own, other, range(5))
    assert_same(ours, own)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [option.get("weight_decay", 0.0), 0.0]
    assert [g["maximize"] for g in optimizer.param_groups] == ["maximize" in option, False]


def test_a_rule_for_each_group() -> None:
    ours, own = Net(), Net()
    momentum = Momentum(lr=1.0)
    rule = (momentum, momentum.init_theta(torch.Generator()))
    optimizer = learned(SGD(lr=1.0), groups_of(ours, rule=rule), lr=0.03)
    others = [torch.optim.SGD(groups_of(own)[0]["params"], 0.2, momentum=0.9)]
    others.append(torch.optim.SGD(groups_of(own)[1]["params"], 0.03))
    for step in range(4):
        train(ours, optimizer, [step])
        loss_of(own, step)
        for other in others:
            other.step()
    assert_same(ours, own)


SCHEDULERS: dict[str, Scheduler] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.4, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5, threshold=0.5),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_here() -> None:
    there = {
        k for k, v in vars(lr_scheduler).items() if isinstance(v, type) and issubclass(v, lr_scheduler.LRScheduler)
    }
    assert there - {"LRScheduler", "_LRScheduler"} <= SCHEDULERS.keys()
    assert "SWALR" not in there


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("twin", ["momentum", "adam"])
@pytest.mark.filterwarnings("ignore:To get the last learning rate")  # of torch's own, where schedulers are chained
def test_schedulers(name: str, twin: str) -> None:
    ours, own = Net(), Net()
    optimizers = both(twin, 0.05, groups_of(ours), groups_of(own))
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in optimizers]
    rates = set()
    for step in range(8):
        for model, optimizer, scheduler in zip((ours, own), optimizers, schedulers, strict=True):
            train(model, optimizer, [step])
            scheduler.step(*[1.0] * (name == "ReduceLROnPlateau"))
        rates.add(float(optimizers[0].param_groups[1]["lr"]))
        assert [g["lr"] for g in optimizers[0].param_groups] == [g["lr"] for g in optimizers[1].param_groups]
    assert len(rates) > 1
    assert_same(ours, own)


def test_a_cycled_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer must support momentum or beta1"):
        lr_scheduler.OneCycleLR(learned(Momentum(lr=1.0), Net().parameters()), 0.1, total_steps=9)


# Closures, gradients that are not there, and those that come late.


def test_a_closure_is_called_once_with_gradients_and_its_loss_returned() -> None:
    ours, own, calls = Net(), Net(), []
    optimizer, other = both("adam", 0.03, ours.parameters(), own.parameters())

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return loss_of(ours, 0)

    with torch.no_grad():
        returned = optimizer.step(closure)
    assert returned.item() == loss_of(own, 0).item() and calls == [True]
    other.step()
    assert_same(ours, own)


@pytest.mark.parametrize("name", [k for k, twin in TWINS.items() if not twin.ours])
def test_parameters_whose_gradients_come_late_have_steps_of_their_own(name: str) -> None:
    """A head is frozen at first, and then left out at every third step, as an expert is that no token visits."""
    ours, own = Net(), Net()
    optimizer, other = both(name, 0.03, ours.parameters(), own.parameters())
    for step in range(9):
        for model in (ours, own):
            loss_of(model, step)
            if step < 3 or step % 3 == 1:
                model.head.weight.grad = model.head.bias.grad = None
        optimizer.step()
        other.step()
        assert_same(ours, own)


@pytest.mark.parametrize("name", [k for k, twin in TWINS.items() if not twin.ours])
def test_groups_that_are_added_late(name: str) -> None:
    ours, own = Net(), Net()
    optimizer, other = both(name, 0.03, ours.head.parameters(), own.head.parameters())
    train(ours, optimizer, range(3))
    train(own, other, range(3))
    for model, one in ((ours, optimizer), (own, other)):
        one.add_param_group({"params": [*model.layer.parameters(), model.scale], "lr": 0.1})
    train(ours, optimizer, range(3, 7))
    train(own, other, range(3, 7))
    assert_same(ours, own)
    assert optimizer.param_groups[1]["lr"] == 0.1


@pytest.mark.parametrize("set_to_none", [False, True], ids=["zeros", "none"])
def test_gradients_that_are_cleared(set_to_none: bool) -> None:
    """Momentum goes on where gradients are zeros, and nothing moves where they are None: as torch's own."""
    ours, own = Net(), Net()
    optimizer, other = both("momentum", 0.03, ours.parameters(), own.parameters())
    train(ours, optimizer, range(2))
    train(own, other, range(2))
    before = values(ours)
    for one in (optimizer, other):
        one.zero_grad(set_to_none=set_to_none)
        one.step()
    assert_same(ours, own)
    assert all(torch.equal(p, before[k]) == set_to_none for k, p in values(ours).items())


# What goes around an optimizer.


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_averaged_models(average: Any) -> None:
    ours, own = Net(), Net()
    optimizers = both("momentum", 0.05, ours.parameters(), own.parameters())
    averages = [AveragedModel(model, multi_avg_fn=average) for model in (ours, own)]
    schedulers = [SWALR(optimizer, swa_lr=0.01, anneal_epochs=2) for optimizer in optimizers]
    for step in range(6):
        for model, optimizer, averaged, scheduler in zip((ours, own), optimizers, averages, schedulers, strict=True):
            train(model, optimizer, [step])
            averaged.update_parameters(model)
            scheduler.step()
    assert_same(averages[0], averages[1])
    assert not torch.equal(averages[0].module.head.weight, ours.head.weight)


def test_batch_statistics_of_an_averaged_model() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    optimizer = learned(Adam(lr=0.05), model.parameters())
    averaged = AveragedModel(model)
    train(model, optimizer, range(3))
    averaged.update_parameters(model)
    inputs = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    update_bn([inputs], averaged)
    hidden = averaged.module[0](inputs)
    torch.testing.assert_close(averaged.module[1].running_mean, hidden.mean(0).detach())


@pytest.mark.parametrize("overflow_at", [None, 0, 2])
def test_a_gradient_scaler(overflow_at: int | None) -> None:
    """Steps whose gradients overflow are left out, the memory with them; the others are torch's."""
    ours, own = Net(), Net()
    optimizers = both("adam", 0.03, ours.parameters(), own.parameters())
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in optimizers]
    for step in range(5):
        for model, optimizer, scaler in zip((ours, own), optimizers, scalers, strict=True):
            loss_of(model, step)
            for p in model.parameters():
                assert p.grad is not None
                p.grad.mul_(scaler.get_scale() if step != overflow_at else torch.inf)
            scaler.scale(torch.tensor(1.0))  # which makes the scale
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale() == (8.0 if overflow_at is None else 4.0)
    assert_same(ours, own)
    steps = {int(optimizers[0].state[p]["step"]) for p in ours.parameters()}
    assert steps == {5 if overflow_at is None else 4}


def test_it_prints_its_groups() -> None:
    shown = repr(learned(Adam(lr=1.0), groups_of(Net()), lr=0.25))
    for text in ("LearnedOptimizer (", "Parameter Group 0", "lr: 0.2\n", "Parameter Group 1", "lr: 0.25\n"):
        assert text in shown


def test_it_is_a_torch_optimizer_whose_step_can_be_wrapped() -> None:
    """Schedulers, scalers and profilers look for these."""
    optimizer = learned(Adam(lr=1.0), Net().parameters())
    assert isinstance(optimizer, torch.optim.Optimizer) and isinstance(optimizer, LearnedOptimizer)
    assert getattr(type(optimizer).step, "hooked", False)
    assert optimizer.defaults.keys() >= {"lr", "weight_decay", "maximize"}
