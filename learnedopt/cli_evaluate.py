"""The command ``learnedopt evaluate``: learned optimizers against baselines, few-shot learners, suites of nets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from learnedopt import cli_suite
from learnedopt.cli_compare import compare
from learnedopt.cli_given import load_all, options_of, require_own, use_threads
from learnedopt.training.following import Tracking


def evaluate_runs(
    checkpoint: Sequence[str],
    tracking: Tracking,
    few_shot: bool = False,
    suite: str | None = None,
    family: str | None = None,
    set: Sequence[str] = (),
    steps: int | None = None,
    tasks: int | None = None,
    tuning_tasks: int | None = None,
    tune_for: str | None = None,
    baselines: str | None = None,
    nets: str | None = None,
    device: str | None = None,
    graphs: Literal["none", "baselines", "all"] | None = None,
    seed: int = 0,
    threads: int = 1,
    out: Path | None = None,
) -> int:
    """Run learned optimizers against tuned baselines, or few-shot learners, or on a suite of unseen nets.

    Without --few-shot and --suite it is the same as learnedopt compare: on fresh tasks of the family, beside tuned
    baselines. With --few-shot: adapt learned starts, side by side, to the same fixed test tasks, and report the
    accuracy (or loss) by steps: few_shot.md, .json, .png. With --suite: untuned on nets that no meta-training saw,
    beside baselines with schedules: suite.md, .json, .png. A folder that holds an evaluation with other settings is
    refused.

    Args:
        checkpoint: files, folders of runs, or packaged names
        tracking: who is told
        few_shot: measure few-shot adaptation, without baselines
        suite: unseen or growth, a fixed list of nets
        family: a task family, see learnedopt list; by default that of their meta-training
        set: KEY=VALUE, an option of the family; repeatable
        steps: inner steps; by default 100, few-shot 10
        tasks: fresh tasks; by default 100, few-shot 600
        tuning_tasks: tasks to tune on; by default all --tasks if they are small, else 8
        tune_for: final_loss (the default), sum_of_losses or last_ten; of a suite last_twenty, last_ten or final_loss
        baselines: what is tuned beside it: plain (the default), main (a suite's) or all with schedules, or labels of
            these as A;B
        nets: of the suite, names or numbers from 1 on, as A;B
        device: of the suite, such as cuda; by default cpu
        graphs: of the suite, whose steps run as CUDA graphs; by default none
        seed: of the tasks
        threads: of torch; tasks are small
        out: a folder; by default runs/evaluate-CHECKPOINT-FAMILY
    """
    from learnedopt.followed import require_views

    require_views(tracking)
    use_threads(threads)
    tuned: dict[str, Any] = {"tuning_tasks": tuning_tasks, "tune_for": tune_for, "baselines": baselines}
    on_suite: dict[str, Any] = {"nets": nets, "device": device, "graphs": graphs}
    if suite is not None:
        if few_shot:
            raise ValueError("--suite and --few-shot exclude each other: leave one out")
        _require_unused("with --suite, whose nets are fixed", family=family, steps=steps, set=set)
        cli_suite.run(suite, checkpoint, tracking, tasks=tasks, seed=seed, out=out, **tuned, **on_suite)
        return 0
    _require_unused("without --suite", **on_suite)
    if few_shot:
        _require_unused("with --few-shot, which tunes nothing", **tuned)
        steps, tasks = 10 if steps is None else steps, 600 if tasks is None else tasks
        _few_shot(checkpoint, tracking, family, set, steps, tasks, seed, out)
        return 0
    given = {"steps": steps, "tasks": tasks, **tuned}
    return compare(
        checkpoint, tracking, family, set, seed=seed, threads=threads, out=out,
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip


def _require_unused(when: str, **options: object) -> None:
    unused = [f"--{name.replace('_', '-')}" for name, value in options.items() if value not in (None, (), [])]
    if unused:
        one = len(unused) == 1
        told = f"{' and '.join(unused)} {'has' if one else 'have'} no effect {when}"
        raise ValueError(f"{told}: leave {'it' if one else 'them'} out")


def _few_shot(
    checkpoint: Sequence[str],
    tracking: Tracking,
    family: str | None,
    assignments: Sequence[str],
    steps: int,
    tasks: int,
    seed: int,
    out: Path | None,
) -> None:
    from learnedopt import tasks as registry
    from learnedopt.config import recorded_solver
    from learnedopt.evaluation.runs import adapt_runs, families, labelled
    from learnedopt.followed import show_few_shot

    loaded, options = load_all(checkpoint), options_of(assignments)
    solvers = {label: recorded_solver(learned.metadata) for label, learned in loaded.items()}
    described = registry.describe(families(loaded, family, options)[0])
    out = out or Path("runs") / f"evaluate-{'-'.join(loaded)}-{described['name']}"
    asked = {"checkpoints": [*checkpoint], "family": described, "num_steps": steps, "num_tasks": tasks, "seed": seed}
    require_own(out / "few_shot.json", asked)
    if out.exists() and not out.is_dir():  # before the work, which may take minutes
        raise ValueError(f"--out {out} exists, and is no folder; name another")
    found = adapt_runs(
        loaded, family, options, solvers=solvers, num_steps=steps, num_tasks=tasks, seed=seed,
        report=lambda line: print(line, flush=True),
    )  # fmt: skip
    found = replace(found, settings={"checkpoints": [*checkpoint], **found.settings})
    print(f"\n{found.markdown()}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    paths = found.save(out)
    print(f"Figure, table and numbers: {paths['png']}, {paths['md']}, {paths['json']}")
    show_few_shot(tracking, out, labelled(checkpoint), found, paths)
