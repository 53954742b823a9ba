"""What a loss holds beside what it is given: tensors and random generators, found, watched and put back."""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from learnedopt.core.containers import is_dict, is_list_or_tuple, is_set

_TENSORS = ("_parameters", "_buffers")
"""Where a module has them by name, those that are None as well: torch has no public way."""
_DEPTH = 8
_MOST_OBJECTS = 20_000  # looked at; a list of a data set's items is not walked to its end
_MOST_ITEMS = 1_000
_MOST_COPIED = (
    2**24
)  # entries in all; of the others only torch's own count of writes is watched, which ``.data`` evades


class Held(NamedTuple):
    """What was found: tensors by name, whether each is a parameter or buffer of a module, and generators by name."""

    tensors: dict[str, Tensor]
    registered: set[str]
    generators: dict[str, Any]


def find(**roots: Any) -> Held:
    """Walk objects, modules, containers and functions (their closures, defaults and globals) from named roots.

    What lies behind slots, C extensions or properties is not found.
    """
    held, seen = Held({}, set(), {}), set[int]()
    queue = deque((name, value, 0) for name, value in roots.items())
    while queue and len(seen) < _MOST_OBJECTS:
        name, value, depth = queue.popleft()
        if id(value) in seen and not isinstance(value, Tensor):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            held.tensors[name] = value
        elif isinstance(value, torch.Generator | random.Random | np.random.Generator):
            held.generators[name] = value
        elif depth < _DEPTH:
            if isinstance(value, nn.Module):
                held.registered.update(f"{name}.{k}" for part in _TENSORS for k in getattr(value, part))
            queue.extend((f"{name}{where}", x, depth + 1) for where, x in _inside(value))
    return held


def _inside(value: object) -> Iterator[tuple[str, Any]]:
    """Yield what an object holds, each with the way to it, such as ``.weight`` or ``[0]``."""
    if is_dict(value):
        yield from ((f"[{k!r}]", x) for k, x in list(value.items())[:_MOST_ITEMS])
    elif is_list_or_tuple(value) or is_set(value):
        yield from ((f"[{i}]", x) for i, x in enumerate(list(value)[:_MOST_ITEMS]))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from ((".__self__", value.__self__), ("", value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, nn.Module):
        for part in (*_TENSORS, "_modules"):
            yield from ((f".{k}", x) for k, x in getattr(value, part).items() if x is not None)
        yield from ((f".{k}", x) for k, x in vars(value).items() if not k.startswith("_"))
        if not type(value).__module__.startswith("torch."):
            yield ".forward", type(value).forward
    elif hasattr(value, "__dict__") and not isinstance(value, type | types.ModuleType):
        yield from ((f".{k}", x) for k, x in vars(value).items())


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    if (function.__module__ or "").startswith("torch."):
        return
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f":{name}", cell.cell_contents
        except ValueError:  # an empty cell: the name is not bound yet
            continue
    yield from ((f":{i}", x) for i, x in enumerate(function.__defaults__ or ()))
    for name in code.co_names:
        value = function.__globals__.get(name)
        own = isinstance(value, types.FunctionType) and value.__module__ == function.__module__
        if own or isinstance(value, Tensor | nn.Module | torch.Generator):
            yield f":{name}", value


class Watch:
    """Remembers tensors, to say later which of them were written to.

    Of a module's tensors and under the roots in ``strict`` a write counts that changed nothing this time, as one of an
    embedding's ``max_norm`` before a row has grown, or of a spectral norm at rest.
    """

    def __init__(self, look: Callable[[], Held], strict: tuple[str, ...]) -> None:
        self._look, self._strict = look, strict
        self.held: Held = look()
        self._before: dict[str, tuple[Tensor, int | None, Tensor | None]] = {}
        left = _MOST_COPIED
        for name, x in self.held.tensors.items():
            copied = x.layout is torch.strided and x.device.type != "meta" and x.numel() <= left
            self._before[name] = x, _version(x), x.detach().clone() if copied else None
            left -= x.numel() if copied else 0

    def written(self) -> list[str]:
        """Return the names of the tensors whose values changed in place, and of a module's that were exchanged."""
        now = self._look().tensors
        found: list[str] = []
        for name, (x, version, copy) in self._before.items():
            current = now.get(name, x) if name in self.held.registered else x
            moved = version != _version(x)
            if moved and (name in self.held.registered or name.startswith(self._strict)):
                changed = True
            elif copy is None:
                changed = moved or (current is not x and not same_bits(current, x))
            else:
                changed = not same_bits(current, copy)
            found += [name] if changed else []
        return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same values bit by bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(a, b) or bool((a.eq(b) | (a.ne(a) & b.ne(b))).all())


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def random_states(generators: dict[str, Any]) -> dict[str, Any]:
    """Return the state of every global generator and of the given ones, in a form that ``==`` compares."""
    found: dict[str, Any] = {
        "torch's global generator": _bits(torch.get_rng_state()),
        "Python's random": random.getstate(),
        "NumPy's global generator": _of_numpy(np.random.get_state()),
    }
    if torch.cuda.is_initialized():
        found["CUDA's global generator"] = [_bits(state) for state in torch.cuda.get_rng_state_all()]
    for name, generator in generators.items():
        if isinstance(generator, torch.Generator):
            found[name] = _bits(generator.get_state())
        elif isinstance(generator, random.Random):
            found[name] = generator.getstate()
        else:
            found[name] = repr(generator.bit_generator.state)
    return found


def seed_everything(seed: int) -> None:
    """Seed every global generator, those of CUDA only where it has started."""
    # Not torch.manual_seed: where CUDA has not started, its seed would stay behind and take effect later.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed)


@contextmanager
def random_states_restored() -> Generator[None, None, None]:
    """Put every global generator back, whatever happens inside."""
    on_cpu, of_python, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(on_cpu)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        if on_cuda is not None:
            torch.cuda.set_rng_state_all(on_cuda)


def _bits(state: Tensor) -> bytes:
    return state.numpy().tobytes()


def _of_numpy(state: Any) -> tuple[Any, ...]:
    return tuple(x.tobytes() if isinstance(x, np.ndarray) else x for x in state)
