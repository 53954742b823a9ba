"""The command ``learnedopt compare``: learned optimizers on fresh tasks, beside tuned hand-designed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from learnedopt.cli_given import baselines_of, load_all, options_of, require_own, use_threads
from learnedopt.training.following import Tracking


def compare(
    checkpoint: Sequence[str],
    tracking: Tracking,
    family: str | None = None,
    set: Sequence[str] = (),
    steps: int = 100,
    tasks: int = 100,
    tuning_tasks: int | None = None,
    tune_for: str = "final_loss",
    baselines: str = "plain",
    seed: int = 0,
    threads: int = 1,
    out: Path | None = None,
) -> int:
    """Run learned optimizers against tuned SGD, momentum, Nesterov, RMSprop and Adam, on fresh tasks.

    The learned ones stand side by side, beside baselines whose learning rates are tuned on other tasks of the same
    family. Writes a table (evaluation.md), all numbers (evaluation.json) and the loss curves (evaluation.png); a
    folder that holds an evaluation with other settings is refused. It is what learnedopt evaluate does without
    --few-shot and --suite.

    Args:
        checkpoint: files, folders of runs, or packaged names
        tracking: who is told
        family: a task family, see learnedopt list; by default that of their meta-training
        set: KEY=VALUE, an option of the family; repeatable
        steps: inner steps
        tasks: fresh tasks
        tuning_tasks: tasks to tune on; by default all --tasks if they are small, else 8
        tune_for: final_loss, sum_of_losses or last_ten
        baselines: what is tuned beside it: plain, main or all with schedules, or labels of these as A;B
        seed: of the tasks
        threads: of torch; tasks are small
        out: a folder; by default runs/evaluate-CHECKPOINT-FAMILY
    """
    from learnedopt import tasks as registry
    from learnedopt.config import recorded_solver
    from learnedopt.evaluation.runs import compare_runs, families, labelled
    from learnedopt.followed import require_views, show_comparison

    require_views(tracking)
    use_threads(threads)
    loaded, options = load_all(checkpoint), options_of(set)
    described = registry.describe(families(loaded, family, options)[0])
    out = out or Path("runs") / f"evaluate-{'-'.join(loaded)}-{described['name']}"
    for label, learned in loaded.items():
        solver = recorded_solver(learned.metadata)
        if solver is not None:
            print(f"{label} was trained on solutions by {solver}; here the rule's own steps are taken")
    names = {"checkpoint": checkpoint[0]} if len(loaded) == 1 else {"checkpoints": [*checkpoint]}
    names = {**names, "baselines": baselines}
    asked = {"num_steps": steps, "num_tasks": tasks, "seed": seed, "tune_for": tune_for, **names}
    tuned = {} if tuning_tasks is None else {"num_tuning_tasks": tuning_tasks}
    require_own(out / "evaluation.json", {"family": described, **asked, **tuned})
    out.mkdir(parents=True, exist_ok=True)  # before the work, which may take minutes
    found = compare_runs(
        loaded, family, options, num_steps=steps, num_tasks=tasks, num_tuning_tasks=tuning_tasks, seed=seed,
        baselines=baselines_of(baselines), tune_for=tune_for, report=lambda line: print(line, flush=True),
    )  # fmt: skip
    found = replace(found, settings={**names, **found.settings})
    print(f"\n{found.markdown()}", flush=True)
    require_own(out / "evaluation.json", found.settings)
    paths = found.save(out)
    print(f"Figure, table and numbers: {paths['png']}, {paths['md']}, {paths['json']}")
    show_comparison(tracking, out, labelled(checkpoint), found, paths)
    return 0
