"""Safetensors files with a description of what is in them, and their SHA-256 in the header (``core.sealed``)."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from learnedopt.core.files import write_atomically
from learnedopt.core.sealed import BLANK, is_sealed, seal
from learnedopt.core.tree import Theta

_MAX_HEADER = 100_000_000  # the format's own bound
_AT_ONCE = 1 << 28
"""Bytes of a file that is read for its SHA-256 first; of a larger one the shapes are compared before."""


class Described(NamedTuple):
    """A file whose tensors were not read yet: the JSON text of its description, shapes, and the length of its header.

    ``text`` is None where the header has none.
    """

    path: Path
    text: str | None
    shapes: dict[str, tuple[int, ...]]
    header: int


def write(path: Path, theta: Theta, description: dict[str, Any]) -> None:
    """Write tensors and their description, atomically; equal ones give the same file.

    Raises:
        TypeError: JSON cannot hold the description.
    """
    # The description inside the file is what is read: one file cannot disagree with itself. The statement is a part of
    # it, because the format writes several texts in any order.
    metadata = {"learnedopt": json.dumps({"sha256": BLANK, **description})}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in theta.items()}
    content = save(tensors, metadata=metadata)

    def fill(partial: Path) -> None:
        partial.write_bytes(content)
        seal(partial, 8, 8 + _header_length(content))

    write_atomically(path, fill)


def describe(path: Path) -> Described:
    """Return what a file says of itself.

    Raises:
        ValueError: it is no safetensors file, is cut short, or is not as it was written.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = _header_length(file.read(8))
            if not 0 < length <= min(size - 8, _MAX_HEADER):
                raise ValueError("it does not begin as one, or ends within its header")
        with _opened(path) as file:  # which compares the header with the size
            metadata: dict[str, str] = file.metadata() or {}
            text = metadata.get("learnedopt")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    # What the header's parsers make of bytes that are none.
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        beside = path.with_suffix(".safetensors")
        if beside != path and beside.is_file():
            raise ValueError(f"{path} is no safetensors file; did you mean {beside}?") from error
        raise ValueError(
            f"{path} is no readable safetensors file ({error}); it is corrupt or cut short: write it again"
        ) from error
    found = Described(path, text, shapes, length)
    if size <= _AT_ONCE:
        require_whole(found, due=False)
    return found


def require_whole(found: Described, *, due: bool) -> None:
    """Raise ValueError where the file's SHA-256 is another than it says, or is due and not there."""
    try:
        if not is_sealed(found.path, 8, 8 + found.header) and due:
            raise ValueError("its SHA-256 is not in its header, where files of its format have it")
    except ValueError as error:
        raise ValueError(f"{found.path} is damaged: {error}; write it again, or fetch it again") from error


def read(found: Described, *, due: bool) -> Theta:
    """Return the tensors.

    Raises:
        ValueError: the file's SHA-256 is another than it says, or is due and not there; a tensor cannot be read.
    """
    require_whole(found, due=due)
    try:
        with _opened(found.path) as file:
            return {k: file.get_tensor(k) for k in found.shapes}
    except Exception as error:  # a type that this torch lacks, or a file that was cut in the meantime
        raise ValueError(f"the tensors of {found.path} cannot be read ({error}); write it again") from error


def _opened(path: Path) -> Any:
    # Its methods have no types.
    return safe_open(str(path), framework="pt")


def num_numbers(found: Described) -> int:
    """Return how many numbers its tensors have."""
    return sum(torch.Size(shape).numel() for shape in found.shapes.values())


def _header_length(content: bytes) -> int:
    return struct.unpack("<Q", content[:8])[0]
