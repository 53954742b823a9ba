"""Carries whose SHA-256 is right, but which no estimator leaves: refused at load, and nothing is restored."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learnedopt import (
    Combined,
    EvolutionStrategies,
    ForwardMode,
    InnerLoop,
    MetaTrainer,
    PersistentES,
    SumOfLosses,
    TaskByTask,
    Truncated,
    Unrolled,
    optimizers,
    tasks,
)
from learnedopt.core.estimator import GradientEstimator
from learnedopt.training import carries, training_file

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own forward mode
ESTIMATORS: dict[str, GradientEstimator] = {
    "truncated": Truncated(1, horizon=8),
    "forward": ForwardMode(1, horizon=8),
    "strategies": EvolutionStrategies(2, 2, 0.1, horizon=8),
    "persistent": PersistentES(2, 4, 2, 0.1),
    "combined": Combined(Truncated(2, horizon=8), EvolutionStrategies(2, 2, 0.1, horizon=4)),
    "task by task": TaskByTask(Unrolled(1), ((1, 0.5), (2, 0.5))),
}


def trainer(path: Path, kind: str) -> MetaTrainer:
    family: Any = tasks.make("quadratic", dim=2)
    if kind == "task by task":
        family = tasks.Mixture(((0.5, family), (0.5, tasks.make("quadratic", dim=3))))
    loop = InnerLoop(family, optimizers.make("momentum", learn=("lr", "momentum")))
    return MetaTrainer(loop, ESTIMATORS[kind], SumOfLosses(), tracker=None, num_tasks=4, checkpoint=path)


def leaf(path: str, new: Any) -> Callable[[dict[str, Any]], Any]:
    """Put something else in the place of a packed carry that a path of keys and fields leads to."""

    def change(content: dict[str, Any]) -> None:
        node, *names = content["carry"], *path.split(".")
        for name in names[:-1]:
            node = node[2][[*map(str, node[1])].index(name)]
        place = [*map(str, node[1])].index(names[-1])
        node[2][place] = new(node[2][place]) if callable(new) else new

    return change


def wider(x: Tensor) -> Tensor:
    return torch.cat([x, x], -1) if x.dim() else x.expand(2).clone()


def plain(error: Exception) -> str:
    """Return what was said, keys as if they were attributes."""
    return str(error).replace("['", ".").replace("']", "")


CRAFTED: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "another class": ("truncated", lambda c: c.update(carry=["dict", ["a"], [c["carry"]]]), "carry is a dict"),
    "shape": ("truncated", leaf("params.x", wider), r"carry\.params\.x is .* \(4, 4\), where .* \(3, 2\) is due"),
    "tasks' type": ("truncated", leaf("tasks.y", lambda x: x.double()), r"carry\.tasks\.y is torch\.float64"),
    "tasks": ("truncated", leaf("tasks.y", lambda x: x[:1]), r"carry\.tasks\.y is torch\.float32 of shape \(1, 2\)"),
    "no state": ("truncated", leaf("state", 5), r"carry\.state is 5, where a"),
    "tangents": ("forward", leaf("params.x", wider), r"carry\.params\.x is .* \(4, 2, 4\)"),
    "sizes": ("forward", leaf("sizes.lr", 2), r"this carry's tangents are along \{'lr': 2"),
    "a part": ("strategies", leaf("pairs", ["tuple", [0, 1], [0, 1]]), "is a part of one"),
    "window": ("strategies", leaf("window", -1), r"carry\.window is -1, where a count"),
    "seed": ("strategies", leaf("seed", 0.5), r"carry\.seed is 0\.5, where"),
    "inner": ("strategies", leaf("inner.params.x", wider), r"carry\.inner\.params\.x is"),
    "drift": ("persistent", leaf("cohorts.0.drift.lr", wider), r"carry\.cohorts\[0\]\.drift\.lr is .* \(2,\)"),
    "state": ("persistent", leaf("cohorts.1.params.x", wider), r"carry\.cohorts\[1\]\.params\.x is"),
    "cohorts": ("persistent", leaf("cohorts", ["tuple", [], []]), r"carry\.cohorts has \[\], where \[0, 1\]"),
    "many tasks": ("persistent", leaf("places.num_tasks", 10**9), r"places\.num_tasks is 1000000000, of a"),
    "positions": ("persistent", leaf("places.positions", ["tuple", [0], [7]]), r"positions is \(7,\), which are no"),
    "sigma": ("persistent", leaf("sigma", 0.5), "were perturbed with sigma=0.5"),
    "moments": ("combined", leaf("moments.0.mean.lr", wider), "carry"),
    "moments' type": ("combined", leaf("moments.0.spread.lr", lambda x: x.float()), r"spread\.lr is torch\.float32"),
    "count": ("combined", leaf("moments.1.count.lr", -1), r"count\.lr is -1"),
    "fresh tasks": ("combined", leaf("num_tasks", 10**9), r"carry\.num_tasks is 1000000000"),
    "one of both": ("combined", leaf("back_propagated.params.x", wider), r"carry\.back_propagated\.params\.x is"),
    "a theta more": ("combined", leaf("moments.0.mean", ["dict", [], []]), r"moments\[0\]\.mean has \[\], where"),
}  # fmt: skip


@pytest.mark.parametrize("case", CRAFTED)
def test_a_carry_that_no_estimator_leaves_is_refused(case: str, tmp_path: Path) -> None:
    kind, change, told = CRAFTED[case]
    path = tmp_path / "a.pt"
    trainer(path, kind).run(1)
    assert trainer(path, kind).run(1).meta_step == 1
    content, _ = training_file.read(path)
    change(content)
    training_file.write(path, content)
    other = trainer(path, kind)
    before = str((other.theta, other.meta_optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"a\.pt was written for another estimator or rule: ") as found:
        other.run(2)
    assert re.search(told, plain(found.value))
    assert str((other.theta, other.meta_optimizer.state_dict())) == before and other.progress.carry is None


BY_TASK: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "as it starts": (lambda c: None, ""),
    "a member that there is none of": (leaf("tasks.member", lambda x: x + 7), ""),
    "shape": (leaf("tasks.member", lambda x: x[None]), r"carry\.tasks\.member is torch\.int64 of shape \(1, 4\)"),
    "fewer tasks": (leaf("places.positions", ["tuple", [0], [0]]), ""),
    "seed": (leaf("seed", -1), r"carry\.seed is -1, where a count"),
    "a loop": (lambda c: c.update(carry=5), r"carry is 5, where a TaskByTaskCarry is due"),
}


@pytest.mark.parametrize("case", BY_TASK)
def test_a_mixture_of_tasks_one_by_one_is_compared_too(case: str, tmp_path: Path) -> None:
    change, told = BY_TASK[case]
    path = tmp_path / "a.pt"
    made = trainer(path, "task by task")
    made.run(1)
    content, _ = training_file.read(path)
    source = torch.Generator().manual_seed(0)
    begun = made.estimator.start(made.loop, made.theta, made.loop.family.sample(4, source), source)
    content["carry"] = carries.pack(begun, torch.device("cpu"))
    change(content)
    training_file.write(path, content)
    if case == "as it starts":
        assert trainer(path, "task by task").run(2).meta_step == 2
        return
    with pytest.raises(ValueError, match=r"a\.pt was written for another estimator or rule: ") as found:
        trainer(path, "task by task").run(2)
    assert re.search(told, plain(found.value))
