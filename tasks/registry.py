"""The registry of task families: name -> family, and family <-> configuration."""

from __future__ import annotations

from typing import Final

from learnedopt.core.registry import Registry
from learnedopt.core.task import TaskFamily

_TABLE = {
    "quadratic": "quadratic:Quadratic",
    "logistic": "logistic:LogisticRegression",
    "linear-regression": "regression:LinearRegression",
    "image-mlp": "image_mlp:ImageMLP",
    "image-conv": "image_conv:ImageConv",
    "image-autoencoder": "image_autoencoder:ImageAutoencoder",
    "noisy-images": "noisy_images:NoisyImages",
    "sine": "sine:Sine",
    "omniglot": "omniglot:Omniglot",
    "image-folder": "image_folder:ImageFolder",
    "mini-imagenet": "mini_imagenet:MiniImageNet",
    "spectral-quadratic": "convex:SpectralQuadratic",
    "clusters": "clusters:Clusters",
    "experts": "experts:Experts",
    "superclasses": "superclasses:Superclasses",
    "text-transformer": "text_transformer:TextTransformer",
    "text-rnn": "text_rnn:TextRNN",
    "lasso": "lasso:Lasso",
    "rastrigin": "rastrigin:Rastrigin",
    "rescaled": "rescaled:Rescaled",
    "mixture": "mixture:Mixture",
}
FAMILIES = Registry(TaskFamily, "task family", "task families", "learnedopt.tasks", _TABLE)
names: Final = FAMILIES.names
register: Final = FAMILIES.register
make: Final = FAMILIES.make
describe: Final = FAMILIES.describe
build: Final = FAMILIES.build
