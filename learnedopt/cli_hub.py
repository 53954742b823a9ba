"""The commands ``learnedopt hub push`` and ``pull``: give a learned optimizer away, and take one, with its card."""

from __future__ import annotations

from pathlib import Path


def push(run: str, *, to: str, license: str | None = None, private: bool = False) -> int:
    """Push a learned optimizer with its card to a hub or a folder.

    Writes theta.safetensors and a card (README.md, made from the file) into a folder or a repository on Hugging Face's
    hub. The configuration in the file's header goes along; nothing else of a run does.

    Args:
        run: a run's folder, a checkpoint or a packaged name
        to: user/name, or a folder (./user/name always is)
        license: for the card, such as apache-2.0; by default none is named
        private: of a repository that this makes
    """
    from learnedopt import hub

    held = hub.push(run, to, license=license, private=private)
    print(f"{held.where}: {hub.THETA} and its card, {hub.CARD}; SHA-256 {held.sha256}")
    if license is None:
        print("The card names no license; --license ID adds one.")
    return 0


def pull(source: str, *, as_: str, runs: Path = Path("runs"), revision: str | None = None, sha256: str = "") -> int:
    """Pull a learned optimizer from a hub or a folder.

    Copies theta.safetensors from a folder or a repository on Hugging Face's hub into a folder as runs have it. Nothing
    else is read, and nothing is executed.

    Args:
        source: user/name, or a folder (./user/name always is)
        as_: the name of the folder in --runs
        runs: where runs are kept
        revision: a branch, tag or commit of the repository
        sha256: refuse a file with another one
    """
    from learnedopt import cards, hub

    held = hub.pull(source, as_, root=runs, revision=revision, sha256=sha256)
    print(cards.card(held.where))
    print(f"{held.where}: SHA-256 {held.sha256}")
    return 0
