"""How a batch of tasks is run: one after the other or together, where, and in which precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, final

import torch

from learnedopt.core import tree
from learnedopt.core.counts import require_count
from learnedopt.core.rule import Kernel


@final
@dataclass(frozen=True)
class Execution:
    """How tasks are run; it changes speed and memory, never the result.

    Args:
        chunk_size: tasks run together. 1 is a plain autograd loop over tasks, n > 1 runs chunks of n under
            ``torch.func.vmap`` (any number at or above ``num_tasks`` means all at once). Default: 1 on a CPU, where
            many sets of weights fall out of the cache, and all at once on a GPU, where small tasks are launch-bound.
            Of particles, as evolution strategies run them, it counts these, and the default is all at once.
        device: where tasks, parameters and batches are moved to; by default they stay where the family makes them.
        dtype: what floating-point parameters and batches are cast to; by default they stay as the family makes them.
        compile: compile meta-gradients. True compiles that of a chunk as a whole (its forward steps, their gradients
            and the way back) up to 20 inner steps, and beyond that, or in segments, one inner step forward and one
            back, which are then called over the unroll; ``"step"`` does the latter for short unrolls too. What is kept
            of a step is then its start and its batch, as by ``segment=1``. It pays where theta is trained for long,
            since compiling takes from seconds to minutes, as a whole the longer the more inner steps; torch keeps what
            it compiled on disk, so that the next process takes seconds. Estimators that back-propagate through unrolls
            do so; where they cannot, or compiling fails, the run goes on uncompiled, with a warning that says why.
            Under the coordinatewise adjoint, where it applies, the gradient of an inner step is what is compiled.
        mixed_mode: under ``Tape.FULL``, keep an inner step's parameters and batch in place of its gradient's graph, and
            compute the gradient again on the way back: second derivatives by forward mode over reverse mode, or by
            reverse over reverse where the first call finds that forward mode fails or errs; a warning in the log then
            says through what. The loss must not draw random numbers.
        vet: evaluate the loss a few times before the first estimate, to find what would make meta-gradients silently
            wrong (``learnedopt check`` says what that is).
    """

    chunk_size: int | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    compile: bool | Literal["step"] = False
    mixed_mode: bool = False
    vet: bool = True

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            require_count("chunk_size", self.chunk_size, least=1)
        if not isinstance(self.compile, bool) and self.compile != "step":
            raise TypeError(f'compile={self.compile!r} is neither True nor False nor "step"')
        for choice in ("mixed_mode", "vet"):
            if not isinstance(getattr(self, choice), bool):
                raise TypeError(f"{choice}={getattr(self, choice)!r} is neither True nor False")
        if self.compile and self.mixed_mode:
            raise ValueError(
                f"compile={self.compile!r} and mixed_mode=True exclude each other: what a compiled program keeps or "
                "computes again is for the compiler to choose; leave one out"
            )


class ThetaMap(Protocol):
    """How a function of one theta and one task is mapped over whatever is run together."""

    def apply_theta(self, fn: Callable[..., Any], theta: tree.Tree, *each: tree.Tree) -> Any:
        """Call ``fn(theta, *each)``, on trees without the leading dimensions that the map itself takes care of."""

    def apply_kernel(self, kernel: Kernel, theta: tree.Tree, *each: tree.Tree) -> Any:
        """Return what ``kernel.step_of_lanes`` does, with the leading dimensions; None where there are none."""


class TaskMap(NamedTuple):
    """How a function of one task is mapped over a chunk of them: called as it is for one, under vmap for several."""

    num_tasks: int
    theta_per_task: bool = False

    def unbatch(self, batched: tree.Tree) -> tree.Tree:
        """Return a batched tree as ``apply`` takes it: without the leading dimension where there is one task."""
        return tree.squeeze(batched) if self.num_tasks == 1 else batched

    def rebatch(self, inside: tree.Tree) -> tree.Tree:
        """Return what ``apply`` returned, batched again."""
        return tree.unsqueeze(inside) if self.num_tasks == 1 else inside

    def apply(self, fn: Callable[..., Any], shared: tuple[tree.Tree, ...], *each: tree.Tree) -> Any:
        """Call ``fn(*shared, *each)``, a function of ONE task, on trees that ``unbatch`` returned."""
        if self.num_tasks == 1:
            return fn(*shared, *each)
        in_dims = (None,) * len(shared) + (0,) * len(each)
        return torch.func.vmap(fn, in_dims=in_dims)(*shared, *each)

    def apply_theta(self, fn: Callable[..., Any], theta: tree.Tree, *each: tree.Tree) -> Any:
        """Call ``fn(theta, *each)`` with one theta for all tasks or, with ``theta_per_task``, each one's own."""
        if self.theta_per_task:
            return self.apply(fn, (), theta, *each)
        return self.apply(fn, (theta,), *each)

    def apply_kernel(self, kernel: Kernel, theta: tree.Tree, *each: tree.Tree) -> Any:
        """Call ``kernel.step_of_lanes`` on all tasks; None for one task, which has no lanes."""
        if self.num_tasks == 1:
            return None
        theta = theta if self.theta_per_task else tree.unsqueeze(theta)
        return kernel.step_of_lanes(theta, *each, num_dims=1)
