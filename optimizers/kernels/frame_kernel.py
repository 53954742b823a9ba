"""The kernel of rules in the normalised frame: what they share of a compiled step."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core import tree
from learnedopt.core.rule import Kernel, State
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.frame import Memory
from learnedopt.optimizers.bases.kinds import TensorKind, kinds_of
from learnedopt.optimizers.kernels import normalised_native
from learnedopt.optimizers.kernels.lanes import expanded
from learnedopt.optimizers.kernels.normalised_native import NO_NET, READ, Cut, Data, Net, Shapes, Sums

Factors: TypeAlias = tuple[Tensor, Tensor]
"""Of all matrices' rows, and of all columns."""


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
        return self._step(theta, grads, state, params, progress, 0, in_place=False)

    def step_of_lanes(
        self, theta: Theta, grads: Params, state: State, params: Params, loss: Any, num_dims: int, *, progress: Tensor
    ) -> tuple[Params, State] | None:
        """Take the steps of all lanes together."""
        return self._step(theta, grads, state, params, progress, num_dims, in_place=False)

    def step_in_place(
        self, theta: Theta, grads: Params, state: State, params: Params, loss: Any, *, progress: Tensor
    ) -> bool:
        """Take a step without new memory; it serves only where all that is written is contiguous."""
        return self._step(theta, grads, state, params, progress, 0, in_place=True) is not None

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
    def tensor_numbers(self, step: Step, sums: Sums, scale: Tensor) -> tuple[Sequence[Tensor], Factors | None]:
        """Return the eight numbers of every tensor, (\\*lanes, tensors) each, and the factors if there are any.

        Args:
            step: the step.
            sums: over tensors, rows and columns; ``rows`` and ``columns`` only with ``with_factors``.
            scale: what corrects v for its start at 0, (\\*lanes, 1).
        """

    def weights(self, step: Step) -> Weights:
        """Return the network."""
        return Weights(Net(NO_NET, 0, 0), (), ())

    def along(self, theta: Theta) -> Tensor | None:
        """Return the weights of g, m1 and m2 in the direction that is orthogonalised, (\\*lanes, 3), or None."""
        return None

    def orthogonalised(self, stacked: Tensor) -> Tensor:
        """Orthogonalise matrices, (..., m, n)."""
        raise NotImplementedError(f"{type(self).__name__} has weights of a direction but does not orthogonalise it")

    def _step(
        self, theta: Theta, grads: Params, state: State, params: Params, progress: Tensor, num_dims: int, in_place: bool
    ) -> tuple[Params, State] | None:
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
        others = [*theta.values(), memory.step, progress]
        lanes, all_expanded = expanded([*flat, *others], num_dims)
        flat = all_expanded[: len(flat)]
        step = Step(theta, state, memory, progress, lanes, _kinds(tuple(names), shapes), normalised_native.cut(shapes))
        written = flat[len(names) :] if in_place else [torch.empty(t.shape, dtype=t.dtype) for t in flat[len(names) :]]
        states = self._taken(step, flat, written, in_place)
        count = memory.step.add_(1) if in_place else (memory.step + 1).expand(lanes).contiguous()
        if in_place:
            torch.autograd.graph.increment_version((*written, *states))
        each = [dict(zip(names, written[i : i + len(names)], strict=True)) for i in range(0, len(written), len(names))]
        return each[0], self.after(state, Memory(count, *each[1:]), states)

    def _taken(self, step: Step, flat: list[Tensor], written: list[Tensor], in_place: bool) -> Sequence[Tensor]:
        """Write what the step comes to over ``written``, and return the network's new states."""
        theta, lanes = step.theta, step.lanes
        keep = self.decays(theta, step.state)
        steps = (step.memory.step + 1).unsqueeze(-1)
        scale = 1 / -torch.expm1(steps * functional.logsigmoid(keep))
        averaging = theta["averaging"]
        power = averaging[..., :1].exp() - 1
        along = self.along(theta)
        numbers = _side_by_side(
            lanes, keep.sigmoid(), scale, theta["mix"], torch.zeros_like(theta["mix"]) if along is None else along,
            (1 + power) / (steps + power), averaging[..., 1:].sigmoid(),
        )  # fmt: skip
        directions = [None] * len(step.cut.shapes) if along is None else _buffers(step, numbers)
        weights = self.weights(step)
        _, states = expanded([*weights.states, *weights.tensors, numbers[..., 0]], len(lanes))
        states, tensors = states[: len(weights.states)], states[len(weights.states) : -1]
        new_states = states if in_place else [torch.empty(h.shape, dtype=h.dtype) for h in states]
        both = [*states, *new_states] if states else [None] * 4
        data = Data(lanes, [*flat, *directions, *written, *both, *tensors])
        sums = normalised_native.sums(step.cut, data, numbers, self.with_factors, self.reads_iterates)
        if along is not None:
            self._orthogonalise(directions)
        per_tensor, factors = self.tensor_numbers(step, sums, scale[..., 2:])
        stacked = torch.stack([x.expand(*lanes, len(step.cut.shapes)) for x in per_tensor], -1)
        if factors is not None:
            factors = (factors[0].expand(*lanes, step.cut.num_rows), factors[1].expand(*lanes, step.cut.num_columns))
        normalised_native.move(step.cut, data, numbers, stacked, factors, weights.net)
        return new_states

    def _orthogonalise(self, directions: Sequence[Tensor | None]) -> None:
        """Orthogonalise directions where they are; those of one shape are parts of one buffer."""
        buffers = {id(d._base): d._base for d in directions if d is not None and d._base is not None}
        for buffer in buffers.values():
            buffer.copy_(self.orthogonalised(buffer))


def _buffers(step: Step, like: Tensor) -> list[Tensor | None]:
    """Return room for each matrix's direction, (\\*lanes, rows, columns), together for those of one shape."""
    found: list[Tensor | None] = [None] * len(step.cut.shapes)
    groups: dict[tuple[int, int], list[int]] = {}
    for tensor, (shape, (matrix, columns, *_)) in enumerate(zip(step.cut.shapes, step.cut.layout, strict=True)):
        if matrix and columns:
            groups.setdefault((shape[0], columns), []).append(tensor)
    for size, members in groups.items():
        for tensor, own in zip(members, like.new_empty((len(members), *step.lanes, *size)).unbind(), strict=True):
            found[tensor] = own
    return found


@functools.lru_cache(maxsize=256)
def _kinds(names: tuple[str, ...], shapes: Shapes) -> tuple[TensorKind, ...]:
    found = kinds_of({k: torch.empty(s, device="meta") for k, s in zip(names, shapes, strict=True)})
    return tuple(found.values())


def _side_by_side(lanes: torch.Size, *parts: Tensor) -> Tensor:
    """Return (\\*lanes, numbers)."""
    return torch.cat([part.expand(*lanes, part.shape[-1]) for part in parts], -1)


def _require_shapes(flat: Sequence[Tensor], shapes: Shapes, num_dims: int) -> None:
    """Raise ValueError where C would read past a tensor's end."""
    for i, tensor in enumerate(flat):
        expected = shapes[i % len(shapes)]
        if tuple(tensor.shape[num_dims:]) != expected:
            raise ValueError(
                f"a step was given a {READ[i // len(shapes)]} of shape {tuple(tensor.shape[num_dims:])} for a "
                f"parameter of shape {expected}; the state must be this rule's own, made by init for these parameters"
            )
