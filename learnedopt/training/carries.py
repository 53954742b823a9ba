"""An estimator's carry as plain values, which a file can hold without any class, and back.

A carry is the estimator's own: any nest of dicts, lists, tuples, named tuples and dataclasses whose leaves are tensors,
numbers, truth values and None. In a file a class is but a name, and what is loaded is made of classes that the training
which goes on brings itself.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from learnedopt.core.containers import is_dict, is_list, is_tuple

Classes: TypeAlias = dict[str, type]
"""The classes of named tuples and dataclasses by module and name, ``learnedopt.core.inner:Carry``."""
_BUILTIN: Classes = {"dict": dict, "OrderedDict": OrderedDict, "list": list, "tuple": tuple}
_NUMBERS = (bool, int, float)


def leaves(carry: Any, path: str = "carry") -> Iterator[tuple[str, Any]]:
    """Yield every leaf with the Python expression that reaches it, such as ``carry.params["weight"]``."""
    found = children(carry)
    if found is None:
        yield path, carry
        return
    by_name = type(carry) not in _BUILTIN.values()
    for key, child in found.items():
        yield from leaves(child, f"{path}.{key}" if by_name else f"{path}[{key!r}]")


def require_plain(carry: Any, whose: str, classes: Classes | None = None) -> None:
    """Raise TypeError, which names the leaf, unless all leaves of ``carry`` are tensors, numbers or None.

    With ``classes`` also where it holds a class that is not among them: no checkpoint could rebuild it.
    """
    for path, leaf in leaves(carry):
        # Exactly these types: NumPy's float64 is a float too, but a class that no checkpoint may load.
        if leaf is not None and type(leaf) not in _NUMBERS and not isinstance(leaf, Tensor):
            raise TypeError(
                f"the carry of {whose} has {_told(leaf)} at {path}, which a checkpoint cannot keep. A carry is any "
                "nest of dicts (with strings or integers as keys), lists, tuples, named tuples and dataclasses with "
                "tensors, int, float, bool and None as leaves" + _advice(leaf)
            )
    unknown = [] if classes is None else sorted(classes_of(carry).keys() - classes.keys())
    if unknown:
        raise TypeError(
            f"the carry of {whose} holds {unknown}, which are not in what {whose}.start returns, nor in a begun "
            "Carry: a checkpoint loads no classes, so it could not rebuild them. Let start return a carry of the same "
            "classes, or use a dict or a tuple there"
        )


def classes_of(carry: Any) -> Classes:
    """Return the classes of the named tuples and dataclasses in a carry."""
    within = children(carry)
    if within is None:
        return {}
    found: Classes = {} if _name(carry) in _BUILTIN else {_name(carry): type(carry)}
    for child in within.values():
        found |= classes_of(child)
    return found


def pack(carry: Any, home: torch.device) -> Any:
    """Return a carry as lists ``[kind, keys, children]`` with plain leaves; a tensor away from ``home`` says where.

    Tensors are copies without a graph: views of larger tensors would be saved whole.
    """
    within = children(carry)
    if within is not None:
        return [_name(carry), list(within), [pack(child, home) for child in within.values()]]
    if not isinstance(carry, Tensor):
        return carry
    tensor = carry.detach().clone()
    return tensor if tensor.device == home else ("on", str(tensor.device), tensor)


def unpack(packed: Any, classes: Classes, home: torch.device) -> Any:
    """Return what was packed, the named tuples and dataclasses in it made of ``classes``.

    Raises:
        ValueError: it holds a class that is not among them, or one of other fields.
    """
    if isinstance(packed, Tensor):
        return packed.to(home)
    if is_tuple(packed):
        return packed[2].to(packed[1])
    if not is_list(packed):
        return packed
    kind, keys, packed_values = packed
    values = [unpack(child, classes, home) for child in packed_values]
    if kind in ("list", "tuple"):
        return _BUILTIN[kind](values)
    by_key = dict(zip(keys, values, strict=True))
    if kind in _BUILTIN:
        return _BUILTIN[kind](by_key)
    found = _find(kind, classes)
    if keys != _fields(found) and not _joined_later(keys, found):
        raise ValueError(f"its {kind} has the fields {keys}, the present one {_fields(found)}")
    return found(**by_key)


def _find(name: str, classes: Classes) -> type[Any]:
    if name in classes:
        return classes[name]
    # A class may have moved to another module since.
    moved = [kind for other, kind in classes.items() if other.partition(":")[2] == name.partition(":")[2]]
    if len(moved) != 1:
        raise ValueError(f"it holds {name}, of which this training's carries have none")
    return moved[0]


def children(node: Any) -> dict[Any, Any] | None:
    """Return what a node holds, by key, or None where it is a leaf."""
    if type(node) in (list, tuple):
        return dict(enumerate(cast("list[Any]", node)))
    if type(node) in (dict, OrderedDict):
        return dict(node) if all(type(key) in (str, int) for key in node) else None
    fields = _fields(cast("type[Any]", type(node)))
    return None if fields is None else {name: getattr(node, name) for name in fields}


def _fields(kind: type[Any]) -> list[str] | None:
    """Return the fields that a named tuple or a dataclass is made of; None for other classes."""
    names: Any = getattr(kind, "_fields", None)
    if issubclass(kind, tuple):
        return None if names is None else [*names]
    if dataclasses.is_dataclass(kind) and all(f.init for f in dataclasses.fields(kind)):
        return [f.name for f in dataclasses.fields(kind)]
    return None


def _joined_later(keys: list[Any], kind: type[Any]) -> bool:
    """Whether a file of before lacks fields of a named tuple alone that have defaults and stand at its end."""
    fields, defaults = _fields(kind) or [], getattr(kind, "_field_defaults", {})
    return keys == fields[: len(keys)] and all(name in defaults for name in fields[len(keys) :])


def _name(node: Any) -> str:
    kind = cast("type[Any]", type(node))
    return kind.__name__ if kind in _BUILTIN.values() else f"{kind.__module__}:{kind.__qualname__}"


def _told(leaf: Any) -> str:
    kind = cast("type[Any]", type(leaf))
    if is_dict(leaf):
        return f"a {kind.__name__} with the keys {list(leaf)}"
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"a {name} {leaf!r}" if isinstance(leaf, str | int | float) else f"a {name}"


def _advice(leaf: Any) -> str:
    if isinstance(leaf, torch.Generator):
        return "; keep the generator's seed, an int, or its get_state(), a tensor"
    if isinstance(leaf, str):
        return "; what a string says belongs into the estimator itself"
    if isinstance(leaf, float | int):
        return "; convert it with float() or int()"
    return ""
