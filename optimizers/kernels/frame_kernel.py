"""The kernel of rules in the normalised frame: what they share of a compiled step."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core import tree
from learnedopt.core.rule import Bound, Kernel, State
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.frame import Memory
from learnedopt.optimizers.bases.kinds import TensorKind, kinds_of
from learnedopt.optimizers.kernels import normalised_native
from learnedopt.optimizers.kernels.lanes import expanded
from learnedopt.optimizers.kernels.normalised_native import (
    NO_NET,
    READ,
    Clocks,
    Constants,
    Cut,
    Data,
    Net,
    Ready,
    Shapes,
)


class Step(NamedTuple):
    """What a step is taken of; every tensor has the lanes' dimensions first, of size 1 where all lanes share it."""

    theta: Theta
    state: State
    memory: Memory
    """The frame's part of the state."""
    progress: Tensor
    lanes: torch.Size
    kinds: tuple[TensorKind, ...]
    cut: Cut


class Weights(NamedTuple):
    """A network's weights, clocks a part of its bias, and what it keeps of all coordinates."""

    net: Net
    tensors: Sequence[Tensor]
    states: Sequence[Tensor]


class FrameKernel(Kernel):
    """A compiled step for tensors on a CPU, in one dtype, where no derivative is recorded.

    Subclasses say what is particular to their rule. It takes ``progress=`` as ``update`` does.
    """

    with_factors: bool = False
    """Whether rows and columns of matrices have factors of their own."""
    reads_iterates: bool = True
    """Whether the sums over z² are read."""

    def step(
        self, theta: Theta, grads: Params, state: State, params: Params, loss: Any, *, progress: Tensor
    ) -> tuple[Params, State] | None:
        """Take a step in two passes over memory; None where the compiled step does not serve."""
        return self._step(theta, grads, state, params, progress, 0)

    def step_of_lanes(
        self, theta: Theta, grads: Params, state: State, params: Params, loss: Any, num_dims: int, *, progress: Tensor
    ) -> tuple[Params, State] | None:
        """Take the steps of all lanes together."""
        return self._step(theta, grads, state, params, progress, num_dims)

    def step_in_place(
        self, theta: Theta, grads: Params, state: State, params: Params, loss: Any, *, progress: Tensor
    ) -> bool:
        """Take a step without new memory; it serves only where all that is written is contiguous."""
        made = self._made(theta, grads, state, params, progress, 0, in_place=True)
        if made is not None:
            made.take()
            made.count_in_place()
        return made is not None

    def bound(self, theta: Theta, state: State, params: Params) -> FrameBound | None:
        """Make such steps ready."""
        progress = torch.zeros((), dtype=next(iter(params.values())).dtype)
        made = self._made(theta, params, state, params, progress, 0, in_place=True)
        return None if made is None else FrameBound(made)

    @abstractmethod
    def memory(self, state: State) -> Memory:
        """Return the frame's part of a state."""

    @abstractmethod
    def after(self, state: State, memory: Memory, states: Sequence[Tensor]) -> State:
        """Return the new state."""

    @abstractmethod
    def decays(self, theta: Theta, state: State) -> Tensor:
        """Return the logits of what running averages keep, (\\*lanes, 3)."""

    @abstractmethod
    def constants(self, step: Step) -> Sequence[Tensor | float]:
        """Return the eleven constants of every tensor, (\\*lanes, tensors) each, in the order of ``frame_numbers.h``.

        They must not depend on the progress, nor on what a step writes.
        """

    def weights(self, step: Step) -> Weights:
        """Return the network at this progress."""
        return Weights(Net(NO_NET, 0, 0), (), ())

    def along(self, theta: Theta) -> Tensor | None:
        """Return the weights of g, m1 and m2 in the direction that is orthogonalised, (\\*lanes, 3), or None."""
        return None

    def orthogonaliser(self, buffers: Sequence[Tensor]) -> Callable[[], None]:
        """Return what overwrites buffers of matrices, (..., m, n) each, by their orthogonalised directions."""
        raise NotImplementedError(f"{type(self).__name__} has weights of a direction but does not orthogonalise it")

    def _step(
        self, theta: Theta, grads: Params, state: State, params: Params, progress: Tensor, num_dims: int
    ) -> tuple[Params, State] | None:
        made = self._made(theta, grads, state, params, progress, num_dims, in_place=False)
        return None if made is None else made.taken(list(params))

    def _made(
        self, theta: Theta, grads: Params, state: State, params: Params, progress: Tensor, num_dims: int, in_place: bool
    ) -> Made | None:
        """Make a step ready; None where the compiled step does not serve."""
        memory, names = self.memory(state), list(params)
        rows = dict(zip(READ, (grads, params, *memory[1:]), strict=True))
        flat = [row[name] for row in rows.values() for name in names]
        leaves = tree.leaves(state)
        if not normalised_native.serves([*flat, progress, *leaves, *theta.values()]):
            return None
        if in_place and not all(t.is_contiguous() for t in (*params.values(), *leaves)):
            return None
        shapes = tuple(tuple(params[name].shape[num_dims:]) for name in names)
        _require_shapes(flat, shapes, num_dims)
        lanes, all_expanded = expanded([*flat, *theta.values(), memory.step, progress], num_dims)
        step = Step(theta, state, memory, progress, lanes, _kinds(tuple(names), shapes), normalised_native.cut(shapes))
        return Made(self, step, all_expanded[: len(flat)], in_place)


class Made:
    """A step of these very tensors, made ready.

    Args:
        kernel: of the rule.
        step: what it is taken of.
        flat: gradients, parameters and the memory's tensors, with all lanes each.
        in_place: whether parameters and state are overwritten.
    """

    def __init__(self, kernel: FrameKernel, step: Step, flat: list[Tensor], in_place: bool) -> None:
        self._kernel, lanes, cut = kernel, step.lanes, step.cut
        self.step = step
        self.count: int = len(cut.shapes)
        constants, read = _constants(kernel, step), flat[self.count :]
        self.written: list[Tensor] = read if in_place else [torch.empty(t.shape, dtype=t.dtype) for t in read]
        turned = kernel.along(step.theta) is not None
        buffers, directions = _buffers(step, constants.lanes) if turned else ([], [None] * self.count)
        self._orthogonalise = kernel.orthogonaliser(buffers) if buffers else None
        weights = kernel.weights(step)
        _, tensors = expanded([*weights.states, *weights.tensors, constants.lanes[..., 0]], len(lanes))
        states, tensors = tensors[: len(weights.states)], tensors[len(weights.states) : -1]
        self.states: list[Tensor] = states if in_place else [torch.empty(h.shape, dtype=h.dtype) for h in states]
        both = [*states, *self.states] if states else [None] * 4
        everything = [*flat, *directions, *self.written, *both]
        self._weights, self._weights_at = weights, len(everything)
        self.data: Data = Data(lanes, [*everything, *tensors])
        clocks = Clocks(*(x.expand(lanes).contiguous() for x in (step.memory.step, step.progress)))
        self._ready = Ready(
            cut, self.data, constants, clocks,
            with_factors=kernel.with_factors, with_iterates=kernel.reads_iterates,
        )  # fmt: skip

    def take(self) -> None:
        """Take it, but for the count of the steps."""
        self._ready.sums()
        if self._orthogonalise is not None:
            self._orthogonalise()
        self._ready.move(self._weights.net)

    def take_again(self) -> None:
        """Take it at the present count and progress; without lanes."""
        if self._weights.tensors:
            self._weights = self._kernel.weights(self.step)
            kept = self.data.point(self._weights_at, self._weights.tensors)
            self.take()
            del kept
        else:
            self.take()

    def count_in_place(self) -> None:
        """Count the step, and tell autograd what was written."""
        self.step.memory.step.add_(1)
        torch.autograd.graph.increment_version((*self.written, *self.states))

    def taken(self, names: list[str]) -> tuple[Params, State]:
        """Take it once and return the new parameters and the new state."""
        self.take()
        memory, written, n = self.step.memory, self.written, self.count
        each = [dict(zip(names, written[i : i + n], strict=True)) for i in range(0, len(written), n)]
        count = (memory.step + 1).expand(self.step.lanes).contiguous()
        return each[0], self._kernel.after(self.step.state, Memory(count, *each[1:]), self.states)


@final
class FrameBound(Bound):
    """Steps of one run: every tensor but the gradients stays where it is."""

    def __init__(self, made: Made) -> None:
        self._made = made
        self._shapes = [torch.Size(shape) for shape in made.step.cut.shapes]
        self._dtype = made.step.progress.dtype

    def step(self, grads: Sequence[Tensor], *, progress: float) -> bool:
        """Take one at this progress."""
        dtype, made = self._dtype, self._made
        if not normalised_native.unrecorded() or not all(normalised_native.plain(g, dtype) for g in grads):
            return False
        if [g.shape for g in grads] != self._shapes:
            _require_shapes(grads, made.step.cut.shapes, 0)
        kept = made.data.point(0, grads)
        made.step.progress.fill_(progress)
        made.take_again()
        made.count_in_place()
        del kept
        return True


def _constants(kernel: FrameKernel, step: Step) -> Constants:
    theta, lanes = step.theta, step.lanes
    keep, averaging, along = kernel.decays(theta, step.state), theta["averaging"], kernel.along(theta)
    parts = (
        keep.sigmoid(), functional.logsigmoid(keep), theta["mix"],
        torch.zeros_like(theta["mix"]) if along is None else along,
        averaging[..., :1].exp() - 1, averaging[..., 1:].sigmoid(), theta["schedule"],
    )  # fmt: skip
    of_lanes = torch.cat([part.expand(*lanes, part.shape[-1]) for part in parts], -1)
    size = (*lanes, len(step.cut.shapes))
    of_tensors = [
        x.expand(size) if isinstance(x, Tensor) else of_lanes.new_full(size, x) for x in kernel.constants(step)
    ]
    return Constants(of_lanes, torch.stack(of_tensors, -1))


def _buffers(step: Step, like: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return room for the directions, (members, \\*lanes, rows, columns) for matrices of one shape, and each's part."""
    found: list[Tensor | None] = [None] * len(step.cut.shapes)
    groups: dict[tuple[int, int], list[int]] = {}
    for tensor, (shape, (matrix, columns, *_)) in enumerate(zip(step.cut.shapes, step.cut.layout, strict=True)):
        if matrix and columns:
            groups.setdefault((shape[0], columns), []).append(tensor)
    buffers = [like.new_empty((len(members), *step.lanes, *size)) for size, members in groups.items()]
    for members, buffer in zip(groups.values(), buffers, strict=True):
        for tensor, own in zip(members, buffer.unbind(), strict=True):
            found[tensor] = own
    return buffers, found


@functools.lru_cache(maxsize=256)
def _kinds(names: tuple[str, ...], shapes: Shapes) -> tuple[TensorKind, ...]:
    found = kinds_of({k: torch.empty(s, device="meta") for k, s in zip(names, shapes, strict=True)})
    return tuple(found.values())


def _require_shapes(flat: Sequence[Tensor], shapes: Shapes, num_dims: int) -> None:
    """Raise ValueError where C would read past a tensor's end."""
    for i, tensor in enumerate(flat):
        expected = shapes[i % len(shapes)]
        if tuple(tensor.shape[num_dims:]) != expected:
            raise ValueError(
                f"a step was given a {READ[i // len(shapes)]} of shape {tuple(tensor.shape[num_dims:])} for a "
                f"parameter of shape {expected}; the state must be this rule's own, made by init for these parameters"
            )
