"""How much memory an estimate will take, from what estimates of a few steps are seen to take."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Tape, narrow
from learnedopt.core.estimator import GradientEstimator, check_loop, check_objective, check_paths
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import FinalLoss, MetaObjective
from learnedopt.core.tree import Theta
from learnedopt.execution import coordinatewise
from learnedopt.execution.choice import goes_by_steps

SOME = 3  # chunks; from the third on each holds the same
FEW = 3  # inner steps; with fewer, some meta-parameters of some rules would not reach the objective yet


def predict_peak(
    loop: InnerLoop, theta: Theta, estimator: GradientEstimator, carry: Carry, objective: MetaObjective | None = None
) -> int | None:
    """Predict the most bytes that tensors of one estimate take at a time, beside theta and the carry given.

    Estimates of ``FEW`` steps and of one more, on a few chunks of the tasks, are watched: their difference is one
    step's tape, of which the estimator will hold as many as it records; segments add the parameters and the state where
    each begins. Where one step is compiled, each adds where it begins and its batch, and one tape is held. Scratch
    memory inside single operations is not seen, and a compiled program takes less than predicted.

    Args:
        objective: by default the final loss.

    Returns:
        The bytes; None for an estimator that does not unroll, whose memory does not grow with its steps.

    Raises:
        ValueError: as ``estimate`` does.
    """
    recording = estimator.recording
    if recording is None:
        return None
    num_recorded, tape, whole, segment, goes_on = recording
    objective = FinalLoss() if objective is None else objective
    by_steps = goes_by_steps(loop.execution, num_recorded, segment)
    execution = replace(loop.execution, compile=False)
    horizon = loop.horizon and max(loop.horizon, FEW + 1)  # what is watched must not be longer
    loop = InnerLoop(loop.family, loop.rule, execution, loop.inner_objective, horizon)
    chunks = loop.split(carry)
    few = narrow(carry, 0, sum(tree.size(chunk.params) for chunk in chunks[:SOME]))

    def peak(num_steps: int) -> int:
        # What is done once is not to be seen.
        check_loop(loop, theta, few, second_derivatives=tape is Tape.FULL)
        check_objective(loop, theta, objective, few, num_steps)
        check_paths(loop, theta, few, num_steps, tape, objective=objective)
        coordinatewise.reason_against(loop, theta, one, tape)
        return peak_of(lambda: whole(num_steps).estimate(loop, theta, objective, few))

    begun = loop.begin(tree.detach(theta), chunks[0])
    params, state = (sum(x.numel() * x.element_size() for x in tree.leaves(y)) for y in begun[1:3])
    # Where training goes on, each chunk's end is kept until all are done.
    ends = len(chunks) * (params + state) if goes_on else 0
    one = {k: p[0] for k, p in begun.params.items()}
    if coordinatewise.reason_against(loop, theta, one, tape) is None:
        return _extrapolated(peak, num_recorded) + ends
    starts = 0 if segment is None else -(-num_recorded // segment) * (params + state)
    if by_steps:
        batch = loop.batch(begun.tasks, begun.step, "train")
        kept = params + state + sum(x.numel() * x.element_size() for x in tree.leaves(batch))
        return _line(peak, 1) + starts + min(num_recorded, segment or num_recorded) * kept + params + state + ends
    if segment is None or segment >= num_recorded:
        return _extrapolated(peak, num_recorded) + ends
    return _extrapolated(peak, segment) + starts + params + ends  # and the cotangents of one segment's end


def peak_of(call: Callable[[], object]) -> int:
    """Return the most bytes held at a time by tensors that ``call`` makes."""
    with _Watch() as watch:
        call()
    return watch.peak


def _extrapolated(peak: Callable[[int], int], num_steps: int) -> int:
    if num_steps <= FEW + 1:
        return peak(num_steps)
    return _line(peak, num_steps)


def _line(peak: Callable[[int], int], num_steps: int) -> int:
    first, second = peak(FEW), peak(FEW + 1)
    return first + (num_steps - FEW) * (second - first)


class _Watch(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType] - torch gives it no types
        self.known: dict[int, int] = {}  # bytes by address; 0 for what was there before
        self.held = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in tree.leaves((args, kwargs)):
            self._meet(x, made_here=False)
        out = func(*args, **kwargs)
        for x in tree.leaves(out):
            self._meet(x, made_here=True)
        return out

    def _meet(self, x: Any, *, made_here: bool) -> None:
        if not isinstance(x, Tensor):
            return
        storage = x.untyped_storage()
        address = storage._cdata  # pyright: ignore[reportPrivateUsage] - the only name of a storage, also of one without memory
        if address not in self.known:
            self.known[address] = storage.nbytes() if made_here else 0
            self.held += self.known[address]
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._lose, address)

    def _lose(self, address: int) -> None:
        self.held -= self.known.pop(address)
