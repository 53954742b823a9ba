"""Which parameters a rule moves together in a step: all of them, or those that are of one age."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.fingerprint import fingerprint
from learnedopt.core.horizon import later
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.plug_in import shards
from learnedopt.plug_in.bound import BoundSteps
from learnedopt.plug_in.members import Member, common_device, name_of, values_of
from learnedopt.plug_in.memory import COUNT, Layout
from learnedopt.plug_in.stepping import begun

MOST_LAYOUTS = 64
"""That a rule remembers: experts that take turns are other parameters at every step."""


@final
@dataclass(eq=False)
class Player:
    """A rule with its theta, as it moves some groups.

    Args:
        rule: the rule.
        theta: its meta-parameters.
        num_steps: of the whole training, where the rule reads that.
        card: what is known of theta, if it came with a card.
        known_steps: of the longest run that theta was trained on or holds in, as the card says.
        warned: whether a run has been said to go past it.
        behind: steps of the run before its memory begins, which its clock counts if it reads the horizon.
    """

    rule: UpdateRule
    theta: Theta
    num_steps: int | None
    card: Any = None
    known_steps: int | None = None
    warned: bool = False
    behind: int = 0
    _alone: dict[Any, bool] = field(default_factory=dict[Any, bool], repr=False)
    _layouts: dict[Any, Layout] = field(default_factory=dict[Any, Layout], repr=False)

    @cached_property
    def mover(self) -> UpdateRule:
        """What is stepped: the rule, with a clock around it where it reads the horizon."""
        return self.rule.within(self.num_steps)

    @cached_property
    def fingerprint(self) -> str:
        """What tells this theta of this rule from others."""
        return fingerprint(self.rule, self.theta)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is found again: layouts hold functions, which cannot be pickled."""
        return {**self.__dict__, "_layouts": {}}

    def theta_on(self, device: torch.device) -> Theta:
        """Return theta on a device."""
        self.theta = tree.to(self.theta, device, None)
        return self.theta

    def begun(self, members: list[Member], params: Params | None = None, *, graph: bool = False) -> State:
        """Return the first state for some parameters, whose values may be given; with a graph to theta or without."""
        params = values_of(members, self.gathers(members)) if params is None else params
        state = begun(self.mover, self.theta_on(common_device(params)), params, graph=graph)[1]
        return later(state, self.behind) if self.behind else state

    def gathers(self, members: list[Member]) -> bool:
        """Return whether some parameters lie in pieces, of which the rule has to see all."""
        return any(shards.kind_of(m.param) is shards.Kind.SHARDED for m in members) and self.reads_whole(members)

    def reads_whole(self, members: list[Member]) -> bool:
        """Return whether the rule needs whole tensors: coordinates interact, or it has a start of its own for them."""
        if not self.rule.coordinatewise:
            return True
        # Asked of parameters without coordinates, so that all processes answer alike, whatever lies on them.
        nothing = {m.name: m.param.new_empty(()).new_empty([0] * m.param.ndim) for m in members}
        nothing = {name: shards.local(x) for name, x in nothing.items()}
        try:
            start, _ = begun(self.mover, self.theta_on(common_device(nothing)), nothing)
        except ValueError:  # it knows their shapes
            return True
        return any(start[name] is not x for name, x in nothing.items())

    def layout(self, state: State, members: list[Member], params: Params, gather: bool) -> Layout:
        """Return how a state for some parameters lies in their entries."""
        return Layout(state, params, spread=self.rule.coordinatewise, cut=_cut(members), gather=gather)

    def known_layout(self, members: list[Member], params: Params, gather: bool) -> Layout:
        """Return the same, of parameters that have begun: their first state, which says it, is made once."""
        key = (gather, tuple((name, p.shape, p.dtype) for name, p in params.items()))
        if key not in self._layouts:
            if len(self._layouts) >= MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = self.layout(self.begun(members, params), members, params, gather)
        return self._layouts[key].of(_cut(members))

    def divides(self, members: list[Member]) -> bool:
        """Return whether the rule moves each parameter as if it were alone, and can begin with any one of them."""
        if not self.rule.coordinatewise:
            return False
        return all(self._begins_alone(m) for m in members)

    def _begins_alone(self, member: Member) -> bool:
        key = (member.name, member.param.shape)
        if key not in self._alone:
            try:
                self.begun([member])
                self._alone[key] = True
            except ValueError:  # a rule that knows all of them together by name, such as a learned start
                self._alone[key] = False
        return self._alone[key]


@final
@dataclass(eq=False)
class Cohort:
    """Parameters that are moved by one call of a rule.

    Args:
        player: the rule.
        members: the parameters, in order.
        still: names of those that have no gradient: they and their memory are to stay.
        layout: of the memory.
        state: the rule's.
        count: steps that have been taken with it.
        fresh: whether the state is the rule's first, which may lie in tensors of others.
        entries: what the optimizer's state holds of each member, the very dicts; empty before the first step.
        held: what was in them after the last step.
        whole: all of the parameters, gathered for the present step; None where the rule sees what lies here.
        ready: further steps, made ready for this memory; None before it was asked for, False where there are none.
    """

    player: Player
    members: list[Member]
    still: frozenset[str]
    layout: Layout
    state: State
    count: int
    fresh: bool
    entries: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    held: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    whole: Params | None = None
    ready: BoundSteps | Literal[False] | None = None

    @property
    def gathers(self) -> bool:
        """Whether the rule sees whole tensors of parameters that lie in pieces."""
        return self.whole is not None

    def values(self) -> Params:
        """Return what the rule sees of the parameters."""
        return values_of(self.members) if self.whole is None else self.whole

    def stands(self, kept: Mapping[Tensor, Any]) -> bool:
        """Return whether the optimizer's state still holds what this was made of."""
        return bool(self.entries) and all(
            kept.get(m.param) is entry and _same_tensors(entry, held)
            for m, entry, held in zip(self.members, self.entries, self.held, strict=True)
        )

    def keep(self, entries: list[dict[str, Any]]) -> None:
        """Note what the optimizer's state holds now."""
        self.entries, self.held = entries, [dict(entry) for entry in entries]

    def made_ready(self) -> BoundSteps | Literal[False]:
        """Return further steps of these tensors, made ready; False where the rule has no such steps for them."""
        kernel, params = self.player.mover.kernel, values_of(self.members)
        if kernel is None or self.still or self.layout.cut:
            return False
        bound = kernel.bound(self.player.theta_on(common_device(params)), self.state, params)
        return bound is not None and BoundSteps(
            bound, [m.param for m in self.members], self.entries, (self.player, self.player.theta)
        )

    def lies_with_its_parameters(self) -> bool:
        """Return whether the memory is on the parameters' device: a model may have been moved."""
        device = self.members[0].param.device
        return all(x.device == device for x in tree.leaves(self.state)[:1])


def formed(player: Player, members: list[Member], kept: Mapping[Tensor, dict[str, Any]]) -> list[Cohort]:
    """Return the cohorts of a step by a rule.

    Where no gradient is missing and all are of one age, there is one. Else a rule that moves each parameter by itself
    moves those with gradients, those of one age together; any other moves all, and ``still`` says which are to stay.

    Args:
        player: the rule.
        members: all its parameters.
        kept: the optimizer's state.
    """
    active = [m for m in members if m.param.grad is not None]
    if not active:
        return []
    ages = {kept.get(m.param, {}).get(COUNT, 0) for m in members}
    if (len(active) == len(members) and len(ages) == 1) or not player.divides(members):
        still = frozenset(m.name for m in members if m.param.grad is None)
        return [_joined(player, members, still, kept)]
    groups: dict[Any, list[Member]] = {}
    layout = Layout(player.begun(members[:1]), values_of(members[:1]), spread=True)
    for member in active:
        entry = kept.get(member.param, {})
        common = tuple((key, tuple(entry[key].flatten().tolist())) for key in layout.common) if COUNT in entry else ()
        groups.setdefault((entry.get(COUNT, 0), common), []).append(member)
    return [_joined(player, group, frozenset(), kept) for group in groups.values()]


def _joined(player: Player, members: list[Member], still: frozenset[str], kept: Mapping[Tensor, Any]) -> Cohort:
    gather = player.gathers(members)
    params = values_of(members, gather)
    whole = params if gather else None
    entries = [kept.get(m.param, {}) for m in members]
    counts = [entry.get(COUNT) for entry in entries]
    if all(count is None for count in counts):
        first = player.begun(members, params)
        layout = player.layout(first, members, params, gather)
        return Cohort(player, members, still, layout, first, 0, fresh=True, whole=whole)
    late = [m.name for m, count in zip(members, counts, strict=True) if count is None]
    if late:
        raise ValueError(
            f"{name_of(player.rule)} ties parameters together, and began without {late}: lazy parameters must have "
            "their shapes before the first step (run the model once on an example), or take a coordinatewise rule"
        )
    layout = player.known_layout(members, params, gather)
    state = layout.state(dict(zip(layout.names, entries, strict=True)))
    device = common_device(params)
    # What all have in common may lie with parameters of other cohorts too, and is written in place.
    state = (
        layout.with_common(tree.to(state, device, None), torch.clone) if layout.spread else tree.to(state, device, None)
    )
    count = max(c for c in counts if c is not None)
    return Cohort(player, members, still, layout, state, count, fresh=False, whole=whole)


def _cut(members: list[Member]) -> Params:
    return {m.name: m.param for m in members if shards.kind_of(m.param) is shards.Kind.SHARDED}


def _same_tensors(entry: dict[str, Any], held: dict[str, Any]) -> bool:
    # Many move an optimizer's memory to another device and back, entry by entry.
    return entry.keys() == held.keys() and all(x is held[key] for key, x in entry.items() if key != COUNT)
