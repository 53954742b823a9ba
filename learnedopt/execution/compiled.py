"""The meta-gradient of a chunk of tasks, compiled as one program.

The engine's own code is run once on stand-in tensors that only record: the inner steps, their gradients and the
back-propagation to theta become one flat list of tensor operations, without autograd and without Python, which
``torch.compile`` then turns into fused kernels. A loss that is differentiated twice cannot be compiled by itself; here
no derivative is left to take. What a family does to make its batches is not recorded: they are inputs, drawn before.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from learnedopt.core import tree
from learnedopt.core.estimator import as_leaves
from learnedopt.core.execution import TaskMap
from learnedopt.core.inner import Carry, InnerLoop, Tape
from learnedopt.core.objective import MetaObjective, TaskMean
from learnedopt.core.task import Batch, Split, Tasks
from learnedopt.core.tree import Params, Theta

logger = logging.getLogger("learnedopt")


class CompileWarning(UserWarning):
    """What was to be compiled runs uncompiled, for the reason that the message gives."""


class Piece(NamedTuple):
    """The objective and its gradient of a chunk of tasks.

    ``value`` is the objective times the chunk's weight; ``grads`` has one gradient for each of theta's leaves, None
    where nothing reaches it; training goes on from ``end``, which the objective ``named`` or which is the rollout's;
    ``losses`` is (num_steps, num_tasks). Nothing has a graph.
    """

    value: Tensor
    grads: Sequence[Tensor | None]
    end: Carry
    named: bool
    losses: Tensor


Differentiate: TypeAlias = Callable[[Theta, Carry, "float | Tensor"], Piece]
"""``(leaves, chunk, weight) -> Piece``."""
_HOLE = object()
_Read: TypeAlias = tuple[int, Split]  # a batch: of which step, counted from the chunk's, and of which split


class _Program(NamedTuple):
    """A compiled ``Differentiate``: ``call(weight, *inputs)`` returns the tensors that ``rebuild`` makes a piece of."""

    call: Callable[..., Sequence[Tensor]]
    rebuild: Callable[[Sequence[Tensor]], Piece]
    dtype: torch.dtype  # of the objective and its weight


def reason_against(estimator: Any, objective: MetaObjective) -> str | None:
    """Return why this meta-gradient is not to be compiled, or None."""
    try:
        hash((estimator, objective))
    except TypeError as error:
        return f"a program could not be found again: {error}"
    if not isinstance(objective, TaskMean):
        return f"{objective!r} is no TaskMean: what else it reads beside batches and the rollout is not known"
    if getattr(estimator, "segment", None) is not None:
        return "segment= recomputes its steps, and a compiler would merge that with the first time they ran"
    return None


def differentiate(
    loop: InnerLoop, eager: Differentiate, theta: Theta, chunk: Carry, weight: float, what: tuple[Any, MetaObjective]
) -> Piece:
    """Return what ``eager`` returns, by a compiled program where that can be.

    Args:
        loop: whose ``programs`` keep what was compiled; ``eager`` draws its batches from it.
        eager: a function of theta's leaves, a chunk of tasks, and the chunk's weight.
        theta: leaves.
        chunk: begun or fresh.
        weight: of the chunk among all tasks.
        what: estimator and objective, on which ``eager`` depends.

    The first piece of its kind is computed both ways: where they differ by more than the square root of the precision,
    the program is not used. Warns, once for each kind, where ``eager`` takes the place of a program.
    """
    reason = reason_against(*what)
    if reason is not None:
        say_why_not(loop, reason)
        return eager(theta, chunk, weight)
    expected = None
    given, structure = _inspected((theta, *_trees(chunk)))
    kind = ("reads", *what, chunk.state is None, structure)
    if kind not in loop.programs:
        expected, loop.programs[kind] = _reads(loop, eager, theta, chunk, weight)
    reads = loop.programs[kind]
    batches = [loop.batch(chunk.tasks, chunk.step + ahead, split) for ahead, split in reads]
    drawn, structure = _inspected(batches)
    # Detached: some may be one tensor, and for a program they are different ones.
    inputs, key = [x.detach() for x in (*given, *drawn)], ("program", kind, structure)
    if key not in loop.programs:
        right = eager(theta, chunk, weight) if expected is None else expected

        def build() -> _Program:
            program = _compile(loop, eager, reads, (theta, chunk, batches), right.value.dtype)
            _require_equal(_call(program, inputs, chunk, weight), right)
            return program

        loop.programs[key] = _built(loop, f"the meta-gradient of {type(what[0]).__name__}", build)
    program = loop.programs[key]
    return eager(theta, chunk, weight) if program is None else _call(program, inputs, chunk, weight)


def gradient(loop: InnerLoop, task_map: TaskMap, params: Params, batch: Batch) -> tuple[Tensor, Params]:
    """Return a train loss and its gradient, as ``loop.gradient`` does, by a compiled program where that can be.

    The rule has no regularizer. The first is computed both ways, as in ``differentiate``.
    """

    def eager(params: Params, batch: Batch) -> tuple[Tensor, Params]:
        loss, grads, _ = loop.gradient(task_map, {}, params, batch, Tape.NONE)
        return loss, grads

    inputs, structure = _inspected((params, batch))
    key = ("gradient", task_map.num_tasks, structure)
    if key not in loop.programs:
        _, restore = tree.flatten((params, batch))

        def record(*tensors: Tensor) -> list[Tensor]:
            loss, grads = eager(*restore(tensors))
            return [loss, *grads.values()]

        right_loss, right = eager(params, batch)

        def build() -> Callable[..., Sequence[Tensor]]:
            program = _compiled(record, inputs)
            with torch.no_grad():
                loss, *grads = program(*inputs)
            _require_close({"loss": ([loss], [right_loss]), "gradient": (grads, list(right.values()))})
            return program

        loop.programs[key] = _built(loop, "the gradient of an inner step", build)
    program = loop.programs[key]
    if program is None:
        return eager(params, batch)
    with torch.no_grad():
        loss, *grads = program(*inputs)
    return loss, dict(zip(params, grads, strict=True))


def seconds_spent(loop: InnerLoop) -> float:
    """Return the seconds that compiling has taken since this was last asked."""
    return loop.programs.pop("seconds", 0.0)


def _built(loop: InnerLoop, name: str, build: Callable[[], Any]) -> Any:
    """Return the program, or None and a warning where it cannot be built."""
    began = time.perf_counter()
    try:
        program = build()
    except Exception as error:  # a compiler may fail in any way; what is wrong with the run itself, eager has raised
        logger.debug("compiling failed", exc_info=True)
        lines = str(error).strip().splitlines()
        reason = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
        say_why_not(loop, f"{type(error).__name__}: {reason}", name)
        program = None
    seconds = time.perf_counter() - began
    loop.programs["seconds"] = loop.programs.get("seconds", 0.0) + seconds
    if program is not None:
        logger.info("compiled %s in %.1f s", name, seconds)
    return program


def say_why_not(loop: InnerLoop, reason: str, what: str = "the meta-gradient") -> None:
    """Warn, once a loop and reason, that ``Execution(compile=True)`` is not followed."""
    if ("warned", reason) not in loop.programs:
        loop.programs["warned", reason] = True
        message = f"Execution(compile=True): {what} is computed uncompiled, because {reason}"
        warnings.warn(message, CompileWarning, stacklevel=2)


def _trees(chunk: Carry) -> tuple[tree.Tree, ...]:
    return chunk.tasks, chunk.params, () if chunk.state is None else chunk.state


def _inspected(tensors: tree.Tree) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Return the leaves, and all that a program takes for granted about them."""
    flat, spec = pytree.tree_flatten(tensors)
    return flat, (spec, *((x.shape, x.stride(), x.dtype, x.device) for x in flat))


def _reads(
    loop: InnerLoop, eager: Differentiate, theta: Theta, chunk: Carry, weight: float
) -> tuple[Piece, tuple[_Read, ...]]:
    """Run ``eager``, and return the piece and which batches it has drawn."""
    reads: dict[_Read, None] = {}

    def source(tasks: Tasks, step: int, split: Split) -> Batch:
        reads[step - chunk.step, split] = None
        return loop.family.batch(tasks, step, split)

    with loop.batches_from(source):
        piece = eager(theta, chunk, weight)
    return piece, tuple(reads)


def _compile(
    loop: InnerLoop, eager: Differentiate, reads: Sequence[_Read], example: tuple[Theta, Carry, list[Batch]],
    dtype: torch.dtype,
) -> _Program:  # fmt: skip
    """Record ``eager`` on stand-ins of the example's theta, chunk and batches, and compile the record."""
    theta, chunk, batches = example
    flat, restore = tree.flatten((theta, *_trees(chunk), batches))
    rebuild: Callable[[Sequence[Any]], Piece] | None = None
    rest: list[Any] = []  # the leaves of a piece that are no tensors

    def record(weight: Tensor, *tensors: Tensor) -> list[Tensor]:
        nonlocal rebuild
        theta, tasks, params, state, batches = restore(tensors)
        drawn = dict(zip(reads, batches, strict=True))
        begins = Carry(tasks, params, None if chunk.state is None else state, chunk.step)
        with loop.batches_from(lambda tasks, step, split: drawn[step - chunk.step, split]):
            piece = eager(as_leaves(theta), begins, weight)
        # Steps are counted from the chunk's: the same program serves every window of an episode.
        piece = piece._replace(end=piece.end._replace(step=piece.end.step - chunk.step))
        leaves, rebuild = tree.flatten(piece)
        rest[:] = [_HOLE if isinstance(x, Tensor) else x for x in leaves]
        return [x for x in leaves if isinstance(x, Tensor)]

    def fill(tensors: Sequence[Tensor]) -> Piece:
        assert rebuild is not None
        found = iter(tensors)
        return rebuild([next(found) if x is _HOLE else x for x in rest])

    return _Program(_compiled(record, [torch.zeros((), dtype=dtype), *flat]), fill, dtype)


def _compiled(record: Callable[..., list[Tensor]], example: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Record a function of tensors that returns tensors, and compile the record."""
    from torch.fx.experimental.proxy_tensor import make_fx

    # Each input is a tensor of its own, even where a family returns one tensor as several batches: it need not always.
    # Stand-ins have no memory, so that code which bypasses torch's operations raises in place of recording nonsense.
    graph = make_fx(record, _WITHOUT_FACTORS, tracing_mode="fake", _allow_non_fake_inputs=True)(
        *[x.detach().clone() for x in example]
    )
    # On a CPU the many small kernels are called from C++ too: it is faster, and sooner ready when found on disk.
    options: dict[str, Any] | None = {"cpp_wrapper": True} if all(x.device.type == "cpu" for x in example) else None
    return torch.compile(graph, fullgraph=True, dynamic=False, options=options)


def _add(a: Any, b: Any, alpha: float = 1) -> Any:
    return NotImplemented if alpha == 1 else a + alpha * b


def _sub(a: Any, b: Any, alpha: float = 1) -> Any:
    return NotImplemented if alpha == 1 else a - alpha * b


def _add_in_place(a: Any, b: Any, alpha: float = 1) -> Any:
    return NotImplemented if alpha == 1 else a.add_(alpha * b)


def _sub_in_place(a: Any, b: Any, alpha: float = 1) -> Any:
    return NotImplemented if alpha == 1 else a.sub_(alpha * b)


def _addmm(a: Any, b: Any, c: Any, beta: float = 1, alpha: float = 1) -> Any:
    if alpha == beta == 1:
        return NotImplemented
    product = alpha * (b @ c)
    return product + beta * a if beta else product  # 0 switches ``a`` off, whatever is in it


# Factors are recorded as products of their own: where torch 2.13's compiler fuses sums with matrix products, it drops
# them (pytorch/pytorch#167313).
_WITHOUT_FACTORS = {
    torch.ops.aten.add.Tensor: _add,
    torch.ops.aten.sub.Tensor: _sub,
    torch.ops.aten.add_.Tensor: _add_in_place,
    torch.ops.aten.sub_.Tensor: _sub_in_place,
    torch.ops.aten.addmm.default: _addmm,
}


def _call(program: _Program, inputs: Sequence[Tensor], chunk: Carry, weight: float) -> Piece:
    with torch.no_grad():
        piece = program.rebuild(program.call(torch.tensor(weight, dtype=program.dtype), *inputs))
    return piece._replace(end=piece.end._replace(step=chunk.step + piece.end.step))


def _require_equal(piece: Piece, expected: Piece) -> None:
    _require_close(
        {
            "objective": ([piece.value], [expected.value]),
            "gradient": (piece.grads, expected.grads),
            "end": (list(piece.end.params.values()), list(expected.end.params.values())),
        }
    )


def _require_close(results: dict[str, tuple[Sequence[Tensor | None], Sequence[Tensor | None]]]) -> None:
    """Raise ArithmeticError where a program computes something else than what it was recorded from."""
    for name, (found, right) in results.items():
        pairs = [(a.detach(), b.detach()) for a, b in zip(found, right, strict=True) if a is not None and b is not None]
        if [x is None for x in found] != [x is None for x in right]:
            raise ArithmeticError(f"the compiled {name} lacks what the uncompiled has")
        difference = sum(float((a - b).double().square().sum()) for a, b in pairs) ** 0.5
        size = sum(float(b.double().square().sum()) for _, b in pairs) ** 0.5
        precision = max((torch.finfo(b.dtype).eps for _, b in pairs), default=0.0) ** 0.5
        # Where the uncompiled is not finite, nothing can be said.
        if math.isfinite(size) and not difference <= precision * size:
            raise ArithmeticError(
                f"the compiled {name} differs by {difference:.1e} from the uncompiled, which has norm {size:.1e}"
            )
