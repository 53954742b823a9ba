"""Files that ``flax.serialization`` wrote: nested dicts of arrays in MessagePack, read without either package.

The format is MessagePack's (the public specification); an array is the extension type 1, in which a further message
holds ``[shape, dtype, bytes]``, in C order. Nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learnedopt.core import tree
from learnedopt.core.containers import is_dict, is_list

MAX_BYTES = 1 << 28
_MAX_DEPTH = 50
_MAX_VALUES = 100_000
"""Of a file: a byte of the file may be one, and takes far more in memory."""
_ARRAY = 1
_DTYPES = ("float16", "float32", "float64", "int32", "int64", "bool")
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i",
    0xD3: ">q",
}  # fmt: skip
"""First byte -> how the number after it is packed."""
_SIZES = {
    **dict.fromkeys((0xC4, 0xC7, 0xD9), ">B"),
    **dict.fromkeys((0xC5, 0xC8, 0xDA, 0xDC, 0xDE), ">H"),
    **dict.fromkeys((0xC6, 0xC9, 0xDB, 0xDD, 0xDF), ">I"),
}
"""First byte -> how the size after it is packed: of bytes, extensions, strings, lists and dicts."""


def read(path: str | Path, sha256: str | None = None) -> dict[str, Any]:
    """Return the nested dict of tensors that a file holds.

    The format has no check sum: a file that was changed can be told only by a SHA-256 that is known from elsewhere.

    Args:
        path: the file, of ``MAX_BYTES`` at most.
        sha256: of the file, in hexadecimal digits; None where it is not known.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, is cut short, or has another SHA-256.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is no file; pass the path of one that flax.serialization wrote")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES:,} bytes, which no file of a learned optimizer is")
    data = path.read_bytes()
    if sha256 is not None and (own := hashlib.sha256(data).hexdigest()) != sha256.lower():
        raise ValueError(f"the SHA-256 of {path} is {own}, not {sha256}: fetch it again from where it is published")
    message = _Message(data)
    try:
        found = message.value()
        if not message.done or not is_dict(found):
            raise ValueError("it is not one dict")
    except (ValueError, TypeError, struct.error, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a file of flax.serialization, or is corrupt or cut short ({error}); such files are "
            "MessagePack, not pickles and not safetensors: fetch it again from where it is published"
        ) from error
    return found


class _Message:
    """Bytes, and how far they were read."""

    def __init__(self, data: bytes, depth: int = 0, count: Iterator[int] | None = None) -> None:
        self._data, self._at, self._depth = data, 0, depth
        self._count = itertools.count() if count is None else count

    @property
    def done(self) -> bool:
        return self._at == len(self._data)

    def value(self) -> Any:
        """Return the next value."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")
        if next(self._count) >= _MAX_VALUES:
            raise ValueError(f"it is of more than {_MAX_VALUES:,} values")
        found = self._next()
        self._depth -= 1
        return found

    def _next(self) -> Any:
        first = self._take(1)[0]
        if first < 0x80:
            return first
        if first < 0xC0:
            kind, size = ("dict", first & 0x0F) if first < 0x90 else ("list", first & 0x0F)
            return self._filled(*((kind, size) if first < 0xA0 else ("str", first & 0x1F)))
        if first >= 0xE0:
            return first - 0x100
        if first in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[first]
        if first in _NUMBERS:
            return self._number(_NUMBERS[first])
        if first in range(0xD4, 0xD9):
            return self._filled("extension", 2 ** (first - 0xD4))
        if first not in _SIZES:
            raise ValueError(f"the byte {first:#x} starts nothing that MessagePack knows")
        kind = "bytes" if first <= 0xC6 else "extension" if first <= 0xC9 else "str" if first <= 0xDB else "list"
        return self._filled("dict" if first >= 0xDE else kind, self._number(_SIZES[first]))

    def _filled(self, kind: str, size: int) -> Any:
        if kind == "bytes":
            return self._take(size)
        if kind == "str":
            return self._take(size).decode()
        if kind == "list":
            return [self.value() for _ in range(size)]
        if kind == "dict":
            return {self._key(): self.value() for _ in range(size)}
        number, data = self._number(">b"), self._take(size)
        if number != _ARRAY:
            raise ValueError(f"it holds an extension of type {number}, and only arrays (type {_ARRAY}) are known")
        return _array(_Message(data, self._depth, self._count).value())

    def _key(self) -> str:
        key = self.value()
        if not isinstance(key, str):
            raise ValueError(f"a dict in it has the key {key!r}, which is no string")
        return key

    def _number(self, packed: str) -> Any:
        return struct.unpack(packed, self._take(struct.calcsize(packed)))[0]

    def _take(self, size: int) -> bytes:
        if self._at + size > len(self._data):
            raise ValueError(f"it ends after {len(self._data)} bytes, in the middle of a value")
        self._at += size
        return self._data[self._at - size : self._at]


def _array(parts: Any) -> torch.Tensor:
    """Return the tensor that ``[shape, dtype, bytes]`` is."""
    if not is_list(parts) or len(parts) != 3 or not isinstance(parts[2], bytes):
        raise ValueError("an array in it is not [shape, dtype, bytes]")
    shape, dtype, data = parts
    if dtype not in _DTYPES:
        raise ValueError(f"an array in it is of dtype {dtype!r}, and only {', '.join(_DTYPES)} are known")
    if not is_list(shape) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"an array in it has the shape {shape!r}")
    # What numpy says of its types is not all known here, and torch takes any array.
    kind: Any = np.dtype(dtype)
    flat: Any = np.frombuffer(data, kind.newbyteorder("<"))
    if flat.size != math.prod(shape):
        raise ValueError(f"an array in it has {flat.size} numbers, and the shape {tuple(shape)}")
    numbers: Any = flat.astype(dtype)
    return tree.from_numpy(numbers.reshape(shape))
