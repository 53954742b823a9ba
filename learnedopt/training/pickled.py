"""Which pickles are read: those of tensors and plain values, in which nothing else is made, nor any tensor at will.

``torch.load(weights_only=True)`` runs no code, but it also calls every class of tensors that a file names, with the
sizes that the file names: 300 bytes ask for gigabytes. So a pickle is gone through before it is loaded, without being
carried out.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, cast

import torch

from learnedopt.core.containers import is_tuple

_CALLED = frozenset({
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter",
    "torch Size", "torch device", "collections OrderedDict", "collections Counter", "__builtin__ set",
})  # fmt: skip
"""What may be called: it makes no more than it is given."""
_ITEM_SIZES = {
    "torch DoubleStorage": 8, "torch FloatStorage": 4, "torch HalfStorage": 2, "torch BFloat16Storage": 2,
    "torch LongStorage": 8, "torch IntStorage": 4, "torch ShortStorage": 2, "torch CharStorage": 1,
    "torch ByteStorage": 1, "torch BoolStorage": 1, "torch ComplexDoubleStorage": 16, "torch ComplexFloatStorage": 8,
    "torch.storage UntypedStorage": 1,
}  # fmt: skip
"""Bytes of a number in what may be named as the kind of a stored tensor."""
_MOST = 50_000
"""Things on the stack: pickles put down what they have made at every thousandth."""
_CONSTANTS = frozenset({
    "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE",
})  # fmt: skip
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FILLS = {"APPEND": 1, "SETITEM": 2}
_FILLS_FROM_MARK = frozenset({"APPENDS", "SETITEMS"})


class NotPlain(ValueError):
    """A pickle holds something else than tensors and plain values."""


def require_plain(pickled: bytes, stored: Callable[[str], int]) -> None:
    """Raise unless a pickle of protocol 2 makes nothing but tensors and plain values.

    Args:
        pickled: what ``torch.save`` wrote.
        stored: how many bytes the tensor of that key has on file.

    Raises:
        NotPlain: it does more than that, or a tensor is not as large as what is stored of it.
        Exception: of any kind, where it is no pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for operation, given, _ in pickletools.genops(pickled):
        name, argument = operation.name, cast(Any, given)
        if len(stack) > _MOST:
            raise NotPlain("it begins too many lists before it ends one")
        if name in _CONSTANTS:
            stack.append(argument)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append(None)  # what is in them cannot be taken out again
        elif name in _TUPLES:
            stack.append(_taken(stack, len(stack) - _TUPLES[name]))
        elif name == "TUPLE":
            stack.append(_taken(stack, marks.pop()))
        elif name in _FILLS:
            _taken(stack, len(stack) - _FILLS[name])
        elif name in _FILLS_FROM_MARK:
            _taken(stack, marks.pop())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_Named(_known(argument)))
        elif name == "BINPERSID":
            _require_stored(stack.pop(), stored)
            stack.append(None)
        elif name == "REDUCE":
            called, _ = _taken(stack, len(stack) - 2)
            if not isinstance(called, _Named) or called not in _CALLED:
                raise NotPlain(f"it calls {called!r}")
            stack.append(None)
        elif name not in ("PROTO", "STOP"):
            raise NotPlain(f"it has the operation {name}")


class _Named(str):
    """A class or function that a pickle names, where a string would be a text."""


def _taken(stack: list[Any], start: int) -> tuple[Any, ...]:
    if start < 0:
        raise ValueError("it takes more than it has made")
    taken = tuple(stack[start:])
    del stack[start:]
    return taken


def _known(name: str) -> str:
    kind = getattr(torch, name.removeprefix("torch "), None) if name.startswith("torch ") else None
    if name not in _CALLED and name not in _ITEM_SIZES and not isinstance(kind, torch.dtype):
        raise NotPlain(f"it names {name!r}")
    return name


def _require_stored(key: Any, stored: Callable[[str], int]) -> None:
    if not is_tuple(key) or len(key) != 5 or not isinstance(key[1], _Named) or key[1] not in _ITEM_SIZES:
        raise NotPlain("it names a tensor in another way than torch does")
    _, kind, name, _, count = key
    needed = _ITEM_SIZES[kind] * count
    if stored(name) != needed:
        raise NotPlain(f"{stored(name)} bytes are stored of a tensor of {needed}")
