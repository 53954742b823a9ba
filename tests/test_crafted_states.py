"""Training states whose SHA-256 is right, but which no training leaves: refused at load, and nothing is restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learnedopt import FinalLoss, InnerLoop, MetaTrainer, Unrolled, optimizers, tasks
from learnedopt.meta_optimizers.per_name import PerName
from learnedopt.training import training_file

Change = Callable[[dict[str, Any]], Any]


def trainer(path: Path, make: Any, **options: Any) -> MetaTrainer:
    loop = InnerLoop(tasks.make("quadratic", dim=2), optimizers.make("momentum", learn=("lr", "momentum")))
    return MetaTrainer(loop, Unrolled(2), FinalLoss(), make, None, num_tasks=2, checkpoint=path, **options)


def change(path: Path, how: Change) -> None:
    content, _ = training_file.read(path)
    how(content)
    training_file.write(path, content)


def group(**options: Any) -> Change:
    return lambda content: content["optimizer"]["param_groups"][0].update(options)


def memory(**entries: Any) -> Change:
    return lambda content: content["optimizer"]["state"][0].update(entries)


def without(where: str, name: str) -> Change:
    def drop(content: dict[str, Any]) -> None:
        del {"group": content["optimizer"]["param_groups"], "state": content["optimizer"]["state"]}[where][0][name]

    return drop


def schedule(**options: Any) -> Change:
    return lambda content: content["scheduler"].update(options)


def adam(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 1e-3, amsgrad=True)


class Growing(torch.optim.Optimizer):
    """One of a user's own, which counts in its groups and remembers more from its third step on."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3, "seen": 0, "best": float("inf")})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        for each in self.param_groups:
            each["seen"] += 1
            each["best"] = min(each["best"], float(each["seen"]))
            for p in each["params"]:
                mine = self.state[p]
                mine["trail"] = [*mine.get("trail", []), p.clone()]
                if each["seen"] > 2:
                    mine["late"] = mine.get("late", torch.zeros_like(p)) + p.grad
                    p.sub_(mine["late"], alpha=1e-3)
                p.sub_(p.grad, alpha=each["lr"])


class Changing(torch.optim.Optimizer):
    """One of a user's own, which moves along no zeros, and of which everything comes late, changes and grows."""

    def __init__(self, params: Any, least: float = 0.0) -> None:
        super().__init__(params, {"lr": 1e-3, "phase": None})
        self.least = least

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        for each in self.param_groups:
            for p in each["params"]:
                if not p.grad.any() or bool((p.grad == self.least).all()):
                    raise RuntimeError("no way to go")
                torch.rand(())  # of the generator that everybody has
                mine = self.state[p]
                mine["before"], mine["now"] = mine.get("now"), p.clone()
                mine["trail"] = torch.stack([*mine.get("trail", []), p])
                each["phase"] = "onward" if len(mine["trail"]) > 2 else None
                p.sub_(p.grad, alpha=each["lr"])


class Phases(torch.optim.lr_scheduler.LRScheduler):
    """One of a user's own, which tells more from its second step on."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.phase, self.since = "warm", None
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        if self.last_epoch > 1:
            self.phase, self.since, self.more = "falling", self.last_epoch, 1
        return [0.9 * float(rate) for rate in self.base_lrs]


def several(params: list[Tensor]) -> torch.optim.Optimizer:
    return PerName({"lr": torch.optim.Adam, "momentum": Growing})(params)


def cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=4)


def falling(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])


CRAFTED: dict[str, tuple[Any, Any, Change, str]] = {
    "betas": (adam, None, group(betas=(5, 5)), r"param_groups\[0\]\.betas is \(5, 5\) on file, and \(0\.9, 0\.999\)"),
    "betas on a schedule": (adam, cycle, group(betas=(5, 0.9)), r"betas is \(5, 0\.9\) .* below 1 are due"),
    "eps": (adam, None, group(eps=float("nan")), r"\.eps is nan on file, and 1e-08 in the configuration"),
    "lr": (adam, None, group(lr=float("nan")), r"\.lr is nan on file, where a finite number of at least 0"),
    "negative lr": (adam, falling, group(lr=-1.0), r"\.lr is -1\.0 on file, where a finite"),
    "huge lr": (adam, None, group(lr=10**400), r"\.lr is 10{400} on file, where a finite"),
    "an option too many": (adam, None, group(lrr=1.0), r"param_groups\[0\] has \['lrr'\]"),
    "an option that is gone": (adam, None, without("group", "eps"), r"param_groups\[0\] lacks \['eps'\]"),
    "a choice": (adam, None, group(amsgrad=False), r"\.amsgrad is False on file, and True"),
    "amsgrad without its memory": (adam, None, without("state", "max_exp_avg_sq"), r"state\[0\] lacks \['max_exp"),
    "step": (adam, None, memory(step=torch.tensor(-1.0)), r"state\[0\]\.step is tensor\(-1\.\), where a count"),
    "step that is none": (adam, None, memory(step=torch.tensor(float("nan"))), r"\.step is tensor\(nan\)"),
    "more steps than meta-steps": (adam, None, memory(step=torch.tensor(9.0)), r"\.step is tensor\(9\.\).*at most 4"),
    "shape": (adam, None, memory(exp_avg=torch.ones(3)), r"exp_avg is torch\.float32 of shape \(3,\), and .* \(\)"),
    "type": (adam, None, memory(exp_avg=torch.ones(()).double()), r"exp_avg is torch\.float64 of shape"),
    "no tensor": (adam, None, memory(exp_avg="x"), r"exp_avg is 'x', and torch\.float32 of shape \(\)"),
    "NaN": (adam, None, memory(exp_avg=torch.tensor(float("nan"))), r"exp_avg is NaN in places"),
    "of nothing": (adam, None, lambda c: c["optimizer"]["state"].update({9: {"a": 1}}), r"state\[9\] is of no param"),
    "a member": (several, None, group(betas=(5, 5)), r"betas is \(5, 5\) on file"),
    "a member of the user's": (
        several, None, lambda c: c["optimizer"]["param_groups"][1].update(seen=float("nan")), r"\[1\]\.seen is nan",
    ),
    "what is there late": (
        several, None, lambda c: c["optimizer"]["state"][1].update(late=torch.ones(3)), r"Members cannot take a step",
    ),
    "schedule": (adam, falling, schedule(last_epoch=-3), r"scheduler\.last_epoch is -3, where a count"),
    "schedule ahead": (adam, falling, schedule(last_epoch=7), r"scheduler\.last_epoch is 7, .*at most 3"),
    "factor": (adam, falling, schedule(gamma=float("nan")), r"scheduler\.gamma is nan on file"),
    "milestones": (adam, falling, schedule(milestones={2: 1}), r"scheduler\.milestones is \{2: 1\} on file"),
    "rates": (adam, falling, schedule(base_lrs=[1e-3] * 2), r"scheduler\.base_lrs is \[0\.001, 0\.001\] on file"),
    "phases": (adam, cycle, schedule(_schedule_phases=[{}, {}]), r"_schedule_phases\[0\] lacks \['end_lr'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CRAFTED)
def test_what_no_meta_optimizer_could_go_on_from_is_refused(kind: str, tmp_path: Path) -> None:
    make, scheduler, how, told = CRAFTED[kind]
    path = tmp_path / "a.pt"
    trainer(path, make, scheduler=scheduler).run(3)
    change(path, lambda content: None)
    assert trainer(path, make, scheduler=scheduler).run(3).meta_step == 3  # where the cycle ends, too
    change(path, how)
    other = trainer(path, make, scheduler=scheduler)
    before = str((other.theta, other.meta_optimizer.state_dict()))
    with pytest.raises(ValueError, match=rf"a\.pt holds what no training leaves: (.|\n)*{told}"):
        other.run(4)
    assert str((other.theta, other.meta_optimizer.state_dict())) == before and other.progress.meta_step == 0


OWN: dict[str, Any] = {
    "alone": Changing,
    "that takes no step along ones": lambda params: Changing(params, least=1.0),
    "beside another": PerName({"lr": torch.optim.Adam, "momentum": lambda params: Changing(params, least=1.0)}),
}


@pytest.mark.parametrize("kind", OWN)
def test_an_optimizer_of_a_user_s_own_goes_on_exactly_whatever_it_remembers(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    whole = trainer(tmp_path / "whole.pt", OWN[kind], scheduler=Phases).run(5)
    for number in (0, 1, 4):
        trainer(path, OWN[kind], scheduler=Phases).run(number)
    before = torch.get_rng_state()
    resumed = trainer(path, OWN[kind], scheduler=Phases)
    assert resumed.restored() is not None and torch.equal(torch.get_rng_state(), before)
    assert str(resumed.run(5)) == str(whole)


def test_another_rule_inside_a_rule_of_equal_shapes_is_refused(tmp_path: Path) -> None:
    template = {"x": torch.zeros(2)}

    def started(inner: str) -> MetaTrainer:
        rule = optimizers.make("learned-init", template=template, rule={"name": inner, "options": {"learn": ("lr",)}})
        loop = InnerLoop(tasks.make("quadratic", dim=2), rule)
        return MetaTrainer(loop, Unrolled(2), FinalLoss(), tracker=None, num_tasks=2, checkpoint=tmp_path / "a.pt")

    started("momentum").run(1)
    told = r"rule in full 'LearnedInit\(Momentum\)' instead of 'LearnedInit\(Nesterov\)'"
    with pytest.raises(ValueError, match=told):
        started("nesterov").run(2)


AVERAGES: dict[str, tuple[Change, str]] = {
    "no average": (lambda c: c.pop("steadied"), "there is no average of theta"),
    "no theta": (lambda c: c["steadied"].update(average={"lr": 1.0}), "the average of theta is no theta"),
    "NaN": (
        lambda c: c["steadied"]["average"]["lr"].fill_(float("nan")),
        r"the average of theta has \['lr'\], .* not fin",
    ),
    "theta": (lambda c: c["theta"]["lr"].fill_(float("nan")), r"theta has \['lr'\], .* not finite"),
    "rollbacks": (lambda c: c["steadied"].update(num_rollbacks=-1), "num_rollbacks is -1"),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_that_no_training_leaves_is_refused(kind: str, tmp_path: Path) -> None:
    how, told = AVERAGES[kind]
    path = tmp_path / "a.pt"
    trainer(path, adam, average=0.3).run(2)
    change(path, how)
    other = trainer(path, adam, average=0.3)
    with pytest.raises(ValueError, match=rf"a\.pt holds what no training leaves: {told}"):
        other.run(4)
    assert other.progress.meta_step == 0 and not other.meta_optimizer.state


def test_an_average_in_a_training_without_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    trainer(path, adam, average=0.3).run(1)
    change(path, lambda content: content["run"].update(average=None))
    with pytest.raises(ValueError, match="there is an average of theta, unlike in the present training"):
        trainer(path, adam).run(2)
