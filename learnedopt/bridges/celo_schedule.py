"""Celo's learned schedule: a small LSTM that reads the losses of a run and how far it is, and answers a rate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from learnedopt.core.tree import Theta

NUM_SCALES = 10
"""Of running means of the loss."""
TIMES = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
"""Of a run, around which its features of time change."""
NUM_FEATURES = NUM_SCALES - 1 + len(TIMES)


class ScheduleMemory(NamedTuple):
    """What the schedule keeps of a run."""

    step: Tensor
    """Updates taken, a scalar."""
    decays: Tensor
    """How much each running mean keeps in a step, (10,): half-lives, up to a factor ln 2, from 10 steps to all."""
    means: Tensor
    """Running means of the loss, not corrected for their start at 0, (10,)."""
    least: Tensor
    """The least that each was, corrected, (10,)."""
    hidden: Tensor
    """Of the LSTM, (units,)."""
    cell: Tensor
    """Of the LSTM, (units,)."""


def start(theta: Theta, horizon: Tensor, dtype: torch.dtype) -> ScheduleMemory:
    """Return the memory of a run of ``horizon`` steps, a scalar."""
    spread = torch.linspace(0, 1, NUM_SCALES, dtype=dtype, device=horizon.device)
    halves = 10 ** (1 + (horizon.to(dtype).log10() - 1) * spread)
    zeros = torch.zeros_like(halves)
    hidden, cell = theta["start/hidden"].to(dtype), theta["start/cell"].to(dtype)
    return ScheduleMemory(
        torch.zeros((), dtype=dtype, device=horizon.device), (-1 / halves).exp(), zeros, zeros + 1e12 - 1, hidden, cell
    )


def rate(theta: Theta, memory: ScheduleMemory, loss: Tensor, progress: Tensor) -> tuple[Tensor, ScheduleMemory]:
    """Return the factor on all steps, exp(w h + b) / 10, a scalar, and the new memory.

    Args:
        theta: in the dtype to compute in.
        memory: as the last step left it.
        loss: at the present parameters, a scalar.
        progress: updates taken over the horizon, a scalar.
    """
    memory = _with_loss(memory, loss.to(memory.means.dtype))
    times = torch.tensor(TIMES, dtype=memory.means.dtype, device=loss.device)
    features = torch.cat([((progress.to(times.dtype) - times) * 10).tanh(), _loss_features(memory)])
    mixed = torch.relu(features @ theta["mix/weight"] + theta["mix/bias"])
    inputs = features @ theta["input/weight"] + theta["input/bias"] + mixed
    gates = torch.cat([inputs, memory.hidden]) @ theta["lstm/weight"] + theta["lstm/bias"]
    entry, new, forget, out = gates.chunk(4)
    cell = (forget + 1).sigmoid() * memory.cell + entry.sigmoid() * new.tanh()
    hidden = out.sigmoid() * cell.tanh()
    found = (hidden @ theta["rate/weight"] + theta["rate/bias"]).exp() * 0.1
    return found, memory._replace(hidden=hidden, cell=cell)


def _with_loss(memory: ScheduleMemory, loss: Tensor) -> ScheduleMemory:
    """Take a loss, at most twice the largest running mean, into the means."""
    step, decays = memory.step + 1, memory.decays
    weight = 1 - decays**step
    largest = torch.where(memory.step == 0, loss, (memory.means / weight).max())
    means = memory.means * decays + torch.minimum(2 * largest.abs(), loss) * (1 - decays)
    return memory._replace(step=step, means=means, least=torch.minimum(memory.least, means / weight))


def _loss_features(memory: ScheduleMemory) -> Tensor:
    """Return where each mean is between its least and the next slower mean, less 1, in [-1, 1]; 0 in the first."""
    means = memory.means / (1 - memory.decays**memory.step)
    gap = (means[1:] - memory.least[:-1]).clamp(min=1e-8)
    found = ((means[:-1] - memory.least[:-1]) / gap - 1).clamp(-1, 1)
    return torch.where(memory.step <= 2, torch.zeros_like(found), found)
