"""The command ``learnedopt``: compare a learned optimizer with tuned hand-designed ones, and list what there is."""

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
    from learnedopt.comparison import Comparison
    from learnedopt.rule import UpdateRule
    from learnedopt.task import TaskFamily
    from learnedopt.tree import Theta
    from learnedopt.wandb_tracker import WandbTracker

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
    parser = _Parser(prog="learnedopt", description="Learned optimizers: compare them with tuned hand-designed ones.")
    commands = parser.add_subparsers(title="commands", dest="name", required=True, metavar="COMMAND")
    about = "list the update rules, task families and packaged optimizers"
    commands.add_parser("list", help=about, description=f"{about.capitalize()}.").set_defaults(command=_list)
    about = "run a learned optimizer against SGD, momentum, Nesterov, RMSprop and Adam"
    evaluate = commands.add_parser(
        "evaluate",
        help=about,
        description=f"{about.capitalize()}, each with its learning rate tuned on other tasks of the same family, on "
        "fresh tasks. Writes a table (evaluation.md), all numbers (evaluation.json) and the loss curves "
        "(evaluation.png).",
    )
    evaluate.set_defaults(command=_evaluate)
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="a file, a run's folder, or a packaged name")
    evaluate.add_argument("--family", required=True, metavar="NAME", help="task family; see learnedopt list")
    evaluate.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the family, repeatable"
    )
    evaluate.add_argument("--steps", type=int, default=100, metavar="N", help="inner steps (default 100)")
    evaluate.add_argument("--tasks", type=int, default=100, metavar="N", help="fresh tasks (default 100)")
    evaluate.add_argument(
        "--tuning-tasks", type=int, metavar="N", help="tasks to tune on (default: all N if small, else 8)"
    )
    evaluate.add_argument(
        "--tune-for", default="final_loss", metavar="MEASURE", help="final_loss (default), sum_of_losses or last_ten"
    )
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

    from learnedopt import tasks
    from learnedopt.evaluate import compare
    from learnedopt.wandb_tracker import WandbTracker, resolve_mode

    torch.set_num_threads(arguments.threads)
    label = Path(arguments.checkpoint).name.removesuffix(".safetensors") or "learned"
    out = arguments.out or Path("runs") / f"evaluate-{label}-{arguments.family}"
    try:
        mode = resolve_mode(arguments.wandb)
        rule, theta = _load(arguments.checkpoint)
        fresh, others = _families(arguments.family, _settings(arguments.set))
        out.mkdir(parents=True, exist_ok=True)  # before the work, which may take minutes
    except (ValueError, TypeError, OSError) as error:
        raise _Refusal(error) from error
    try:
        comparison = compare(
            {label: (rule, theta)}, fresh, tuning_family=others, num_steps=arguments.steps, num_tasks=arguments.tasks,
            num_tuning_tasks=arguments.tuning_tasks, seed=arguments.seed, tune_for=arguments.tune_for,
            report=lambda line: print(line, flush=True),
        )  # fmt: skip
    except (ValueError, FileNotFoundError) as error:
        raise _Refusal(error) from error
    about = {"checkpoint": arguments.checkpoint, "family": tasks.describe(fresh)}
    comparison = replace(comparison, settings={**about, **comparison.settings})
    print(f"\n{comparison.markdown()}", flush=True)
    paths = comparison.save(out)
    print(f"Figure, table and numbers: {paths['png']}, {paths['md']}, {paths['json']}")
    _show(WandbTracker(mode, group=label, job_type="evaluate", dir=out), comparison, paths)


def _load(checkpoint: str) -> tuple[UpdateRule, Theta]:
    from learnedopt.checkpoint import load, packaged

    try:
        return load(checkpoint)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(checkpoint, packaged(), n=1)
        raise FileNotFoundError(f"{error}" + (f"; did you mean {near[0]!r}?" if near else "")) from error


def _settings(assignments: Sequence[str]) -> dict[str, Any]:
    from learnedopt.overrides import read_value

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
    from learnedopt.comparison import summarise

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
