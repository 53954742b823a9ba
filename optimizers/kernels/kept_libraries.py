"""Compiled libraries, kept between processes in a folder of this user's own.

A library lies there as ``KEY-SHA256.so``, where the hash is that of its bytes: name and bytes reach their place in one
step, so that processes which build at once need not wait for each other, and what is not whole is known by its name.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from learnedopt.core.private_folder import not_ours

logger: logging.Logger = logging.getLogger("learnedopt")


def load(folder: int, place: Path, key: str) -> ctypes.CDLL | None:
    """Return the library of that key, or None where there is none that is ours and whole; a damaged one is logged.

    Args:
        folder: of ``open_private``.
        place: the folder's path.
        key: what the library was built from.

    Raises:
        OSError: it is whole, and cannot be loaded.
    """
    for name in _names(folder, key):
        fault = _fault(folder, name)
        if fault is None:
            return ctypes.CDLL(_path(folder, place, name))
        logger.warning("%s is not loaded, and built again: it %s", place / name, fault)
    return None


def keep(folder: int, key: str, product: Path) -> None:
    """Put a library that was just built into the folder, in place of what has its key.

    Raises:
        OSError: it cannot be written; what there was is still there.
    """
    content = product.read_bytes()
    name = f"{key}-{hashlib.sha256(content).hexdigest()}.so"
    partial = f".{key}.{secrets.token_hex(8)}.partial"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with open(os.open(partial, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        if partial in os.listdir(folder):
            os.unlink(partial, dir_fd=folder)
        raise
    for other in _names(folder, key):
        if other != name:
            with suppress(FileNotFoundError):  # another process has been quicker
                os.unlink(other, dir_fd=folder)
    os.fsync(folder)


def _names(folder: int, key: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith(f"{key}-") and name.endswith(".so"))


def _fault(folder: int, name: str) -> str | None:
    """Return what is wrong with a file of that name, or None."""
    try:
        # Without waiting: what has this name may be a pipe.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    try:
        status, digest = os.fstat(descriptor), hashlib.sha256()
        if not stat.S_ISREG(status.st_mode):
            return "is no plain file"
        while piece := os.read(descriptor, 1 << 20):
            digest.update(piece)
    finally:
        os.close(descriptor)
    if not_ours(status) is not None:
        return not_ours(status)
    whole = name.endswith(f"-{digest.hexdigest()}.so")
    return None if whole else f"is damaged (its {status.st_size} bytes have not the hash in its name)"


def _path(folder: int, place: Path, name: str) -> str:
    """Return a path that leads into the folder that was opened, where the system has such paths.

    Loaders take equal paths for one library: this one ends in its hash.
    """
    return f"/proc/self/fd/{folder}/{name}" if Path(f"/proc/self/fd/{folder}").is_dir() else str(place / name)
