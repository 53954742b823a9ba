"""Nested tensors and plain values in one file: what ``torch.save`` writes, its SHA-256 in the archive's comment."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnedopt.core.files import require_plain_file, write_atomically
from learnedopt.core.sealed import END, at_the_end, is_sealed, seal
from learnedopt.training.pickled import NotPlain, require_plain

_MAX_DIRECTORY = 1 << 26
"""Bytes of an archive's directory, and of its pickle without tensors."""
_MAX_DEPTH = 200
_END, _END_64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
"""The records at an archive's end, in the order of its format's specification but for the comment."""


def write(path: Path, content: Any) -> None:
    """Write ``content`` atomically.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """

    def fill(partial: Path) -> None:
        with partial.open("w+b") as file:
            save(content, file)
            file.seek(-2, os.SEEK_END)
            file.write(len(END).to_bytes(2, "little") + END)
        seal(partial, *at_the_end(partial))

    write_atomically(path, fill)


def save(content: Any, file: io.BufferedRandom | io.BytesIO) -> None:
    """Do ``torch.save``, but raise what the file raises: torch makes a RuntimeError of a full disk."""
    output = _Output(file)
    try:
        torch.save(content, output)  # pyright: ignore[reportArgumentType]  # it asks for write and flush
    except RuntimeError as error:
        if output.failure is not None:
            raise output.failure from error
        raise


def read(path: Path) -> tuple[Any, bool]:
    """Return what a file holds, tensors on the CPU, and whether its SHA-256 was compared: earlier versions wrote none.

    Nothing is loaded before the archive's directory, its sizes, its check sums and its pickle were found to be those of
    tensors and plain values.

    Raises:
        pickle.UnpicklingError, NotPlain: it holds something else.
        Exception: of any kind, where the file is damaged.
    """
    require_plain_file(path)
    with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
        _require_one_directory(file, archive, path.stat().st_size)
        entries = _entries(archive, path.stat().st_size)
        sealed = is_sealed(path, *at_the_end(path))
        # torch writes check sums, but does not compare them.
        if not sealed and (damaged := archive.testzip()):
            raise zipfile.BadZipFile(f"the check sum of {damaged} is wrong")
        (pickled,) = (name for name in entries if name.endswith("/data.pkl"))
        if entries[pickled] > _MAX_DIRECTORY:
            raise ValueError(f"its structure alone takes {entries[pickled]} bytes")
        folder, content = pickled.removesuffix("data.pkl"), archive.read(pickled)
        require_plain(content, lambda key: entries[f"{folder}data/{key}"])
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    _require_bounded(loaded, 10 * len(content) + 1000)
    return loaded, sealed


def require_readable(content: Any) -> None:
    """Raise TypeError unless ``read`` would give ``content`` back."""
    buffer = io.BytesIO()
    try:
        save(content, buffer)
        with zipfile.ZipFile(buffer) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            (pickled,) = (name for name in sizes if name.endswith("/data.pkl"))
            folder = pickled.removesuffix("data.pkl")
            require_plain(archive.read(pickled), lambda key: sizes[f"{folder}data/{key}"])
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, NotPlain, AttributeError) as error:
        raise TypeError(str(error)) from error


def _require_one_directory(file: io.FileIO, archive: zipfile.ZipFile, size: int) -> None:
    """Raise unless the archive's directory is where its end says: else torch would read another one than is checked.

    ``zipfile`` takes the directory that ends where the end begins, torch's reader the one at the stated offset.
    """
    end = size - _END.size - len(archive.comment)
    file.seek(max(end - _LOCATOR.size, 0))
    locator, stated = _LOCATOR.unpack(file.read(_LOCATOR.size)), _END.unpack(file.read(_END.size))
    due = [archive.start_dir]
    if locator[0] == b"PK\x06\x07":
        at = end - _LOCATOR.size - _END_64.size
        file.seek(max(at, 0))
        found, due = _END_64.unpack(file.read(_END_64.size)), [archive.start_dir, (1 << 32) - 1]
        if found[0] != b"PK\x06\x06" or locator[2] != at or found[-1] != archive.start_dir:
            raise zipfile.BadZipFile("its large end is not where it says")
    if stated[0] != b"PK\x05\x06" or stated[-2] not in due or b"PK" in archive.comment:
        raise zipfile.BadZipFile("its directory is not where its end says")


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """Return the sizes of an archive's entries, once they are found to lie in the file as they are, each once."""
    entries = archive.infolist()
    sizes = {entry.filename: entry.file_size for entry in entries}
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
        raise zipfile.BadZipFile("it has compressed entries, which torch.save does not write")
    # torch's reader takes names for the same that differ in their case alone.
    if len({name.lower() for name in sizes}) != len(entries) or sum(sizes.values()) > size:
        raise zipfile.BadZipFile("its entries are there twice, or are larger than the file")
    return sizes


def _require_bounded(content: Any, most: int) -> None:
    """Raise ValueError where values are nested too deeply, shared too often, or larger than what is stored of them."""
    level, depth, seen = [content], 0, 0
    while level:
        depth, seen = depth + 1, seen + len(level)
        if depth > _MAX_DEPTH or seen > most:
            raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels, or refers to the same values too often")
        below: list[Any] = []
        for node in level:
            if isinstance(node, Tensor):
                if node.numel() * node.element_size() > node.untyped_storage().nbytes():
                    raise ValueError(f"it has a tensor of shape {tuple(node.shape)}, of which less is stored")
            elif isinstance(node, dict):
                below += [*node.keys(), *node.values()]
            elif isinstance(node, list | tuple | set):
                below += node
        level = below


class _Bounded(io.FileIO):
    """A file that is read in pieces: what an archive says of its own size is not believed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most ``size`` bytes, or the rest."""
        wanted = size if size is not None and size >= 0 else os.fstat(self.fileno()).st_size - self.tell()
        if wanted > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"it asks for {wanted} bytes at once")
        return super().read(wanted) or b""


class _Output:
    """A file that remembers why it could not be written."""

    def __init__(self, file: io.BufferedRandom | io.BytesIO) -> None:
        self._file, self.failure = file, None

    def write(self, data: bytes) -> int:
        """Write ``data``."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        """Hand what was written to the system."""
        self._file.flush()
