"""Commands that take a recipe: its fields on the command line and in YAML, and what ``--help`` says of them."""

from __future__ import annotations

import dataclasses
from argparse import SUPPRESS
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from learnedopt.cli_parser import Parser, load_plugins

if TYPE_CHECKING:
    from learnedopt.recipes import Recipe, Study


class Chosen(NamedTuple):
    """A recipe as the command line wants it: its name, itself with all changes, and these."""

    name: str
    recipe: Recipe | Study
    changes: list[str | Mapping[str, Any]]


def call(command: str, function: Callable[..., int], words: Sequence[str]) -> Callable[[], int]:
    """Return the call of ``function`` that the words ask for, with the ``Chosen`` recipe as its first argument.

    A field of the recipe is set by ``--meta.lr=1e-3``, ``--meta.lr 1e-3``, ``meta.lr=1e-3`` or ``--set meta.lr=1e-3``:
    what the command's own options do not name is one. Files of ``--config`` come before all of these.
    """
    parser = _parser(command, function)
    wants_help = not {"-h", "--help"}.isdisjoint(words)
    own, given = _apart(parser, [word for word in words if word not in ("-h", "--help")])
    arguments = parser.parse_args(own)
    if wants_help and "recipe" not in arguments:
        parser.parse_args(["--help"])
    load_plugins(arguments)
    name, files, _, smoke, lists, prints = (
        arguments.pop(key, None) for key in ("recipe", "config", "set", "smoke", "list", "print_config")
    )
    if lists:
        return list_recipes
    chosen = _chosen(parser, name, files, given, smoke=smoke, extend=arguments.get("extend", False))
    if wants_help:
        from learnedopt.cli_fields import add_fields

        add_fields(parser, chosen.recipe)
        parser.print_help()
        return lambda: 0
    if prints:
        return lambda: print_config(chosen.recipe)
    options = parser.given(arguments)
    return lambda: function(chosen, **options)


def _parser(command: str, function: Callable[..., int]) -> Parser:
    parser = Parser(command, function)
    parser.usage = f"learnedopt {command} RECIPE [KEY=VALUE ...] [options]"
    parser.epilog = f"learnedopt {command} RECIPE --help lists the fields of a recipe as well."
    parser.add_argument("recipe", nargs="?", default=SUPPRESS, help="one of --list")
    parser.add_argument("--list", action="store_true", help="print the recipes, one line each")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="set a field of the recipe, such as meta.lr=1e-3; also KEY=VALUE alone, --KEY=VALUE or --KEY VALUE",
    )  # fmt: skip
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE",
        help="YAML with fields, as --print_config prints them, or some of these; fields on the command line win",
    )  # fmt: skip
    parser.add_argument("--print_config", action="store_true", help="print all fields as YAML, and do nothing else")
    parser.add_argument("--smoke", action="store_true", help="shrink what is not set here, to a minute at most")
    return parser


def _apart(parser: Parser, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the command's own words, and those that may set fields: ``key=text``, or an option with its value."""
    own: list[str] = []
    given: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, text = word.partition("=")
        action = parser._option_string_actions.get(name)
        if name == "--set" and (equals or (text := next(rest, None)) is not None):
            given.append(text)
        elif action is not None:
            own += [word, *([] if equals or action.nargs == 0 else islice(rest, 1))]
        elif name.startswith("--") and not equals:
            value = next(rest, None)
            if value is None:
                parser.error(f"argument {word}: expected one argument")
            given.append(f"{word}={value}")
        else:
            (given if equals else own).append(word)
    return own, given


def _chosen(
    parser: Parser, name: str | None, files: list[str], given: list[str], *, smoke: bool, extend: bool
) -> Chosen:
    from learnedopt import recipes
    from learnedopt.config import INTERCHANGEABLE, override
    from learnedopt.core.counts import require_count

    if name is None:
        raise ValueError("name a recipe (learnedopt train --list shows all)")
    recipe = recipes.make(name)
    if extend and isinstance(recipe, recipes.Study):
        raise ValueError(f"{name} is a study, which has its end: --extend lengthens a meta-training; leave it out")
    parser.fields = [f"--{field.name}" for field in dataclasses.fields(recipe)]
    for word in given:
        if word.startswith("--") and word.partition("=")[0].partition(".")[0] not in parser.fields:
            parser.error(f"unrecognized arguments: {word}")
    said = [word.removeprefix("--") for word in given]
    changes = [*map(read_config, files), *said]
    recipe = override(recipe, changes, INTERCHANGEABLE)
    if smoke:
        small = recipes.smoke(recipe)
        name = small.name  # its folder is not that of the run itself
        try:  # what is said in so many words is not made smaller
            recipe = override(small, said, INTERCHANGEABLE)
        except ValueError as error:
            raise ValueError(f"{error} (--smoke has shrunk what the command line does not name)") from error
    require_count("num_threads", recipe.num_threads, least=1)
    return Chosen(name, recipe, changes)


def read_config(path: str) -> Mapping[str, Any]:
    """Return the fields that a file of YAML, or of JSON, holds.

    Raises:
        ValueError: there is no such file, or it holds none.
    """
    import yaml
    from jsonargparse import get_loader

    try:
        found = get_loader("yaml")(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} is no YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"--config {path} holds no fields: write key: value, as --print_config does")
    return found


def print_config(recipe: Recipe | Study) -> int:
    """Print all fields of a recipe as YAML, which ``--config`` reads; return 0."""
    import yaml

    from learnedopt.config import as_config

    print(yaml.safe_dump(as_config(recipe), sort_keys=False), end="")
    return 0


def list_recipes() -> int:
    """Print the recipes, one line each, and return 0."""
    from learnedopt import recipes

    for name in recipes.names():
        print(f"{name:24} {recipes.summary(name)}")
    return 0
