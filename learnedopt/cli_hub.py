"""The command ``learnedopt hub``: give a learned optimizer away, and take one, with its card."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add ``hub`` to the commands of a parser."""
    about = "push a learned optimizer with its card to a hub or a folder, or pull one"
    parser = commands.add_parser("hub", help=about, description=f"{about.capitalize()}.")
    actions = parser.add_subparsers(title="actions", dest="action", required=True, metavar="ACTION")
    _add_push(actions)
    _add_pull(actions)


def _add_push(actions: Any) -> None:
    parser = actions.add_parser(
        "push",
        help="write theta.safetensors and its card there",
        description="Write theta.safetensors and a card (README.md, made from the file) into a folder or a repository "
        "on Hugging Face's hub. The configuration in the file's header goes along; nothing else of a run does.",
    )
    parser.set_defaults(command=push)
    parser.add_argument("run", metavar="RUN", help="a run's folder, a checkpoint or a packaged name")
    parser.add_argument("--to", required=True, metavar="PLACE", help="user/name, or a folder (./user/name always is)")
    parser.add_argument("--license", metavar="ID", help="for the card, such as apache-2.0 (default: none is named)")
    parser.add_argument("--private", action="store_true", help="of a repository that this makes")


def _add_pull(actions: Any) -> None:
    parser = actions.add_parser(
        "pull",
        help="copy theta.safetensors from there",
        description="Copy theta.safetensors from a folder or a repository on Hugging Face's hub into a folder as runs "
        "have it. Nothing else is read, and nothing is executed.",
    )
    parser.set_defaults(command=pull)
    parser.add_argument("source", metavar="PLACE", help="user/name, or a folder (./user/name always is)")
    parser.add_argument("--as", required=True, dest="name", metavar="NAME", help="of the folder in --runs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="default runs")
    parser.add_argument("--revision", metavar="R", help="a branch, tag or commit of the repository")
    parser.add_argument("--sha256", default="", metavar="HEX", help="refuse a file with another one")


def push(arguments: argparse.Namespace) -> int:
    """Push what the arguments name; return 0."""
    from learnedopt import hub

    held = hub.push(arguments.run, arguments.to, license=arguments.license, private=arguments.private)
    print(f"{held.where}: {hub.THETA} and its card, {hub.CARD}; SHA-256 {held.sha256}")
    if arguments.license is None:
        print("The card names no license; --license ID adds one.")
    return 0


def pull(arguments: argparse.Namespace) -> int:
    """Pull what the arguments name; return 0."""
    from learnedopt import cards, hub

    held = hub.pull(
        arguments.source, arguments.name, root=arguments.runs, revision=arguments.revision, sha256=arguments.sha256
    )
    print(cards.card(held.where))
    print(f"{held.where}: SHA-256 {held.sha256}")
    return 0
