"""Few-shot classification of mini-ImageNet."""

from __future__ import annotations

import csv
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

from learnedopt.core.files import require_name
from learnedopt.tasks.data import arguments
from learnedopt.tasks.data.few_shot import FewShotImages
from learnedopt.tasks.data.image_array import ClassImages
from learnedopt.tasks.image_folder import FILES, Classes, read, require_apart

SIZE = 84
_FOLDER, _LISTS = "mini-imagenet", "mini-imagenet-splits/ravi"


@final
@dataclass(frozen=True)
class MiniImageNet(FewShotImages):
    """N-way K-shot classification of mini-ImageNet in the split 64/16/20 of Ravi and Larochelle (2017).

    600 images of each of 100 classes, resized to 84x84 by Lanczos' filter, in colours. The images are not free to be
    downloaded: put them into ``<root>/images``, as ``n0153282900000005.jpg`` and so on. The split is read from
    ``train.csv``, ``val.csv`` and ``test.csv`` (lines ``filename,label``) in ``root`` or, where it has none, in
    ``$LEARNEDOPT_DATA/mini-imagenet-splits/ravi``. Decoded once, the training images take 813 MB in
    ``$LEARNEDOPT_CACHE``, by default the user's cache folder. The rest is said in ``FewShotImages``.

    Args:
        root: the folder that holds ``images``; by default ``$LEARNEDOPT_DATA/mini-imagenet``.

    Raises:
        FileNotFoundError: from ``sample``: the images or the lists are not there.
        ValueError: an option is out of its range; from ``sample``: a list is none, classes are in two of them, or an
            image cannot be read.

    Example:
        >>> family = MiniImageNet(model="conv-pool", width=32, root="~/data/mini-imagenet")
    """

    root: str | None = None

    def images(self) -> ClassImages:
        """Return the images of the meta-split's classes."""
        data = os.environ.get("LEARNEDOPT_DATA") or None
        return _load(data, os.environ.get("LEARNEDOPT_CACHE"), self.root, self.meta_split)

    def image_shape(self) -> tuple[int, int]:
        """Return (84, 3)."""
        return SIZE, 3


@functools.cache
def _load(data: str | None, cache: str | None, root: str | None, meta_split: arguments.MetaSplit) -> ClassImages:
    if root is None and data is None:
        raise FileNotFoundError("mini-ImageNet: pass root=, the folder that holds images/, or set LEARNEDOPT_DATA")
    base = Path(data).expanduser() if data else None
    folder = Path(root).expanduser().resolve() if root is not None else Path(str(base)) / _FOLDER
    images = folder / "images"
    if not images.is_dir():
        raise FileNotFoundError(
            f"there is no folder {images}; it must hold mini-ImageNet's images, named as in train.csv, such as "
            "n0153282900000005.jpg: pass root=, the folder that holds images/"
        )
    parts = {part: _read_list(_find_list(folder, base, f"{name}.csv"), images) for part, name in FILES.items()}
    require_apart(parts, str(folder))
    files = {part: [path.name for paths in classes.values() for path in paths] for part, classes in parts.items()}
    require_apart(files, str(folder), "image")
    _require_files(parts[meta_split], images)
    return read(parts[meta_split], SIZE, 3, f"{folder} ({meta_split})")


def _find_list(folder: Path, base: Path | None, name: str) -> Path:
    places = [folder / name, *([base / _LISTS / name] if base else [])]
    for path in places:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"there is no {' and no '.join(map(str, places))}; put the lists of Ravi and Larochelle's split into {folder}"
    )


def _read_list(path: Path, images: Path) -> Classes:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is no list of images, or is damaged ({error}): put the published one there"
        ) from error
    if header != ["filename", "label"] or not all(len(row) == 2 for row in rows):
        raise ValueError(f"{path} is no list of images: its lines must be 'filename,label', and so must its header")
    if len({name for name, _ in rows}) < len(rows):
        raise ValueError(f"{path} names an image twice; a task could learn from the image that it is tested on")
    for name, _ in rows:
        require_name(name, f"{path}: the image", of="file")
    classes: Classes = {}
    for name, label in rows:
        classes.setdefault(label, []).append(images / name)
    return classes


def _require_files(classes: Classes, images: Path) -> None:
    present = {path.name for path in images.iterdir()}
    for label, paths in classes.items():
        if missing := [path.name for path in paths if path.name not in present]:
            raise FileNotFoundError(
                f"the split names the class {label!r}, but {images} lacks {len(missing)} of its {len(paths)} images, "
                f"such as {missing[0]}; complete the folder, or correct the list"
            )
