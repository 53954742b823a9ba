"""Images that are decoded once, into one memory-mapped array of bytes in the user's cache folder."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from learnedopt.core.files import write_atomically
from learnedopt.core.private_folder import cache_folder
from learnedopt.core.sealed import END, at_the_end, is_sealed, seal

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
"""What is read, whatever a file's name ends with: Pillow would start programs for some others, as for EPS."""
MAX_PIXELS = 50_000_000
"""Of an image: more take half a gigabyte while they are made smaller."""
MODES: dict[int, tuple[str, ...]] = {1: ("L", "1"), 3: ("RGB", "L", "1", "P", "CMYK")}
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
        ValueError: the file cannot be read as an image of ``FORMATS`` of at most ``MAX_PIXELS``, or has a mode that
            ``channels`` cannot hold.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, and at most {MAX_PIXELS:,} are read")
            image.load()
    except Exception as error:  # Pillow makes anything of files that are broken or no images
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
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)
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

    The file's SHA-256 is compared when it is mapped. One that is not what was written is made again, with a warning
    where it is damaged, without where an earlier version wrote no SHA-256 into it.
    """
    digest = hashlib.sha256("\n".join([*source, str(tuple(shape))]).encode()).hexdigest()[:32]
    path = cache_folder() / f"images-{digest}.npy"
    if not path.is_file() or not _is_whole(path, shape):
        _write(path, shape, fill)
    array = np.load(path, mmap_mode="c")  # private pages: torch takes only writable arrays, and nobody writes
    pixels = torch.from_numpy(array)
    file = os.open(path, os.O_RDONLY)  # kept, as the mapping is: the name may be of another file by then
    if pixels.data_ptr() in _mapped:
        os.close(_mapped[pixels.data_ptr()][0])
    _mapped[pixels.data_ptr()] = file, path, os.fstat(file).st_size
    return pixels


def require_mapped(pixels: Tensor) -> None:
    """Check that the file which ``pixels`` are mapped from, if they are, is as long as it was.

    To read beyond a file's end kills the process (SIGBUS). Between this check and the reading a file may still be cut.

    Raises:
        OSError: it is shorter.
    """
    file, path, size = _mapped.get(pixels.data_ptr(), (None, None, 0))
    if file is not None and (now := os.fstat(file).st_size) < size:
        raise OSError(
            f"{path} was cut from {size} to {now} bytes while it was in use; delete it, and start again: it will be "
            "made anew"
        )


_mapped: dict[int, tuple[int, Path, int]] = {}
"""Where in memory a file is mapped -> the open file, its name and size."""


def _is_whole(path: Path, shape: Sequence[int]) -> bool:
    """Return whether a file is what was written, warning of damage."""
    try:
        if not is_sealed(path, *at_the_end(path)):
            return False
        array = np.load(path, mmap_mode="r")
        if array.shape == tuple(shape) and array.dtype == np.uint8:
            return True
        raise ValueError(f"it holds {array.dtype} {array.shape}, expected uint8 {tuple(shape)}")
    except (ValueError, EOFError) as error:
        warnings.warn(f"{path} is damaged ({error}); the images are decoded again", stacklevel=2)
        return False


def _write(path: Path, shape: Sequence[int], fill: Callable[[], Iterator[np.ndarray]]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}

    def write(partial: Path) -> None:  # not by a mapping: on a full disk that kills the process
        with partial.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            start = 0
            for piece in fill():
                file.write(np.ascontiguousarray(piece, dtype=np.uint8).data)
                start += len(piece)
            if start != shape[0]:
                raise AssertionError(f"{start} images were written where {shape[0]} were announced")
            file.write(END)
        seal(partial, *at_the_end(partial))

    write_atomically(path, write)
