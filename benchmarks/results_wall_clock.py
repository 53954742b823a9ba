"""Seconds until AdamW + cosine's final loss, of whole training loops on plain torch modules, one thread.

Run ``python benchmarks/results_wall_clock.py --suite runs/suite``, with the folder of the suite's results, whose tuned
rates of AdamW are taken. ``--rule`` is a packaged name or a checkpoint, ``--bfloat16`` an option of the rule general,
``--nets`` some of the nets. Both optimizers start from the same parameters and see the same minibatches, drawn before;
they take turns. The level is the mean of AdamW's last 20 losses; it is reached when 20 in a row have that mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import learnedopt
from learnedopt import LearnedOptimizer
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.evaluation.comparison import align
from learnedopt.evaluation.evaluate import sample_tasks
from learnedopt.evaluation.nets import UNSEEN, Net
from learnedopt.evaluation.suite import LAST, result_path
from learnedopt.evaluation.suite_table import GOAL, steps_to_reach

WARMUP = 0.05
NETS = (
    "mlp 64-64 relu, Fashion", "mlp 128-128 relu, Fashion", "mlp 5x32 tanh, MNIST", "logistic, Fashion",
    "conv 16-32 batch norm, Fashion", "GRU 64, text", "mlp 20 relu, MNIST",
)  # fmt: skip
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU}


class Run(NamedTuple):
    """The loss before each update, and the seconds and CPU seconds from the start to the end of each."""

    losses: Tensor
    seconds: Tensor
    cpu_seconds: Tensor


class GRU(nn.Module):
    """``TextRNN`` of torch's own layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (batch_size, 64, context)."""
        return self.head(self.recurrent(self.embedding(inputs))[0]).mT


def module(net: Net) -> nn.Module:
    """Return the net of torch's own layers."""
    options = net.options
    if net.family == "text-rnn":
        return GRU(options["width"])
    if net.family == "image-conv":
        layers, before = [], 1
        for i, width in enumerate(options["channels"]):
            layers += [nn.AvgPool2d(2)] if i else []
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))
    widths = (784, *options["hidden"], 10)
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[options["activation"]]()]
    return nn.Sequential(*layers[:-1])


def put(model: nn.Module, start: Params) -> None:
    """Give the module the family's start: tensors of one shape are in the same order in both."""
    left = list(start.values())
    with torch.no_grad():
        for param in model.parameters():
            index = next(i for i, value in enumerate(left) if value.shape == param.shape)
            param.copy_(left.pop(index))
    assert not left


def train(model: nn.Module, batches: Sequence[Any], optimizer: torch.optim.Optimizer, after: Callable[[], None]) -> Run:
    """Train on the batches, ``after`` every step."""
    losses, wall, cpu = [], [], []
    began, began_cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch["inputs"]), batch["targets"])
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.detach())
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    return Run(*(torch.tensor([float(x) for x in each], dtype=torch.float64) for each in (losses, wall, cpu)))


def by_adamw(model: nn.Module, batches: Sequence[Any], values: dict[str, float]) -> Run:
    """Train by torch's AdamW, all tensors together, with the schedule of the suite's."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=values["lr"], weight_decay=values["weight_decay"], foreach=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / len(batches)))
    return train(model, batches, optimizer, schedule.step)


def factor(progress: float) -> float:
    """Return the factor of the rate, as ``Scheduled``'s cosine."""
    if progress < WARMUP:
        return 0.1 + 0.9 * progress / WARMUP
    return (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))) / 2


def by_rule(model: nn.Module, batches: Sequence[Any], rule: tuple[UpdateRule, Theta]) -> Run:
    """Train by the learned rule."""
    optimizer = LearnedOptimizer(model.named_parameters(), rule, num_steps=len(batches), guard=False)
    return train(model, batches, optimizer, lambda: None)


def measure(net: Net, rule: tuple[UpdateRule, Theta], values: dict[str, float], rounds: int) -> list[str]:
    """Return the row of a net."""
    family = net.make()
    shares, wall, cpu, each = [], [], [], []
    for i in range(rounds + 1):
        tasks = sample_tasks(family, 1, "wall clock", i)
        start = {name: value[0] for name, value in family.init_params(tasks).items()}
        batches = [family.batch(tasks, step, "train") for step in range(net.num_steps)]
        batches = [{name: value[0] for name, value in batch.items()} for batch in batches]
        runs = []
        for way in (lambda m, b: by_adamw(m, b, values), lambda m, b: by_rule(m, b, rule)):
            model = module(net)
            put(model, start)
            runs.append(way(model, batches))
        theirs, ours = runs
        level = theirs.losses[-LAST:].mean()[None]
        steps = [float(steps_to_reach(run.losses[:, None], level)[0]) for run in (theirs, ours)]
        if i == 0:
            continue  # the first round compiles, and warms up
        shares.append(steps[1] / net.num_steps)
        for name, found in (("seconds", wall), ("cpu_seconds", cpu)):
            times = [reached(getattr(run, name), n) for run, n in zip(runs, steps, strict=True)]
            found.append(times[1] / times[0])
        each.append([float(run.cpu_seconds[-1]) / net.num_steps * 1e3 for run in runs])
    shown = [f"{statistics.median(x):.2f}" for x in (shares, *zip(*each, strict=True), wall, cpu)]
    spread = f"{min(wall):.2f} to {max(wall):.2f}"
    return [net.name, str(net.num_steps), f"{values['lr']:.2g}", *shown[:3], shown[3], spread, shown[4]]


def reached(seconds: Tensor, steps: float) -> float:
    """Return when the step ended, infinite for a level never reached."""
    return math.inf if math.isinf(steps) else float(seconds[round(steps) - 1])


def main() -> None:
    """Print a row a net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, default=Path("runs/suite-unseen"), help="folder of its results")
    parser.add_argument("--rule", default="general", help="packaged name or checkpoint (default general)")
    parser.add_argument("--bfloat16", action="store_true", help="orthogonalise in bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="tasks, each trained once by both (default 5)")
    parser.add_argument("--nets", default="; ".join(NETS), metavar="A;B", help="default %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rule, theta = learnedopt.load(arguments.rule)
    if arguments.bfloat16:
        rule = dataclasses.replace(rule, bfloat16=True)  # pyright: ignore[reportArgumentType]
    known = {net.name: net for net in UNSEEN}
    head = [
        "net",
        "T",
        "AdamW's rate",
        "steps to its end / T",
        "its step, ms",
        "ours",
        "seconds, ratio",
        "range",
        "CPU",
    ]
    rows = [head]
    for name in (each.strip() for each in arguments.nets.split(";")):
        record = json.loads(result_path(arguments.suite, known[name], GOAL).read_text(encoding="utf-8"))
        rows.append(measure(known[name], (rule, theta), record["values"], arguments.rounds))
        print(*rows[-1], sep=" | ", flush=True)
    medians = [statistics.median(float(row[column]) for row in rows[1:]) for column in (3, 6, 8)]
    last = ["**median**", "", "", f"{medians[0]:.2f}", "", "", f"{medians[1]:.2f}", "", f"{medians[2]:.2f}"]
    print(f"\n{align([*rows, last])}")


if __name__ == "__main__":
    main()
