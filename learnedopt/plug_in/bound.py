"""A rule's steps made ready once, for as long as an optimizer's tensors stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from learnedopt.core.rule import Bound


@final
class BoundSteps:
    """Steps for these parameters and their memory, and what tells whether they are still the ones.

    Args:
        bound: the steps.
        params: in the order that the rule knows them in.
        memory: what ``Optimizer.state`` has of each, with the count ``step`` in it.
        constants: further objects that the steps depend on and that must stay the very same ones, such as theta.
    """

    def __init__(
        self, bound: Bound, params: Sequence[Tensor], memory: Sequence[dict[str, Any]], constants: tuple[Any, ...]
    ) -> None:
        self._bound, self._params, self._memory, self._constants = bound, params, memory, constants
        self._leaves = [(own, key, x) for own in memory for key, x in own.items() if isinstance(x, Tensor)]
        self._tensors = [*params, *(x for *_, x in self._leaves)]
        self._addresses = [x.data_ptr() for x in self._tensors]
        self._strides = [p.stride() for p in params]

    def hold(
        self, params: Sequence[Tensor], memory: Sequence[dict[str, Any] | None], constants: tuple[Any, ...]
    ) -> bool:
        """Return whether everything is the same and lies where it lay."""
        return (
            _same(params, self._params)
            and _same(memory, self._memory)
            and _same(constants, self._constants)
            and all(own.get(key) is x for own, key, x in self._leaves)
            and [x.data_ptr() for x in self._tensors] == self._addresses
            and [p.stride() for p in params] == self._strides
        )

    def step(self) -> bool:
        """Take a step, and count it; return whether it was done, for which all gradients must be there."""
        grads = [p.grad for p in self._params]
        if any(g is None for g in grads):
            return False
        with torch.no_grad():
            done = self._bound.step(grads)  # pyright: ignore[reportArgumentType]
        if done:
            for own in self._memory:
                own["step"] += 1
        return done


def _same(found: Sequence[Any], held: Sequence[Any]) -> bool:
    return len(found) == len(held) and all(a is b for a, b in zip(found, held, strict=True))
