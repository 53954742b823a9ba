"""Task families: one file each, and the registry that makes them by name.

Families are imported when first used. Data sets are read, or downloaded, when the first batch is drawn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from learnedopt.tasks.registry import build, describe, make, names, register

if TYPE_CHECKING:
    from learnedopt.tasks.clusters import Clusters
    from learnedopt.tasks.convex import RegularizedLogistic, SpectralQuadratic
    from learnedopt.tasks.data.few_shot import FewShotImages, ModuleOnImages
    from learnedopt.tasks.experts import Experts
    from learnedopt.tasks.image_autoencoder import ImageAutoencoder
    from learnedopt.tasks.image_conv import ImageConv
    from learnedopt.tasks.image_folder import ImageFolder
    from learnedopt.tasks.image_mlp import ImageMLP
    from learnedopt.tasks.logistic import LogisticRegression
    from learnedopt.tasks.mini_imagenet import MiniImageNet
    from learnedopt.tasks.module_family import ModuleFamily
    from learnedopt.tasks.noisy_images import NoisyImages
    from learnedopt.tasks.omniglot import Omniglot
    from learnedopt.tasks.quadratic import Quadratic
    from learnedopt.tasks.regression import LinearRegression
    from learnedopt.tasks.sine import Sine
    from learnedopt.tasks.superclasses import Superclasses

_LAZY = {
    "Clusters": "clusters",
    "Experts": "experts",
    "FewShotImages": "data.few_shot",
    "ImageAutoencoder": "image_autoencoder",
    "ImageConv": "image_conv",
    "ImageFolder": "image_folder",
    "ImageMLP": "image_mlp",
    "LinearRegression": "regression",
    "LogisticRegression": "logistic",
    "MiniImageNet": "mini_imagenet",
    "ModuleFamily": "module_family",
    "ModuleOnImages": "data.few_shot",
    "NoisyImages": "noisy_images",
    "Omniglot": "omniglot",
    "Quadratic": "quadratic",
    "RegularizedLogistic": "convex",
    "SpectralQuadratic": "convex",
    "Sine": "sine",
    "Superclasses": "superclasses",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'learnedopt.tasks' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"learnedopt.tasks.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


__all__ = [
    "Clusters",
    "Experts",
    "FewShotImages",
    "ImageAutoencoder",
    "ImageConv",
    "ImageFolder",
    "ImageMLP",
    "LinearRegression",
    "LogisticRegression",
    "MiniImageNet",
    "ModuleFamily",
    "ModuleOnImages",
    "NoisyImages",
    "Omniglot",
    "Quadratic",
    "RegularizedLogistic",
    "Sine",
    "SpectralQuadratic",
    "Superclasses",
    "build",
    "describe",
    "make",
    "names",
    "register",
]
