"""The step of every packaged optimizer beside Adam's and a plain LSTMCell's: CPU time and memory by size.

Run ``python benchmarks/results_plug_in.py`` on a machine that does nothing else (about ten minutes). The parameters are
one square matrix of 0.1, 1 and 10 million numbers, float32, one thread. Every measurement is a process of its own: the
first steps build the memory and what is made ready once, then the least CPU time of the steps that follow counts, over
all rounds. ``--celo PYTHON CELO LEARNED_OPTIMIZATION THETA`` times Celo's own program too (see ``celo_jax.py``).

Memory is what the optimizer keeps, and by how much the process's resident memory grows at most from before it is made
until after its third step, beside parameters and gradients. The learned ones are bare, without the guard.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

import learnedopt
from benchmarks.measure import ONE_THREAD, OWN_PAGES
from benchmarks.results_memory import resident_growth
from benchmarks.workloads_lstm import cells_of, step_of, zeros
from learnedopt import LearnedOptimizer
from learnedopt.core import tree
from learnedopt.optimizers import Normalised

SIZES = (100_000, 1_000_000, 10_000_000)
ADAM, CELL, BARE = "Adam, foreach", "nn.LSTMCell", "normalised"
PIECE = 1_000_000  # coordinates that the cells see at a time, so that ten million fit into memory
NUM_STEPS = 100  # what rules that read the horizon are told
SECONDS, LEAST, MOST = 2.0, 2, 40  # of timing; steps at least and at most
MB = 1e6
GOALS = {"lstm-mnist": 1 / 10, "normalised": 8.0, "normalised-mlp-mnist": 8.0}
"""At a million: the LSTM's time over the cells' at most, and the small rules' over Adam's."""


class Stepped(Protocol):
    """What takes a step."""

    def step(self) -> Any:
        """Move the parameters once."""


class Cells:
    """The LSTM of ``lstm-mnist`` in torch's own cells, all coordinates a batch: how one writes it first."""

    def __init__(self, param: Tensor) -> None:
        self.param = param
        self.cells = cells_of(learnedopt.load("lstm-mnist")[1])
        flat = param.detach().view(-1)
        self.pieces = [slice(low, low + PIECE) for low in range(0, flat.numel(), PIECE)]
        self.state: Any = [zeros(flat[piece].numel(), flat) for piece in self.pieces]

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameter once."""
        if self.param.grad is None:
            raise ValueError("the parameter has no gradient")
        flat, grads = self.param.view(-1), self.param.grad.view(-1)
        for i, piece in enumerate(self.pieces):
            deltas, self.state[i] = step_of(self.cells, grads[piece], self.state[i])
            flat[piece] += deltas


def _learned(param: Tensor, rule: Any, reads_horizon: bool, reads_loss: bool = False) -> Stepped:
    told: dict[str, Any] = {"num_steps": NUM_STEPS} if reads_horizon else {}
    optimizer: Any = LearnedOptimizer([("weight", param)], rule, guard=False, **told)
    if reads_loss:
        step = optimizer.step
        optimizer.step = lambda: step(loss=1.0)
    return optimizer


def competitors() -> dict[str, Callable[[Tensor], Stepped]]:
    """Return what is compared, by label."""
    normalised = Normalised()
    theta = normalised.init_theta(torch.Generator())
    found: dict[str, Callable[[Tensor], Stepped]] = {
        ADAM: lambda p: torch.optim.Adam([p], foreach=True),
        "Adam, fused": lambda p: torch.optim.Adam([p], fused=True),
        BARE: lambda p: _learned(p, (normalised, theta), reads_horizon=True),
    }
    for name in learnedopt.packaged():
        reads = learnedopt.load(name)[0].reads_horizon
        found[name] = lambda p, name=name, reads=reads: _learned(p, name, reads, name.startswith("tensor-gru"))
    return {**found, CELL: Cells}


class Point(NamedTuple):
    """CPU milliseconds of a step, megabytes that are kept, and the most that the process grew by."""

    cpu_ms: float
    kept: float
    peak: float


def matrix(size: int) -> Tensor:
    """Return the parameter, with its gradient."""
    side, generator = math.isqrt(size), torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(side, side, generator=generator))
    param.grad = torch.randn(side, side, generator=generator)
    return param


def cpu_ms(label: str, size: int) -> float:
    """Return the least CPU time of a step; call it in a process of its own."""
    optimizer = competitors()[label](matrix(size))
    for _ in range(3):
        optimizer.step()
    found: list[float] = []
    while len(found) < LEAST or (sum(found) < SECONDS and len(found) < MOST):
        begun = time.process_time()
        optimizer.step()
        found.append(time.process_time() - begun)
    return 1e3 * min(found)


def memory(label: str, size: int) -> tuple[float, float]:
    """Return the megabytes that are kept and the peak; call it in a process of its own."""
    small, param, made = matrix(100), matrix(size), competitors()[label]
    warm = made(small)
    warm.step()  # what is loaded and compiled once
    gc.collect()
    held: list[Any] = []

    def run() -> None:
        held.append(made(param))
        for _ in range(3):
            held[0].step()

    growth = resident_growth(run)
    state = held[0].state
    leaves = tree.leaves(list(state.values()) if isinstance(state, dict) else state)
    unique = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in leaves if isinstance(x, Tensor)}
    return sum(unique.values()) / MB, growth / MB


def in_own_process(what: str, label: str, size: int) -> Any:
    """Return ``cpu_ms`` or ``memory`` as a fresh process of one thread finds it."""
    environment = {**os.environ, **ONE_THREAD, **(OWN_PAGES if what == "memory" else {})}
    command = [sys.executable, __file__, "--worker", what, label, str(size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{what} of {label} at {size}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(size: int, rounds: int, only: Sequence[str] | None = None) -> dict[str, Point]:
    """Return the points of Adam and of ``only`` those, by default of all, at a size; the rounds of all in turn."""
    labels = [label for label in competitors() if only is None or label in (ADAM, *only)]
    times: dict[str, list[float]] = {label: [] for label in labels}
    for _ in range(rounds):
        for label in labels:
            times[label].append(in_own_process("cpu_ms", label, size))
    return {label: Point(min(times[label]), *in_own_process("memory", label, size)) for label in labels}


def celo_row(size: int, rounds: int, given: Sequence[str] | None) -> str:
    """Return the row of Celo's own program, or that it is not there."""
    if given is None:
        return "| Celo on JAX | not installed | | | |"
    program, times = str(Path(__file__).with_name("celo_jax.py")), []
    for _ in range(rounds):
        done = subprocess.run([given[0], program, *given[1:], str(size)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"Celo on JAX at {size}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        times.append(json.loads(done.stdout.splitlines()[-1]))
    return f"| Celo on JAX | {min(times):.3g} | | | |"


def table(size: int, points: dict[str, Point]) -> str:
    """Return the table of a size, as Markdown."""
    adam = points[ADAM]
    rows = [
        f"| {label} | {p.cpu_ms:.3g} | {p.cpu_ms / adam.cpu_ms:.3g} | {p.kept:.3g} | {p.peak:.3g} |"
        for label, p in points.items()
    ]
    head = ["| | CPU ms a step | of Adam's (foreach) | kept MB | peak MB |", "|---|---|---|---|---|"]
    return "\n".join([f"{math.isqrt(size) ** 2:,} parameters, {size * 4 / MB:.3g} MB in float32:\n", *head, *rows])


def missed(points: dict[str, Point]) -> list[str]:
    """Say which goals are missed at a million parameters."""
    beside = {name: points[CELL if name == "lstm-mnist" else ADAM].cpu_ms for name in GOALS}
    ratios = {name: points[name].cpu_ms / beside[name] for name in GOALS}
    return [f"{name}: {ratios[name]:.3g}, goal {goal:.3g}" for name, goal in GOALS.items() if ratios[name] > goal]


def main() -> None:
    """Measure and print, or do a worker's part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="processes of each, the least time counts")
    parser.add_argument("--only", nargs="+", choices=[*competitors()], metavar="LABEL", help="these, beside Adam")
    parser.add_argument("--celo", nargs=4, metavar=("PYTHON", "CELO", "LEARNED_OPTIMIZATION", "THETA"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers as JSON")
    parser.add_argument("--worker", nargs=3, metavar=("WHAT", "LABEL", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        what, label, size = arguments.worker
        print(json.dumps({"cpu_ms": cpu_ms, "memory": memory}[what](label, int(size))))
        return
    points = {}
    for size in arguments.sizes:
        points[size] = measured(size, arguments.rounds, arguments.only)
        print(table(size, points[size]), celo_row(size, arguments.rounds, arguments.celo), sep="\n", flush=True)
        print()
        if size == 1_000_000 and arguments.only is None:
            print("\n".join(missed(points[size])) or "The goals at a million parameters are reached.", end="\n\n")
    if arguments.out:
        arguments.out.write_text(
            json.dumps({str(n): {k: p._asdict() for k, p in row.items()} for n, row in points.items()})
        )


if __name__ == "__main__":
    main()
