"""Whether particles can be run together: torch fails at some operations under ``vmap``, or is silently wrong.

That is the case under two levels of it above all (slots and particles). So the first step of a loop's particles is
tried, on two of each of two slots, against each of them alone.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Tape
from learnedopt.core.inner import InnerLoop
from learnedopt.core.task import Batch
from learnedopt.core.tree import Params
from learnedopt.core.vetting.purity import near
from learnedopt.execution.particle_maps import ParticleMap, Particles, joined, piece_of, sizes

logger: logging.Logger = logging.getLogger("learnedopt")


def serves_together(loop: InnerLoop, particles: Particles, num_slots: int) -> bool:
    """Whether particles of so many slots can be run at once, or of one slot at a time; found out once a loop.

    Raises:
        ValueError: not even the particles of one slot can.
    """
    high = min(num_slots, 2)
    return loop.cache.remember(("particles together", high), lambda: _try(loop, particles, high))


def _try(loop: InnerLoop, particles: Particles, high: int) -> bool:
    few = piece_of(particles, (0, high), (0, 2))
    batch = loop.batch(few.tasks, few.steps[0], "train")  # any will do, for slots at other steps too
    expected = _step(loop, few, batch, (1, 1), None)
    reasons: list[tuple[str, RuntimeError | None]] = []
    for size in dict.fromkeys((high, 1)):
        try:
            found = _step(loop, few, batch, (size, 2), expected[1])
        except RuntimeError as error:
            reasons.append((str(error).partition("\n")[0], error))
            continue
        if _agree(found, expected):
            if reasons:
                logger.warning(
                    "particles are run one task after the other, slower, since together they would be wrong: %s",
                    reasons[0][0],
                )
            return size == high
        reasons.append(("a step of theirs under torch.func.vmap is not that of each of them alone", None))
    raise ValueError(
        f"the particles of {type(loop.family).__name__} with {type(loop.rule).__name__} cannot be run together: "
        f"{reasons[-1][0]}. Execution(chunk_size=1) runs them one after the other"
    ) from reasons[-1][1]


_Step = tuple[tuple[Tensor, Tensor], Params, tree.Tree]


def _step(loop: InnerLoop, few: Particles, batch: Batch, piece: tuple[int, int], grads: Params | None) -> _Step:
    """Return losses, gradients and what an update makes of ``grads``, by default of these, in pieces of so many."""
    (num_slots, num_particles), (high, wide) = sizes(few.theta), piece
    rows = []
    for i in range(0, num_slots, high):
        row = []
        for j in range(0, num_particles, wide):
            here = piece_of(few, (i, high), (j, wide))
            own = None if grads is None else {k: g[i : i + high, j : j + wide] for k, g in grads.items()}
            row.append(_of_piece(loop, here, tree.narrow(batch, i, min(i + high, num_slots)), own))
        rows.append(joined(row, 1))
    return joined(rows, 0)


def _of_piece(loop: InnerLoop, piece: Particles, batch: Batch, grads: Params | None) -> _Step:
    mapped = ParticleMap(*sizes(piece.theta))
    theta, params, state = (mapped.unbatch(x) for x in (piece.theta, piece.params, piece.state))
    loop.rule_theta(piece.theta)  # what it finds out once, it cannot find out under vmap
    with torch.no_grad():
        at = loop.gradient(mapped, theta, params, mapped.share(batch), Tape.NONE)
        own = at.grads if grads is None else mapped.unbatch(grads)
        moved = loop.move(mapped, theta, own, state, tree.detach(at.params), at.loss)
        return mapped.rebatch((at.loss, at.outer)), mapped.rebatch(at.grads), mapped.rebatch(moved)


def _agree(found: _Step, expected: _Step) -> bool:
    """Whether two steps are equal but for rounding; gradients are measured against the length of all of them."""
    length = torch.stack([g.double().norm() for g in expected[1].values()]).norm()
    gaps = [(found[1][k] - g).double().norm() for k, g in expected[1].items()]
    eps = max(map(_eps, expected[1].values()))
    if bool(length.isfinite()) and not torch.stack(gaps).norm() <= 4 * eps**0.5 * length:
        return False
    pairs = [pair for i in (0, 2) for pair in zip(tree.leaves(found[i]), tree.leaves(expected[i]), strict=True)]
    return all(near(x, y, _eps(y) if y.is_floating_point() else None) for x, y in pairs)


def _eps(x: Tensor) -> float:
    # On a GPU products of float32 may be rounded to TF32's ten bits, as those of convolutions are by default.
    return 2.0**-10 if x.is_cuda and x.dtype is torch.float32 else torch.finfo(x.dtype).eps
