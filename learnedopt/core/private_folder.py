"""Folders that code is loaded from: this user's alone, or refused."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$LEARNEDOPT_CACHE``, by default ``learnedopt`` in the user's cache folder; it need not be there.

    Raises:
        RuntimeError: the user has no home folder.
    """
    own = os.environ.get("LEARNEDOPT_CACHE")
    place = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "learnedopt"
    return place.expanduser()


def open_private(folder: Path) -> int:
    """Open a folder, made for this user alone (mode 0700) where there is none, and return its descriptor.

    What is reached through the descriptor stays in the folder that was checked, whatever happens to its name. Links
    are followed up to the folder itself, which must be none.

    Raises:
        PermissionError: another user owns it or may write into it, or the system does not tell.
        OSError: it cannot be made or opened.
    """
    if os.name != "posix":
        raise PermissionError(f"this system does not tell who may write into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.parent.resolve() / folder.name
    with suppress(FileExistsError):
        place.mkdir(mode=0o700)
    if place.is_symlink():
        raise PermissionError(f"{place} is a link")
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    fault = not_ours(os.fstat(descriptor))
    if fault is not None:
        os.close(descriptor)
        raise PermissionError(f"{place} {fault}")
    return descriptor


def not_ours(status: os.stat_result) -> str | None:
    """Return why others could have written what has this status, or None.

    Root is a user like others here: in a container it does not trust what the users of the host own.
    """
    if status.st_uid != os.geteuid():
        return f"belongs to the user with the number {status.st_uid}, and this process to {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None
