"""Registries: name -> thing, and thing <-> configuration; one class for update rules, families, inner objectives."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeGuard, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from learnedopt.core.containers import is_list_or_tuple, is_mapping, is_tuple
from learnedopt.core.group import is_again
from learnedopt.core.tree import Params

T = TypeVar("T")
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""What a template on file may be of."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A registered thing: its name, and options that the registry checks when it is made."""

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])


@dataclasses.dataclass(eq=False)
class Registry(Generic[T]):
    """Things of one kind by name, and their configurations ``{"name": ..., "options": {...}}``, which JSON can hold.

    Args:
        kind: what each thing is an instance of.
        noun: what messages call one, such as "update rule".
        plural: what they call several.
        package: where the modules of ``table`` lie, and the users' ``register``.
        table: name -> module in the package:class or function; imported when first made.
        templated: whether ``make`` is given a template, which it hands to whatever takes one, nested things as well;
            otherwise ``template`` is an option like any other.
        retired: name of before -> what to make in its place; ``make`` says so.
        registered: what users have added.
        parts: name -> module in the package:class, of what options may be made of beside things: frozen dataclasses,
            which are described as things are.

    Example:
        >>> RULES = Registry(UpdateRule, "update rule", "update rules", "learnedopt.optimizers", {"sgd": "sgd:SGD"})
        >>> RULES.describe(RULES.make("sgd", lr=0.1))["name"]
        'sgd'
    """

    kind: type[T]
    noun: str
    plural: str
    package: str
    table: Mapping[str, str]
    templated: bool = False
    retired: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    registered: dict[str, Callable[..., T]] = dataclasses.field(default_factory=dict[str, Callable[..., T]])
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    def names(self) -> list[str]:
        """Return all names, the users' last."""
        return [*self.table, *self.registered]

    def register(self, name: str, factory: Callable[..., T]) -> None:
        """Add a thing under a name of its own, so that ``make`` builds it and files can name it.

        Args:
            name: a name that is not taken.
            factory: a class, or a function that returns one. ``describe``, and with it every file, needs the class: a
                frozen dataclass whose fields are numbers, strings, tuples, dicts, things of the same registry, and
                ``template``. Task families that hold out tasks, or that recipes train on, take ``meta_split``.

        Raises:
            TypeError: ``name`` is not a string or ``factory`` cannot be called.
            ValueError: the name is taken, and not by what this is a new definition of.
        """
        if not isinstance(cast("object", name), str) or not callable(factory):
            raise TypeError(
                f"register({name!r}, {factory!r}): pass a name, and the class or function that makes the {self.noun}"
            )
        if name in self.table or name in self.retired or not is_again(factory, self.registered.get(name, factory)):
            raise ValueError(f"the name {name!r} of {self.plural} is already registered; choose another name")
        self.registered[name] = factory

    def make(self, name: str, /, *, template: Params | None = None, **options: Any) -> T:
        """Make the thing of that name.

        Args:
            name: one of ``names()``.
            template: one task's parameters, for what has meta-parameters per tensor or coordinate; others take none,
                and it is not used for them, so that one call serves all.
            options: its own; lists are taken for tuples. A thing of the same registry may be given as its
                configuration, see ``describe``.

        Raises:
            TypeError: an option is ill-typed.
            ValueError: the name or an option is unknown, an option without default is missing, or a value is refused.

        Example:
            >>> learnedopt.optimizers.make("momentum", lr=0.1, learn=("lr",))
            Momentum(learn=('lr',), lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0)
        """
        factory = self.factory(name)
        parameters = inspect.signature(factory).parameters
        given = {key: self._decode(value, template if self.templated else None) for key, value in options.items()}
        if template is not None and ("template" in parameters or not self.templated):
            given["template"] = self._decode(template, None)
        hints = get_type_hints(factory) if name in self.table else {}  # a user's own may not be resolvable
        _check_options(name, parameters, given, hints)
        thing = factory(**given)
        if not isinstance(thing, self.kind):
            raise TypeError(
                f"the factory registered as {name!r} returned a {type(thing).__name__}, not a {self.kind.__name__}"
            )
        return thing

    def describe(self, thing: T) -> dict[str, Any]:
        """Return its configuration ``{"name": ..., "options": {...}}``, which JSON can hold; see ``build``.

        Templates are kept as shapes and types only: values that were learned are in theta.

        Raises:
            TypeError: an option is of a type that JSON cannot hold, or the class is not a dataclass.
            ValueError: the class is not registered.
        """
        return self._describe(self._name_of(type(thing)), thing)

    def _describe(self, name: str, thing: object) -> dict[str, Any]:
        if dataclasses.is_dataclass(thing):
            fields = [field.name for field in dataclasses.fields(thing) if field.init]
        elif not inspect.signature(type(thing)).parameters:
            fields = []
        else:
            kind = type(thing).__name__
            raise TypeError(f"{kind} takes arguments that are not on record; make it a frozen dataclass")
        options = {key: self._encode(getattr(thing, key), f"{name}.{key}", key) for key in fields}
        return {"name": name, "options": options}

    def build(self, config: Mapping[str, Any]) -> T:
        """Make the thing that ``describe`` described; a template is rebuilt as zeros.

        Raises:
            TypeError: an option is ill-typed.
            ValueError: it is not a configuration of a registered thing.
        """
        if not _is_configuration(config):
            needed = 'it needs exactly "name" and "options"'
            raise ValueError(f"this is no configuration of {self.plural}: {config!r}; {needed}")
        return self.make(config["name"], **config["options"])

    def _part(self, name: str, options: Mapping[str, Any]) -> Any:
        module, _, attribute = self.parts[name].partition(":")
        factory = getattr(importlib.import_module(f"{self.package}.{module}"), attribute)
        _check_options(name, inspect.signature(factory).parameters, {**options}, get_type_hints(factory))
        return factory(**options)

    def factory(self, name: str) -> Callable[..., T]:
        """Return the class or function that makes the thing of that name.

        Raises:
            ValueError: the name is unknown; the message names the nearest.
        """
        if name in self.registered:
            return self.registered[name]
        if name in self.retired:
            raise ValueError(f"there is no {self.noun} {name!r} any more: {self.retired[name]}")
        if name not in self.table:
            raise ValueError(
                f"there is no {self.noun} {name!r}{nearest(str(name), self.names()) or '.'} All {self.plural}: "
                f"{', '.join(self.names())}"
            )
        module, _, attribute = self.table[name].partition(":")
        return getattr(importlib.import_module(f"{self.package}.{module}"), attribute)

    def _name_of(self, kind: type[T]) -> str:
        for name, factory in self.registered.items():
            if factory is kind:
                return name
        for name, target in self.table.items():
            if self._is(kind, target):
                return name
        raise ValueError(
            f"{kind.__module__}.{kind.__qualname__} is not registered, so a configuration could not name it; call "
            f"{self.package}.register('<name>', {kind.__name__}) first, before loading as well"
        )

    def _is(self, kind: type[Any], target: str) -> bool:
        module, _, attribute = target.partition(":")
        return (kind.__module__, kind.__qualname__) == (f"{self.package}.{module}", attribute)

    def _encode(self, value: object, where: str, key: str) -> Any:
        if isinstance(value, self.kind):
            return self.describe(value)
        for name, target in self.parts.items():
            if self._is(type(value), target):
                return self._describe(name, value)
        if isinstance(value, Tensor) and key == "template":
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if is_mapping(value) and all(isinstance(k, str) for k in value):
            return {k: self._encode(v, f"{where}[{k!r}]", key) for k, v in value.items()}
        if is_list_or_tuple(value):
            return [self._encode(v, f"{where}[{i}]", key) for i, v in enumerate(value)]
        if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
            return value
        raise TypeError(
            f"{where} is {value!r} ({type(value).__name__}), which a configuration cannot hold; options are finite "
            f"numbers, strings, tuples, dicts, {self.plural}, and template for tensors, whose values are theta's"
        )

    def _decode(self, value: Any, template: Params | None) -> Any:
        """Undo ``_encode``; ``template`` goes on to things among the options that bring none."""
        if _is_configuration(value):
            options = value["options"]
            if value["name"] in self.parts:
                return self._part(value["name"], options)
            return self.make(value["name"], **({} if template is None else {"template": template}) | options)
        if is_mapping(value) and set(value) == {"shape", "dtype"} and isinstance(value["dtype"], str):
            return _zeros(value["shape"], value["dtype"])
        if is_mapping(value):
            return {k: self._decode(v, template) for k, v in value.items()}
        return tuple(self._decode(v, template) for v in value) if is_list_or_tuple(value) else value


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean ...?"`` with the word of ``valid`` that is most like ``word``, or nothing for none.

    Like are words of which half the letters match in order: ``rl`` is meant for ``lr``, ``xyzzy`` for nothing.
    """
    # Upper and lower case are one: a name in the wrong case is nearer than any other.
    by_folded = {name.casefold(): name for name in valid}
    near = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.5)
    return f"; did you mean {by_folded[near[0]]!r}?" if near else ""


def nearest_or_all(word: str, valid: Collection[str]) -> str:
    """Return what ``nearest`` does, or where nothing is like ``word`` all that there is."""
    return nearest(word, valid) or (f"; there are {', '.join(valid)}" if valid else "")


def _check_options(
    name: str, parameters: Mapping[str, inspect.Parameter], given: dict[str, Any], hints: dict[str, Any]
) -> None:
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    valid = f"options of {name!r}: {', '.join(_signature(p, hints) for p in parameters.values()) or 'none'}"
    for key, value in given.items():
        if key not in parameters and not open_ended:
            raise ValueError(f"{name!r} has no option {key!r}{nearest(key, parameters)} ({valid})")
        if key not in hints or _fits(value, hints[key]):
            continue
        words = [*_words(hints[key])]
        if isinstance(value, str) and words:
            choices = ", ".join(map(repr, words))
            raise ValueError(f"{name!r}: {key}={value!r} is none of {choices}{nearest(value, words)} ({valid})")
        raise TypeError(f"{name!r}: {key}={value!r} ({type(value).__name__}) is not of the option's type ({valid})")
    missing = [
        key
        for key, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and key not in given
    ]
    if missing:
        why = "; template is one task's parameters, without the leading dimension of tasks" * ("template" in missing)
        raise ValueError(f"{name!r} needs {', '.join(f'{key}=' for key in missing)}{why} ({valid})")


def _signature(parameter: inspect.Parameter, hints: Mapping[str, Any]) -> str:
    hint = hints.get(parameter.name, parameter.annotation)
    shown = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{parameter.name}{'' if hint is parameter.empty else f': {shown}'}{default}"


def _words(hint: Any) -> Iterable[str]:
    """Yield the strings that an annotated type takes by name, those of an alternative as well."""
    if get_origin(hint) is Literal:
        yield from (word for word in get_args(hint) if isinstance(word, str))
    if get_origin(hint) in (Union, UnionType):
        for each in get_args(hint):
            yield from _words(each)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of an annotated type, containers looked into."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str | int) and value in args
    if origin is tuple:
        each = args[:1] * len(value) if is_tuple(value) and args[1:] == (...,) else args
        return is_tuple(value) and len(value) == len(each) and all(map(_fits, value, each))
    if origin in (dict, Mapping):
        pairs = cast("Mapping[Any, Any]", value)
        return isinstance(value, origin) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in pairs.items())
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, NoneType if hint is None else hint) if isinstance(hint, type) or hint is None else True


def _zeros(shape: Any, dtype: str) -> Tensor:
    sizes = is_list_or_tuple(shape) and all(_fits(n, int) and n >= 0 for n in shape)
    if not sizes or dtype not in _DTYPES:
        raise ValueError(
            f"shape={shape!r}, dtype={dtype!r} describe no tensor; shape is a list of sizes, dtype one of {[*_DTYPES]}"
        )
    return torch.zeros((), dtype=_DTYPES[dtype]).expand(tuple(shape))  # one zero: a wrong shape on file costs no memory


def _is_configuration(value: object) -> TypeGuard[Mapping[str, Any]]:
    return (
        is_mapping(value)
        and set(value) == {"name", "options"}
        and isinstance(value["name"], str)
        and isinstance(value["options"], Mapping)
    )
