"""Character text that is on every machine: the sources of Python's own standard library."""

from __future__ import annotations

import functools
import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.tasks.data.arguments import MetaSplit

Part: TypeAlias = Literal["whole", "kept", "held-out"]
"""Of each file: all of it, all but the last tenth, or the last tenth."""

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz012ACDEFILMNOPRSTU_.,:'\"()[]=-+*#>\\"
"""The most frequent characters, 99 % of the text; a character's symbol is its place here."""
NUM_SYMBOLS = len(CHARACTERS) + 1
"""64: the last symbol stands for every other byte."""

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"})
"""Folders: what was installed, tests, and tables that are no text."""
_SYMBOL_OF = bytes(CHARACTERS.find(chr(i)) % NUM_SYMBOLS for i in range(256))
_LEAST_FILES = 100


@functools.cache
def load(meta_split: MetaSplit, part: Part = "whole") -> Tensor:
    """Return the text of a split as symbols: (num_characters,) uint8, files one after the other in order of names.

    A hash of its name puts a file into "train" (80 % of the files), "valid" or "test" (10 % each): never a text in two
    splits. The text is the same in every process and on every machine with the same Python, but depends on Python's
    version: 8.7, 1.1 and 0.9 million characters in 3.11. Read in a tenth of a
    second, once in a process.

    Raises:
        FileNotFoundError: this Python's standard library is not there as source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = _names(root)
    if len(names) < _LEAST_FILES:
        raise FileNotFoundError(
            f"the text is made of the sources of Python's standard library, but {root} holds {len(names)} of them: "
            "this Python has its library zipped, frozen or compiled only; run with one that is installed with sources"
        )
    own = [(root / name).read_bytes().replace(b"\r\n", b"\n") for name in names if split_of(name) == meta_split]
    pieces = b"".join(_part_of(content, part) for content in own).translate(_SYMBOL_OF)
    return torch.frombuffer(bytearray(pieces), dtype=torch.uint8)


def split_of(name: str) -> MetaSplit:
    """Return which split the file of that name, relative to the library and with slashes, belongs to."""
    tenth = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10
    return "train" if tenth < 8 else "valid" if tenth == 8 else "test"


def as_text(symbols: Tensor) -> str:
    """Return symbols (n,) as text to read; the last symbol is shown as a replacement character."""
    shown = CHARACTERS + "\ufffd"
    return "".join(shown[i] for i in tree.numbers(symbols))


def _part_of(content: bytes, part: Part) -> bytes:
    start = len(content) - len(content) // 10
    return content if part == "whole" else content[:start] if part == "kept" else content[start:]


def _names(root: Path) -> list[str]:
    """Return the names of the library's sources, sorted, but for those that differ from build to build."""
    found: list[str] = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT and not name.startswith("config-")]
        sources = (name for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata"))
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in sources]
    return sorted(found)
