"""What every command has in common: its options are its function's parameters, and what is wrong ends in one line."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from argparse import Action
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from learnedopt.cli import BAD_INPUT
from learnedopt.training.following import Tracking
from learnedopt.typed_values import refusal, spelled


class Help(DefaultHelpFormatter):
    """A help as jsonargparse has it, with types in words."""

    def _get_type_str(self, action: Action) -> str | None:
        hint = getattr(action, "_typehint", None)
        return super()._get_type_str(action) if hint is None else spelled(hint)


class Parser(ArgumentParser):
    """The options of one command, read off the signature and the docstring of the function that carries it out.

    Parameters without a default are given by their place, the others as ``--an-option value``; one that is a ``bool``
    as ``--an-option`` alone, a tuple of texts as ``--tags a,b``, a sequence of texts by being repeated. What Python
    keeps for itself is written with an underscore behind it: ``as_``. A parameter ``tracking`` has an option for each
    field of ``Tracking``, those of meta-steps where there is a ``chosen`` recipe, whose options ``cli_recipe`` adds.

    Args:
        command: what it is called after ``learnedopt``.
        function: what carries it out, and returns the exit code.

    Attributes:
        fields: what else a word that is no option may have been meant for.
    """

    def __init__(self, command: str, function: Callable[..., int]) -> None:
        self.fields: list[str] = []
        about = docstring_parser.parse(inspect.getdoc(function) or "")
        super().__init__(
            prog=f"learnedopt {command}", description=about.description, formatter_class=Help, print_config=None,
            allow_abbrev=False,
        )  # fmt: skip
        self.add_function_arguments(function, as_group=False, as_positional=True, skip={"chosen", "tracking"})
        parameters = inspect.signature(function).parameters
        self._follows = "tracking" in parameters
        if self._follows:
            self.add_class_arguments(Tracking, as_group=False, skip=set() if "chosen" in parameters else {"log_every"})
        self.add_argument(
            "--import", action="append", default=[], metavar="MODULE",
            help="a module to import first, which registers rules, families, objectives or recipes of your own; "
            "repeatable",
        )  # fmt: skip

    def given(self, arguments: Namespace) -> dict[str, Any]:
        """Return what was read, by parameter of the function.

        Raises:
            ValueError: a value of ``Tracking`` cannot work.
        """
        given = {**vars(arguments)}
        if not self._follows:
            return given
        said = {each.name: given.pop(each.name) for each in dataclasses.fields(Tracking) if each.name in given}
        return {**given, "tracking": Tracking(**said)}

    def add_argument(self, *names: str, **options: Any) -> Any:
        """Add an argument as ``jsonargparse`` does, but for what the class says of its form."""
        options["help"] = (options.get("help") or "").replace("``", "")
        if options.pop("as_it_is", False):
            return super().add_argument(*names, **options)
        hint = options.get("type") or getattr(options.get("action"), "_typehint", None)
        plain = {key: value for key, value in options.items() if key not in ("type", "action")}
        if hint is bool:
            options = {**plain, "action": "store_true"}
        elif hint == tuple[str, ...]:
            options = {**plain, "type": _Words()}
        elif hint == Sequence[str]:
            names = names[:1]  # it is repeated under one name
            options = {**plain, **({"action": "append", "default": []} if names[0].startswith("-") else {"nargs": "+"})}
        if names[0].startswith("--") and not names[0].startswith("--print_"):  # jsonargparse's own are spelled so
            options.setdefault("dest", names[0][2:])
            names = (names[0].rstrip("_").replace("_", "-"), *names[1:])
        elif not names[0].startswith("-"):
            options.setdefault("metavar", names[0].upper())
        return super().add_argument(*names, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line, with the nearest word that would have been right, and exit with code 2."""
        told = self._of_a_value(message) or self._of_what_is_missing(message) or " ".join(message.split())
        self.exit(BAD_INPUT, f"{self.prog}: {told}{self._nearest_option(told)} ({self.prog} --help says more)\n")

    def _of_a_value(self, message: str) -> str | None:
        """Return what is to be said of a value that is not of its option's type, if ``message`` is of one."""
        key, value = re.match(r'Parser key "(\w+)"', message), re.search(r"(?:Got|Given) value: (.*)", message)
        action = next((each for each in self._actions if key and each.dest == key[1]), None)
        if action is None or value is None:
            return None
        return refusal(_shown(action), value[1], getattr(action, "_typehint", action.type), "option")

    def _of_what_is_missing(self, message: str) -> str | None:
        start = "the following arguments are required: "
        missing = message.removeprefix(start).split(", ") if message.startswith(start) else []
        return start + ", ".join(_shown(each) for each in self._actions if each.dest in missing) if missing else None

    def _nearest_option(self, message: str) -> str:
        known = [*self.fields, *(word for action in self._actions for word in action.option_strings)]
        words = message.removeprefix("unrecognized arguments:").split() if message.startswith("unrecog") else []
        names = [word.partition("=")[0] for word in words]
        near = [hit for name in names for hit in difflib.get_close_matches(name, known, n=1, cutoff=0.7)]
        return f"; did you mean {near[0]}?" if near and near[0] not in names else ""


def _shown(action: Action) -> str:
    """Return what a user calls an argument."""
    return action.option_strings[0] if action.option_strings else str(action.metavar)


class _Words:
    """The type of ``a,b``."""

    def __call__(self, text: str | tuple[str, ...]) -> tuple[str, ...]:
        if isinstance(text, tuple):  # the parser asks again of what it has read
            return text
        return tuple(word.strip() for word in text.split(",") if word.strip())

    def __repr__(self) -> str:
        return "words as A,B"


def call(command: str, function: Callable[..., int], words: Sequence[str]) -> Callable[[], int]:
    """Return the call of ``function`` that the words of a command line ask for; modules that they name are imported.

    Raises:
        SystemExit: all is said: the help, or what is wrong.
        ValueError: a value cannot work.
    """
    parameters = inspect.signature(function).parameters
    if "chosen" in parameters:
        from learnedopt import cli_recipe

        return cli_recipe.call(command, function, words)
    parser = Parser(command, function)
    arguments = parser.parse_args([*words])
    load_plugins(arguments)
    given = parser.given(arguments)
    return lambda: function(**given)


def load_plugins(arguments: Namespace) -> None:
    """Import what ``--import`` names, and what installed packages offer, and take the option off the others."""
    from learnedopt import plugins

    plugins.load(arguments.pop("import"))
