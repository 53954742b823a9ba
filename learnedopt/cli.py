"""The command ``learnedopt``: train, check and diagnose recipes, evaluate what was learned, and list what there is."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from learnedopt import __version__

BAD_INPUT = 2
DISK_FULL = 74  # EX_IOERR of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells count
CLOSED_OUTPUT = 141  # 128 + SIGPIPE
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
COMMANDS = {
    "train": "cli_train:train",
    "evaluate": "cli_evaluate:evaluate_runs",
    "compare": "cli_compare:compare",
    "card": "cli_list:print_cards",
    "list": "cli_list:list_all",
    "check": "cli_check:check",
    "diagnose": "cli_diagnose:diagnose",
    "report": "cli_report:report",
    "sweep": "cli_sweep:sweep",
    "hub push": "cli_hub:push",
    "hub pull": "cli_hub:pull",
}
"""What a command line begins with -> module of this package:function, whose signature and docstring are its options.

A help waits for torch where a function is called as an export of the package, which jsonargparse looks up, or where
its module imports for type checkers what needs torch, which jsonargparse does as well.
"""


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
    command = "learnedopt"
    try:
        command = f"learnedopt {_command(argv)}"
        call = parse(argv)
    except SystemExit as end:  # the parser's way to say that all is said
        return int(end.code or 0)
    except UnicodeEncodeError as error:
        print(f"learnedopt: {error.object!a} is no text: its bytes are not {error.encoding}", file=sys.stderr)
        return BAD_INPUT
    except (ValueError, TypeError) as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:  # what is imported, maybe of the user's own, takes seconds
        return _interrupted(command)
    try:
        with warnings.catch_warnings():
            # As one line: where in the library a warning was raised does not help who runs a command.
            warnings.showwarning = lambda message, *_, **__: print(f"Warning: {message}", file=sys.stderr)
            return call()
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, NotImplementedError) as error:  # what the user gave cannot work
        full = isinstance(error, OSError) and error.errno in _FULL
        why = "the disk is full, or a quota of it: " if full else ""
        then = "; make room, and start again: what was written before is whole" if full else ""
        print(f"{command}: {why}{' '.join(_told(error).split())}{then}", file=sys.stderr)
        return DISK_FULL if full else BAD_INPUT
    except KeyboardInterrupt:
        return _interrupted(command)


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.errno not in _FULL:
        return f"{error.filename} cannot be read or written: {error.strerror}; name another place, or change that one"
    return str(error)


def _interrupted(command: str) -> int:
    print(f"{command}: interrupted", file=sys.stderr)
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


def parse(argv: Sequence[str]) -> Callable[[], int]:
    """Return what the arguments ask for, not yet done.

    Raises:
        SystemExit: all is said: a help, or what is wrong.
        ValueError: a value cannot work.
    """
    name = _command(argv)
    from learnedopt import cli_parser  # only now: what lists the commands does not wait for it

    return cli_parser.call(name, _function(name), argv[len(name.split()) :])


def _command(argv: Sequence[str]) -> str:
    """Return which command the arguments begin with; of none print what is asked for or wrong, and exit."""
    for argument in argv:
        argument.encode()  # bytes that are no text could be shown nowhere
    for name in COMMANDS:
        if [*argv[: len(name.split())]] == name.split():
            return name
    if argv and argv[0] == "--version":
        print(f"learnedopt {__version__}")
        sys.exit(0)
    below = [name for name in COMMANDS if argv and name.startswith(f"{argv[0]} ")]
    if not {"-h", "--help"}.isdisjoint(argv[:2]):
        print("Learned optimizers and few-shot learners: train and judge them.\n\nusage: learnedopt COMMAND ...\n")
        told = below or COMMANDS
        print(*(f"  {name:10} {(_function(name).__doc__ or '').splitlines()[0]}" for name in told), sep="\n")
        print("\nlearnedopt COMMAND --help says more of one, learnedopt --version which release this is.")
        sys.exit(0)
    given = " ".join(argv[: 2 if below else 1])
    near = difflib.get_close_matches(given, [*COMMANDS, "--help", "--version"], n=1, cutoff=0.5)
    if len(argv) == 1 and below:
        near = [" or ".join(below)]
    wrong = f"there is no command {given!r}" if given else "name a COMMAND"
    hint = f"; did you mean {near[0]}?" if near else ""
    print(f"learnedopt: {wrong}{hint} (learnedopt --help lists them)", file=sys.stderr)
    sys.exit(BAD_INPUT)


def _function(name: str) -> Callable[..., int]:
    module, _, function = COMMANDS[name].partition(":")
    return getattr(importlib.import_module(f"learnedopt.{module}"), function)


if __name__ == "__main__":
    sys.exit(main())
