"""The meta-gradient of a chunk of tasks, compiled as one program.

The engine's own code is run once on stand-in tensors that only record: the inner steps, their gradients and the
back-propagation to theta become one flat list of tensor operations, without autograd and without Python, which
torch's compiler then turns into fused kernels. A loss that is differentiated twice cannot be compiled by itself; here
no derivative is left to take. What a family does to make its batches is not recorded: they are inputs, drawn before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.cache import MISSING
from learnedopt.core.carry import Carry, Tape
from learnedopt.core.estimator import as_leaves
from learnedopt.core.execution import TaskMap
from learnedopt.core.inner import InnerLoop
from learnedopt.core.objective import MetaObjective, TaskMean
from learnedopt.core.task import Batch, Split, Tasks
from learnedopt.core.tree import Params, Theta
from learnedopt.execution.adjoint import Adjoint, ChunkGradient, Eager
from learnedopt.execution.given_batches import with_batches
from learnedopt.execution.programs import build_once, compiled, inspected, require_close, say_why_not

_HOLE = object()
_Read: TypeAlias = tuple[int, Split]  # a batch: of which step, counted from the chunk's, and of which split


class _Program(NamedTuple):
    """A compiled adjoint: ``call(weight, *inputs)`` returns the tensors that ``rebuild`` makes a gradient of."""

    call: Callable[..., Sequence[Tensor]]
    rebuild: Callable[[Sequence[Tensor]], ChunkGradient]
    dtype: torch.dtype  # of the objective and its weight


def reason_against(objective: MetaObjective) -> str | None:
    """Return why this meta-gradient is not to be compiled, or None."""
    try:
        hash(objective)
    except TypeError as error:
        return f"a program could not be found again: {error}"
    if not isinstance(objective, TaskMean):
        return f"{objective!r} is no TaskMean: what else it reads beside batches and the rollout is not known"
    return None


@final
@dataclass(frozen=True)
class Compiled(Adjoint):
    """What ``eager`` computes, by a compiled program where that can be.

    The first gradient of its kind is computed both ways: where they differ by more than the square root of the
    precision, the program is not used. Warns, once for each kind, where ``eager`` takes the place of a program.
    """

    eager: Eager

    def differentiate(
        self, loop: InnerLoop, leaves: Theta, objective: MetaObjective, chunk: Carry, weight: float | Tensor
    ) -> ChunkGradient:
        """Call the program of this kind of chunk, built now where there is none yet."""
        eager = self.eager
        reason = reason_against(objective)
        if reason is not None:
            say_why_not(loop, reason)
            return eager.differentiate(loop, leaves, objective, chunk, weight)
        expected = None
        given, structure = inspected((leaves, *_trees(chunk)))
        kind = ("reads", eager.unroll, objective, chunk.state is None, structure)
        reads = loop.cache.get(kind)
        if reads is MISSING:
            expected, reads = _reads(loop, eager, leaves, objective, chunk, weight)
            loop.cache.put(kind, reads)
        batches = [loop.batch(chunk.tasks, chunk.step + ahead, split) for ahead, split in reads]
        drawn, structure = inspected(batches)
        # Detached: some may be one tensor, and for a program they are different ones.
        inputs, key = [x.detach() for x in (*given, *drawn)], ("program", kind, structure)
        program = loop.cache.get(key)
        if program is MISSING:
            right = expected or eager.differentiate(loop, leaves, objective, chunk, weight)

            def build() -> _Program:
                program = _record(loop, eager, reads, (leaves, objective, chunk, batches), right.value.dtype)
                _require_equal(_call(program, inputs, chunk, weight), right)
                return program

            program = loop.cache.put(key, build_once(loop, "the meta-gradient", build))
        if program is None:
            return eager.differentiate(loop, leaves, objective, chunk, weight)
        return _call(program, inputs, chunk, weight)


def step_gradient(loop: InnerLoop, task_map: TaskMap, params: Params, batch: Batch) -> tuple[Tensor, Params]:
    """Return a train loss and its gradient, as ``loop.gradient`` does, by a compiled program where that can be.

    The loop descends the family's loss. The first is computed both ways, as in ``Compiled``.
    """

    def eager(params: Params, batch: Batch) -> tuple[Tensor, Params]:
        found = loop.gradient(task_map, {}, params, batch, Tape.NONE)
        return found.loss, found.grads

    inputs, structure = inspected((params, batch))
    key = ("gradient", task_map.num_tasks, structure)
    program = loop.cache.get(key)
    if program is MISSING:
        _, restore = tree.flatten((params, batch))

        def record(*tensors: Tensor) -> list[Tensor]:
            loss, grads = eager(*restore(tensors))
            return [loss, *grads.values()]

        right_loss, right = eager(params, batch)

        def build() -> Callable[..., Sequence[Tensor]]:
            program = compiled(record, inputs)
            with torch.no_grad():
                loss, *grads = program(*inputs)
            require_close({"loss": ([loss], [right_loss]), "gradient": (grads, list(right.values()))})
            return program

        program = loop.cache.put(key, build_once(loop, "the gradient of an inner step", build))
    if program is None:
        return eager(params, batch)
    with torch.no_grad():
        loss, *grads = program(*inputs)
    return loss, dict(zip(params, grads, strict=True))


def _trees(chunk: Carry) -> tuple[tree.Tree, ...]:
    return chunk.tasks, chunk.params, () if chunk.state is None else chunk.state


def _reads(
    loop: InnerLoop, eager: Eager, leaves: Theta, objective: MetaObjective, chunk: Carry, weight: float | Tensor
) -> tuple[ChunkGradient, tuple[_Read, ...]]:
    """Run ``eager``, and return its gradient and which batches it has drawn."""
    reads: dict[_Read, None] = {}

    def source(tasks: Tasks, step: int, split: Split) -> Batch:
        reads[step - chunk.step, split] = None
        return loop.family.batch(tasks, step, split)

    found = eager.differentiate(with_batches(loop, source), leaves, objective, chunk, weight)
    return found, tuple(reads)


def _record(
    loop: InnerLoop, eager: Eager, reads: Sequence[_Read], example: tuple[Theta, MetaObjective, Carry, list[Batch]],
    dtype: torch.dtype,
) -> _Program:  # fmt: skip
    """Record ``eager`` on stand-ins of the example's theta, chunk and batches, and compile the record."""
    theta, objective, chunk, batches = example
    flat, restore = tree.flatten((theta, *_trees(chunk), batches))
    rebuild: Callable[[Sequence[Any]], ChunkGradient] | None = None
    rest: list[Any] = []  # the leaves of a gradient that are no tensors

    def record(weight: Tensor, *tensors: Tensor) -> list[Tensor]:
        nonlocal rebuild
        theta, tasks, params, state, batches = restore(tensors)
        drawn = dict(zip(reads, batches, strict=True))
        begins = Carry(tasks, params, None if chunk.state is None else state, chunk.step)
        here = with_batches(loop, lambda tasks, step, split: drawn[step - chunk.step, split])
        found = eager.differentiate(here, as_leaves(theta), objective, begins, weight)
        # Steps are counted from the chunk's: the same program serves every window of an episode.
        found = found._replace(end=found.end._replace(step=found.end.step - chunk.step))
        leaves, rebuild = tree.flatten(found)
        rest[:] = [_HOLE if isinstance(x, Tensor) else x for x in leaves]
        return [x for x in leaves if isinstance(x, Tensor)]

    def fill(tensors: Sequence[Tensor]) -> ChunkGradient:
        assert rebuild is not None
        found = iter(tensors)
        return rebuild([next(found) if x is _HOLE else x for x in rest])

    return _Program(compiled(record, [torch.zeros((), dtype=dtype), *flat]), fill, dtype)


def _call(program: _Program, inputs: Sequence[Tensor], chunk: Carry, weight: float | Tensor) -> ChunkGradient:
    with torch.no_grad():
        found = program.rebuild(program.call(torch.tensor(weight, dtype=program.dtype), *inputs))
    return found._replace(end=found.end._replace(step=chunk.step + found.end.step))


def _require_equal(found: ChunkGradient, expected: ChunkGradient) -> None:
    require_close(
        {
            "objective": ([found.value], [expected.value]),
            "gradient": (found.grads, expected.grads),
            "end": (list(found.end.params.values()), list(expected.end.params.values())),
        }
    )
