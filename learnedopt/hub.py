"""Theta on a hub: a folder, or a model repository of Hugging Face, with ``theta.safetensors`` and a card beside it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from learnedopt.cards import Card, card_of
from learnedopt.checkpoint import file_of, load_checkpoint
from learnedopt.core.files import require_name, write_atomically

THETA, CARD = "theta.safetensors", "README.md"
LIBRARY = "learnedopt"
TAGS = ("learned-optimizer", "meta-learning", "pytorch")
_OURS = f"library_name: {LIBRARY}\n"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class Held(NamedTuple):
    """Where a theta lies, and the SHA-256 of its file, by which it can be asked for."""

    where: str
    sha256: str


def push(name_or_path: str | Path, to: str, *, license: str | None = None, private: bool = False) -> Held:
    """Put a packaged optimizer, a checkpoint file or a run's theta on a hub, with a card made from the file.

    The file goes as it is, with the configuration in its header. Nothing else of a run does.

    Args:
        name_or_path: what ``learnedopt.load`` takes.
        to: a folder, made where it is missing, or ``user/name`` of Hugging Face; see ``is_folder``.
        license: an identifier for the card, such as ``apache-2.0``; without one the card names none.
        private: of a repository that is made by this.

    Raises:
        FileNotFoundError: there is no such theta.
        ValueError: it is no checkpoint of this library; the folder has a README.md of another kind; huggingface_hub is
            not installed.
        OSError: the folder cannot be written, or the hub cannot be reached or refuses.
    """
    file = file_of(name_or_path)
    learned = load_checkpoint(file)
    if is_folder(to):
        folder = Path(to).expanduser()
        text = _card(card_of(learned, folder.resolve().name), file, None, license)
        _fill(folder, file, text)
        return Held(str(folder), sha256_of(file))
    text = _card(card_of(learned, to.rpartition("/")[2]), file, to, license)
    hub = _client()
    with tempfile.TemporaryDirectory() as staged, _plain(f"push to {to}"):
        _fill(Path(staged), file, text)
        hub.HfApi().create_repo(to, repo_type="model", private=private or None, exist_ok=True)
        hub.HfApi().upload_folder(
            repo_id=to, folder_path=staged, allow_patterns=[THETA, CARD], commit_message="theta and its card"
        )
    return Held(to, sha256_of(file))


def pull(source: str, name: str, *, root: Path = Path("runs"), revision: str | None = None, sha256: str = "") -> Held:
    """Copy a theta of a hub to ``root/name/theta.safetensors``, where all that takes a run's folder finds it.

    The safetensors file alone is fetched and read. It is checked as ``learnedopt.load`` checks it before it is put in
    its place; nothing in it is executed.

    Args:
        source: a folder, or ``user/name`` of Hugging Face; see ``is_folder``.
        name: of the folder in ``root``.
        revision: a branch, tag or commit of a repository.
        sha256: what the file must have, in hexadecimal.

    Raises:
        FileNotFoundError: there is no such repository, revision or folder, or no theta.safetensors in it.
        ValueError: the file has another SHA-256, is damaged, or no checkpoint of this library; another theta lies there
            under that name; huggingface_hub is not installed.
        OSError: the hub cannot be reached or refuses.
    """
    require_name(name, "--as")
    file = _in_folder(Path(source).expanduser(), revision) if is_folder(source) else _fetched(source, revision)
    got = sha256_of(file)
    if sha256 and got != sha256.lower():
        raise ValueError(f"{THETA} of {source} has the SHA-256 {got}, and {sha256} was asked for: nothing was written")
    load_checkpoint(file)
    target = root / name / THETA
    if target.is_file() and sha256_of(target) != got:
        raise ValueError(f"{target} is another theta than that of {source}; pull it under another name")
    write_atomically(target, lambda partial: _copy(file, partial))
    return Held(str(target.parent), got)


def is_folder(place: str) -> bool:
    """Return whether ``place`` is a folder, and not ``user/name``: it is one already, or is not of that form.

    ``./user/name`` is always a folder.
    """
    return Path(place).expanduser().is_dir() or _REPOSITORY.fullmatch(place) is None


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _card(card: Card, file: Path, repository: str | None, license: str | None) -> str:
    """Return a card as hubs read it: YAML between two lines of dashes, then Markdown."""
    tags = [f"- {json.dumps(tag)}" for tag in (*TAGS, card.rule)]  # texts of JSON are texts of YAML
    head = [*([f"license: {json.dumps(license)}"] if license else []), "tags:", *tags]
    return (
        "---\n" + _OURS + "\n".join(head) + f"\n---\n\n{card}\n## How to use it\n\n"
        f"```sh\n{_pulling(card, repository or 'FOLDER', sha256_of(file))}\n```\n\n"
        f"```python\n{_making(card)}\n```\n"
    )


def _pulling(card: Card, place: str, sha256: str) -> str:
    """Return the command that takes it from where it lies."""
    imports = [] if card.needs is None else [f" --import {name}" for name in card.needs.modules]
    return f"learnedopt hub pull {place} --as {card.name} --sha256 {sha256}{''.join(imports)}"


def _making(card: Card) -> str:
    """Return the lines of Python that make an optimizer of it."""
    steps = ", num_steps=1000" if card.reads_horizon else ""
    made = f'optimizer = LearnedOptimizer(model.named_parameters(), "runs/{card.name}"{steps})'
    if card.needs is None:
        return f"from learnedopt import LearnedOptimizer\n\n{made}"
    names = ", ".join(card.needs.names)
    if not card.needs.modules and not card.needs.distributions:
        return f"from learnedopt import LearnedOptimizer\n\n# Import here what registers {names}.\n{made}"
    loaded = f"plugins.load({json.dumps(card.needs.modules)})  # registers {names}"
    return f"from learnedopt import LearnedOptimizer, plugins\n\n{loaded}\n{made}"


def _fill(folder: Path, file: Path, text: str) -> None:
    readme = folder / CARD
    if readme.exists() and _OURS not in readme.read_text("utf-8", errors="replace")[:200]:
        raise ValueError(f"{readme} is no card of this library, and would be lost; push to a folder of its own")
    write_atomically(folder / THETA, lambda partial: _copy(file, partial))
    write_atomically(readme, lambda partial: _write(partial, text))


def _copy(file: Path, partial: Path) -> None:
    shutil.copyfile(file, partial)


def _write(partial: Path, text: str) -> None:
    partial.write_text(text, "utf-8")


def _in_folder(folder: Path, revision: str | None) -> Path:
    if revision is not None:
        raise ValueError(f"{folder} is a folder, which has no revision {revision!r}; --sha256 says which file is meant")
    if not (folder / THETA).is_file():
        what = "has no " + THETA if folder.is_dir() else "is no folder, and no user/name of a hub"
        raise FileNotFoundError(f"{str(folder)!r} {what}; `learnedopt hub push RUN --to {folder}` writes one")
    return folder / THETA


def _fetched(repository: str, revision: str | None) -> Path:
    hub = _client()
    with _plain(f"pull {repository}{'' if revision is None else f' at {revision}'}"):
        return Path(hub.hf_hub_download(repository, THETA, revision=revision, library_name=LIBRARY))


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            "user/name is on Hugging Face's hub, for which huggingface_hub is not installed: pip install "
            "'learnedopt[hub]'; a folder needs nothing (./user/name)"
        ) from error
    return huggingface_hub


@contextmanager
def _plain(action: str) -> Generator[None, None, None]:
    """Raise what the client raises as OSError, with what to do; its own errors are of three libraries."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"cannot {action}: ask for access on its page, and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"cannot {action}: no such repository, or a private one; `hf auth login`, or $HF_TOKEN, says who you are"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"cannot {action}: it has no such branch, tag or commit") from error
    except errors.LocalEntryNotFoundError as error:  # before its base class
        raise ConnectionError(f"cannot {action}: the hub cannot be reached, and it was not fetched before") from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"cannot {action}: it has no {THETA}; nothing else is ever read") from error
    except (OSError, ValueError) as error:
        raise OSError(f"cannot {action}: {error}") from error
    except Exception as error:  # of the HTTP library, another one in each version of the client
        raise ConnectionError(f"cannot {action}: the hub cannot be reached ({error}); push to a folder") from error
