"""``learnedopt evaluate --suite``: learned optimizers, untuned, on a fixed suite of nets beside tuned baselines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from learnedopt.evaluation.suite import Graphs
    from learnedopt.training.following import Tracking


def run(
    suite: str,
    checkpoint: Sequence[str],
    tracking: Tracking,
    *,
    nets: str | None,
    tasks: int | None,
    tuning_tasks: int | None,
    tune_for: str | None,
    baselines: str | None,
    device: str | None,
    graphs: Graphs | None,
    seed: int,
    out: Path | None,
) -> None:
    """Evaluate on a suite, as ``learnedopt evaluate --help`` says: what the folder has already is not run again."""
    from learnedopt.cli_given import load_all
    from learnedopt.core.execution import Execution
    from learnedopt.evaluation import suite_table
    from learnedopt.evaluation.grids import named
    from learnedopt.evaluation.nets import SUITES, chosen
    from learnedopt.evaluation.runs import labelled
    from learnedopt.evaluation.suite import Protocol, run_suite
    from learnedopt.followed import show_suite
    from learnedopt.run import require_device

    require_device(device, "--device ")
    names = [name.strip() for name in (nets or "").split(";") if name.strip()]
    chosen_nets = chosen(suite, names)
    given = {"num_seeds": tasks, "num_tuning_tasks": tuning_tasks, "tune_for": tune_for, "seed": seed}
    protocol = Protocol(**{name: value for name, value in given.items() if value is not None})
    out = out or Path("runs") / f"suite-{suite}"
    run_suite(
        {label: (found.rule, found.theta, found.inner_objective) for label, found in load_all(checkpoint).items()},
        chosen_nets, named(baselines or "main"), folder=out, protocol=protocol,
        execution=Execution(device=device, vet=False), graphs=graphs or "none",
        report=lambda line: print(line, flush=True),
    )  # fmt: skip
    found = suite_table.collect(out, [net.name for net in SUITES[suite]])
    print(f"\n{found.markdown()}", flush=True)
    paths = found.save(out)
    print(f"Figures, tables and numbers: {', '.join(map(str, paths.values()))}")
    show_suite(tracking, out, labelled(checkpoint), suite, found, paths)
