"""The command ``learnedopt``: evaluate learned optimizers and few-shot learners, and list what there is."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from learnedopt.core.inner import InnerSolver
    from learnedopt.core.rule import UpdateRule
    from learnedopt.core.task import TaskFamily
    from learnedopt.core.tree import Theta
    from learnedopt.evaluation.comparison import Comparison
    from learnedopt.evaluation.few_shot import FewShot
    from learnedopt.training.wandb_tracker import Mode, WandbTracker

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class _Refusal(Exception):
    """What the user gave cannot work; its text says why, in one line."""


class _Parser(argparse.ArgumentParser):
    """Ends with one line that names the nearest valid word, instead of argparse's usage text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with code 2."""
        words = [word for action in self._actions for word in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                words += [w for name, sub in action.choices.items() for w in (name, *sub._option_string_actions)]
        choice = re.search("invalid choice: '(.*?)'", message)
        unknown = [choice[1]] if choice else message.removeprefix("unrecognized arguments:").split()
        near = [hit for word in unknown for hit in difflib.get_close_matches(word.partition("=")[0], words, n=1)]
        hint = f"; did you mean {near[0]}?" if near and near[0] not in unknown else ""
        self.exit(BAD_INPUT, f"{self.prog}: {message}{hint} ({self.prog} --help says more)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 when done, 2 for bad input, 130 after Ctrl-C.

    ``argv`` are the arguments without the program's name; by default those of the process.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as end:  # argparse's way to say that all is said
        return int(end.code or 0)
    try:
        with warnings.catch_warnings():
            # As one line: where in the library a warning was raised does not help who runs a command.
            warnings.showwarning = lambda message, *_, **__: print(f"Warning: {message}", file=sys.stderr)
            arguments.command(arguments)
    except _Refusal as refusal:
        print(f"learnedopt {arguments.name}: {' '.join(str(refusal).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"learnedopt {arguments.name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="learnedopt", description="Learned optimizers and few-shot learners: how good they are.")
    commands = parser.add_subparsers(title="commands", dest="name", required=True, metavar="COMMAND")
    about = "list the update rules, task families and packaged optimizers"
    commands.add_parser("list", help=about, description=f"{about.capitalize()}.").set_defaults(command=_list)
    about = "run a learned optimizer against SGD, momentum, Nesterov, RMSprop and Adam, or few-shot learners"
    evaluate = commands.add_parser(
        "evaluate",
        help=about,
        description="Run a learned optimizer against SGD, momentum, Nesterov, RMSprop and Adam, each with its learning "
        "rate tuned on other tasks of the same family, on fresh tasks. Writes a table (evaluation.md), all numbers "
        "(evaluation.json) and the loss curves (evaluation.png). With --few-shot: adapt learned starts, side by side, "
        "to the same fixed test tasks, and report the accuracy (or loss) by steps: few_shot.md, .json, .png.",
    )
    evaluate.set_defaults(command=_evaluate)
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
    evaluate.add_argument("--tune-for", metavar="MEASURE", help="final_loss (default), sum_of_losses or last_ten")
    evaluate.add_argument("--seed", type=int, default=0, metavar="S", help="of the tasks (default 0)")
    evaluate.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default 1: tasks are small)")
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="default runs/evaluate-CHECKPOINT-FAMILY")
    evaluate.add_argument(
        "--wandb", metavar="MODE", help="online, offline or disabled (default: what WANDB_MODE says, else offline)"
    )
    return parser


def _list(arguments: argparse.Namespace) -> None:
    from learnedopt import checkpoint, optimizers, tasks

    print("Update rules:", ", ".join(optimizers.names()))
    print("Task families:", ", ".join(tasks.names()))
    print("Packaged optimizers:", ", ".join(checkpoint.packaged()) or "none")


def _evaluate(arguments: argparse.Namespace) -> None:
    import torch

    from learnedopt.training.wandb_tracker import resolve_mode

    torch.set_num_threads(arguments.threads)
    try:
        mode = resolve_mode(arguments.wandb)
        (_few_shot if arguments.few_shot else _compare)(arguments, mode)
    except (ValueError, TypeError, OSError) as error:
        raise _Refusal(error) from error


def _compare(arguments: argparse.Namespace, mode: Mode) -> None:
    from learnedopt import tasks
    from learnedopt.evaluation.evaluate import compare
    from learnedopt.training.wandb_tracker import WandbTracker

    if arguments.family is None:
        raise ValueError("the following arguments are required: --family")
    if len(arguments.checkpoint) > 1:
        raise ValueError(f"{len(arguments.checkpoint)} checkpoints are evaluated together only with --few-shot")
    (label,) = _labels(arguments.checkpoint)
    out = arguments.out or Path("runs") / f"evaluate-{label}-{arguments.family}"
    rule, theta, _ = _load(arguments.checkpoint[0])
    fresh, others = _families(arguments.family, _settings(arguments.set))
    out.mkdir(parents=True, exist_ok=True)  # before the work, which may take minutes
    comparison = compare(
        {label: (rule, theta)}, fresh, tuning_family=others,
        num_steps=100 if arguments.steps is None else arguments.steps,
        num_tasks=100 if arguments.tasks is None else arguments.tasks,
        num_tuning_tasks=arguments.tuning_tasks, seed=arguments.seed, tune_for=arguments.tune_for or "final_loss",
        report=lambda line: print(line, flush=True),
    )  # fmt: skip
    about = {"checkpoint": arguments.checkpoint[0], "family": tasks.describe(fresh)}
    comparison = replace(comparison, settings={**about, **comparison.settings})
    print(f"\n{comparison.markdown()}", flush=True)
    paths = comparison.save(out)
    print(f"Figure, table and numbers: {paths['png']}, {paths['md']}, {paths['json']}")
    _show(WandbTracker(mode, group=label, job_type="evaluate", dir=out), comparison, paths)


def _few_shot(arguments: argparse.Namespace, mode: Mode) -> None:
    from learnedopt import tasks
    from learnedopt.core.checks import require_count
    from learnedopt.evaluation.few_shot import FewShot, adapt, recorded_solver
    from learnedopt.training.wandb_tracker import WandbTracker

    unused = [f"--{name}" for name in ("tuning-tasks", "tune-for") if getattr(arguments, name.replace("-", "_"))]
    if unused:
        raise ValueError(f"{' and '.join(unused)} have no effect with --few-shot, which tunes nothing: leave them out")
    labels = _labels(arguments.checkpoint)
    loaded = {label: _load(name) for label, name in zip(labels, arguments.checkpoint, strict=True)}
    family = _few_shot_family(arguments, loaded[labels[0]][2])
    name = tasks.describe(family)["name"]
    about = {
        "checkpoints": arguments.checkpoint, "family": tasks.describe(family), "seed": arguments.seed,
        "num_steps": 10 if arguments.steps is None else arguments.steps,
        "num_tasks": 600 if arguments.tasks is None else arguments.tasks,
    }  # fmt: skip
    require_count("num_steps", about["num_steps"])
    require_count("num_tasks", about["num_tasks"], least=2)
    solvers: dict[str, InnerSolver | None] = {}
    for label, (rule, theta, record) in loaded.items():  # one that does not fit is refused before any is run
        solvers[label] = recorded_solver(record)
        require_count("num_steps", about["num_steps"], least=1 if solvers[label] else 0)
        try:
            adapt(rule, theta, family, min(about["num_steps"], 1), 2, inner=solvers[label])
        except ValueError as error:
            trained = record.get("family", {})
            hint = f" ({label} was meta-trained on {trained['name']} with {trained['options']})" if trained else ""
            raise ValueError(f"{label} does not fit {family}: {error}{hint}") from error
    out = arguments.out or Path("runs") / f"evaluate-{'-'.join(labels)}-{name}"
    out.mkdir(parents=True, exist_ok=True)
    adaptations = {}
    for label, (rule, theta, _) in loaded.items():
        inner = solvers[label]
        print(f"Adapting {label} to {about['num_tasks']} tasks{f' by {inner}' if inner else ''}", flush=True)
        adaptations[label] = adapt(
            rule, theta, family, about["num_steps"], about["num_tasks"], seed=arguments.seed, inner=inner
        )
    found = FewShot({**about, "inner": {label: str(inner) for label, inner in solvers.items() if inner}}, adaptations)
    print(f"\n{found.markdown()}", flush=True)
    paths = found.save(out)
    print(f"Figure, table and numbers: {paths['png']}, {paths['md']}, {paths['json']}")
    _show_few_shot(WandbTracker(mode, group=labels[0], job_type="evaluate", dir=out), found, paths)


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
    name, options = arguments.family, {}
    if name is None:
        trained = record.get("family")
        if not trained:
            raise ValueError(f"{arguments.checkpoint[0]} has no record of a family; name one with --family")
        held_out = (record.get("validation") or {}).get("family_options") or {}
        name, options = trained["name"], {**trained["options"], **held_out}
        options.pop("meta_split", None)
    return _families(name, {**options, **_settings(arguments.set)})[0]


def _load(checkpoint: str) -> tuple[UpdateRule, Theta, dict[str, Any]]:
    from learnedopt.checkpoint import load_with_metadata, packaged

    try:
        return load_with_metadata(checkpoint)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(checkpoint, packaged(), n=1)
        raise FileNotFoundError(f"{error}" + (f"; did you mean {near[0]!r}?" if near else "")) from error


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


def _show(tracker: WandbTracker, comparison: Comparison, paths: dict[str, Path]) -> None:
    """Log the table's numbers, the figure and the files to W&B."""
    from learnedopt.evaluation.comparison import summarise

    numbers = {
        f"{measure}/{label}/{name}": value
        for label, outcome in comparison.outcomes.items()
        for measure, values in outcome.values.items()
        for name, value in vars(summarise(values)).items()
    }
    tracker.start(comparison.settings)
    tracker.log(numbers, step=0)
    tracker.figure("loss_curves", paths["png"])
    tracker.artifact(f"evaluation-{comparison.settings['family']['name']}", [*paths.values()], comparison.settings)
    tracker.finish()


def _show_few_shot(tracker: WandbTracker, found: FewShot, paths: dict[str, Path]) -> None:
    """Log the course of every measure over the steps, the figure and the files to W&B."""
    courses: dict[int, dict[str, float]] = {}
    for label, adaptation in found.adaptations.items():
        for measure in adaptation.values:
            for step, summary in zip(adaptation.steps, adaptation.summaries(measure), strict=True):
                entry = courses.setdefault(step, {})
                entry |= {f"{measure}/{label}/{name}": value for name, value in vars(summary).items()}
    tracker.start(found.settings)
    for step, numbers in sorted(courses.items()):
        tracker.log(numbers, step=step)
    tracker.figure("adaptation", paths["png"])
    tracker.artifact(f"few-shot-{found.settings['family']['name']}", [*paths.values()], found.settings)
    tracker.finish()
