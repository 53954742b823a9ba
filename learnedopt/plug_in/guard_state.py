"""What a state dict holds of a guard: with each parameter its part, under keys that begin with ``guard.``."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from learnedopt.plug_in.guard_rail import Rail
from learnedopt.plug_in.levels import Level
from learnedopt.plug_in.watch import KEPT, HandOver, Phase, Reason, Watch

KEY = "guard."
FALLBACK, SNAPSHOT, WATCH, HISTORY = f"{KEY}fallback.", f"{KEY}snapshot", f"{KEY}watch", f"{KEY}history"
NEEDS_SNAPSHOT = (Phase.FIRST_TRY, Phase.TRIAL, Phase.RETURN_TRY)
"""Phases at whose end the snapshot may come back."""


@contextlib.contextmanager
def held(state: MutableMapping[Tensor, Any], rail: Rail | None, params: list[Tensor]) -> Iterator[None]:
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

    Where there are none and the rule has a memory, the guard watches a run that is on its way, without a first trial.
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
        on_its_way = bool(state)
        rail.watch = Watch(rail.watch.window, rail.watch.anneals, Phase.LEARNED if on_its_way else Phase.FIRST_TRY)
        return
    *own, taken, rail.base = numbers[WATCH].tolist()
    rail.watch = unpacked(own, numbers[HISTORY].tolist())
    rail.fallback.taken = int(taken)
    for param, one in zip(params, found, strict=True):
        rail.fallback.recall(param, {k.removeprefix(FALLBACK): x for k, x in one.items() if k.startswith(FALLBACK)})
    movable = rail.movable(params)
    snapshots = [
        one.get(SNAPSHOT) for param, one in zip(params, found, strict=True) if any(param is p for p in movable)
    ]
    if all(x is not None for x in snapshots):
        rail.snapshot = [x.clone() for x in snapshots if x is not None]
    elif rail.watch.phase in NEEDS_SNAPSHOT or rail.watch.probation:
        logging.getLogger("learnedopt").warning(
            "the state that was loaded lacks the guard's snapshot: a trial that was under way ends where it is"
        )
        rail.watch.cut_short()


def _entries(rail: Rail, params: list[Tensor]) -> list[dict[str, Any]]:
    found = [{f"{FALLBACK}{k}": x for k, x in rail.fallback.entries(param).items()} for param in params]
    snapshots = {} if rail.snapshot is None else dict(zip(map(id, rail.movable(params)), rail.snapshot, strict=True))
    for param, one in zip(params, found, strict=True):
        if id(param) in snapshots:
            one[SNAPSHOT] = snapshots[id(param)].clone()
    numbers, rows = packed(rail.watch)
    own = torch.tensor([*numbers, rail.fallback.taken, rail.base], dtype=torch.float64)
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
    kinds = {"float": float, "int": int, "bool": bool, "Phase": lambda x: Phase(int(x))}
    scalars = {f.name: kinds[str(f.type)](found[f.name]) for f in fields(Watch) if f.name in found}
    rest = numbers[len(SCALARS) :]
    levels = {name: Level(*rest[3 * i : 3 * i + 3]) for i, name in enumerate(LEVELS)}
    watch = Watch(**scalars)
    watch.best, watch.last, watch.mark = (None if math.isnan(x.mean) else x for x in levels.values())
    watch.losses = [x for x in rest[3 * len(LEVELS) :] if not math.isnan(x)]
    watch.handed = [HandOver(int(a), bool(b), Reason(int(c))) for a, b, c in rows if not math.isnan(a)]
    return watch
