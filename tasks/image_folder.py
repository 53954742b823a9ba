"""Few-shot classification of images in folders, one folder a class."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, cast, final

import numpy as np
import torch

from learnedopt.tasks.data import arguments, image_array
from learnedopt.tasks.data.few_shot import FewShotImages
from learnedopt.tasks.data.image_array import ClassImages

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"})
FILES: Mapping[str, str] = {"train": "train", "valid": "val", "test": "test"}
"""meta_split -> the name of its folder or list."""
MAX_BYTES = 1 << 28
"""Of an image's file."""
Classes: TypeAlias = dict[str, list[Path]]
"""Class -> its images."""
_PIECE = 256


@final
@dataclass(frozen=True)
class ImageFolder(FewShotImages):
    """N-way K-shot classification of the images below a folder; see ``FewShotImages`` for the rest.

    Every folder below ``root`` that holds images is a class, named by its path from there. Which classes are trained,
    validated and tested on is read from ``lists`` where given, else from folders train, val and test where ``root`` has
    these three (classes are then named by their path from these), else drawn at random. Hidden folders are left out;
    links are followed, also those that lead out of ``root``: what they lead to is read as images, or refused. Images
    are resized to ``size`` by Lanczos' filter whatever their proportions (EXIF data play no part), decoded once, and
    kept in ``$LEARNEDOPT_CACHE``, by default the user's cache folder: (num_images, size, size, channels) bytes.

    Args:
        root: the folder.
        size: the side of the images that the network sees, in pixels.
        channels: 3 reads colour images, and grey ones as colours; 1 reads grey ones.
        lists: a folder with train.txt, val.txt and test.txt, which name one class a line.
        fractions: of the classes that are trained, validated and tested on, where they are drawn.
        split_seed: of that draw.

    Raises:
        FileNotFoundError: from ``sample``: the folder or a list is not there.
        ValueError: an option is out of its range; from ``sample``: there are no images, one cannot be read, a list
            names a class that is not there, a class is in two parts, or two of train, val and test are there but not
            these three alone.

    Example:
        >>> family = ImageFolder(root="~/data/birds", size=84, model="conv-pool", width=32)
    """

    root: str = field(kw_only=True)
    size: int = 84
    channels: int = 3
    lists: str | None = None
    fractions: tuple[float, ...] = (0.64, 0.16, 0.2)
    split_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.require_count("size", self.size)
        if self.channels not in image_array.MODES:
            raise ValueError(f"channels={self.channels!r} is neither 1 (grey) nor 3 (colours)")
        if not isinstance(cast("object", self.fractions), tuple):
            raise ValueError(f"fractions={self.fractions!r} is not a tuple; pass one such as (0.64, 0.16, 0.2)")
        for i, fraction in enumerate(self.fractions):
            arguments.require_number(f"fractions[{i}]", fraction, least=0)
        if len(self.fractions) != len(FILES) or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions={self.fractions!r} are not three numbers for train, valid and test of sum 1")
        if cast("int | None", self.split_seed) is None:
            raise ValueError("split_seed=None: the split must be the same in every process; pass an integer")
        arguments.require_seed("split_seed", self.split_seed)

    def images(self) -> ClassImages:
        """Return the images of the meta-split's classes."""
        where = (os.environ.get("LEARNEDOPT_CACHE"), self.root, self.lists, self.fractions, self.split_seed)
        return _load(*where, self.meta_split, self.size, self.channels)

    def image_shape(self) -> tuple[int, int]:
        """Return ``size`` and ``channels``."""
        return self.size, self.channels


@functools.cache
def _load(
    cache: str | None,
    root: str,
    lists: str | None,
    fractions: tuple[float, ...],
    seed: int,
    meta_split: arguments.MetaSplit,
    size: int,
    channels: int,
) -> ClassImages:
    folder = Path(root).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"root={root!r} is not a folder; pass one that holds a folder of images for each class")
    if lists is not None:
        parts = _listed(find_classes(folder), Path(lists).expanduser())
    elif _has_parts(folder):
        parts = {part: find_classes(folder / name) for part, name in FILES.items()}
    else:
        parts = _drawn(find_classes(folder), fractions, seed)
    require_apart(parts, str(folder) if lists is None else lists)
    linked = {part: {str(paths[0].parent.resolve()) for paths in classes.values()} for part, classes in parts.items()}
    require_apart(linked, str(folder), "folder")
    return read(parts[meta_split], size, channels, f"{folder} ({meta_split})")


def find_classes(folder: Path) -> Classes:
    """Return the classes below a folder and their images, both sorted.

    Raises:
        ValueError: there are no images.
    """
    classes: Classes = {}
    for path in _folders_below(folder):
        images = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if images:
            classes[path.relative_to(folder).as_posix()] = images
    if not classes:
        endings = ", ".join(sorted(SUFFIXES))
        raise ValueError(f"{folder} has no folders with images ({endings}) in them; put each class into one of its own")
    return classes


def _folders_below(folder: Path) -> list[Path]:
    """Return all folders below one, through links but not hidden ones, sorted."""
    found: list[Path] = []
    seen = {folder.resolve(): folder}
    for parent, names, _ in os.walk(folder, followlinks=True):
        kept: list[str] = []
        for path in (Path(parent) / name for name in sorted(names) if not name.startswith(".")):
            if path.resolve() in seen:
                raise ValueError(
                    f"{path} and {seen[path.resolve()]} are the same folder, by a link; a class must be there once"
                )
            seen[path.resolve()] = path
            kept.append(path.name)
            found.append(path)
        names[:] = kept
    return sorted(found)


def _has_parts(folder: Path) -> bool:
    """Say whether the folders in it are train, val and test; two of them, or others beside them, are refused."""
    names = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    parts = set(FILES.values())
    if len(parts & names) > 1 and names != parts:  # one of them may be a class of that name
        wrong = [f"lacks {name!r}" for name in sorted(parts - names)] + [
            f"has {name!r}" for name in sorted(names - parts)
        ]
        raise ValueError(
            f"{folder} holds {', '.join(sorted(parts & names))}, but also {' and '.join(wrong)}; give it the three "
            "folders train, val and test and no others, or say which classes are which with lists="
        )
    return names == parts


def require_apart(parts: Mapping[str, Iterable[str]], where: str, what: str = "class") -> None:
    """Raise ValueError where a class, or whatever the names are of, is in two parts."""
    owner: dict[str, str] = {}
    for part, names in parts.items():
        for name in names:
            if owner.setdefault(name, part) != part:
                raise ValueError(
                    f"{where}: {what} {name!r} is in both {FILES[owner[name]]!r} and {FILES[part]!r}; what is tested "
                    "on must not be trained on: remove it from one of them"
                )


def read(classes: Classes, size: int, channels: int, where: str) -> ClassImages:
    """Return the images of the classes, decoded once.

    Args:
        classes: see ``Classes``.
        size: their side, in pixels.
        channels: 1 or 3.
        where: names them in errors.

    Raises:
        ValueError: there are no classes, or an image cannot be read, or is no file of at most ``MAX_BYTES``.
    """
    if not classes:
        raise ValueError(f"{where} has no classes; put some into this part of the split")
    paths = [path for images in classes.values() for path in images]

    def fill() -> Iterator[np.ndarray]:
        for start in range(0, len(paths), _PIECE):
            some = paths[start : start + _PIECE]
            yield np.stack([image_array.decode(path.read_bytes(), str(path), size, channels) for path in some])

    # Names, sizes and dates tell whether files are the same, and are read much faster than the files.
    facts = [f"{path} {(facts := _facts(path)).st_size} {facts.st_mtime_ns}" for path in paths]
    pixels = image_array.cached(["folder, lanczos", *facts], (len(paths), size, size, channels), fill)
    counts = torch.tensor([len(images) for images in classes.values()])
    return ClassImages(pixels, counts.cumsum(0) - counts, counts)


def _facts(path: Path) -> os.stat_result:
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_BYTES:
        raise ValueError(f"{path} is no file, or one of more than {MAX_BYTES:,} bytes; an image must be there")
    return facts


def _listed(classes: Classes, folder: Path) -> dict[str, Classes]:
    parts: dict[str, Classes] = {}
    for part, name in FILES.items():
        path = folder / f"{name}.txt"
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}; lists={str(folder)!r} must hold train.txt, val.txt, test.txt")
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not in UTF-8 ({error}); save it so") from error
        names = [line.strip().rstrip("/") for line in lines if line.strip()]
        if missing := [name for name in names if name not in classes]:
            raise ValueError(
                f"{path} names the class {missing[0]!r} ({len(missing)} such), but there is no folder of that name "
                "with images; correct the list, or add the folder"
            )
        parts[part] = {name: classes[name] for name in names}
    return parts


def _drawn(classes: Classes, fractions: Sequence[float], seed: int) -> dict[str, Classes]:
    # By hashes: the same on every machine, and a class that is added moves few of the others.
    order = sorted(classes, key=lambda name: hashlib.sha256(f"seed {seed} {name}".encode()).digest())
    stops = [round(len(order) * sum(fractions[: i + 1])) for i in range(len(FILES))]
    starts = [0, *stops]
    return {
        part: {name: classes[name] for name in sorted(order[start:stop])}
        for part, start, stop in zip(FILES, starts, stops, strict=False)
    }
