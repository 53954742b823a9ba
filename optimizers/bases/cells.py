"""Recurrent cells as functions: torch's own ``nn.GRUCell`` and ``nn.LSTMCell`` have no rule for ``torch.func.vmap``."""

from __future__ import annotations

import torch
from torch import Tensor


def gru(of_input: Tensor, of_hidden: Tensor, bias: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """Return the next state of a gated recurrent unit (Cho et al. 2014) on rows: x (rows, inputs), h (rows, units).

    Gates are in the order reset, update, candidate, as in ``torch.nn.GRUCell`` with ``bias_hh`` 0.
    """
    size = h.shape[1]
    driven, recurrent = x @ of_input.T + bias, h @ of_hidden.T
    reset, keep = (driven[:, : 2 * size] + recurrent[:, : 2 * size]).sigmoid().chunk(2, dim=1)
    candidate = (driven[:, 2 * size :] + reset * recurrent[:, 2 * size :]).tanh()
    return keep * h + (1 - keep) * candidate


def lstm(weight: Tensor, bias: Tensor, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next ``h`` and ``c`` of an LSTM cell (Hochreiter and Schmidhuber 1997, with forget gate).

    All are (features, num_coordinates), so that each gate is a contiguous block of rows: input, forget, output,
    candidate, of ``weight`` (4 units, inputs + units) and ``bias`` (4 units,).
    """
    gates = torch.addmm(bias[:, None], weight, torch.cat([x, h]))
    i, f, o = gates[: 3 * h.shape[0]].sigmoid().chunk(3)
    c = f * c + i * gates[3 * h.shape[0] :].tanh()
    return o * c.tanh(), c
