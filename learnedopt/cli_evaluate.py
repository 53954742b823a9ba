"""The command ``learnedopt evaluate``: learned optimizers against baselines, and few-shot learners side by side."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learnedopt import cli_suite

if TYPE_CHECKING:
    from learnedopt.checkpoint import Checkpoint
    from learnedopt.core.inner import InnerSolver
    from learnedopt.core.task import TaskFamily
    from learnedopt.training.wandb_variables import Mode


def add_parser(commands: Any) -> None:
    """Add ``evaluate`` to the commands of a parser."""
    about = "run a learned optimizer against SGD, momentum, Nesterov, RMSprop and Adam, or few-shot learners"
    evaluate = commands.add_parser(
        "evaluate",
        help=about,
        description="Run a learned optimizer against SGD, momentum, Nesterov, RMSprop and Adam, each with its learning "
        "rate tuned on other tasks of the same family, on fresh tasks. Writes a table (evaluation.md), all numbers "
        "(evaluation.json) and the loss curves (evaluation.png). With --few-shot: adapt learned starts, side by side, "
        "to the same fixed test tasks, and report the accuracy (or loss) by steps: few_shot.md, .json, .png. With "
        "--suite: untuned on nets that no meta-training saw, beside baselines with schedules: suite.md, .json, .png.",
    )
    evaluate.set_defaults(command=run)
    evaluate.add_argument(
        "checkpoint", nargs="+", metavar="CHECKPOINT", help="a file, a run's folder, or a packaged name"
    )
    evaluate.add_argument("--few-shot", action="store_true", help="measure few-shot adaptation, without baselines")
    evaluate.add_argument(
        "--family", metavar="NAME", help="task family; see learnedopt list (few-shot: default as in meta-training)"
    )
    evaluate.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the family, repeatable"
    )
    evaluate.add_argument("--steps", type=int, metavar="N", help="inner steps (default 100; few-shot: 10)")
    evaluate.add_argument("--tasks", type=int, metavar="N", help="fresh tasks (default 100; few-shot: 600)")
    evaluate.add_argument(
        "--tuning-tasks", type=int, metavar="N", help="tasks to tune on (default: all N if small, else 8)"
    )
    evaluate.add_argument(
        "--tune-for",
        metavar="MEASURE",
        help="final_loss (default), sum_of_losses or last_ten; suite: last_twenty, last_ten or final_loss",
    )
    evaluate.add_argument(
        "--baselines", metavar="A;B", help="tuned beside it: plain (default), main (suite: default) or all with "
        "schedules, or labels of these"
    )  # fmt: skip
    cli_suite.add_arguments(evaluate)
    evaluate.add_argument(
        "--import", dest="imported", action="append", default=[], metavar="MODULE",
        help="import a module first, which registers rules or families that are not the library's; repeatable",
    )  # fmt: skip
    evaluate.add_argument("--seed", type=int, default=0, metavar="S", help="of the tasks (default 0)")
    evaluate.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default 1: tasks are small)")
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="default runs/evaluate-CHECKPOINT-FAMILY")
    evaluate.add_argument(
        "--wandb", metavar="MODE", help="online, offline or disabled (default: what WANDB_MODE says, else offline)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate as the arguments say; return the exit code."""
    import torch

    from learnedopt.training.wandb_tracker import resolve_mode

    torch.set_num_threads(arguments.threads)
    for name in arguments.imported:
        _import(name)
    mode = resolve_mode(arguments.wandb)
    if arguments.suite and arguments.few_shot:
        raise ValueError("--suite and --few-shot exclude each other: leave one out")
    if arguments.suite:
        labels = _labels(arguments.checkpoint)
        loaded = {label: _load(name) for label, name in zip(labels, arguments.checkpoint, strict=True)}
        cli_suite.run(arguments, mode, loaded)
        return 0
    alone = [name for name in ("nets", "device", "graphs") if getattr(arguments, name)]
    if alone:
        raise ValueError(f"--{' and --'.join(alone)} belong to --suite: name one, or leave them out")
    (_few_shot if arguments.few_shot else _compare)(arguments, mode)
    return 0


def _compare(arguments: argparse.Namespace, mode: Mode) -> None:
    from learnedopt import tasks
    from learnedopt.config import recorded_solver
    from learnedopt.evaluation.evaluate import compare
    from learnedopt.followed import show_comparison
    from learnedopt.training.tracking import Tracking

    if arguments.family is None:
        raise ValueError("the following arguments are required: --family")
    if len(arguments.checkpoint) > 1:
        raise ValueError(f"{len(arguments.checkpoint)} checkpoints are evaluated together only with --few-shot")
    (label,) = _labels(arguments.checkpoint)
    out = arguments.out or Path("runs") / f"evaluate-{label}-{arguments.family}"
    learned = _load(arguments.checkpoint[0])
    fresh, others = _families(arguments.family, _settings(arguments.set))
    solver = recorded_solver(learned.metadata)
    if solver is not None:
        print(f"{label} was trained on solutions by {solver}; here the rule's own steps are taken, as the baselines'")
    out.mkdir(parents=True, exist_ok=True)  # before the work, which may take minutes
    comparison = compare(
        {label: (learned.rule, learned.theta, learned.inner_objective)}, fresh, tuning_family=others,
        num_steps=100 if arguments.steps is None else arguments.steps,
        num_tasks=100 if arguments.tasks is None else arguments.tasks,
        num_tuning_tasks=arguments.tuning_tasks, seed=arguments.seed, baselines=_baselines(arguments.baselines),
        tune_for=arguments.tune_for or "final_loss",
        report=lambda line: print(line, flush=True),
    )  # fmt: skip
    about = {"checkpoint": arguments.checkpoint[0], "family": tasks.describe(fresh)}
    comparison = replace(comparison, settings={**about, **comparison.settings})
    print(f"\n{comparison.markdown()}", flush=True)
    paths = comparison.save(out)
    print(f"Figure, table and numbers: {paths['png']}, {paths['md']}, {paths['json']}")
    show_comparison(Tracking(mode), out, {label: arguments.checkpoint[0]}, comparison, paths)


def _few_shot(arguments: argparse.Namespace, mode: Mode) -> None:
    from learnedopt import tasks
    from learnedopt.config import recorded_solver
    from learnedopt.core.counts import require_count
    from learnedopt.evaluation.few_shot import FewShot, adapt
    from learnedopt.followed import show_few_shot
    from learnedopt.training.tracking import Tracking

    unused = [
        f"--{name}" for name in ("tuning-tasks", "tune-for", "baselines") if getattr(arguments, name.replace("-", "_"))
    ]
    if unused:
        raise ValueError(f"{' and '.join(unused)} have no effect with --few-shot, which tunes nothing: leave them out")
    labels = _labels(arguments.checkpoint)
    loaded = {label: _load(name) for label, name in zip(labels, arguments.checkpoint, strict=True)}
    family = _few_shot_family(arguments, loaded[labels[0]].metadata)
    name = tasks.describe(family)["name"]
    about = {
        "checkpoints": arguments.checkpoint, "family": tasks.describe(family), "seed": arguments.seed,
        "num_steps": 10 if arguments.steps is None else arguments.steps,
        "num_tasks": 600 if arguments.tasks is None else arguments.tasks,
    }  # fmt: skip
    require_count("num_steps", about["num_steps"])
    require_count("num_tasks", about["num_tasks"], least=2)
    solvers = {label: recorded_solver(learned.metadata) for label, learned in loaded.items()}
    for label, learned in loaded.items():  # one that does not fit is refused before any is run
        _require_fit(label, learned, family, about["num_steps"], solvers[label])
    out = arguments.out or Path("runs") / f"evaluate-{'-'.join(labels)}-{name}"
    out.mkdir(parents=True, exist_ok=True)
    adaptations = {}
    for label, (rule, inner_objective, theta, _) in loaded.items():
        inner = solvers[label]
        print(f"Adapting {label} to {about['num_tasks']} tasks{f' by {inner}' if inner else ''}", flush=True)
        adaptations[label] = adapt(
            rule, theta, family, about["num_steps"], about["num_tasks"], seed=arguments.seed, inner=inner,
            inner_objective=inner_objective,
        )  # fmt: skip
    found = FewShot({**about, "inner": {label: str(inner) for label, inner in solvers.items() if inner}}, adaptations)
    print(f"\n{found.markdown()}", flush=True)
    paths = found.save(out)
    print(f"Figure, table and numbers: {paths['png']}, {paths['md']}, {paths['json']}")
    show_few_shot(Tracking(mode), out, dict(zip(labels, arguments.checkpoint, strict=True)), found, paths)


def _baselines(text: str | None) -> Mapping[str, Any]:
    from learnedopt.evaluation.evaluate import BASELINES
    from learnedopt.evaluation.grids import named

    return BASELINES if text in (None, "plain") else named(text)


def _require_fit(
    label: str, learned: Checkpoint, family: TaskFamily, num_steps: int, inner: InnerSolver | None
) -> None:
    """Raise ValueError unless the checkpoint adapts to tasks of the family: to two of them, one step at most."""
    from learnedopt.core.counts import require_count
    from learnedopt.evaluation.few_shot import adapt

    require_count("num_steps", num_steps, least=1 if inner else 0)
    rule, inner_objective, theta, record = learned
    try:
        adapt(rule, theta, family, min(num_steps, 1), 2, inner=inner, inner_objective=inner_objective)
    except ValueError as error:
        trained = record.get("family", {})
        hint = f" ({label} was meta-trained on {trained['name']} with {trained['options']})" if trained else ""
        raise ValueError(f"{label} does not fit {family}: {error}{hint}") from error


def _labels(checkpoints: Sequence[str]) -> list[str]:
    """Return what each checkpoint is called: its file's or folder's name, or the whole path where two share that."""
    labels = [Path(name).name.removesuffix(".safetensors") or "learned" for name in checkpoints]
    if len(set(labels)) < len(labels):
        labels = [str(Path(name)).strip("/").replace("/", "-") for name in checkpoints]
    if len(set(labels)) < len(labels):
        raise ValueError(f"the same checkpoint is named twice in {' '.join(checkpoints)}")
    return labels


def _few_shot_family(arguments: argparse.Namespace, record: dict[str, Any]) -> TaskFamily:
    """Return the family as --family and --set say, or as the first checkpoint's record does; the split is "test"."""
    name, options, settings = arguments.family, {}, _settings(arguments.set)
    if name is None:
        name, options = _recorded_family(arguments.checkpoint[0], record)
        _require_no_paths(arguments.checkpoint[0], {k: v for k, v in options.items() if k not in settings})
    return _families(name, {**options, **settings})[0]


def _recorded_family(checkpoint: str, record: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and options of the family that the record of a checkpoint tells, without the split."""
    if not record.get("family"):
        raise ValueError(f"{checkpoint} has no record of a family; name one with --family")
    try:
        held_out = (record.get("validation") or {}).get("family_options") or {}
        name, options = record["family"]["name"], {**record["family"]["options"], **held_out}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the record of {checkpoint} is of no family ({error!r}); name one with --family") from error
    options.pop("meta_split", None)
    return name, options


def _require_no_paths(checkpoint: str, options: dict[str, Any]) -> None:
    """Raise ValueError where the record of a checkpoint would choose the files that are read here."""
    paths = {key: value for key, value in options.items() if _may_name_files(key, value)}
    if paths:
        told = " and ".join(f"{key}={value!r}" for key, value in paths.items())
        raise ValueError(
            f"the record of {checkpoint} names what is to be read: {told}; a file does not choose that here: pass "
            f"{' '.join(f'--set {key}=...' for key in paths)} with a folder that you mean"
        )


def _may_name_files(key: str, value: Any) -> bool:
    if isinstance(value, dict):  # a part, or a family of a mixture
        return any(_may_name_files(k, v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return any(_may_name_files(key, each) for each in value)
    return isinstance(value, str) and (key in ("root", "lists") or not set(value).isdisjoint("/\\~") or value == "..")


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"--import {module}: {error}; name a module as in Python's import statement") from error


def _load(checkpoint: str) -> Checkpoint:
    from learnedopt.checkpoint import load_checkpoint

    return load_checkpoint(checkpoint)


def _settings(assignments: Sequence[str]) -> dict[str, Any]:
    from learnedopt.config import read_value

    settings = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {assignment!r} is not of the form KEY=VALUE, such as --set batch_size=64")
        settings[key] = read_value(text)
    return settings


def _families(name: str, options: dict[str, Any]) -> tuple[TaskFamily, TaskFamily]:
    """Return the family of fresh tasks and that of tasks to tune on, from different splits where there are any."""
    from learnedopt import tasks

    family = tasks.make(name, **options)
    if not hasattr(family, "meta_split"):
        return family, family
    return tasks.make(name, **{"meta_split": "test", **options}), tasks.make(name, **{**options, "meta_split": "train"})
