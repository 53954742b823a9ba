"""Few-shot classification of hand-written characters."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from learnedopt.tasks.data import arguments, downloads, image_array
from learnedopt.tasks.data.few_shot import FewShotImages
from learnedopt.tasks.data.image_array import ClassImages

Characters: TypeAlias = Literal["vinyals", "seeded"]
SIDE = 28
NUM_DRAWINGS = 20
NUM_ROTATIONS = 4
NUM_CHARACTERS = 1623
_FOLDER = "omniglot-py"
_MIRROR = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
_MAX_BYTES = 1 << 24
"""Of a zip file; the published ones are of 9.5 and 6.5 million bytes."""


class _Zip(NamedTuple):
    """A file: the MD5 of the published one, and the SHA-256 of one with the same images, packed anew."""

    md5: str
    repacked_sha256: str


_ZIPS = {
    "images_background.zip": _Zip(
        "68d2efa1b9178cc56df9314c21c6e718", "8720b329b69c2c60badef73b7b2873c6d73f466bfdb631c642cdb109e90b0fbd"
    ),
    "images_evaluation.zip": _Zip(
        "6b91aef0f799c5bb55b94e3f2daec811", "a84d4d2379d450bdb09fb32460da9e4d6ef8000ef2d08cf228bd3a7242338bd6"
    ),
}
# The lists that Snell et al. (2017) published for the split of Vinyals et al. (2016) are whole alphabets, but for one.
_VINYALS_VALID = frozenset({"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"})
_VINYALS_TEST = frozenset({
    "Kannada", "Keble", "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)", "Oriya", "Sylheti",
    "Syriac_(Serto)", "Tengwar", "Tibetan", "ULOG", *(f"Gurmukhi/character{i}" for i in range(42, 46)),
})  # fmt: skip
_SEEDED_SIZES = {"train": 1100, "valid": 100, "test": 423}
SPLIT_SHA256: dict[Characters, str] = {
    "vinyals": "7c9cfb0ac5c320505c000290bcd473bc6821f24cffc006f57615303ff2896a8a",
    "seeded": "7dc14a15a0da1639deb476f9337009f9a91e76ed3e7e3306424105db31a4cdd3",
}
"""Of the lines "<meta_split> <Alphabet>/characterNN", "train" first, then "valid" and "test", each sorted."""


@final
@dataclass(frozen=True)
class Omniglot(FewShotImages):
    """N-way K-shot classification of Omniglot's characters (Lake et al. 2015); see ``FewShotImages`` for the rest.

    1,623 characters of 50 alphabets, 20 drawings each. Images are made 28x28 by Lanczos' filter and inverted: ink is 1,
    paper 0. Each character's rotations by 0, 90, 180 and 270 degrees are four classes, always in the same meta-split.
    Decoded once, all take 102 MB in ``$LEARNEDOPT_CACHE``, by default the user's cache folder.

    Args:
        split: which characters are trained, validated and tested on: "vinyals", 1028/172/423 (Vinyals et al. 2016, the
            lists of Snell et al. 2017), or "seeded", 1100/100/423 drawn at random from all alphabets, once and for all.

    Raises:
        ValueError: an option is out of its range; from ``sample``: a file is not the published one.
        FileNotFoundError: from ``sample``: the data are neither in ``$LEARNEDOPT_DATA/omniglot-py`` nor in
            ``$LEARNEDOPT_CACHE/omniglot-py``, and cannot be downloaded.

    Example:
        >>> family = Omniglot(ways=20, shots=5, meta_split="test")
        >>> tasks = family.sample(2, torch.Generator().manual_seed(0))
        >>> family.batch(tasks, 0, "train")["inputs"].shape
        torch.Size([2, 100, 1, 28, 28])
    """

    split: Characters = "vinyals"

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.require_choice("split", self.split, Characters)

    def images(self) -> ClassImages:
        """Return the images of the meta-split's classes; all meta-splits share one array."""
        return load(self.split, self.meta_split)

    def image_shape(self) -> tuple[int, int]:
        """Return (28, 1)."""
        return SIDE, 1


def load(split: Characters, meta_split: arguments.MetaSplit) -> ClassImages:
    """Return all rotations of the characters of a split: class 4c + r is character c, sorted, turned r times."""
    return _load(os.environ.get("LEARNEDOPT_DATA") or None, os.environ.get("LEARNEDOPT_CACHE"), split, meta_split)


@functools.cache
def _load(root: str | None, cache: str | None, split: Characters, meta_split: arguments.MetaSplit) -> ClassImages:
    names, pixels = read(root, cache)
    number = {name: i for i, name in enumerate(names)}
    parts = split_characters(names, split)
    characters = torch.tensor([number[name] for name in parts[meta_split]])
    classes = (characters.unsqueeze(1) * NUM_ROTATIONS + torch.arange(NUM_ROTATIONS)).flatten()
    return ClassImages(pixels, classes * NUM_DRAWINGS, torch.full_like(classes, NUM_DRAWINGS))


def split_characters(names: Sequence[str], split: Characters) -> dict[str, list[str]]:
    """Return which characters are trained, validated and tested on, sorted.

    Args:
        names: all 1,623, as "<Alphabet>/characterNN".
        split: "vinyals" or "seeded".

    Raises:
        ValueError: the result is not the split that was published: characters are missing, unknown or in two parts.
    """
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    if split == "vinyals":
        for name in sorted(names):
            alphabet = name.partition("/")[0]
            test = alphabet in _VINYALS_TEST or name in _VINYALS_TEST
            parts["test" if test else "valid" if alphabet in _VINYALS_VALID else "train"].append(name)
    else:
        shuffled = iter(sorted(names, key=lambda name: hashlib.sha256(f"seed 0 {name}".encode()).digest()))
        for part, size in _SEEDED_SIZES.items():
            parts[part] = sorted(itertools.islice(shuffled, size))
    check_split(parts, SPLIT_SHA256[split], split)
    return parts


def check_split(parts: Mapping[str, Sequence[str]], sha256: str, split: str) -> None:
    """Raise ValueError unless no character is in two parts, and the lists are those that the hash was taken of."""
    owner: dict[str, str] = {}
    for part, names in parts.items():
        for name in names:
            if owner.setdefault(name, part) != part:
                raise ValueError(f"split {split!r}: {name} is in {owner[name]!r} and in {part!r}; keep it in one")
    lines = [f"{part} {name}" for part, names in parts.items() for name in names]
    found = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if found != sha256:
        raise ValueError(
            f"split {split!r} of {len(lines)} characters has SHA-256 {found}, expected {sha256}: it would not compare "
            f"with others' results; put the original files of all {NUM_CHARACTERS} characters in place"
        )


def read(root: str | None, cache: str | None) -> tuple[list[str], Tensor]:
    """Return the names of all characters, sorted, and the pixels of all their rotations, read once in a process.

    Args:
        root: ``$LEARNEDOPT_DATA``, where the files are looked for first.
        cache: ``$LEARNEDOPT_CACHE``, a part of what is remembered.

    Returns:
        ``<Alphabet>/characterNN``, and uint8 (num_characters * 4 * 20, 28, 28, 1): character by character, turned 0 to
        3 times, drawing by drawing.
    """
    return _read(root, cache)


@functools.cache
def _read(root: str | None, cache: str | None) -> tuple[list[str], Tensor]:
    paths = [downloads.fetch(root, _FOLDER, name, [_MIRROR], f"md5:{known.md5}") for name, known in _ZIPS.items()]
    digests = [_checked(path) for path in paths]
    with contextlib.ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(path)) for path in paths]
        # Inside, a file is images_background/<Alphabet>/characterNN/XXXX_YY.png.
        files = {
            name.partition("/")[2]: functools.partial(archive.read, name)
            for archive in archives
            for name in archive.namelist()
            if name.endswith(".png")
        }
        order = sorted(files)
        names = sorted({name.rpartition("/")[0] for name in files})

        def fill() -> Iterator[np.ndarray]:
            for start in range(0, len(order), NUM_DRAWINGS):
                drawn = order[start : start + NUM_DRAWINGS]
                upright = 255 - np.stack([image_array.decode(files[name](), name, SIDE, 1) for name in drawn])
                yield np.concatenate([np.rot90(upright, turns, axes=(1, 2)) for turns in range(NUM_ROTATIONS)])

        shape = (NUM_ROTATIONS * len(files), SIDE, SIDE, 1)
        return names, image_array.cached(["omniglot, lanczos, inverted, four rotations", *digests], shape, fill)


def _checked(path: Path) -> str:
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} is larger than the published file; delete it, or put the original file in its place")
    content = path.read_bytes()
    md5, sha256 = hashlib.md5(content).hexdigest(), hashlib.sha256(content).hexdigest()
    published = _ZIPS[path.name]
    if md5 != published.md5 and sha256 != published.repacked_sha256:
        raise ValueError(
            f"{path} is corrupt, incomplete or another file than the one that was published: its MD5 is {md5}, "
            f"expected {published.md5}; delete it, or put the original file in its place"
        )
    return sha256
