"""A recurrent network that predicts the next character."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, initial_params
from learnedopt.tasks.data.character_model import CharacterModel, embedded
from learnedopt.tasks.data.text import NUM_SYMBOLS

Cell: TypeAlias = Literal["gru", "lstm"]
_NUM_GATES = {"gru": 3, "lstm": 4}


@final
@dataclass(frozen=True)
class TextRNN(CharacterModel):
    """A GRU (Cho et al. 2014) or LSTM (Hochreiter and Schmidhuber 1997) on character text, from a memory of zeros.

    Of the data, and the options that all models of text have, see ``CharacterModel``. The cells are torch's, with gates
    in torch's order, written as matrix products: ``nn.LSTM`` has no rule for vmap and no second derivatives on the GPU.
    The products with a layer's inputs are one for all places.

    Parameters, with w = ``width`` and g = 3w for the GRU, 4w for the LSTM: ``embedding.weight`` (64, w); in each layer
    ``layer0.input.weight`` (g, w), ``layer0.input.bias`` (g,), ``layer0.hidden.weight`` (g, w), ``layer0.hidden.bias``
    (g,); ``head.weight`` (64, w), ``head.bias``. They start as torch's do, from U(±1/√w); embeddings from N(0, 1), cut
    off at two standard deviations.

    Args:
        cell: "gru" or "lstm".
        width: of the memory, and of the embedding.
        num_layers: layers one on the other.

    Example:
        >>> family = TextRNN(cell="lstm", width=64)
        >>> params = family.init_params(family.sample(1, torch.Generator().manual_seed(0)))
        >>> params["layer0.hidden.weight"].shape
        torch.Size([1, 256, 64])
    """

    cell: Cell = "gru"
    width: int = 64
    num_layers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.require_choice("cell", self.cell, Cell)
        arguments.require_count("width", self.width)
        arguments.require_count("num_layers", self.num_layers)

    def layout(self) -> initial_params.Layout:
        """Return the parameters; see the class."""
        gates = _NUM_GATES[self.cell] * self.width
        entries = [initial_params.Entry("embedding.weight", (NUM_SYMBOLS, self.width), 2.0, normal=True)]
        for i in range(self.num_layers):
            entries += initial_params.layer(f"layer{i}.input", (gates, self.width))
            entries += initial_params.layer(f"layer{i}.hidden", (gates, self.width))
        return (*entries, *initial_params.layer("head", (NUM_SYMBOLS, self.width)))

    def logits(self, params: Params, inputs: Tensor) -> Tensor:
        """Return logits (batch_size·context, 64)."""
        x = embedded(params["embedding.weight"], inputs.mT)  # places first: (context, batch_size, width)
        run = _gru if self.cell == "gru" else _lstm
        for i in range(self.num_layers):
            projected = functional.linear(x, params[f"layer{i}.input.weight"], params[f"layer{i}.input.bias"])
            x = run(projected, params[f"layer{i}.hidden.weight"], params[f"layer{i}.hidden.bias"])
        rows = x.transpose(0, 1).reshape(-1, self.width)
        return functional.linear(rows, params["head.weight"], params["head.bias"])


def _gru(projected: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return h of all places (context, batch_size, width), of inputs projected to (context, batch_size, 3·width).

    ``r, z = σ(...)``, ``n = tanh(input_n + r·(W_n h + b_n))``, ``h ← n + z·(h − n)``.
    """
    width = weight.shape[-1]
    hidden = torch.zeros_like(projected[0, :, :width])
    found: list[Tensor] = []
    for own in projected.unbind(0):
        from_hidden = functional.linear(hidden, weight, bias)
        gates = (own[:, : 2 * width] + from_hidden[:, : 2 * width]).sigmoid()
        candidate = (own[:, 2 * width :] + gates[:, :width] * from_hidden[:, 2 * width :]).tanh()
        hidden = candidate + gates[:, width:] * (hidden - candidate)
        found.append(hidden)
    return torch.stack(found)


def _lstm(projected: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return h of all places (context, batch_size, width), of inputs projected to (context, batch_size, 4·width).

    ``c ← σ(f)·c + σ(i)·tanh(g)``, ``h = σ(o)·tanh(c)``, with the gates in the order i, f, g, o.
    """
    width = weight.shape[-1]
    hidden = memory = torch.zeros_like(projected[0, :, :width])
    found: list[Tensor] = []
    for own in projected.unbind(0):
        first, forget, new, last = torch.split(own + functional.linear(hidden, weight, bias), width, dim=-1)
        memory = forget.sigmoid() * memory + first.sigmoid() * new.tanh()
        hidden = last.sigmoid() * memory.tanh()
        found.append(hidden)
    return torch.stack(found)
