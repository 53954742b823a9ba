"""One training run at a time: what studies of rates that are learned meanwhile share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Tape
from learnedopt.core.files import plain_json, write_json
from learnedopt.core.inner import InnerLoop
from learnedopt.core.task import TaskFamily
from learnedopt.core.tree import Params
from learnedopt.evaluation.plots import plot_lines
from learnedopt.plug_in.hyper import HyperOptimizer
from learnedopt.plug_in.learner import RunDiverged
from learnedopt.training.tracker import Tracker

WIDTH = 50  # steps that what the tracker is told is a mean of
POINTS = 100  # of a line in the figure, at most
Curves = Mapping[str, list[list[float]]]
"""Method -> the losses of each of its runs."""


def fixed(family: TaskFamily, rule: str, options: dict[str, Any], seeds: Sequence[int], num_steps: int) -> Any:
    """Return the losses of a rule as it is made: a list for each seed's run."""
    from learnedopt import optimizers

    loop = InnerLoop(family, optimizers.make(rule, **options))
    theta = loop.init_theta(torch.Generator())
    rollout = loop.run(theta, loop.start({"seed": torch.tensor(seeds)}), num_steps, Tape.NONE)
    return tree.numbers(rollout.losses.T)


def learning(family: TaskFamily, make: Callable[[Params], HyperOptimizer], seed: int, num_steps: int) -> dict[str, Any]:
    """Return the losses of one run in which theta is learned, and the mean of each tensor of theta at its end.

    The losses of a run that diverged are infinite from there on.
    """
    task = {"seed": torch.tensor([seed])}
    params = {k: p.detach().clone().requires_grad_() for k, p in tree.squeeze(family.init_params(task)).items()}
    optimizer = make(params)
    losses: list[float] = []
    for step in range(num_steps):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = family.loss(params, tree.squeeze(family.batch(task, step, "train")))
            loss.backward()  # pyright: ignore[reportUnknownMemberType] - torch gives it no types
            return loss.detach()

        try:
            losses.append(float(optimizer.step(closure)))
        except RunDiverged:
            losses += [math.inf] * (num_steps - step)
            break
    return {"losses": losses, "theta": {k: float(v.double().mean()) for k, v in optimizer.theta.items()}}


def score(runs: Sequence[Sequence[float | str]], last: int) -> float:
    """Return the mean of the last losses of all runs."""
    return statistics.fmean(statistics.fmean(floats(each)[-last:]) for each in runs)


def floats(values: Sequence[float | str]) -> list[float]:
    """Return numbers out of JSON, in which those that are not finite are words."""
    return [float(x) for x in values]


def best(scores: Mapping[str, float]) -> str:
    """Return the setting with the least score; what is not a number is never the least."""
    return min(scores, key=lambda key: scores[key] if scores[key] == scores[key] else float("inf"))


def report(path: Path, curves: Curves, last: int, emphasis: Sequence[str], title: str, tracker: Tracker) -> None:
    """Write what each method ends with as JSON, beside a figure of all losses; ratios are to the first method.

    Args:
        path: without a suffix.
        curves: of one length.
        last: steps at the end whose mean counts.
        emphasis: methods that the figure is about.
        title: of the figure.
        tracker: is told of the curves.
    """
    ends = {label: [score([each], last) for each in runs] for label, runs in curves.items()}
    reference = statistics.fmean(next(iter(ends.values())))
    table = {
        label: {"last": values, "mean": statistics.fmean(values), "ratio": statistics.fmean(values) / reference}
        for label, values in ends.items()
    }
    lines = {label: smoothed(runs) for label, runs in curves.items()}
    num_steps = len(next(iter(lines.values())))
    for step in range(min(WIDTH, num_steps), num_steps + 1, WIDTH):
        tracker.log({label: line[step - 1] for label, line in lines.items()}, step)
    write_json(path.with_suffix(".json"), plain_json(table))
    num_runs = len(next(iter(curves.values())))
    drawn = {label: recent(runs) for label, runs in curves.items()}
    ylabel = f"training loss, mean over {num_runs} runs\nand the last tenth of the steps"
    plot_lines(path.with_suffix(".png"), drawn, "step", ylabel, logx=True, logy=None, emphasis=emphasis, title=title)


def recent(runs: Sequence[Sequence[float]]) -> tuple[list[int], list[float]]:
    """Return steps t, evenly in their logarithm, and the mean over runs of the mean over the last tenth of t steps.

    Both the start and the end of a run are seen so, and no point is a mean over what lies far behind it.
    """
    means = [statistics.fmean(each) for each in zip(*runs, strict=True)]
    steps = sorted({round(len(means) ** (i / POINTS)) for i in range(POINTS + 1)})
    return steps, [statistics.fmean(means[t - max(1, t // 10) : t]) for t in steps]


def smoothed(runs: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over runs of the mean over the last steps, at every step."""
    means = [statistics.fmean(each) for each in zip(*runs, strict=True)]
    return [statistics.fmean(means[max(0, i + 1 - WIDTH) : i + 1]) for i in range(len(means))]
