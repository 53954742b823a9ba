"""A file's SHA-256 in the file itself, so that it survives a copy of the file alone.

The statement ``"sha256": "<64 hexadecimal digits>"`` stands in a place that the format of the file leaves for it,
before any other text of that form. Its digits are the SHA-256 of the whole file with 64 zeros in their place: every
bit of the file is under it, its own too. It tells damage, not malice: who can write the file can write the statement.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from learnedopt.core.containers import is_dict
from learnedopt.core.files import parse_json, require_plain_file, write_atomically

BLANK = "0" * 64
"""What stands in the place of the digits until ``seal`` writes them."""
END = f'\n{{"sha256": "{BLANK}"}}\n'.encode()
"""A statement for the end of a file, for formats that read no further than their own end."""
RECORD = "learnedopt-record-1"
"""What says that a JSON file has a statement, so that one that lost it is told from one of before."""
_PLACE = re.compile(rb'\\?"sha256\\?": ?\\?"([0-9a-f]{64})\\?"')  # also in JSON text inside JSON text
_OWN = ("format", "sha256")
_PIECE = 1 << 20
MAX_RECORD = 1 << 26
"""Bytes of a JSON file that are read."""


def seal(path: Path, start: int = 0, stop: int | None = None) -> None:
    """Write the digits into the first statement between the bytes ``start`` and ``stop`` of a file."""
    with path.open("r+b") as file:
        place = _place(file, start, stop)
        if place is None:
            raise AssertionError(f"{path} has no place for its SHA-256")
        digest = _digest(file, place)
        file.seek(place)
        file.write(digest.encode())


def is_sealed(path: Path, start: int = 0, stop: int | None = None) -> bool:
    """Return whether a statement stands there and is true; False for none.

    The file is read in pieces of a megabyte.

    Raises:
        ValueError: it is not true: the file is damaged.
    """
    with path.open("rb") as file:
        place = _place(file, start, stop)
        if place is None:
            return False
        file.seek(place)
        stated, found = file.read(len(BLANK)).decode(), _digest(file, place)
    if stated != found:
        raise ValueError(f"its SHA-256 is {found}, and it says {stated}: it was changed after it was written")
    return True


def at_the_end(path: Path) -> tuple[int, int]:
    """Return where ``END`` stands in a file that ends with it."""
    size = path.stat().st_size
    return max(size - len(END), 0), size


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON with a statement in it, atomically; ``read_record`` gives it back."""
    text = json.dumps({"format": RECORD, "sha256": BLANK, **value}, indent=2) + "\n"

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")
        seal(partial)

    write_atomically(path, write)


def read_record(path: Path, of_before: tuple[type, ...] = (dict,)) -> Any:
    """Return what ``write_record`` wrote, or the JSON that an earlier version wrote, without a statement.

    Args:
        path: the file.
        of_before: what an earlier version wrote.

    Raises:
        ValueError: it is damaged, nested too deeply, or larger than any that is written; it holds something else.
    """
    require_plain_file(path)
    try:
        if path.stat().st_size > MAX_RECORD:
            raise ValueError(f"it is larger than {MAX_RECORD} bytes")
        text = path.read_bytes()
        value = parse_json(text)
        # One of the three is still there where another was changed.
        due = [key for key in _OWN if is_dict(value) and key in value]
        if due or b"sha256" in text or RECORD.encode() in text:
            if len(due) < len(_OWN) or value["format"] != RECORD or not is_sealed(path):
                raise ValueError("its SHA-256 is not in its place")
            return {key: item for key, item in value.items() if key not in _OWN}
        if not isinstance(value, of_before):
            raise ValueError(f"it is a {type(value).__name__}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or not what this library wrote: {error}") from error
    return value


def _place(file: BinaryIO, start: int, stop: int | None) -> int | None:
    """Return where the digits are, None for nowhere."""
    file.seek(start)
    found = _PLACE.search(file.read() if stop is None else file.read(stop - start))
    return None if found is None else start + found.start(1)


def _digest(file: BinaryIO, place: int) -> str:
    """Return the SHA-256 of a file with zeros for the digits at ``place``."""
    file.seek(0)
    digest, at = hashlib.sha256(), 0
    for piece in _pieces(file):
        digest.update(piece if at + len(piece) <= place or at >= place + len(BLANK) else _blanked(piece, place - at))
        at += len(piece)
    return digest.hexdigest()


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece


def _blanked(piece: bytes, start: int) -> bytes:
    """Return a piece with zeros for those of the digits, which begin at ``start``, that are in it."""
    first, stop = max(start, 0), min(start + len(BLANK), len(piece))
    return piece[:first] + b"0" * (stop - first) + piece[stop:]
