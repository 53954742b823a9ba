"""Files of published data sets: found on disk, else downloaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from learnedopt.core.private_folder import cache_folder

_log = logging.getLogger(__name__)


def find(root: str | None, folder: str, name: str) -> Path | None:
    """Return where a file is, as ``fetch`` looks for it, or None."""
    return next((path for place in _places(root, folder) if (path := place / name).is_file()), None)


def fetch(root: str | None, folder: str, name: str, mirrors: Sequence[str], known_hash: str) -> Path:
    """Return where a file is: ROOT/FOLDER/NAME, else CACHE/FOLDER/NAME, which is downloaded where there is neither.

    CACHE is ``$LEARNEDOPT_CACHE``, by default ``learnedopt`` in the user's cache folder. What is found is not checked.

    Args:
        root: ``$LEARNEDOPT_DATA``, or None.
        folder: of the data set, below either.
        name: of the file.
        mirrors: addresses that the name is appended to, tried in this order.
        known_hash: of what is downloaded, as ``"sha256:..."``.

    Raises:
        FileNotFoundError: it is in neither place, and no mirror sent it. What each said goes to the log (INFO).
    """
    found = find(root, folder, name)
    if found is not None:
        return found
    *_, cache = places = _places(root, folder)
    failures: dict[str, Exception] = {}
    for mirror in mirrors:
        try:
            return _retrieve(mirror + name, known_hash, name, cache)
        except (OSError, ValueError) as error:  # no network, a server's refusal, no space, or a wrong checksum
            _log.info("%s%s was not downloaded: %s", mirror, name, error)
            failures[mirror] = error
    looked = " and ".join(map(str, places))
    variable = f"LEARNEDOPT_DATA is {root!r}" if root else "LEARNEDOPT_DATA is not set"
    reasons = "; ".join(f"{urlsplit(mirror).hostname}: {_reason(error)}" for mirror, error in failures.items())
    raise FileNotFoundError(
        f"there is no {name} in {looked} ({variable}), and it could not be downloaded ({reasons}). Set LEARNEDOPT_DATA "
        f"to a folder that holds {folder}/{name}, or put the file into {cache}"
    )


def _places(root: str | None, folder: str) -> list[Path]:
    return [*([Path(root).expanduser() / folder] if root else []), cache_folder() / folder]


def _retrieve(address: str, known_hash: str, name: str, folder: Path) -> Path:
    import pooch  # pyright: ignore[reportMissingTypeStubs] - it has no types

    file: Any = pooch.retrieve(  # pyright: ignore[reportUnknownMemberType]
        address, known_hash, fname=name, path=folder
    )
    return Path(file)


def _reason(error: BaseException) -> str:
    """Return why in the words of the system, such as "Connection refused": what is around them repeats the address."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
