"""Images that are decoded once, into one memory-mapped array of bytes in the user's cache folder."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MODES = {1: ("L", "1"), 3: ("RGB", "L", "1", "P", "CMYK")}
"""Channels -> the modes of images that are read into so many; a palette (P) only without transparency."""


class ClassImages(NamedTuple):
    """Images sorted by class.

    ``pixels`` (num_images, side, side, channels) uint8, from 0 to 255; class c has the ``counts[c]`` images from
    ``first[c]`` on, both (num_classes,) int64.
    """

    pixels: Tensor
    first: Tensor
    counts: Tensor


def decode(content: bytes, name: str, size: int, channels: int) -> np.ndarray:
    """Return an image file as (size, size, channels) uint8, resized by Lanczos' filter where it has another size.

    It is read as it is stored: EXIF data do not turn it.

    Raises:
        ValueError: the file cannot be read as an image, or has a mode that ``channels`` cannot hold.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    # What Pillow raises on files that are broken, no images, or larger than its limit.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name} cannot be read as an image ({error}); put a whole file in its place, or remove it"
        ) from error
    transparent = image.mode == "P" and "transparency" in image.info
    if image.mode not in MODES[channels] or transparent:
        found = f"{image.mode} with transparency" if transparent else image.mode
        raise ValueError(
            f"{name} is an image of mode {found}, but channels={channels} reads {', '.join(MODES[channels])}; "
            f"convert it{', or pass channels=3' if image.mode in MODES[3] and not transparent else ''}"
        )
    # Two colours are made grey first: the filter has something to smooth.
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels)


def cached(source: Iterable[str], shape: Sequence[int], fill: Callable[[], Iterator[np.ndarray]]) -> Tensor:
    """Return the array (uint8) that ``fill`` yields piece by piece, memory-mapped.

    The first call writes it to ``$LEARNEDOPT_CACHE``, by default the user's cache folder; later ones map the file.

    Args:
        source: everything that the array depends on; the file's name holds its hash, so that a stale one is never read.
        shape: of the array.
        fill: yields pieces (n, *shape[1:]) from first to last.

    Raises:
        ValueError: a file in the cache is not what was written.
    """
    digest = hashlib.sha256("\n".join([*source, str(tuple(shape))]).encode()).hexdigest()[:32]
    path = _folder() / f"images-{digest}.npy"
    if not path.is_file():
        _write(path, shape, fill)
    try:
        array = np.load(path, mmap_mode="c")  # private pages: torch takes only writable arrays, and nobody writes
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and it will be made again") from error
    if array.shape != tuple(shape) or array.dtype != np.uint8:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, expected uint8 {tuple(shape)}; delete it")
    return torch.from_numpy(array)


def _folder() -> Path:
    import pooch

    return Path(os.environ.get("LEARNEDOPT_CACHE") or pooch.os_cache("learnedopt")).expanduser()


def _write(path: Path, shape: Sequence[int], fill: Callable[[], Iterator[np.ndarray]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".images-") as folder:  # several processes may do the same
        partial = Path(folder) / path.name
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=tuple(shape))
        start = 0
        for piece in fill():
            array[start : start + len(piece)] = piece
            start += len(piece)
        if start != len(array):
            raise AssertionError(f"{start} images were written where {len(array)} were announced")
        array.flush()
        os.replace(partial, path)
