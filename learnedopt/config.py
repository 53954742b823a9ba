"""Configurations: typed changes of nested frozen dataclasses, and configurations as plain values.

Rules, families and inner objectives are named by a ``Choice``, estimators, objectives and solvers by their class:
those of a ``Group`` are joined by the user's.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

from learnedopt.core.containers import is_dict, is_list_or_tuple, is_mapping
from learnedopt.core.group import Group
from learnedopt.core.inner import InnerSolver
from learnedopt.core.registry import Choice, nearest, nearest_or_all
from learnedopt.estimators.combined import Combined
from learnedopt.estimators.hessian_free import HessianFree
from learnedopt.estimators.linear_solvers import GMRES, ConjugateGradient, Neumann
from learnedopt.estimators.registry import ESTIMATORS
from learnedopt.objectives.matching import KLDivergence, SquaredDistance
from learnedopt.objectives.registry import OBJECTIVES
from learnedopt.objectives.solvers import SumOfLossesSolver
from learnedopt.objectives.target_matching import TargetMatching
from learnedopt.objectives.targets import BestInHindsight, Bootstrap, LastIterate, RegularizedSolution
from learnedopt.typed_values import read_value, typed

T = TypeVar("T")
Kinds: TypeAlias = Sequence[Collection[Callable[..., Any]]]
"""Groups of dataclasses, and of functions that make one, that may stand for one another."""
INTERCHANGEABLE: Kinds = (
    ESTIMATORS,
    OBJECTIVES,
    (Bootstrap, LastIterate, BestInHindsight, RegularizedSolution),
    (SquaredDistance, KLDivergence),
    (SumOfLossesSolver,),
    (ConjugateGradient, Neumann, GMRES),
    (HessianFree,),
)
"""What a recipe's overrides take by name, as in ``--set estimator=Unrolled``."""
_Change: TypeAlias = tuple[list[str], Any]  # the keys that remain, and the text, or the value of a configuration


def override(value: T, changes: Iterable[str | Mapping[str, Any]], kinds: Kinds = ()) -> T:
    """Return a copy of the dataclass ``value`` with fields replaced, all at once: no order of them is invalid.

    Args:
        value: a frozen dataclass; fields may be dataclasses again, reached by dots.
        changes: each ``path.to.field=text``; the text is read as the field's type, and of two for the same field the
            later counts. The options of a ``Choice`` are reached like fields, and ``choice=name`` names another
            (``choice=null`` none, where there may be none). Or a configuration as ``as_config`` returns it, whole or
            in part, whose values are of their types already.
        kinds: a field that holds a dataclass out of one of these groups takes the name of another class of the group;
            the fields that the two have in common are kept.

    Raises:
        ValueError: there is no such field, or the text is not of its type; the message names the nearest valid one.
        What a dataclass itself says of values that it does not accept passes through, with the path of the field.

    Example:
        >>> override(recipe, ["estimator=Unrolled", "estimator.num_steps=10"], [(Unrolled, Truncated)])
    """
    found: list[_Change] = []
    for change in changes:
        if isinstance(change, Mapping):
            found.append(([], change))
            continue
        path, equals, text = change.partition("=")
        if not equals or not path:
            raise ValueError(f"{change!r} is not of the form key=value, such as num_meta_steps=100")
        found.append((path.split("."), text))
    found = [*_spread(found, value, type(value))]
    for keys, other in found:
        if not keys:
            raise ValueError(f"this is the configuration of a {other}, and what it would change is {_a(value)}")
    return _changed(value, found, "", kinds)


def _a(value: Any) -> str:
    return f"a {type(value).__name__}"


def _spread(changes: Iterable[_Change], before: Any, hint: Any) -> Iterator[_Change]:
    """Take configurations of a ``Choice`` or a dataclass apart, into changes of what has a name in it."""
    for keys, given in changes:
        nothing = before is None or before is dataclasses.MISSING
        known = _names_a_choice(hint) or dataclasses.is_dataclass(before)
        if keys or not is_mapping(given) or not (known or (nothing and "type" in given)):
            yield keys, given
        elif not all(isinstance(key, str) for key in given):
            raise ValueError(f"{dict(given)!r} is no configuration: what it names are no words")
        elif _names_a_choice(hint):
            yield from (([], given["name"]) for key in given if key == "name")
            options: Any = given.get("options") or {}
            named = is_mapping(options) and all(isinstance(key, str) for key in options)
            if given.keys() - {"name", "options"} or not named:
                raise ValueError(f"{dict(given)!r} is no configuration of a choice: it has a name, and maybe options")
            # A text of a configuration is what it is, one of a command line is read as a literal.
            yield from (([key], repr(each) if isinstance(each, str) else each) for key, each in options.items())
        else:
            own = type(before).__name__
            yield from (([], given["type"]) for key in given if key == "type" and given[key] != own)
            yield from (([key], each) for key, each in given.items() if key != "type")


def _names_a_choice(hint: Any) -> bool:
    return hint is Choice or Choice in typing.get_args(hint)


def _changed(value: Any, changes: list[_Change], prefix: str, kinds: Kinds) -> Any:
    if not changes:
        return value
    if isinstance(value, Choice):
        return _choice_changed(value, changes, prefix)
    if not dataclasses.is_dataclass(value):
        path = prefix + ".".join(changes[0][0])
        raise ValueError(f"there is no setting {path!r}: {prefix[:-1]!r} is {value!r}, which has no fields")
    return _made(type(value), _fields_of(value), changes, prefix, kinds)


def _choice_changed(choice: Choice, changes: list[_Change], prefix: str) -> Choice:
    options = dict(choice.options)
    for keys, text in changes:
        if len(keys) > 1:
            path = prefix + ".".join(keys)
            if keys[0] == "options":
                own = prefix + ".".join(keys[1:])
                raise ValueError(f"{path!r} names the options of {choice.name!r}, which are set directly: {own!r}")
            raise ValueError(f"{path!r} reaches into an option of {choice.name!r}; set {prefix + keys[0]!r} as a whole")
        options[keys[0]] = read_value(text)
    return Choice(choice.name, options)


def _made(kind: Callable[..., Any], kept: dict[str, Any], changes: list[_Change], prefix: str, kinds: Kinds) -> Any:
    """Make a dataclass out of the values ``kept``, where ``kind`` has such a field, and the changes."""
    fields = _defaults(kind)
    hints = _hints(kind)
    by_field: dict[str, list[_Change]] = {}
    for keys, text in changes:
        if keys[0] not in fields:
            path = prefix + ".".join(keys)
            raise ValueError(
                f"there is no setting {path!r}: {kind.__name__} has no {keys[0]!r}{nearest_or_all(keys[0], fields)}"
            )
        by_field.setdefault(keys[0], []).append((keys[1:], text))
    values = {name: value for name, value in kept.items() if name in fields}
    for name, inner in by_field.items():
        before = values.get(name, fields[name])
        values[name] = _field_changed(before, inner, prefix + name, hints[name], kinds)
    missing = [prefix + name for name, f in fields.items() if name not in values and f is dataclasses.MISSING]
    if missing:
        raise ValueError(f"{kind.__name__} needs {' and '.join(missing)}: set that too")
    with placed(prefix, values):
        return kind(**values)


@contextmanager
def placed(prefix: str, fields: Collection[str]) -> Generator[None, None, None]:
    """Let a ValueError that begins with ``field=`` tell which one of that name it is: ``prefix`` comes before it."""
    try:
        yield
    except ValueError as error:
        if str(error).partition("=")[0] not in fields or not prefix:
            raise
        raise ValueError(f"{prefix}{error}") from error


def _field_changed(before: Any, changes: list[_Change], path: str, hint: Any, kinds: Kinds) -> Any:
    changes = [*_spread(changes, before, hint)]
    below = [(keys, text) for keys, text in changes if keys]
    whole = [text for keys, text in changes if not keys]
    if not whole or (before is not dataclasses.MISSING and whole[-1] == as_config(before)):  # it says what is there
        return _changed(before, below, f"{path}.", kinds)
    text = whole[-1]
    if _names_a_choice(hint):
        if not isinstance(text, str) or (read_value(text) is None and hint is Choice):
            raise ValueError(f"{path}={text!r} names nothing, and the setting needs a name")
        return _changed(None if read_value(text) is None else Choice(text), below, f"{path}.", kinds)
    group = next((group for group in kinds if _stands_for(group, before, hint, text)), None)
    if group is None:
        return _changed(typed(text, hint, path), below, f"{path}.", kinds)
    by_name = {kind.__name__: kind for kind in group}
    if not isinstance(text, str) or text not in by_name:
        own = " (yours: --import the module that registers it)" if isinstance(group, Group) else ""
        raise ValueError(f"{path}={text!r} is none of {', '.join(by_name)}{nearest(str(text), by_name)}{own}")
    return _made(by_name[text], _fields_of(before), below, f"{path}.", kinds)


def _stands_for(group: Collection[Callable[..., Any]], before: Any, hint: Any, text: Any) -> bool:
    """Whether a group's members may take the place of what is there or, where nothing is, of what the type says."""
    # A function's type says nothing of who has it: there, and where None may stand, the name alone tells.
    named = isinstance(text, str) and text in {kind.__name__ for kind in group}
    if before is None:
        return named
    if before is not dataclasses.MISSING:
        return type(before) in group
    plain = isinstance(hint, type) and typing.get_origin(hint) is None  # Python 3.10 takes tuple[int] for a class too
    return named or (plain and any(isinstance(kind, type) and issubclass(kind, hint) for kind in group))


def _fields_of(value: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(value):  # there was nothing before
        return {}
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}


def _defaults(kind: Callable[..., Any]) -> dict[str, Any]:
    """Return what a dataclass or function takes, by name, with its default or MISSING."""
    if isinstance(kind, type):
        return {f.name: _default(f) for f in dataclasses.fields(kind) if f.init}
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: dataclasses.MISSING if p.default is p.empty else p.default for p in parameters}


def _hints(kind: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except NameError as error:  # a user's own may name what is imported for a type checker alone
        raise ValueError(
            f"the types of {kind.__name__}'s fields cannot be told: {error}; import that in its module always, not "
            "under TYPE_CHECKING alone"
        ) from error


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def as_config(value: Any) -> Any:
    """Return a configuration as nested dicts of plain values; dataclasses name the types they were, but for choices."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: as_config(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return fields if isinstance(value, Choice) else {"type": type(value).__name__, **fields}
    if is_dict(value):
        return {k: as_config(v) for k, v in value.items()}
    if is_list_or_tuple(value):
        return [as_config(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def up_to_date(saved: Any, value: Any) -> Any:
    """Return a configuration of before as ``as_config`` would write it today.

    Args:
        saved: what ``as_config`` returned, maybe in an earlier version.
        value: what it is to be compared with; fields that its dataclasses have gained are taken to have had their
            defaults.
    """
    saved = _renamed(saved)
    if not is_dict(saved) or not dataclasses.is_dataclass(value) or isinstance(value, (type, Choice)):
        return saved
    if saved.get("type", type(value).__name__) != type(value).__name__:
        return saved
    defaults = {f.name: _default(f) for f in dataclasses.fields(value) if f.name not in saved}
    gained = {name: as_config(default) for name, default in defaults.items() if default is not dataclasses.MISSING}
    return {**{k: up_to_date(v, getattr(value, k, None)) for k, v in saved.items()}, **gained}


def _renamed(saved: Any) -> Any:
    """Return a bootstrapped target, which until version 0.2 was an objective of its own, as a target to match."""
    if not is_dict(saved) or saved.get("type") != "BootstrappedTarget":
        return saved
    rest = {key: value for key, value in saved.items() if key not in ("type", "matching")}
    matching = {"matching": saved["matching"]} if "matching" in saved else {}
    return {"type": TargetMatching.__name__, "target": {"type": Bootstrap.__name__, **rest}, **matching}


def split_imaml(rule: Any) -> tuple[Any, dict[str, Any] | None]:
    """Return the configurations of a rule and of its inner objective, None for the task's loss.

    Until version 0.1 the rule ``imaml`` held its proximal term: it is ``maml`` with the inner objective ``proximal``.
    """
    if not is_mapping(rule) or rule.get("name") != "imaml" or not isinstance(rule.get("options"), Mapping):
        return rule, None
    options: dict[str, Any] = {"lr": 0.1, "strength": 1.0, **rule["options"]}  # its defaults
    template = {"template": options.pop("template")} if "template" in options else {}
    renamed = {"strength": "strength", "learn_strength": "learn", "strengths": "per"}
    proximal = {renamed[key]: options.pop(key) for key in renamed if key in options}
    maml = {"name": "maml", "options": {**template, **options}}
    return maml, {"name": "proximal", "options": {**template, **proximal}}


def recorded_solver(record: Mapping[str, Any]) -> InnerSolver | None:
    """Return what solved the inner problem of the run that left ``record``: None for the rule's own steps.

    Raises:
        ValueError: it was a solver of the user's own, which a record cannot hold.
    """
    estimator = record.get("estimator")
    if is_dict(estimator) and estimator.get("type") == Combined.__name__:
        estimator = estimator.get("back_propagated")  # the solver is that of both
    found = estimator.get("inner") if is_dict(estimator) else None
    if found is None:
        return None
    names = {field.name for field in dataclasses.fields(HessianFree)}
    if not is_dict(found) or found.get("type") != HessianFree.__name__ or found.keys() - {"type", *names}:
        raise ValueError(
            f"this was meta-trained with the inner solver {found!r}, which cannot be made again from the record; pass "
            "it to learnedopt.evaluation.few_shot.adapt"
        )
    try:
        return HessianFree(**{key: value for key, value in found.items() if key != "type"})
    except Exception as error:  # a record holds whatever save was given
        raise ValueError(f"the record of a meta-training has an inner solver that there cannot be: {error}") from error
