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
    from learnedopt.tasks.lasso import Lasso
    from learnedopt.tasks.logistic import LogisticRegression
    from learnedopt.tasks.mini_imagenet import MiniImageNet
    from learnedopt.tasks.mixture import Mixture
    from learnedopt.tasks.module_family import ModuleFamily
    from learnedopt.tasks.noisy_images import NoisyImages
    from learnedopt.tasks.omniglot import Omniglot
    from learnedopt.tasks.quadratic import Quadratic
    from learnedopt.tasks.rastrigin import Rastrigin
    from learnedopt.tasks.regression import LinearRegression
    from learnedopt.tasks.rescaled import Rescaled
    from learnedopt.tasks.sine import Sine
    from learnedopt.tasks.superclasses import Superclasses
    from learnedopt.tasks.text_rnn import TextRNN
    from learnedopt.tasks.text_transformer import TextTransformer

_LAZY = {
    "Clusters": "clusters",
    "Experts": "experts",
    "FewShotImages": "data.few_shot",
    "ImageAutoencoder": "image_autoencoder",
    "ImageConv": "image_conv",
    "ImageFolder": "image_folder",
    "ImageMLP": "image_mlp",
    "Lasso": "lasso",
    "LinearRegression": "regression",
    "LogisticRegression": "logistic",
    "MiniImageNet": "mini_imagenet",
    "Mixture": "mixture",
    "ModuleFamily": "module_family",
    "ModuleOnImages": "data.few_shot",
    "NoisyImages": "noisy_images",
    "Omniglot": "omniglot",
    "Quadratic": "quadratic",
    "RegularizedLogistic": "convex",
    "SpectralQuadratic": "convex",
    "Rastrigin": "rastrigin",
    "Rescaled": "rescaled",
    "Sine": "sine",
    "Superclasses": "superclasses",
    "TextRNN": "text_rnn",
    "TextTransformer": "text_transformer",
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
    "Lasso",
    "LinearRegression",
    "LogisticRegression",
    "MiniImageNet",
    "Mixture",
    "ModuleFamily",
    "ModuleOnImages",
    "NoisyImages",
    "Omniglot",
    "Quadratic",
    "Rastrigin",
    "RegularizedLogistic",
    "Rescaled",
    "Sine",
    "SpectralQuadratic",
    "Superclasses",
    "TextRNN",
    "TextTransformer",
    "build",
    "describe",
    "make",
    "names",
    "register",
]
