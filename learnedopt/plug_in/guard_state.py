"""What a state dict holds of a guard: with each parameter its part, under keys that begin with ``guard.``."""

from __future__ import annotations

import contextlib
import logging
import math
import zlib
from collections.abc import Callable, Generator, MutableMapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from learnedopt.plug_in.guard_rail import Rail
from learnedopt.plug_in.levels import Level
from learnedopt.plug_in.memory import COUNT
from learnedopt.plug_in.phases import HandOver, Phase, Reason
from learnedopt.plug_in.watch import KEPT, Watch

KEY = "guard."
FALLBACK, SNAPSHOT, WATCH, HISTORY = f"{KEY}fallback.", f"{KEY}snapshot", f"{KEY}watch", f"{KEY}history"
NEEDS_SNAPSHOT = (Phase.FIRST_TRY, Phase.TRIAL, Phase.RETURN_TRY)
"""Phases at whose end the snapshot may come back."""


@contextlib.contextmanager
def held(state: MutableMapping[Tensor, Any], rail: Rail | None, params: list[Tensor]) -> Generator[None, None, None]:
    """Have the guard's entries in an optimizer's state, so that torch's ``state_dict`` and its hooks see them."""
    if rail is None or not rail.watch.step + rail.watch.skipped:  # a fresh one has none
        yield
        return
    kept = {p: state[p] for p in params if p in state}
    for param, own in zip(params, _entries(rail, params), strict=True):
        if own:
            state[param] = {**kept.get(param, {}), **own}
    try:
        yield
    finally:
        state.clear()
        state.update(kept)


def without(state_dict: dict[str, Any], *, guarded: bool) -> dict[str, Any]:
    """Return a state dict without the guard's entries.

    Raises:
        ValueError: nobody is there to take them, and the fallback was in control.
    """
    halves = {i: _split(one) for i, one in state_dict["state"].items()}
    rules = {i: kept for i, (kept, _) in halves.items()}
    if not guarded and any(own for _, own in halves.values()) and not any(rules.values()):
        raise ValueError(
            "this state was saved while the guard's fallback moved the parameters, so it holds no memory of the "
            "rule's; make the optimizer with guard=True"
        )
    return {**state_dict, "state": rules}


def recall(state: MutableMapping[Tensor, Any], rail: Rail | None, params: list[Tensor]) -> None:
    """Take the guard's entries out of an optimizer's state, and have the guard be as they say.

    Where there are none and the rule has a memory, the guard watches a run that is on its way, without a first trial,
    from the step on that the memory is at.
    """
    found: list[dict[str, Any]] = []
    for param in params:
        kept, own = _split(state.get(param, {}))
        found.append(own)
        if kept:
            state[param] = kept
        else:
            state.pop(param, None)
    if rail is None:
        return
    rail.snapshot, rail.norm = None, None
    rail.fallback.cool()
    numbers = next((one for one in found if WATCH in one), None)
    if numbers is None:
        phase, taken = Phase.LEARNED if state else Phase.FIRST_TRY, [one.get(COUNT, 0) for one in state.values()]
        rail.watch = Watch(rail.watch.window, rail.watch.anneals, phase, step=max(taken, default=0))
        return
    *own, taken, rail.base, _ = numbers[WATCH].tolist()
    rail.watch = unpacked(own, numbers[HISTORY].tolist())
    rail.fallback.taken = int(taken)
    for param, one in zip(params, found, strict=True):
        rail.fallback.recall(param, {k.removeprefix(FALLBACK): x for k, x in one.items() if k.startswith(FALLBACK)})
    snapshot = {p: one[SNAPSHOT].clone() for p, one in zip(params, found, strict=True) if SNAPSHOT in one}
    if all(p in snapshot for p in rail.movable(params)):
        rail.snapshot = snapshot
    elif rail.watch.phase in NEEDS_SNAPSHOT or rail.watch.probation:
        logging.getLogger("learnedopt").warning(
            "the state that was loaded lacks the guard's snapshot: a trial that was under way ends where it is"
        )
        rail.watch.cut_short()


def require(state_dict: dict[str, Any], rail: Rail, params: list[Tensor]) -> None:
    """Raise ValueError where a state dict holds of a guard what the guard of these parameters cannot take."""
    indices = [i for group in state_dict["param_groups"] for i in group["params"]]
    found = [(p, _split(state_dict["state"].get(i, {}))[1]) for i, p in zip(indices, params, strict=True)]
    for param, own in found:
        numbers, rows, snapshot = own.get(WATCH), own.get(HISTORY), own.get(SNAPSHOT)
        if numbers is not None and _damaged(numbers, rows):
            raise ValueError(
                "what this state holds of the guard is damaged, or of another version; load what state_dict() "
                f"returned, as it was, or drop the keys that begin with {KEY!r}: the guard then watches from here on"
            )
        if snapshot is not None and snapshot.shape != param.shape:
            raise ValueError(
                f"the guard's snapshot in this state is of parameters of other shapes: {tuple(snapshot.shape)} where "
                f"the optimizer has {tuple(param.shape)}; make it with the parameters that it was saved with"
            )
        hot = any(key.startswith(FALLBACK) for _, one in found for key in one)
        if numbers is not None and hot and float(numbers[-1]) != _kind(rail):
            raise ValueError(
                "this state holds the moments of another fallback than the guard's "
                f"{type(rail.fallback.optimizer).__name__}; make the guard with the fallback that it was saved with"
            )


def _damaged(numbers: Any, rows: Any) -> bool:
    if not isinstance(numbers, Tensor) or numbers.ndim != 1 or not numbers.numel() or not bool(numbers[0].isfinite()):
        return True
    size = len(SCALARS) + 3 * len(LEVELS) + int(numbers[0]) + 3  # the window; taken, base and kind
    return numbers.numel() != size or getattr(rows, "shape", None) != (KEPT, 3)


def _kind(rail: Rail) -> float:
    """Return a number for the class of the fallback."""
    return float(zlib.crc32(type(rail.fallback.optimizer).__qualname__.encode()))


def _entries(rail: Rail, params: list[Tensor]) -> list[dict[str, Any]]:
    found = [{f"{FALLBACK}{k}": x for k, x in rail.fallback.entries(param).items()} for param in params]
    for param, one in zip(params, found, strict=True):
        if rail.snapshot is not None and param in rail.snapshot:
            one[SNAPSHOT] = rail.snapshot[param].clone()
    numbers, rows = packed(rail.watch)
    own = torch.tensor([*numbers, rail.fallback.taken, rail.base, _kind(rail)], dtype=torch.float64)
    if found:  # a process of ZeroRedundancyOptimizer may have no parameters
        found[0] |= {WATCH: own, HISTORY: torch.tensor(rows, dtype=torch.float64)}
    return found


def _split(entries: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a parameter's entries hold of the rule, and of the guard.

    A flattened state dict of ``torch.distributed.checkpoint`` comes back with the keys of a fresh optimizer alone, and
    nothing, {}, under those that were not saved.
    """
    entries = {k: x for k, x in entries.items() if not isinstance(x, dict) or x}
    own = {k: x for k, x in entries.items() if str(k).startswith(KEY)}
    return {k: x for k, x in entries.items() if k not in own}, own


SCALARS = tuple(f.name for f in fields(Watch) if f.type in ("int", "bool", "float", "Phase"))
LEVELS = ("best", "last", "mark")
ABSENT = Level(math.nan, math.nan, math.nan)


def packed(watch: Watch) -> tuple[list[float], list[list[float]]]:
    """Return a watch as numbers, as many for every watch of this window; and its hand-overs, ``KEPT`` rows of three."""
    scalars = [float(getattr(watch, name)) for name in SCALARS]
    levels = [x for name in LEVELS for x in getattr(watch, name) or ABSENT]
    losses = [*watch.losses, *[math.nan] * (watch.window - len(watch.losses))]
    rows = [[float(x) for x in each] for each in watch.handed]
    return [*scalars, *levels, *losses], [*rows, *[[math.nan] * 3] * (KEPT - len(rows))]


def unpacked(numbers: Sequence[float], rows: Sequence[Sequence[float]]) -> Watch:
    """Return the watch that ``packed`` took apart."""
    found = dict(zip(SCALARS, numbers, strict=False))

    def phase(x: float) -> Phase:
        return Phase(int(x))

    kinds: dict[str, Callable[[float], Any]] = {"float": float, "int": int, "bool": bool, "Phase": phase}
    scalars = {f.name: kinds[str(f.type)](found[f.name]) for f in fields(Watch) if f.name in found}
    rest = numbers[len(SCALARS) :]
    levels = {name: Level(*rest[3 * i : 3 * i + 3]) for i, name in enumerate(LEVELS)}
    watch = Watch(**scalars)
    watch.best, watch.last, watch.mark = (None if math.isnan(x.mean) else x for x in levels.values())
    watch.losses = [x for x in rest[3 * len(LEVELS) :] if not math.isnan(x)]
    watch.handed = [HandOver(int(a), bool(b), Reason(int(c))) for a, b, c in rows if not math.isnan(a)]
    return watch
