"""The registry of update rules: name -> rule, and rule <-> configuration."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params

_TABLE = {
    "sgd": "sgd:SGD",
    "momentum": "momentum:Momentum",
    "nesterov": "nesterov:Nesterov",
    "rmsprop": "rmsprop:RMSprop",
    "adam": "adam:Adam",
    "lstm": "lstm:LSTM",
    "learned-rates": "meta_sgd:LearnedRates",
    "meta-sgd": "meta_sgd:meta_sgd",
    "maml": "meta_sgd:maml",
    "anil": "anil:ANIL",
    "learned-init": "learned_init:LearnedInit",
    "clip": "clip:Clip",
    "partition": "partition:Partition",
}
"""name -> module in this package:class or function; imported when first made."""
_registered: dict[str, Callable[..., UpdateRule]] = {}
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""What a template on file may be of."""


def names() -> list[str]:
    """Return the names of all registered rules."""
    return [*_TABLE, *_registered]


def register(name: str, factory: Callable[..., UpdateRule]) -> None:
    """Add a rule under a name of its own, so that ``make`` builds it and checkpoints can hold it.

    Args:
        name: a name that is not taken.
        factory: a class, or a function that returns a rule. ``describe``, and with it checkpoints, needs the class: a
            frozen dataclass whose fields are numbers, strings, tuples, dicts, rules, and ``template``.

    Raises:
        TypeError: ``name`` is not a string or ``factory`` cannot be called.
        ValueError: the name is taken.
    """
    if not isinstance(name, str) or not callable(factory):
        raise TypeError(f"register({name!r}, {factory!r}): pass a name and a class or function that returns a rule")
    if name in _TABLE or _registered.get(name, factory) is not factory:
        raise ValueError(f"an update rule named {name!r} is already registered; choose another name")
    _registered[name] = factory


def make(name: str, /, *, template: Params | None = None, **options: Any) -> UpdateRule:
    """Make the rule of that name.

    Args:
        name: one of ``names()``.
        template: one task's parameters, for rules with meta-parameters per tensor or coordinate; others take none, and
            it is not used for them, so that one call serves all.
        options: the rule's own. A rule among them may be given as its configuration, see ``describe``.

    Raises:
        TypeError: an option is ill-typed.
        ValueError: the name or an option is unknown, an option without default is missing, or the rule refuses a value.

    Example:
        >>> make("momentum", lr=0.1, learn=("lr",))
        Momentum(learn=('lr',), lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0)
    """
    factory = _factory(name)
    parameters = inspect.signature(factory).parameters
    given = {key: _decode(value, template) for key, value in options.items()}
    if template is not None and "template" in parameters:
        given["template"] = _decode(template, None)
    _check_options(name, parameters, given, get_type_hints(factory) if name in _TABLE else {})
    rule = factory(**given)
    if not isinstance(rule, UpdateRule):
        raise TypeError(f"the factory registered as {name!r} returned a {type(rule).__name__}, not an UpdateRule")
    return rule


def example(name: str, template: Params) -> UpdateRule:
    """Make the named rule with options that have no default filled in: what tests and benchmarks walk over."""
    heavy_ball = {"name": "momentum", "options": {"lr": 0.05}}
    options: dict[str, dict[str, Any]] = {
        "learned-init": {"rule": heavy_ball},
        "clip": {"rule": heavy_ball, "max_value": 0.5},
        "anil": {"head": glob.escape(next(reversed(template), ""))},
        "partition": {"groups": {str(i): [glob.escape(key), heavy_ball] for i, key in enumerate(template)}},
    }
    return make(name, template=template, **options.get(name, {}))


def describe(rule: UpdateRule) -> dict[str, Any]:
    """Return the rule's configuration ``{"name": ..., "options": {...}}``, which JSON can hold; see ``build``.

    Rules among the options are configurations themselves. A template keeps its shapes and dtypes only: values that
    were learned are in theta.

    Raises:
        TypeError: an option is of a type that JSON cannot hold, or the rule is not a dataclass.
        ValueError: the rule's class is not registered.
    """
    name = _name_of(type(rule))
    if dataclasses.is_dataclass(rule):
        fields = [field.name for field in dataclasses.fields(rule) if field.init]
    elif not inspect.signature(type(rule)).parameters:
        fields = []
    else:
        raise TypeError(f"{type(rule).__name__} takes arguments that are not on record; make it a frozen dataclass")
    return {"name": name, "options": {key: _encode(getattr(rule, key), f"{name}.{key}", key) for key in fields}}


def build(config: Mapping[str, Any]) -> UpdateRule:
    """Make the rule that ``describe`` described; a template is rebuilt as zeros.

    Raises:
        TypeError: an option is ill-typed.
        ValueError: it is not a configuration of a registered rule.
    """
    if not _is_rule(config):
        raise ValueError(f'this is no configuration of a rule: {config!r}; it needs exactly "name" and "options"')
    return make(config["name"], **config["options"])


def _factory(name: str) -> Callable[..., UpdateRule]:
    if name in _registered:
        return _registered[name]
    if name not in _TABLE:
        hint = difflib.get_close_matches(str(name), names(), n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no update rule {name!r}; did you mean {hint!r}? Rules: {', '.join(names())}")
    module, _, attribute = _TABLE[name].partition(":")
    return getattr(importlib.import_module(f"learnedopt.optimizers.{module}"), attribute)


def _name_of(kind: type[UpdateRule]) -> str:
    for name, factory in _registered.items():
        if factory is kind:
            return name
    for name, target in _TABLE.items():
        module, _, attribute = target.partition(":")
        if (kind.__module__, kind.__qualname__) == (f"learnedopt.optimizers.{module}", attribute):
            return name
    raise ValueError(
        f"{kind.__module__}.{kind.__qualname__} is not registered, so a configuration could not name it; call "
        f"learnedopt.optimizers.register('<name>', {kind.__name__}) first, before loading as well"
    )


def _check_options(
    name: str, parameters: Mapping[str, inspect.Parameter], given: dict[str, Any], hints: dict[str, Any]
) -> None:
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    valid = f"options of {name!r}: {', '.join(_signature(p) for p in parameters.values()) or 'none'}"
    for key, value in given.items():
        if key not in parameters and not open_ended:
            near = difflib.get_close_matches(key, parameters, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name!r} has no option {key!r}{hint} ({valid})")
        if key in hints and not _fits(value, hints[key]):
            raise TypeError(f"{name!r}: {key}={value!r} ({type(value).__name__}) is not of the option's type ({valid})")
    missing = [
        key
        for key, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and key not in given
    ]
    if missing:
        why = "; template is one task's parameters, without the leading dimension of tasks" * ("template" in missing)
        raise ValueError(f"{name!r} needs {', '.join(f'{key}=' for key in missing)}{why} ({valid})")


def _signature(parameter: inspect.Parameter) -> str:
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{parameter.name}: {parameter.annotation}{default}"


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of an annotated type, containers looked into."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str | int) and value in args
    if origin is tuple:
        each = args[:1] * len(value) if isinstance(value, tuple) and args[1:] == (...,) else args
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if origin in (dict, Mapping):
        return isinstance(value, origin) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, NoneType if hint is None else hint) if isinstance(hint, type) or hint is None else True


def _encode(value: Any, where: str, key: str) -> Any:
    if isinstance(value, UpdateRule):
        return describe(value)
    if isinstance(value, Tensor) and key == "template":
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: _encode(v, f"{where}[{k!r}]", key) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(v, f"{where}[{i}]", key) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError(
        f"{where} is {value!r} ({type(value).__name__}), which a configuration cannot hold; options are finite "
        "numbers, strings, tuples, dicts, rules, and template for tensors, whose values are theta's business"
    )


def _decode(value: Any, template: Params | None) -> Any:
    """Undo ``_encode``; ``template`` goes on to rules among the options that bring none."""
    if _is_rule(value):
        options = value["options"]
        return make(value["name"], **({} if template is None else {"template": template}) | options)
    if isinstance(value, Mapping) and value.keys() == {"shape", "dtype"} and isinstance(value["dtype"], str):
        return _zeros(value["shape"], value["dtype"])
    if isinstance(value, Mapping):
        return {k: _decode(v, template) for k, v in value.items()}
    return tuple(_decode(v, template) for v in value) if isinstance(value, list | tuple) else value


def _zeros(shape: Any, dtype: str) -> Tensor:
    sizes = isinstance(shape, list | tuple) and all(_fits(n, int) and n >= 0 for n in shape)
    if not sizes or dtype not in _DTYPES:
        raise ValueError(
            f"shape={shape!r}, dtype={dtype!r} describe no tensor; shape is a list of sizes, dtype one of {[*_DTYPES]}"
        )
    return torch.zeros((), dtype=_DTYPES[dtype]).expand(tuple(shape))  # one zero: a wrong shape on file costs no memory


def _is_rule(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and value.keys() == {"name", "options"}
        and isinstance(value["name"], str)
        and isinstance(value["options"], Mapping)
    )
