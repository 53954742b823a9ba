"""Omniglot's characters as one data set of images to classify, with drawings that are held out."""

from __future__ import annotations

import functools
import os

import torch

from learnedopt.tasks import omniglot
from learnedopt.tasks.data.arguments import MetaSplit
from learnedopt.tasks.data.images import NUM_PIXELS, Images

NUM_TRAIN = 15
"""Drawings of each character to train on; the other 5 are held out. Each of the 20 is by another hand."""
ALPHABETS: dict[MetaSplit, tuple[str, ...]] = {
    "train": ("Alphabet_of_the_Magi", "Anglo-Saxon_Futhorc", "Arcadian", "Balinese"),
    "valid": ("Burmese_(Myanmar)", "Cyrillic", "Early_Aramaic"),
    "test": ("Angelic", "Atemayar_Qelisayer", "Atlantean", "Aurek-Besh"),
}
"""Whole alphabets: "train" and "valid" from Omniglot's background set, "test" the first four of its evaluation set."""
NUM_CLASSES: dict[MetaSplit, int] = {"train": 99, "valid": 89, "test": 98}


def load(meta_split: MetaSplit, held_out: bool) -> Images:
    """Return the upright drawings of a split's characters: (15 or 5 of each, sorted by character), ink 255, paper 0.

    The label of a character is its place among the split's, sorted by alphabet and number. Where the files are looked
    for is said at ``learnedopt.tasks.Omniglot``.

    Raises:
        FileNotFoundError: the data are not there and cannot be downloaded.
        ValueError: a file is not the one that was published.
    """
    return _load(os.environ.get("LEARNEDOPT_DATA") or None, os.environ.get("LEARNEDOPT_CACHE"), meta_split, held_out)


@functools.cache
def _load(root: str | None, cache: str | None, meta_split: MetaSplit, held_out: bool) -> Images:
    names, pixels = omniglot.read(root, cache)
    chosen = [i for i, name in enumerate(names) if name.partition("/")[0] in ALPHABETS[meta_split]]
    turned = torch.unflatten(pixels, 0, (len(names), omniglot.NUM_ROTATIONS, omniglot.NUM_DRAWINGS))
    part = slice(NUM_TRAIN, None) if held_out else slice(NUM_TRAIN)
    drawings = turned[chosen, 0, part].reshape(len(chosen), -1, NUM_PIXELS)
    labels = torch.arange(len(chosen)).repeat_interleave(drawings.shape[1])
    return Images(drawings.flatten(0, 1), labels)
