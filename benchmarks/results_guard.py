"""The guard's promise, measured: fallback alone, the bare rule and the guarded one, on small real problems.

Run ``python benchmarks/results_guard.py``; every run is kept in ``--folder`` as it ends, and is not made again.
``--table`` prints the tables of what is there. Losses are means over a run's last 20 steps, on minibatches that are
the same for all; ratios are of the means over seeds, and that of the worst seed. "Shifted" is the
fallback alone again, from the same start, with the minibatches of 8, 16, 32 and 48 steps later: what chance does to it.
LEARNEDOPT_DATA holds the images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from guard_problems import ImageBatches, Problem, TextBatches, Transformer, conv, loss_on, mlp
from torch import nn

from learnedopt import HorizonWarning, LearnedOptimizer

LAST, SEEDS, WARM_UP, SHIFTS = 20, range(5), 10, (8, 16, 32, 48)
SHIFTED = {f"shifted {n}": n for n in SHIFTS}
READERS = ("general", "normalised-lstm-mnist", "normalised-mlp-mnist")


class Case(NamedTuple):
    """A problem, the rules that are tried on it, and the horizon that readers are told, all steps by default."""

    problem: Callable[[], Problem]
    rules: tuple[str, ...]
    told: int | None = None


def mnist(size: int = 14, **options: Any) -> ImageBatches:
    """Return minibatches of MNIST."""
    return ImageBatches("mnist", size=size, batch_size=64, **options)


def fashion(size: int = 14, **options: Any) -> ImageBatches:
    """Return minibatches of Fashion-MNIST."""
    return ImageBatches("fashion-mnist", size=size, batch_size=64, **options)


CASES = {
    "logistic regression": Case(lambda: Problem(lambda: mlp(784, ()), fashion(28), 500), ("general", "lstm-quadratic")),
    "ReLU MLP": Case(
        lambda: Problem(lambda: mlp(196, (64,)), mnist(), 600),
        (
            "general",
            "lstm-mnist",
            "lstm-quadratic",
            "tensor-gru-quadratic",
            "normalised-lstm-mnist",
            "normalised-mlp-mnist",
        ),
    ),
    "conv net": Case(
        lambda: Problem(lambda: conv(14, (8, 16)), mnist(), 500),
        ("general", "normalised-mlp-mnist", "tensor-gru-quadratic"),
    ),
    "transformer": Case(lambda: Problem(Transformer, TextBatches(), 400), ("general", "lstm-quadratic")),
    "ten ReLU layers": Case(
        lambda: Problem(lambda: mlp(196, (32,) * 9), mnist(), 600), ("general", "lstm-mnist", "tensor-gru-quadratic")
    ),
    "pixels 0..255": Case(
        lambda: Problem(lambda: mlp(196, (32,)), mnist(scale=1.0), 600),
        ("general", "lstm-mnist", "normalised-lstm-mnist"),
    ),
    "continuing Adam's": Case(
        lambda: Problem(lambda: mlp(196, (20,), nn.Sigmoid), mnist(), 500, trained=300),
        ("general", "lstm-mnist", "lstm-quadratic"),
    ),
    "its own net, 10 x the horizon": Case(
        lambda: Problem(lambda: mlp(784, (20,), nn.Sigmoid), mnist(28), 1000),
        ("lstm-mnist", "normalised-lstm-mnist"),
        100,
    ),
    "ReLU MLP, 10 x the horizon": Case(lambda: Problem(lambda: mlp(196, (64,)), mnist(), 600), ("general",), 60),
}


def run(
    problem: Problem, seed: int, make: Callable[[nn.Module], torch.optim.Optimizer], skip: int, guarded: bool
) -> dict[str, Any]:
    """Train once, ``skip`` minibatches later; the loss before every step, and what the guard reports."""
    model, batches = problem.start(seed)
    for _ in range(skip):
        next(batches)
    optimizer, losses = make(model), []
    for step in range(problem.num_steps):
        optimizer.zero_grad()
        loss = loss_on(model, next(batches))
        loss.backward()
        losses.append(float(loss.detach()))
        if isinstance(optimizer, LearnedOptimizer):
            optimizer.step(loss=loss)
            continue
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / WARM_UP)
        optimizer.step()
    found: dict[str, Any] = {"losses": losses}
    if isinstance(optimizer, LearnedOptimizer) and guarded:
        report = optimizer.guard_report()
        found |= {
            "control": report.in_control,
            "handed": [(h.step, h.to_learned, h.reason.name) for h in report.history],
        }
    return found


def maker(how: str, rule: str, told: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return what makes one of the optimizers: "adam", "fallback", "shifted 8", ..., "bare", "guarded"."""
    if how == "adam":
        return lambda model: torch.optim.Adam(model.parameters())
    if how.startswith(("fallback", "shifted")):
        return lambda model: torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)
    steps = told if rule in READERS else None
    return lambda model: LearnedOptimizer(model.named_parameters(), rule, num_steps=steps, guard=how == "guarded")


def runs(folder: Path, names: list[str]) -> None:
    """Make the runs that are missing, those without a guard last."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ("adam", "fallback", *SHIFTED, "guarded"), ("bare",)
    for hows, seed, name in itertools.product(kinds, SEEDS, names):
        case, problem = CASES[name], None
        for how, rule in itertools.product(hows, case.rules):
            path = path_of(folder, name, how, rule, seed)
            if path.exists():
                continue
            problem = problem or case.problem()
            make = maker(how, rule, case.told or problem.num_steps)
            found = run(problem, seed, make, SHIFTED.get(how, 0), how == "guarded")
            path.write_text(json.dumps(found))
            print(path.stem, f"{last(found):.4f}", found.get("handed", ""), flush=True)


def path_of(folder: Path, name: str, how: str, rule: str, seed: int) -> Path:
    """Return where a run is kept; those without a rule of ours are a problem's, whatever the rule beside them."""
    return folder / f"{name} {how} {rule if how in ('bare', 'guarded') else ''} {seed}.json"


def last(found: dict[str, Any]) -> float:
    """Return the mean of a run's last losses."""
    return statistics.fmean(found["losses"][-LAST:])


def steps_to(found: dict[str, Any], goal: float) -> float:
    """Return after how many steps the mean of the last 20 losses was at most ``goal``."""
    losses = found["losses"]
    means = (statistics.fmean(losses[i - LAST : i]) for i in range(LAST, len(losses) + 1))
    return next((i + LAST for i, mean in enumerate(means) if mean <= goal), math.inf)


def table(folder: Path) -> str:
    """Return the tables, in Markdown."""
    lines = [
        "| problem, steps | rule | fallback | bare | guarded | guarded / fallback, worst | shifted / fallback, worst "
        "| hand-overs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reach = ["| problem | Adam's steps | guarded `general`, mean | share |", "|---|---|---|---|"]
    for name, case in CASES.items():
        for rule in case.rules:
            sets = {how: kept(folder, name, how, rule) for how in ("fallback", *SHIFTED, "guarded", "adam", "bare")}
            shared = set.intersection(*({*each} for how, each in sets.items() if how != "bare"))
            if not shared or not sets["bare"]:
                continue
            seeds = sorted(shared)
            ends = {
                how: [last(x) for seed, x in each.items() if how == "bare" or seed in shared]
                for how, each in sets.items()
            }
            guarded = [sets["guarded"][seed] for seed in seeds]
            steps, handed = len(guarded[0]["losses"]), statistics.fmean(len(x["handed"]) for x in guarded)
            means = " | ".join(f"{statistics.fmean(ends[how]):.3f}" for how in ("fallback", "bare", "guarded"))
            late = [x for how in SHIFTED for x in ends[how]]
            lines.append(
                f"| {name}, {steps} | `{rule}` | {means} | {ratio(ends['guarded'], ends['fallback'])} | "
                f"{ratio(late, ends['fallback'] * len(SHIFTED))} | {handed:.1f} |"
            )
            if rule == "general" and case.told is None:
                needed = [steps_to(x, end) for x, end in zip(guarded, ends["adam"], strict=True)]
                mean = statistics.fmean(needed)
                reach.append(f"| {name} | {steps} | {mean:.0f} | {mean / steps:.2f} |")
    return "\n".join([*lines, "", *reach])


def ratio(ends: list[float], of: list[float]) -> str:
    """Return the ratio of the means, and the largest of pairs."""
    worst = max(a / b for a, b in zip(ends, of, strict=True))
    return f"{statistics.fmean(ends) / statistics.fmean(of):.3f}, {worst:.3f}"


def kept(folder: Path, name: str, how: str, rule: str) -> dict[int, dict[str, Any]]:
    """Return the runs that are there, by seed."""
    paths = {seed: path_of(folder, name, how, rule, seed) for seed in SEEDS}
    return {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}


def main() -> None:
    """Make the runs, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/guard"), help="default runs/guard")
    parser.add_argument("--cases", nargs="*", default=[*CASES], choices=[*CASES])
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", HorizonWarning)
    if not arguments.table:
        runs(arguments.folder, arguments.cases)
    sys.stdout.write(table(arguments.folder) + "\n")


if __name__ == "__main__":
    main()
