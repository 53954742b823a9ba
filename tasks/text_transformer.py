"""A transformer that predicts the next character."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, initial_params
from learnedopt.tasks.data.activations import ACTIVATIONS, Activation
from learnedopt.tasks.data.character_model import CharacterModel, embedded
from learnedopt.tasks.data.text import NUM_SYMBOLS

_EPS = 1e-5  # of the layer norms, torch's default


@final
@dataclass(frozen=True)
class TextTransformer(CharacterModel):
    """A decoder with norms before its blocks (Vaswani et al. 2017, Radford et al. 2019) on character text.

    Of the data, and the options that all models of text have, see ``CharacterModel``. With symbols s and places t,
    ``x = embedding[s] + position[t]``; in each layer ``x += attention(norm1(x))``, where no place sees a later one,
    then ``x += mlp(norm2(x))``; logits are ``head norm(x)``. Written as matrix products, softmax and means: torch's own
    layer norm has wrong second derivatives in one order of differentiation, and its attention has none at all.

    Parameters, with d = ``dim``: ``embedding.weight`` (64, d), ``position.weight`` (context, d); in each layer
    ``layer0.norm1.weight`` and ``.bias`` (d,), ``layer0.attention.qkv.weight`` (3d, d) and ``.bias``,
    ``layer0.attention.out.weight`` (d, d) and ``.bias``, ``layer0.norm2.``, ``layer0.mlp.in.weight``
    (mlp_ratio·d, d) and ``.bias``, ``layer0.mlp.out.weight`` and ``.bias``; ``norm.``; ``head.weight`` (64, d).

    They start as ``nn.Linear`` does, from U(±1/√fan_in), ``attention.out`` and ``mlp.out`` divided by √(2·num_layers)
    as in Radford et al. (2019); embeddings from N(0, 0.1²), cut off at two standard deviations; norms with gains of 1
    and shifts of 0.

    Args:
        dim: width of the residual stream.
        num_layers: attention blocks, each with its MLP.
        num_heads: of each attention; a divisor of ``dim``.
        mlp_ratio: width of an MLP over ``dim``.
        activation: of the MLPs.
        bias: whether matrices have biases, all but the head's.

    Example:
        >>> family = TextTransformer(dim=48, num_layers=3, num_heads=4, meta_split="test", held_out=True)
        >>> tasks = family.sample(2, torch.Generator().manual_seed(0))
        >>> family.batch(tasks, 0, "train")["inputs"].shape
        torch.Size([2, 16, 32])
    """

    dim: int = 32
    num_layers: int = 2
    num_heads: int = 2
    mlp_ratio: int = 4
    activation: Activation = "gelu"
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("dim", "num_layers", "num_heads", "mlp_ratio"):
            arguments.require_count(option, getattr(self, option))
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide dim={self.dim}: each head has an equal share")
        arguments.require_choice("activation", self.activation, Activation)
        if not isinstance(cast("object", self.bias), bool):
            raise TypeError(f"bias={self.bias!r} is neither True nor False")

    def layout(self) -> initial_params.Layout:
        """Return the parameters; see the class."""
        dim, wide, shrunk = self.dim, self.mlp_ratio * self.dim, 1 / math.sqrt(2 * self.num_layers)
        embedding = initial_params.Entry("embedding.weight", (NUM_SYMBOLS, dim), 0.2, normal=True)
        position = initial_params.Entry("position.weight", (self.context, dim), 0.2, normal=True)
        entries = [embedding, position]
        for name in (f"layer{i}" for i in range(self.num_layers)):
            entries += initial_params.norm(f"{name}.norm1", dim)
            entries += self._linear(f"{name}.attention.qkv", (3 * dim, dim))
            entries += self._linear(f"{name}.attention.out", (dim, dim), shrunk)
            entries += initial_params.norm(f"{name}.norm2", dim)
            entries += self._linear(f"{name}.mlp.in", (wide, dim))
            entries += self._linear(f"{name}.mlp.out", (dim, wide), shrunk)
        entries += initial_params.norm("norm", dim)
        return (*entries, *initial_params.layer("head", (NUM_SYMBOLS, dim), bias=False))

    def _linear(self, name: str, shape: tuple[int, int], scale: float = 1.0) -> initial_params.Layout:
        drawn = initial_params.layer(name, shape, bias=self.bias)
        return tuple(entry._replace(bound=entry.bound * scale) for entry in drawn)

    def logits(self, params: Params, inputs: Tensor) -> Tensor:
        """Return logits (batch_size·context, 64)."""
        x = embedded(params["embedding.weight"], inputs) + params["position.weight"]
        x = x.flatten(0, 1)  # rows of all places: every product but those inside attention is one of two matrices
        for name in (f"layer{i}" for i in range(self.num_layers)):
            x = x + self._attention(params, f"{name}.attention", _normalised(params, f"{name}.norm1", x))
            wide = _affine(params, f"{name}.mlp.in", _normalised(params, f"{name}.norm2", x))
            x = x + _affine(params, f"{name}.mlp.out", ACTIVATIONS[self.activation](wide))
        return _affine(params, "head", _normalised(params, "norm", x))

    def _attention(self, params: Params, name: str, x: Tensor) -> Tensor:
        """Return what each row (batch_size·context, dim) gathers from the places before it and its own."""
        by_head = (-1, self.context, 3, self.num_heads, self.dim // self.num_heads)
        queries, keys, values = _affine(params, f"{name}.qkv", x).reshape(by_head).permute(2, 0, 3, 1, 4).unbind(0)
        later = torch.full((self.context, self.context), -math.inf, dtype=x.dtype, device=x.device).triu(1)
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(by_head[-1]) + later
        gathered = (scores.softmax(-1) @ values).transpose(1, 2).reshape(x.shape)
        return _affine(params, f"{name}.out", gathered)


def _affine(params: Params, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, params[f"{name}.weight"], params.get(f"{name}.bias"))


def _normalised(params: Params, name: str, x: Tensor) -> Tensor:
    """Return the layer norm of each row, by hand; see the class."""
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + _EPS).rsqrt()
    return centred * scale * params[f"{name}.weight"] + params[f"{name}.bias"]
