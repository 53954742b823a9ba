"""The command ``learnedopt``: train, check and diagnose recipes, evaluate what was learned, and list what there is."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from learnedopt import __version__, cli_check, cli_diagnose, cli_evaluate, cli_hub, cli_report, cli_train

BAD_INPUT = 2
DISK_FULL = 74  # EX_IOERR of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells count
CLOSED_OUTPUT = 141  # 128 + SIGPIPE
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    """Run the command and return its exit code.

    It is 0 when done, 2 for bad input, 74 for a full disk, 130 after Ctrl-C, 141 where nobody reads the output any
    more, or the command's own. ``argv`` are the arguments without the program's name; by default those of the process.
    """
    _fill_standard_streams()
    try:
        code = _main(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:
            sys.stdout.flush()  # while an error of it can still be caught
        return code
    except BrokenPipeError:
        # What is still to be written at the end of the process has nowhere to go either.
        _replace(1)
        return CLOSED_OUTPUT


def _main(argv: Sequence[str]) -> int:
    try:
        for argument in argv:
            argument.encode()  # bytes that are no text could be shown nowhere
        arguments = _parser().parse_args(argv)
    except SystemExit as end:  # argparse's way to say that all is said
        return int(end.code or 0)
    except UnicodeEncodeError as error:
        print(f"learnedopt: {error.object!a} is no text: its bytes are not {error.encoding}", file=sys.stderr)
        return BAD_INPUT
    try:
        with warnings.catch_warnings():
            # As one line: where in the library a warning was raised does not help who runs a command.
            warnings.showwarning = lambda message, *_, **__: print(f"Warning: {message}", file=sys.stderr)
            return arguments.command(arguments)
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, NotImplementedError) as error:  # what the user gave cannot work
        full = isinstance(error, OSError) and error.errno in _FULL
        why = "the disk is full, or a quota of it: " if full else ""
        then = "; make room, and start again: what was written before is whole" if full else ""
        print(f"learnedopt {arguments.subcommand}: {why}{' '.join(str(error).split())}{then}", file=sys.stderr)
        return DISK_FULL if full else BAD_INPUT
    except KeyboardInterrupt:
        print(f"learnedopt {arguments.subcommand}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _fill_standard_streams() -> None:
    """Open the null device in the place of standard streams that are closed: the next file would be taken for one."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - for good


def _replace(number: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="learnedopt", description="Learned optimizers and few-shot learners: train and judge them.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", dest="subcommand", required=True, metavar="COMMAND")
    for module in (cli_train, cli_check, cli_diagnose, cli_evaluate, cli_report, cli_hub):
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
