"""Where a task that is not finite shows it first: the inner step, and the tensor by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Tape
from learnedopt.core.containers import is_dict
from learnedopt.core.estimator import Estimate, GradientEstimator
from learnedopt.core.execution import TaskMap
from learnedopt.core.inner import InnerLoop
from learnedopt.core.tree import Theta
from learnedopt.training import carries


class Fault(NamedTuple):
    """The first tensor that is not finite, at which inner step (None: not of a step), of a task of which seed."""

    tensor: str
    step: int | None = None
    seed: int | None = None

    def __str__(self) -> str:
        """Say so."""
        at = "" if self.step is None else f" at inner step {self.step}"
        return f"{self.tensor}{at}" + ("" if self.seed is None else f" (task seed {self.seed})")


def first_fault(
    estimator: GradientEstimator, loop: InnerLoop, theta: Theta, carry: Any, estimate: Estimate | None
) -> Fault:
    """Return where a task shows first that it is not finite: its inner steps are taken again, without a tape.

    At theta itself, that is: what fails under a perturbed theta alone is found in what its estimate left behind, if
    at all.

    Args:
        estimator: whose carry it is.
        loop: the loop.
        theta: the loop's.
        carry: the task's, before the estimate.
        estimate: of it alone, where there is one.
    """
    theta, seed = tree.detach(theta), None
    for own, start, num_steps in estimator.standing(loop, carry):
        curve = None if estimate is None else estimate.info.get("losses")
        seed = _seed(start.tasks) if seed is None else seed
        count = num_steps if num_steps is not None else 0 if curve is None else len(curve)
        for step, name, value in _along(own, theta, start, count):
            for path, leaf in carries.leaves(value, name):
                if not _finite(leaf):
                    return Fault(path, step, seed)
    if estimate is not None:
        left = {"loss": estimate.loss, "gradient": estimate.grads, "carry": estimate.carry}
        for name, value in left.items():
            for path, leaf in carries.leaves(value, name):
                if not _finite(leaf):
                    return Fault(f"the meta-{path}" if name in ("loss", "gradient") else path, None, seed)
    return Fault("the meta-loss or meta-gradient, or a perturbed theta's loss", None, seed)


def _along(loop: InnerLoop, theta: Theta, carry: Carry, num_steps: int) -> Iterator[tuple[int, str, Any]]:
    """Yield what one task's inner steps see and make, in order."""
    with torch.no_grad():
        begun = loop.begin(theta, carry)
    one = TaskMap(1)
    params, state = one.unbatch(begun.params), one.unbatch(begun.state)
    yield begun.step, "params", params
    yield begun.step, "state", state
    for step in range(begun.step, begun.step + num_steps):
        batch = one.unbatch(loop.batch(begun.tasks, step, "train"))
        yield step, "batch", batch
        with torch.no_grad():
            found = loop.gradient(one, theta, tree.detach(params), batch, Tape.NONE)
        yield step, "loss", found.loss
        yield step, "grads", found.grads
        with torch.no_grad():
            params, state = loop.move(one, theta, found.grads, state, tree.detach(found.params), found.loss)
        yield step, "state", state
        yield step, "params", params
    end = begun.step + num_steps
    yield end, "valid_batch", one.unbatch(loop.batch(begun.tasks, end, "valid"))


def _finite(leaf: Any) -> bool:
    return not isinstance(leaf, Tensor) or not leaf.is_floating_point() or bool(leaf.isfinite().all())


def _seed(tasks: Any) -> int | None:
    """Return the seed of the one task, where its family says one."""
    seed = tasks.get("seed") if is_dict(tasks) else None
    if not isinstance(seed, Tensor) or seed.numel() != 1 or seed.is_floating_point():
        return None
    return int(seed)
