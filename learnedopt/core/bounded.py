"""Tensors may only be made so large, where a file says how large they are to be."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from learnedopt.core.containers import is_list_or_tuple

_LEAST = 1 << 16
"""Numbers that anybody may make."""
_OPERATIONS = 100
"""For each tensor that is expected, and as many as for so many tensors beside."""
_FREE = frozenset({
    "__get__", "__len__", "size", "stride", "dim", "numel", "element_size", "is_floating_point", "is_complex", "expand",
    "expand_as", "view", "detach", "requires_grad_",
})  # fmt: skip
"""Operations that make nothing, whatever they are asked of."""
_MAKERS = frozenset({
    "empty", "zeros", "ones", "full", "rand", "randn", "randint", "normal", "eye", "arange", "linspace", "new_empty",
    "new_zeros", "new_ones", "new_full", "repeat", "tile",
})  # fmt: skip


@contextmanager
def bounded(numbers: int, tensors: int) -> Generator[None, None, None]:
    """Refuse work far beyond what makes ``tensors`` tensors of ``numbers`` numbers in all.

    What a function of torch is asked for is read off its arguments before it makes anything.

    Raises:
        ValueError: one would make more than eight times as many numbers, or there are too many calls.
    """
    with _Bounded(8 * numbers + _LEAST, _OPERATIONS * (tensors + _OPERATIONS)):
        yield


class _Bounded(TorchFunctionMode):
    # No mode of the dispatcher: the first one in a process imports torch's compiler, which takes seconds.
    def __init__(self, numbers: int, operations: int) -> None:
        super().__init__()
        self._numbers, self._operations = numbers, operations

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given, name = kwargs or {}, getattr(func, "__name__", "")
        self._operations -= 1
        if self._operations < 0:
            raise ValueError("it takes more operations than tensors of that number and size are made by")
        asked = 0 if name in _FREE else _asked(name, (*args, *given.values()))
        if asked > self._numbers:
            raise ValueError(f"it asks for tensors of {asked} numbers, where there are places for {self._numbers}")
        return func(*args, **given)


def _asked(name: str, arguments: tuple[Any, ...]) -> int:
    """Return how many numbers the largest tensor among the arguments has, or the one that they are the sizes of."""
    largest = max((value.numel() for value in arguments if isinstance(value, Tensor)), default=0)
    if name not in _MAKERS:
        return largest
    sizes = [math.prod(value) for value in arguments if is_list_or_tuple(value)]  # a Size is a tuple
    numbers = [value for value in arguments if type(value) is int and value > 0]
    return max([largest, *(sizes or [math.prod(numbers)])])
