"""The registry of task families: name -> family, and family <-> configuration."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from learnedopt.core.task import TaskFamily

_TABLE = {
    "quadratic": "quadratic:Quadratic",
    "logistic": "logistic:LogisticRegression",
    "linear-regression": "regression:LinearRegression",
    "image-mlp": "image_mlp:ImageMLP",
    "noisy-images": "noisy_images:NoisyImages",
    "sine": "sine:Sine",
    "omniglot": "omniglot:Omniglot",
    "image-folder": "image_folder:ImageFolder",
    "mini-imagenet": "mini_imagenet:MiniImageNet",
}
"""name -> module in this package:class; imported when first made."""
_registered: dict[str, Callable[..., TaskFamily]] = {}


def names() -> list[str]:
    """Return the names of all registered families."""
    return [*_TABLE, *_registered]


def register(name: str, factory: Callable[..., TaskFamily]) -> None:
    """Add a family under a name of its own, so that ``make`` builds it.

    Args:
        name: a name that is not taken.
        factory: a class, or a function that returns a family. ``describe`` needs the class: a frozen dataclass whose
            fields are numbers, strings and tuples of them. Families that hold out tasks, or that recipes train on, take
            an option ``meta_split``.

    Raises:
        TypeError: ``name`` is not a string or ``factory`` cannot be called.
        ValueError: the name is taken.
    """
    if not isinstance(name, str) or not callable(factory):
        raise TypeError(f"register({name!r}, {factory!r}): pass a name and a class or function that returns a family")
    if name in _TABLE or _registered.get(name, factory) is not factory:
        raise ValueError(f"a task family named {name!r} is already registered; choose another name")
    _registered[name] = factory


def make(name: str, /, **options: Any) -> TaskFamily:
    """Make the family of that name.

    Args:
        name: one of ``names()``.
        options: the family's own; lists are taken for tuples.

    Raises:
        TypeError: an option is ill-typed.
        ValueError: the name or an option is unknown, an option without default is missing, or a value is refused.

    Example:
        >>> make("quadratic", dim=3)
        Quadratic(dim=3, distribution='gaussian', start_scale=0.0, dtype=None, meta_split='train')
    """
    factory = _factory(name)
    given = {key: _tuples(value) for key, value in options.items()}
    _check_options(name, factory, given)
    family = factory(**given)
    if not isinstance(family, TaskFamily):
        raise TypeError(f"the factory registered as {name!r} returned a {type(family).__name__}, not a TaskFamily")
    return family


def describe(family: TaskFamily) -> dict[str, Any]:
    """Return the family's configuration ``{"name": ..., "options": {...}}``, which JSON can hold; see ``build``.

    Raises:
        TypeError: an option is of a type that JSON cannot hold, or the family is not a dataclass.
        ValueError: the family's class is not registered.
    """
    name = _name_of(type(family))
    if dataclasses.is_dataclass(family):
        fields = [field.name for field in dataclasses.fields(family) if field.init]
    elif not inspect.signature(type(family)).parameters:
        fields = []
    else:
        raise TypeError(f"{type(family).__name__} takes arguments that are not on record; make it a frozen dataclass")
    return {"name": name, "options": {key: _encode(getattr(family, key), f"{name}.{key}") for key in fields}}


def build(config: Mapping[str, Any]) -> TaskFamily:
    """Make the family that ``describe`` described.

    Raises:
        TypeError: an option is ill-typed.
        ValueError: it is not a configuration of a registered family.
    """
    if (
        not isinstance(config, Mapping)
        or config.keys() != {"name", "options"}
        or not isinstance(config["options"], Mapping)
    ):
        raise ValueError(f'this is no configuration of a family: {config!r}; it needs exactly "name" and "options"')
    return make(config["name"], **config["options"])


def _factory(name: str) -> Callable[..., TaskFamily]:
    if name in _registered:
        return _registered[name]
    if name not in _TABLE:
        hint = difflib.get_close_matches(str(name), names(), n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no task family {name!r}; did you mean {hint!r}? Families: {', '.join(names())}")
    module, _, attribute = _TABLE[name].partition(":")
    return getattr(importlib.import_module(f"learnedopt.tasks.{module}"), attribute)


def _name_of(kind: type[TaskFamily]) -> str:
    for name, factory in _registered.items():
        if factory is kind:
            return name
    for name, target in _TABLE.items():
        module, _, attribute = target.partition(":")
        if (kind.__module__, kind.__qualname__) == (f"learnedopt.tasks.{module}", attribute):
            return name
    raise ValueError(
        f"{kind.__module__}.{kind.__qualname__} is not registered, so a configuration could not name it; call "
        f"learnedopt.tasks.register('<name>', {kind.__name__}) first"
    )


def _check_options(name: str, factory: Callable[..., TaskFamily], given: Mapping[str, Any]) -> None:
    parameters = inspect.signature(factory).parameters
    hints = get_type_hints(factory) if name in _TABLE else {}  # a user's own annotations may not be resolvable
    shown = [f"{key}: {_text(hints[key])} = {p.default!r}" if key in hints else str(p) for key, p in parameters.items()]
    valid = f"options of {name!r}: {', '.join(shown) or 'none'}"
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, value in given.items():
        if key not in parameters and not open_ended:
            near = difflib.get_close_matches(key, parameters, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name!r} has no option {key!r}{hint} ({valid})")
        if key in hints and not _fits(value, hints[key]):
            raise TypeError(f"{name!r}: {key}={value!r} ({type(value).__name__}) is not of the option's type ({valid})")
    named = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [f"{p.name}=" for p in named if p.default is p.empty and p.name not in given]
    if missing:
        raise ValueError(f"{name!r} needs {', '.join(missing)} ({valid})")


def _text(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of an annotated type; which strings a Literal takes is the family's to say."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(x, args[0]) for x in value)  # tuple[x, ...]
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _encode(value: Any, where: str) -> Any:
    if isinstance(value, tuple | list):
        return [_encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError(
        f"{where} is {value!r} ({type(value).__name__}), which a configuration cannot hold; options are finite "
        "numbers, strings and tuples of them"
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
