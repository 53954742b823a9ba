"""What a checkpoint says of the meta-optimizer and its schedule, beside what the configuration makes of them.

Nobody knows in general what a ``torch.optim.Optimizer`` remembers. So one is made anew, of copies of theta, and takes
a step along a gradient of ones: what it remembers then has the names, shapes and types that are due. Another one is
given what is on file, and must be able to go on from there. Of classes that are neither torch's nor this library's what
is remembered is not compared, as it may come later, go, change or grow: the step alone tells.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from learnedopt.core.containers import is_dict, is_list, is_list_or_tuple

Scheduler: TypeAlias = "torch.optim.lr_scheduler.LRScheduler | None"
Anew: TypeAlias = Callable[[], "tuple[torch.optim.Optimizer, Scheduler]"]
"""Makes both as the configuration says, of copies of theta whose gradients are ones."""
_OWN = ("torch.optim", "learnedopt.meta_optimizers")
"""Modules of optimizers and schedulers that are known to keep in their groups what they were given, and rates."""
_FRACTIONS = ("betas", "momentum", "base_momentum", "max_momentum", "min_momentum")
"""What schedules of torch move beside learning rates: fractions below 1."""
_ROUNDING = 1e-12
"""How far below 0 a schedule that ends there may come."""


@runtime_checkable
class _Several(Protocol):
    """An optimizer whose groups are those of several."""

    members: list[torch.optim.Optimizer]


class _Rule(NamedTuple):
    """What may differ of a group from its configuration: all values but in kind, or those of a schedule alone."""

    free: bool
    fractions: bool


# The steps that are tried draw nothing that the training would have drawn. (torch gives it no types.)
@torch.random.fork_rng(devices=[])  # pyright: ignore[reportUnknownMemberType]
def require_saved(saved: Any, of_scheduler: Any, anew: Anew, meta_step: int) -> None:
    """Raise TypeError or ValueError, naming field and value, unless these two could go on from what was saved of them.

    Compared are, of each parameter, what is remembered with what one step of a fresh optimizer leaves; of each group,
    the options with those of the configuration, where neither rates nor (of classes that are neither torch's nor this
    library's) the optimizer's own values; of the scheduler, names, forms and lengths. Then a step is tried.

    Args:
        saved: a state of the optimizer.
        of_scheduler: one of the scheduler; None for none.
        anew: makes both, of the same parameters.
        meta_step: how many steps have been taken, at most.
    """
    (fresh, schedule), (other, its_schedule) = anew(), anew()
    name, kinds = type(fresh).__name__, _kinds(fresh)
    if (of_scheduler is None) != (schedule is None):
        raise ValueError("it was written with a scheduler, or without one, unlike the present training")
    own, begun = fresh.state_dict()["param_groups"], copy.deepcopy(schedule.state_dict()) if schedule else {}
    groups = _dicts("param_groups", saved["param_groups"])
    if [group.get("params") for group in groups] != [group["params"] for group in own]:
        raise ValueError(f"the meta-optimizer's groups are not {[group['params'] for group in own]}")
    free = {i for group, kind in zip(own, kinds, strict=True) if not _known(kind) for i in group["params"]}
    if steps := _steps(fresh, bool(free)):
        _require_memory(saved["state"], fresh.state_dict(), meta_step, free)
    if schedule is not None:
        if steps:
            schedule.step()
            _require_alike("scheduler", of_scheduler, schedule.state_dict(), _known(type(schedule)))
        _require_counts(of_scheduler, begun, meta_step if _known(type(schedule)) else math.inf)
    try:
        restore(other, its_schedule, copy.deepcopy(saved), copy.deepcopy(of_scheduler))
    except Exception as error:  # whatever an optimizer makes of a state that is none of its own
        raise ValueError(f"{name} cannot take up the optimizer's state ({_told(error)})") from error
    rules = [_rule(kind, schedule) for kind in kinds]
    # After it was taken up: options of later versions of torch have got their defaults.
    for i, (group, due, rule) in enumerate(zip(other.state_dict()["param_groups"], own, rules, strict=True)):
        _require_group(f"optimizer.param_groups[{i}]", group, due, rule)
    if not steps:
        return
    try:
        other.step()
    except Exception as error:
        raise ValueError(f"{name} cannot take a step from the optimizer's state ({_told(error)})") from error
    if its_schedule is not None:
        _require_step(its_schedule)


def restore(optimizer: torch.optim.Optimizer, scheduler: Scheduler, saved: Any, of_scheduler: Any) -> None:
    """Let both go on from what was saved."""
    optimizer.load_state_dict(saved)
    # torch casts states to their parameter's dtype; those that were kept in another would go on with other numbers.
    params = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [i for group in saved["param_groups"] for i in group["params"]]
    for p, i in zip(params, indices, strict=True):
        for k, v in saved["state"].get(i, {}).items():
            if isinstance(v, Tensor):
                optimizer.state[p][k] = v.to(optimizer.state[p][k].device)
    if scheduler:
        scheduler.load_state_dict(of_scheduler)


def _steps(fresh: torch.optim.Optimizer, free: bool) -> bool:
    """Take a step; return whether it could be taken. With ``free`` an optimizer may want other gradients than ones."""
    try:
        fresh.step()
    except Exception as error:  # whatever it raises
        if free:
            return False
        raise ValueError(
            f"{type(fresh).__name__} takes no step along ones, by which its state is checked ({_told(error)})"
        ) from error
    return True


def _require_memory(saved: Any, own: Mapping[str, Any], most: float, free: set[Any]) -> None:
    """Compare what is remembered of each parameter; nothing of any of them is right as well, as after a rollback.

    Of the parameters in ``free`` any dict is right.
    """
    due, params = own["state"], {index for group in own["param_groups"] for index in group["params"]}
    remembered: dict[Any, Any] = _dicts("optimizer.state", [saved])[0]
    for index, memory in remembered.items():
        where = f"optimizer.state[{index!r}]"
        if index not in params and index not in due and (not free or isinstance(index, int)):
            raise ValueError(f"{where} is of no parameter that there is ({sorted(params)})")
        if index in params and not is_dict(memory):
            raise ValueError(f"{where} is {memory!r}, and no dict")
        if index in free or (free and index not in params):
            continue
        if not is_dict(memory):
            memory, example = {index: memory}, {index: due[index]}
        elif not (memory := {k: v for k, v in memory.items() if v is not None}):
            continue
        elif not (example := due.get(index)):
            raise ValueError(f"{where} has {[*memory]}, of which this meta-optimizer remembers nothing")
        _require_entry(where, memory, example, most)


def _require_entry(where: str, memory: Mapping[Any, Any], due: Mapping[Any, Any], most: float) -> None:
    """Compare what is remembered of one parameter; what is there later than after a step is tried, not compared."""
    if missing := sorted(str(k) for k in due.keys() - memory.keys() if due[k] is not None):
        raise ValueError(f"{where} lacks {missing}, which are there after a step of this meta-optimizer")
    for name in due.keys() & memory.keys():
        value, example = memory[name], due[name]
        if name == "step" and _is_number(example):
            _require_count(f"{where}.step", value, float(example) + most)
        elif not _same_form(value, example):
            raise ValueError(f"{where}.{name} is {_form(value)}, and {_form(example)} after a step here")
        elif isinstance(value, Tensor) and bool(value.isnan().any()):
            raise ValueError(f"{where}.{name} is NaN in places, which no step of a training leaves")


def _require_group(where: str, saved: Mapping[str, Any], own: Mapping[str, Any], rule: _Rule) -> None:
    """Compare the options of a group with those of the configuration."""
    if missing := sorted(own.keys() - saved.keys()):
        raise ValueError(f"{where} lacks {missing}, of which {[*own]} are due")
    # An option that is off, and that another version of torch had, says nothing.
    unknown = sorted(str(k) for k in saved.keys() - own.keys() if saved[k] is not None and saved[k] is not False)
    if unknown and not rule.free:
        raise ValueError(f"{where} has {unknown}, which are no options of this meta-optimizer ({[*own]})")
    for name, due in own.items():
        value, told = saved[name], f"{where}.{name} is {saved[name]!r} on file"
        if _is_rate(name) and _is_number(due):
            if not _is_number(value) or not -_ROUNDING <= float(value) < math.inf:
                raise ValueError(f"{told}, where a finite number of at least 0 is due")
        elif name in _FRACTIONS and rule.fractions and all(0 <= float(x) < 1 for x in _numbers(due)):
            if not _alike(value, due, True) or not all(0 <= float(x) < 1 for x in _numbers(value)):
                raise ValueError(f"{told}, where numbers of at least 0 and below 1 are due, as {due!r} is")
        elif not ((due is None or _alike(value, due, False)) if rule.free else _same(value, due)):
            raise ValueError(f"{told}, and {due!r} in the configuration")


def _require_step(schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Raise ValueError where a schedule cannot go on for want of something."""
    try:
        schedule.step()
    except ValueError:
        pass  # so a schedule says that it has come to its end, which that of a finished training has
    except Exception as error:
        raise ValueError(f"{type(schedule).__name__} cannot take a step from its state ({_told(error)})") from error


def _require_counts(saved: Mapping[str, Any], begun: Mapping[str, Any], most: float) -> None:
    """Compare how far a schedule has come with how far it can have come."""
    for name in ("last_epoch", "_step_count"):
        if name in saved and _is_number(begun.get(name)):
            _require_count(f"scheduler.{name}", saved[name], float(begun[name]) + most)


def _require_count(where: str, value: Any, most: float) -> None:
    if not _is_number(value) or not 0 <= float(value) <= most or not float(value).is_integer():
        raise ValueError(f"{where} is {value!r}, where a count of at least 0 and at most {most:g} is due")


def _require_alike(where: str, saved: Any, own: Any, known: bool) -> None:
    """Compare kinds of values and, of a known schedule, names, lengths and words as well, at any depth."""
    if known and isinstance(own, Counter | str):  # of the configuration, as milestones are
        if saved != own:
            raise ValueError(f"{where} is {saved!r} on file, and {own!r} here")
    elif own is None and not known:
        return  # there may be something later
    elif is_dict(own):
        found = _dicts(where, [saved])[0]
        hidden = (k for k, v in found.items() if str(k).startswith("_") or v is None or v is False)
        if known and (differing := sorted(map(str, (found.keys() - {*hidden}) - own.keys()))):
            raise ValueError(f"{where} has {differing}, which the present one has not")
        if missing := sorted(str(k) for k in own.keys() - found.keys() if not str(k).startswith("_")):
            raise ValueError(f"{where} lacks {missing}")
        for name in own.keys() & found.keys():
            _require_alike(f"{where}.{name}", found[name], own[name], known)
    elif is_list_or_tuple(own) and is_list_or_tuple(saved) and (len(own) == len(saved) or not known):
        for i, (value, due) in enumerate(zip(saved, own, strict=False)):
            _require_alike(f"{where}[{i}]", value, due, known)
    elif not _alike(saved, own, known):
        raise ValueError(f"{where} is {saved!r} on file, and {own!r} after a step here")
    elif ".base_lrs[" in where and any(float(x) < -_ROUNDING for x in _numbers(saved)):
        raise ValueError(f"{where} is {saved!r}, where a finite number of at least 0 is due")


def _alike(saved: Any, own: Any, lengths: bool) -> bool:
    """Whether a value is of the same kind as another one, and as finite."""
    if is_list_or_tuple(own):
        same = is_list_or_tuple(saved) and (len(saved) == len(own) or not lengths)
        return same and all(_alike(a, b, lengths) for a, b in zip(saved, own, strict=False))
    if _is_number(own):
        return _is_number(saved) and (math.isfinite(saved) or not math.isfinite(own))
    return type(saved) is type(own)


def _same(saved: Any, own: Any) -> bool:
    if is_list_or_tuple(own):
        same = is_list_or_tuple(saved) and len(saved) == len(own)
        return same and all(_same(a, b) for a, b in zip(saved, own, strict=True))
    if isinstance(own, Tensor) or isinstance(saved, Tensor):
        return isinstance(own, Tensor) and isinstance(saved, Tensor) and torch.equal(saved.cpu(), own.cpu())
    return saved == own and isinstance(saved, bool) == isinstance(own, bool)


def _same_form(saved: Any, due: Any) -> bool:
    if isinstance(due, Tensor):
        return isinstance(saved, Tensor) and (saved.shape, saved.dtype) == (due.shape, due.dtype)
    return _alike(saved, due, False)


def _form(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _dicts(where: str, values: Any) -> list[dict[str, Any]]:
    if not is_list(values) or not all(is_dict(value) for value in values):
        raise ValueError(f"{where} is {values!r}, and no dict")
    return values


def _kinds(optimizer: torch.optim.Optimizer) -> list[type]:
    """Return the class that each group is of."""
    parts = optimizer.members if isinstance(optimizer, _Several) else [optimizer]
    return [type(part) for part in parts for _ in part.param_groups]


def _known(kind: type) -> bool:
    return kind.__module__.startswith(_OWN)


def _rule(kind: type, schedule: Scheduler) -> _Rule:
    free = not _known(kind) or (schedule is not None and not _known(type(schedule)))
    return _Rule(free, free or schedule is not None)


def _is_rate(name: str) -> bool:
    return name == "lr" or name.endswith("_lr")


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex()
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 63
    return isinstance(value, float)


def _numbers(value: Any) -> list[Any]:
    """Return the numbers in a value; NaN in the place of what is none."""
    return [x if _is_number(x) else math.nan for x in (value if is_list_or_tuple(value) else [value])]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
