"""Where MNIST and Fashion-MNIST come from: found on disk, else downloaded, and checked either way."""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from learnedopt.tasks.data import downloads
from learnedopt.tasks.data.arguments import MetaSplit, require_choice

Dataset: TypeAlias = Literal["mnist", "fashion-mnist"]
SIDE = 28
NUM_PIXELS = SIDE**2
NUM_CLASSES = 10
NUM_TRAIN = 50_000
"""Images 1 to 50,000 of the 60,000 are meta-trained on, the other 10,000 are validated on."""

MOMENTS: dict[Dataset, tuple[float, float]] = {"mnist": (0.1307, 0.3081), "fashion-mnist": (0.2860, 0.3530)}
"""Mean and standard deviation of all pixels, scaled to [0, 1], of the 60,000 training images."""


class _Source(NamedTuple):
    """A data set: its folder below the root, where to download from, and the SHA-256 of each file."""

    folder: str
    mirrors: tuple[str, ...]
    sha256: dict[str, str]


_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
_SOURCES: dict[Dataset, _Source] = {
    "mnist": _Source(
        "MNIST/raw",
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion-mnist": _Source(
        "FashionMNIST/raw",
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
}


_MAX_BYTES = 1 << 25
"""Of a packed file; the largest published one is of 26 million bytes. A larger one is not read at all."""


class Images(NamedTuple):
    """``pixels`` (num_images, 784) uint8, row by row from 0 (paper) to 255 (ink); ``labels`` (num_images,) int64."""

    pixels: Tensor
    labels: Tensor


def load(dataset: Dataset, meta_split: MetaSplit) -> Images:
    """Return the images of a split: "train" is images 1 to 50,000, "valid" the 10,000 after them, "test" the test set.

    The files are looked for in ``$LEARNEDOPT_DATA/MNIST/raw`` (or ``FashionMNIST/raw``), then in
    ``$LEARNEDOPT_CACHE``, by default the user's cache folder, and else downloaded into it. They are read and checked
    once in a process and kept in memory.

    Raises:
        FileNotFoundError: a file is not there, and no mirror sent it.
        ValueError: a file is not the one that was published; or there is no such data set or split.
    """
    return _split(os.environ.get("LEARNEDOPT_DATA") or None, dataset, meta_split)


@functools.cache
def _split(root: str | None, dataset: Dataset, meta_split: MetaSplit) -> Images:
    require_choice("dataset", dataset, Dataset)
    require_choice("meta_split", meta_split, MetaSplit)
    if meta_split == "test":
        return _read(root, dataset, "test")
    pixels, labels = _read(root, dataset, "train")
    part = slice(NUM_TRAIN) if meta_split == "train" else slice(NUM_TRAIN, None)
    return Images(pixels[part], labels[part])


@functools.cache
def _read(root: str | None, dataset: Dataset, part: Literal["train", "test"]) -> Images:
    # The format is idx: a header of 4 bytes and of 4 for each dimension, then the values. That the header is the
    # right one is known from the checksum.
    image_file, label_file = _FILES[part]
    pixels = torch.frombuffer(bytearray(_content(root, dataset, image_file)), dtype=torch.uint8, offset=16)
    labels = torch.frombuffer(bytearray(_content(root, dataset, label_file)), dtype=torch.uint8, offset=8)
    return Images(pixels.reshape(-1, NUM_PIXELS), labels.long())


def _content(root: str | None, dataset: Dataset, name: str) -> bytes:
    """Return the unpacked content of one file, found or downloaded, once its checksum is right."""
    source = _SOURCES[dataset]
    path = downloads.fetch(root, source.folder, name, source.mirrors, f"sha256:{source.sha256[name]}")
    packed = path.read_bytes() if path.stat().st_size <= _MAX_BYTES else b""
    found = hashlib.sha256(packed).hexdigest()
    if found != source.sha256[name]:
        raise ValueError(
            f"{path} is corrupt, incomplete or another file than the {dataset} that was published: its SHA-256 is "
            f"{found}, expected {source.sha256[name]}; delete it, or put the original file in its place"
        )
    return gzip.decompress(packed)
