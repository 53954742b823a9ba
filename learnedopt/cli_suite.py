"""``learnedopt evaluate --suite``: learned optimizers, untuned, on a fixed suite of nets beside tuned baselines."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from learnedopt.checkpoint import Checkpoint
    from learnedopt.training.wandb_variables import Mode


def add_arguments(evaluate: argparse.ArgumentParser) -> None:
    """Add what is said of a suite."""
    evaluate.add_argument(
        "--suite", metavar="NAME", help="unseen or growth: on a fixed list of nets, beside baselines with schedules"
    )
    evaluate.add_argument("--nets", default="", metavar="A;B", help="of the suite, names or numbers from 1 on")
    evaluate.add_argument("--device", metavar="DEVICE", help="of the suite, such as cuda (default cpu)")
    evaluate.add_argument(
        "--graphs",
        choices=("none", "baselines", "all"),
        help="of the suite: whose steps run as CUDA graphs (default none)",
    )


def run(arguments: argparse.Namespace, mode: Mode, loaded: Mapping[str, Checkpoint]) -> None:
    """Evaluate as the arguments say: what the folder has already is not run again."""
    from learnedopt import followed
    from learnedopt.core.execution import Execution
    from learnedopt.evaluation import suite_table
    from learnedopt.evaluation.grids import named
    from learnedopt.evaluation.nets import SUITES, chosen
    from learnedopt.evaluation.suite import Protocol, run_suite
    from learnedopt.training.tracking import Tracking

    unused = [name for name in ("family", "steps", "set") if getattr(arguments, name)]
    if unused:
        raise ValueError(
            f"--{' and --'.join(unused)} have no effect with --suite, whose nets are fixed: leave them out"
        )
    nets = chosen(arguments.suite, [name.strip() for name in arguments.nets.split(";") if name.strip()])
    given = {
        "num_seeds": arguments.tasks, "num_tuning_tasks": arguments.tuning_tasks, "tune_for": arguments.tune_for,
        "seed": arguments.seed,
    }  # fmt: skip
    protocol = Protocol(**{name: value for name, value in given.items() if value is not None})
    out = arguments.out or Path("runs") / f"suite-{arguments.suite}"
    run_suite(
        {label: (learned.rule, learned.theta, learned.inner_objective) for label, learned in loaded.items()}, nets,
        named(arguments.baselines or "main"), folder=out, protocol=protocol,
        execution=Execution(device=arguments.device, vet=False), graphs=arguments.graphs or "none",
        report=lambda line: print(line, flush=True),
    )  # fmt: skip
    found = suite_table.collect(out, [net.name for net in SUITES[arguments.suite]])
    print(f"\n{found.markdown()}", flush=True)
    paths = found.save(out)
    print(f"Figures, tables and numbers: {', '.join(map(str, paths.values()))}")
    labels = dict(zip(loaded, arguments.checkpoint, strict=True))
    followed.show_suite(Tracking(mode), out, labels, arguments.suite, found, paths)
