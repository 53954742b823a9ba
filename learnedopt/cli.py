"""The command ``learnedopt``: train, check and diagnose recipes, evaluate what was learned, and list what there is."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from learnedopt import cli_check, cli_diagnose, cli_evaluate, cli_train

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count


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
    """Run the command and return its exit code: 0 when done, 2 for bad input, 130 after Ctrl-C, or its own.

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
            return arguments.command(arguments)
    except (ValueError, TypeError, OSError, NotImplementedError) as error:  # what the user gave cannot work
        print(f"learnedopt {arguments.subcommand}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"learnedopt {arguments.subcommand}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="learnedopt", description="Learned optimizers and few-shot learners: train and judge them.")
    commands = parser.add_subparsers(title="commands", dest="subcommand", required=True, metavar="COMMAND")
    for module in (cli_train, cli_check, cli_diagnose, cli_evaluate):
        module.add_parser(commands)
    for add_parser in (_add_list, _add_card):
        add_parser(commands)
    return parser


def _add_list(commands: Any) -> None:
    about = "list the update rules, task families, recipes and packaged optimizers"
    parser = commands.add_parser("list", help=about, description=f"{about.capitalize()}.")
    parser.set_defaults(command=_list)


def _list(arguments: argparse.Namespace) -> int:
    from learnedopt import cards, checkpoint, inner_objectives, optimizers, recipes, tasks

    print("Update rules:", ", ".join(optimizers.names()))
    print("Inner objectives:", ", ".join(inner_objectives.names()))
    print("Task families:", ", ".join(tasks.names()))
    print("Recipes:", ", ".join(recipes.names()))
    print("Packaged optimizers (learnedopt card NAME says more):")
    for name in checkpoint.packaged():
        print(f"  {name:22} {cards.card(name).sentences['summary']}")
    return 0


def _add_card(commands: Any) -> None:
    about = "say what a learned optimizer was trained and measured on, where it fails, and what it costs"
    parser = commands.add_parser("card", help=about, description=f"{about.capitalize()}.")
    parser.add_argument("name", nargs="+", metavar="NAME", help="a packaged name, a checkpoint, or a run's folder")
    parser.set_defaults(command=_card)


def _card(arguments: argparse.Namespace) -> int:
    from learnedopt import cards

    print(*map(cards.card, arguments.name), sep="\n", end="")
    return 0
