"""Forward mode: how exact it is, what it holds against the number of inner steps, and its windows beside truncation.

Run ``python benchmarks/results_forward.py`` (a few minutes). Errors are relative, ``|a - b| / |b|`` over one
meta-parameter, in float64. Memory is the most bytes that torch's allocator held at a time during one estimate, as in
``results_memory``, a process of its own for each number of steps: the MLP there, momentum's two learned numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator

import torch
from results_gradients import like
from results_memory import MB, STEPS, allocator_peak, build, data
from torch import Tensor, nn

from learnedopt import (
    BootstrappedTarget,
    FinalLoss,
    ForwardMode,
    GradientEstimator,
    InnerLoop,
    KLDivergence,
    MeanLogLoss,
    MetaObjective,
    ModuleFamily,
    SumOfLosses,
    Tape,
    TaskFamily,
    Theta,
    Truncated,
    Unrolled,
    inner_objectives,
    optimizers,
    tasks,
)

OBJECTIVES: dict[str, MetaObjective] = {
    "final loss": FinalLoss(),
    "sum of losses": SumOfLosses(),
    "mean log loss": MeanLogLoss(),
    "bootstrapped": BootstrappedTarget(3, 0.3),
    "bootstrapped, divergence": BootstrappedTarget(3, 0.3, "train", KLDivergence()),
}
NUM_STEPS, HORIZON, WINDOW = 4, 60, 5
EXACT, FLAT, OFF = 1e-12, 1.1, 0.2
"""The goals: the largest error, the largest over the smallest peak, and the least error of truncation."""
PEAKS: dict[str, type[ForwardMode] | type[Unrolled]] = {"ForwardMode": ForwardMode, "Unrolled": Unrolled}


def classifier() -> TaskFamily:
    """Return a small classification by a tanh network."""

    def points(seed: int, step: int, split: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed % 1000 + 7 * (split == "valid"))
        return torch.randn(6, 2, generator=generator), torch.randint(3, (6,), generator=generator)

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))

    return ModuleFamily(net, nn.functional.cross_entropy, points)


def error(found: Theta, expected: Theta) -> float:
    """Return the worst relative error over the meta-parameters."""
    return max(
        float((found[k] - e).norm() / e.norm()) if e.any() else float(found[k].norm()) for k, e in expected.items()
    )


def loops() -> Iterator[tuple[str, InnerLoop]]:
    """Yield every registered rule on quadratics and on a network, and MAML's on inner objectives that need no labels.

    ``tests/test_combinations.py`` walks over all inner objectives.
    """
    families: dict[str, TaskFamily] = {"quadratics": tasks.make("quadratic", dim=4), "a tanh MLP": classifier()}
    for where, family in families.items():
        template = like(family)
        for rule in optimizers.names():
            # At Adam's usual decay rates the first updates hardly know them: what is left of their gradients is the
            # rounding of a difference of numbers a million times as large.
            adam = optimizers.make("adam", lr=0.06, beta1=0.8, beta2=0.9, eps=0.05)
            made = adam if rule == "adam" else optimizers.example(rule, template)
            yield f"{rule}, {where}", InnerLoop(family, made, horizon=2 * NUM_STEPS)  # with the steps of targets
        for inner in ("l2", "proximal"):
            objective = inner_objectives.example(inner, template, 8, 2, (2,))
            loop = InnerLoop(family, optimizers.example("maml", template), inner_objective=objective)
            yield f"maml on {inner}, {where}", loop


def differences() -> dict[str, float]:
    """Return the worst error of forward mode against back-propagation, by objective; what both refuse is left out."""
    worst: dict[str, float] = {}
    for label, loop in loops():
        generator = torch.Generator().manual_seed(3)
        theta = {k: v.double() for k, v in loop.init_theta(generator).items()}
        carry = loop.start(loop.family.sample(2, generator))
        for name, objective in OBJECTIVES.items():
            try:
                expected = Unrolled(NUM_STEPS).estimate(loop, theta, objective, carry).grads
            except (ValueError, NotImplementedError):
                continue
            found = error(ForwardMode(NUM_STEPS).estimate(loop, theta, objective, carry).grads, expected)
            print(f"{label}, {name}: {found:.1e}", flush=True)
            worst[name] = max(worst.get(name, 0.0), found)
    return worst


def peak(label: str, num_steps: int) -> float:
    """Return the peak bytes of one estimate; call it in a process of its own."""
    torch.set_num_threads(1)
    family = ModuleFamily(build, nn.functional.cross_entropy, data)
    loop = InnerLoop(family, optimizers.make("momentum", lr=0.01, momentum=0.9, learn=("lr", "momentum")))
    generator = torch.Generator().manual_seed(0)
    carry, theta = loop.start(family.sample(1, generator)), loop.init_theta(generator)

    def estimate(steps: int) -> None:
        PEAKS[label](steps).estimate(loop, theta, FinalLoss(), carry)

    estimate(1)  # what is set up once
    return allocator_peak(lambda: estimate(num_steps))


def peaks() -> dict[str, list[float]]:
    """Return the peaks for each number of steps, each of a process of its own."""

    def own(label: str, num_steps: int) -> float:
        command = [sys.executable, __file__, label, str(num_steps)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(f"{label}, {num_steps} steps: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    return {label: [own(label, n) for n in STEPS] for label in PEAKS}


def window_errors() -> dict[str, float]:
    """Return how far the last window's gradient of the final loss is from the whole horizon's exact one."""
    family = tasks.make("quadratic", dim=4)
    loop = InnerLoop(family, optimizers.make("momentum", lr=0.003, momentum=0.8, learn=("lr", "momentum")))
    generator = torch.Generator().manual_seed(0)
    theta, drawn = loop.init_theta(generator), family.sample(4, generator)
    exact = Unrolled(HORIZON).estimate(loop, theta, FinalLoss(), loop.start(drawn)).grads
    estimators: dict[str, GradientEstimator] = {
        f"ForwardMode({HORIZON})": ForwardMode(HORIZON),
        f"ForwardMode({WINDOW}, {HORIZON})": ForwardMode(WINDOW, HORIZON),
        f"Truncated({WINDOW}, {HORIZON}, Tape.FULL)": Truncated(WINDOW, HORIZON, Tape.FULL),
    }
    found = {}
    for label, estimator in estimators.items():
        carry = estimator.start(loop, theta, drawn, generator)
        while carry is not None:
            estimate = estimator.estimate(loop, theta, FinalLoss(), carry)
            carry = estimate.carry
        found[label] = error(estimate.grads, exact)
    return found


def main() -> None:
    """Print the tables; exit with an error where a goal is missed."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
    worst, errors = differences(), window_errors()
    torch.set_default_dtype(torch.float32)
    held = peaks()
    print("\n| objective | goal | worst difference |\n|---|---|---|")
    for name, value in worst.items():
        print(f"| {name} | {EXACT:.0e} | {value:.1e} |")
    print(
        f"\n| peak MB, steps | {' | '.join(map(str, STEPS))} | largest / smallest |\n|---|{'---|' * (len(STEPS) + 1)}"
    )
    for label, row in held.items():
        print(f"| {label} | {' | '.join(f'{x / MB:.2f}' for x in row)} | {max(row) / min(row):.3f} |")
    print("\n| the last window's gradient, against the whole horizon's | relative error |\n|---|---|")
    for label, value in errors.items():
        print(f"| `{label}` | {value:.1e} |")
    flat = max(held["ForwardMode"]) / min(held["ForwardMode"])
    *ours, cut = errors.values()
    if max(*worst.values(), *ours) > EXACT or flat > FLAT or cut < OFF:
        raise SystemExit("a goal is missed")


if __name__ == "__main__":
    if len(sys.argv) == 3:  # a point's own process
        print(json.dumps(peak(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
