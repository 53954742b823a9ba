"""Networks for small images as pure functions of their parameters, normalised by batch statistics."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core.tree import Params
from learnedopt.tasks.data import initial_params

Model: TypeAlias = Literal["conv", "conv-pool", "mlp"]
NUM_BLOCKS = 4
_EPS = 1e-5  # torch's default of batch normalisation


def layout(model: Model, width: int, channels: int, side: int, num_classes: int) -> initial_params.Layout:
    """Return the parameters of a network.

    Four blocks of a layer without bias, which the normalisation would take away, and a batch normalisation:
    ``block0.weight``, ``norm0.weight``, ``norm0.bias``, ...; then ``head.weight`` and ``head.bias``.

    Args:
        model: "conv" has 3x3 convolutions of stride 2; "conv-pool" those of stride 1, each followed by 2x2 max-pooling
            (Vinyals et al. 2016); "mlp" linear layers of 4·width, 2·width, width and width units, as Santoro et al.
            (2016) and Finn et al. (2017) have them for width 64.
        width: filters of every convolution.
        channels: of the images.
        side: of the images, in pixels.
        num_classes: logits.

    Raises:
        ValueError: the images are too small to be pooled four times.
    """
    entries: list[initial_params.Entry] = []
    fan = channels
    if model == "mlp":
        widths, fan = (4 * width, 2 * width, width, width), channels * side**2
    else:
        widths = (width,) * NUM_BLOCKS
        for _ in range(NUM_BLOCKS):
            side = (side + 1) // 2 if model == "conv" else side // 2
        if side == 0:
            raise ValueError(f"model={model!r} pools images four times, which takes 16 pixels a side; pass larger ones")
    for i, units in enumerate(widths):
        shape = (units, fan) if model == "mlp" else (units, fan, 3, 3)
        entries += [*initial_params.layer(f"block{i}", shape, bias=False), *initial_params.norm(f"norm{i}", units)]
        fan = units
    features = fan if model == "mlp" else fan * side**2
    return (*entries, *initial_params.layer("head", (num_classes, features)))


def logits(model: Model, params: Params, inputs: Tensor, support: Tensor | None = None) -> Tensor:
    """Return the logits (num_images, num_classes) of images (num_images, channels, side, side).

    Args:
        model: see ``layout``.
        params: see ``layout``.
        inputs: the images.
        support: images whose statistics normalise the inputs; None takes the inputs' own.
    """
    num_support = 0 if support is None else len(support)
    hidden = inputs if support is None else torch.cat([support, inputs])
    hidden = hidden.flatten(1) if model == "mlp" else hidden
    for i in range(NUM_BLOCKS):
        weight, scale, shift = params[f"block{i}.weight"], params[f"norm{i}.weight"], params[f"norm{i}.bias"]
        if model == "mlp":
            hidden = functional.linear(hidden, weight)
        else:
            hidden = functional.conv2d(hidden, weight, stride=2 if model == "conv" else 1, padding=1)
        hidden = _normalise(hidden, scale, shift, num_support)
        if model == "conv-pool":
            hidden = functional.max_pool2d(hidden, 2)  # before ReLU, which is equal and costs a quarter
        hidden = hidden.relu()
    return functional.linear(hidden[num_support:].flatten(1), params["head.weight"], params["head.bias"])


def _normalise(hidden: Tensor, scale: Tensor, shift: Tensor, num_support: int) -> Tensor:
    """Normalise each channel by the mean and variance of the first ``num_support`` images, of all where it is 0."""
    if not num_support:
        return functional.batch_norm(hidden, None, None, scale, shift, training=True, eps=_EPS)
    axes = (0, *range(2, hidden.ndim))
    variance, mean = torch.var_mean(hidden[:num_support], axes, correction=0, keepdim=True)
    shape = mean.shape
    return (hidden - mean) * ((variance + _EPS).rsqrt() * scale.reshape(shape)) + shift.reshape(shape)
