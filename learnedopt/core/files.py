"""Files that are either whole or not there: written beside their place, flushed to disk, then moved in one step."""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from learnedopt.core.containers import is_dict, is_list_or_tuple, is_mapping

MAX_DEPTH = 100
"""How deeply JSON may be nested."""
MAX_NAME = 200
"""Bytes of a folder's name: file systems take 255, and some are added to it."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new file in ``path``'s folder, then replace ``path`` by it; a crash leaves the old file.

    Raises:
        OSError: it cannot be written, as on a full disk; it names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:  # of a name that nobody knows
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(handle)
    try:
        write(Path(name))
        _flush(Path(name), os.O_RDWR)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's private mode is meant for secrets
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _flush(path.parent, os.O_RDONLY)  # the new name itself must reach the disk too


@contextmanager
def exclusive(folder: Path) -> Generator[None, None, None]:
    """Hold an existing folder for this process alone; the hold of a process ends with it, however it ends.

    A file system without locks gives a warning, and no hold.

    Raises:
        ValueError: another process holds it.
        PermissionError: it cannot be written: said before hours of work, not after.
    """
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()  # pyright: ignore[reportUnknownMemberType] - filelock picks the lock's class as it runs
    except Timeout as error:
        raise ValueError(
            f"another process is at work in {folder}; wait for it to end, or give this run a name of its own"
        ) from error
    except (OSError, NotImplementedError) as error:
        if not os.access(folder, os.W_OK):
            raise PermissionError(
                f"{folder} cannot be written ({error}); make it writable, or train elsewhere"
            ) from error
        warnings.warn(f"{folder} cannot be locked ({error}): let no other process train there", stacklevel=3)
    try:
        yield
    finally:
        lock.release()


def remove_partials(folder: Path) -> None:
    """Remove what writes that were killed have left in ``folder``, where nobody else may be writing."""
    for partial in folder.glob(".*.partial"):
        partial.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda partial: _write_text(partial, text))


def parse_json(text: bytes | str) -> Any:
    """Return what JSON text says, where that is nested no deeper than anything that this library writes.

    Raises:
        ValueError: it is not JSON, or nested deeper: what walks through it needs no bound of its own.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from error
    level: list[Any] = [value]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        level = [child for node in level for child in _children(node)]
    return value


def _children(node: Any) -> Iterable[Any]:
    return node.values() if is_dict(node) else node if is_list_or_tuple(node) else ()


def require_plain_file(path: Path) -> None:
    """Raise ValueError where ``path`` is a folder, a pipe or a device: to read it would fail, wait, or never end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a folder, a pipe or a device, and no file; move it away")


def require_name(name: str, what: str, of: str = "folder") -> None:
    """Raise ValueError unless ``name`` can name a folder, or a file, inside one: nothing that leads elsewhere."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = None  # bytes of the command line that are no text
    if size is None or not 0 < size <= MAX_NAME or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
        raise ValueError(
            f"{what} {name!a} is not the name of a {of}; pass 1 to {MAX_NAME} characters without slashes, which "
            "are not '.' or '..'"
        )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _flush(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def plain_json(value: Any) -> Any:
    """Return ``value`` as nested dicts and lists of what JSON can hold; non-finite floats and the rest as strings."""
    if is_mapping(value):
        return {str(key): plain_json(item) for key, item in value.items()}
    if is_list_or_tuple(value):
        return [plain_json(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return json_number(value) if isinstance(value, float) else str(value)


def json_number(value: float) -> int | float | str:
    """Return a count or a finite number as it is, another as ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``."""
    if isinstance(value, int):
        return value
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
