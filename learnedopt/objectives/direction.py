"""Whether a rule's updates keep their length whatever the gradients' scale, as those along a normalised direction."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, narrow
from learnedopt.core.estimator import as_leaves
from learnedopt.core.execution import TaskMap
from learnedopt.core.inner import InnerLoop
from learnedopt.core.tree import Params, Theta

SCALES = (1e-3, 1.0, 1e3)  # of gradients: a clipped or bounded update shrinks with the small ones
NUM_UPDATES = 4  # by then most rules' memories are those of gradients of that scale
TOLERANCE = 0.1  # that far apart may lengths be which count as the same: an eps is in the way


def is_normalised(loop: InnerLoop, theta: Theta, begun: Carry) -> bool:
    """Whether theta enters updates, of all tensors or of one, that turn with the gradients and keep their length.

    The rule is run from a fresh state at fixed parameters of one task, on random gradients, on a thousand times larger
    and smaller ones, and on their opposite: an update that does not turn around with them, as that of an LSTM before it
    is trained, goes along no direction of theirs. Found out once a loop.
    """
    return loop.cache.remember("normalised direction", lambda: _keeps_its_length(loop, theta, begun))


def _keeps_its_length(loop: InnerLoop, theta: Theta, begun: Carry) -> bool:
    leaves = as_leaves(theta)
    with torch.enable_grad():
        moves = [_move(loop, leaves, begun, scale) for scale in (*SCALES, -SCALES[1])]
    # All together, and each tensor for itself: a rule may treat one of them so, and the others otherwise.
    whole = [torch.cat([x.reshape(-1) for x in move.values()]) for move in moves]
    return _is_kept(whole) or any(_is_kept([move[k] for move in moves]) for k in moves[0])


def _is_kept(moves: list[Tensor]) -> bool:
    small, medium, large, opposite = moves
    if not medium.requires_grad:
        return False  # with fixed updates, a learned start's, nothing grows
    lengths = [float(tree.length(move.detach())) for move in (small, medium, large)]
    turned = float(tree.length((medium + opposite).detach())) <= TOLERANCE * lengths[1]
    same = all(map(math.isfinite, lengths)) and max(lengths) <= (1 + TOLERANCE) * min(lengths)
    return min(lengths) > 0 and same and turned


def _move(loop: InnerLoop, theta: Theta, begun: Carry, scale: float) -> Params:
    """Return the last of a few updates on gradients of that scale, by the parameters' names."""
    params, state = loop.init_task(theta, tree.squeeze(narrow(begun, 0, 1).params))
    params = tree.detach(params)
    generator = torch.Generator().manual_seed(0)
    grads = {k: scale * torch.randn(p.shape, generator=generator).to(p) for k, p in params.items()}
    loss, moved = next(iter(params.values())).new_ones(()), params
    for _ in range(NUM_UPDATES):
        moved, state = loop.move(TaskMap(1), theta, grads, state, params, loss)
    return {k: moved[k] - p for k, p in params.items()}
