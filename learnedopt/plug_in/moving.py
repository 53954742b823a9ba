"""How learned rules move an optimizer's parameters: in cohorts, with memory by parameter, in place if it can be."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from learnedopt.core import tree
from learnedopt.plug_in import shards
from learnedopt.plug_in.base import RuleOptimizer, moved, require_structure, unshared
from learnedopt.plug_in.cohorts import Cohort, Player, formed
from learnedopt.plug_in.members import (
    Member,
    common_device,
    factors_of,
    gradients_of,
    name_of,
    require_start,
    saved_indices,
    scalar_loss,
    values_of,
)
from learnedopt.plug_in.memory import COUNT
from learnedopt.plug_in.state_dtype import packed
from learnedopt.plug_in.stepping import begun, updated

THETA = "theta"
"""What a group says of its theta: the fingerprint."""


class MovedByRules(RuleOptimizer):
    """Moves each group by its rule, the parameters of one rule together."""

    _players: list[Player]
    """Of each group."""
    adopt_start: bool
    num_steps: int | None
    _state_dtype: torch.dtype | None = None
    _owned: bool = False
    """Whether nobody else can hold the memory, so that it may be overwritten."""
    _together: list[Cohort]
    """What was moved together in the last step."""

    @abstractmethod
    def _require_end(self, cohort: Cohort) -> None:
        """Warn of a step beyond what is known of a rule."""

    @torch.no_grad()
    def _step_learned(self, loss: Any) -> None:
        if self._step_ready(loss):
            return
        members = self._members()
        if any(m.param.grad is not None for m in members) and not self._only_looked_at(members):
            cohorts = self._cohorts()
            for cohort in cohorts:
                self._require_end(cohort)
                self._move(cohort, loss)
            # What was gathered for this step goes; it is gathered anew for the next.
            self._together = [cohort for cohort in self._together if not cohort.gathers]
            # Memory that was given away is nobody else's again once the step has made new one of all of it.
            renewed = {m.param for cohort in cohorts for m in cohort.members if m.name not in cohort.still}
            self._owned = self._owned or renewed >= set(self.state)

    def _step_ready(self, loss: Any) -> bool:
        """Take the step as it was made ready; return whether it was done.

        That is for whole steps of all parameters, from the second one on in which nobody else can hold the memory.
        """
        if not self._owned or len(self._together) != 1:
            return False
        (cohort,), params = self._together, [p for group in self.param_groups for p in group["params"]]
        plain = all(float(g["lr"]) == 1 and not g["weight_decay"] and not g["maximize"] for g in self.param_groups)
        if not plain or cohort.ready is False or any(p.grad is None for p in params):
            return False
        memory = [self.state.get(p) for p in params]
        if cohort.ready is None or not cohort.ready.hold(params, memory, (cohort.player, cohort.player.theta)):
            whole = len(params) == len(cohort.members) and cohort.lies_with_its_parameters()
            if not whole or not cohort.stands(self.state):
                return False
            cohort.ready = cohort.made_ready()
        if loss is not None:
            scalar_loss(loss, params[0].device)
        self._require_end(cohort)
        done = cohort.ready is not False and cohort.ready.step()
        if done:
            cohort.count += 1
        else:
            cohort.ready = False
        return done

    def _parts(self) -> list[tuple[Player, list[Member]]]:
        """Return each rule with its parameters, in the order of the first of them."""
        parts: dict[int, tuple[Player, list[Member]]] = {}
        rules = {id(group): player for group, player in zip(self.param_groups, self._players, strict=True)}
        for member in self._members():
            player = rules[id(member.group)]
            parts.setdefault(id(player), (player, []))[1].append(member)
        return list(parts.values())

    def _only_looked_at(self, members: list[Member]) -> bool:
        """Give a fresh optimizer its memory, without a step, where a tool asks for it by a step of nothing.

        Such as those of ``torch.distributed.checkpoint``, which step at rate 0 with gradients of 0.
        """
        if self._begun() or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        if not shards.all_zero(m.param.grad for m in members if m.param.grad is not None):
            return False
        for cohort in self._cohorts():
            entries = cohort.layout.entries(unshared(cohort.state, tuple(shards.local(m.param) for m in members)))
            for name, param, _ in cohort.members:
                self.state[param] = {COUNT: 0, **entries[name]}
        return True

    def _cohorts(self) -> list[Cohort]:
        """Return what is moved together in this step; as in the last one where nothing has changed."""
        parts = self._parts()
        if self._together and all(cohort.stands(self.state) for cohort in self._together):
            active = {m.param for _, members in parts for m in members if m.param.grad is not None}
            before = {m.param for cohort in self._together for m in cohort.members if m.name not in cohort.still}
            if active == before and all(cohort.lies_with_its_parameters() for cohort in self._together):
                groups = {m.param: m for _, members in parts for m in members}
                for cohort in self._together:  # a state dict that was loaded has brought other groups
                    cohort.members = [groups[m.param] for m in cohort.members]
                return self._together
        self._together = [cohort for player, members in parts for cohort in formed(player, members, self.state)]
        return self._together

    def _move(self, cohort: Cohort, loss: Any) -> None:
        """Move the parameters of a cohort, and keep the rule's new memory."""
        members, player = cohort.members, cohort.player
        params, grads = cohort.values(), gradients_of(members, cohort.gathers)
        grads = {name: -grads[name] if group["maximize"] else grads[name] for name, _, group in members}
        if loss is not None and all(group["maximize"] for _, _, group in members):
            loss = -loss
        factors = factors_of(members)
        decays = {name: factors[name] * float(group["weight_decay"]) for name, _, group in members}
        found = updated(
            player.mover, player.theta_on(common_device(params)), grads, cohort.state, params, loss,
            whole=all(f in (0, 1) for f in factors.values()),
            in_place=self._owned and not cohort.fresh and not cohort.still,
            overwrite=all(f == 1 for f in factors.values()) and not any(decays.values()) and not cohort.gathers,
        )  # fmt: skip
        self._keep(cohort, found.state, tuple(grads.values()))
        if not found.written:
            moved(members, found.found, factors, added=found.added, decays=decays, gather=cohort.gathers)

    def _keep(self, cohort: Cohort, state: Any, grads: tuple[Tensor, ...]) -> None:
        """Keep a rule's new memory; parameters that are still keep theirs."""
        if state is cohort.state and self._owned and cohort.entries and not cohort.still:  # written in place
            for entry in cohort.entries:
                entry[COUNT] += 1
            cohort.count += 1
            return
        # What is written in place from here on, or by the next backward(), must not be part of the memory.
        params, layout = tuple(shards.local(m.param) for m in cohort.members), cohort.layout
        require_structure(layout, state, cohort.player.rule)
        state = tree.detach(unshared(state, (*params, *grads)))
        if cohort.still:
            entries, before = layout.entries(state), layout.entries(unshared(cohort.state, params))
            for name in cohort.still:
                entries[name].update({k: x for k, x in before[name].items() if k not in layout.common})
            state = layout.state(entries)
        entries = layout.entries(state)
        kept: list[dict[str, Any]] = []
        for name, param, _ in cohort.members:
            # New dicts, so that an earlier state_dict() keeps what it held.
            count = self.state.get(param, {}).get(COUNT, 0) + (name not in cohort.still)
            memory = packed(entries[name], param, self._state_dtype, seed=count)
            self.state[param] = {COUNT: count, **memory}
            kept.append(self.state[param])
        cohort.keep(kept)
        if self._state_dtype is not None:
            self._together = []  # what was computed with is not kept beside what is kept of it
        cohort.state, cohort.count, cohort.fresh, cohort.ready = state, cohort.count + 1, False, None

    def _settle(self) -> None:
        """See that the rules take their parameters, and put a start into them if that was allowed."""
        self._settled = True
        if any(is_lazy(p) for group in self.param_groups for p in group["params"]):
            return  # they have no shapes; what is wrong with them is found in the first step
        shards.require_known((m.name, m.param) for m in self._members())
        for player, members in self._parts():
            named = [(m.name, m.param) for m in members]
            if shards.what_is_missing(named) is not None and player.reads_whole(members):
                shards.require_whole_tensors(named, name_of(player.rule))
            gather = player.gathers(members)
            params = values_of(members, gather)
            start, _ = begun(player.mover, player.theta_on(common_device(params)), params)
            changed = [k for k, p in params.items() if start[k] is not p and not torch.equal(start[k].to(p), p)]
            if changed and not self.adopt_start:
                raise ValueError(
                    f"{name_of(player.rule)} has a start of its own, which would overwrite the parameters {changed}; "
                    "pass adopt_start=True to let it, or use a rule without a learned start to train on from the "
                    "present values"
                )
            require_start(player.rule, start)
            for name, param, _ in members:
                if name in changed:
                    shards.local(param.detach()).copy_(shards.own_piece(start[name], param, gather))

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        indices = saved_indices(state_dict, self.param_groups)
        for player, members in self._parts():
            gather = player.gathers(members)
            params = values_of(members, gather)
            state = player.begun(members, params)
            layout = player.layout(state, members, params, gather)
            own = [(indices.get(m.param), m) for m in members]
            self._require_memory(layout, state, state_dict, own, player.rule)
            self._require_length(player, [state_dict["state"].get(i, {}) for i, _ in own])
        for player, saved in zip(self._players, state_dict["param_groups"], strict=False):
            if saved.get(THETA, player.fingerprint) != player.fingerprint:
                raise ValueError(
                    f"this state is of another theta ({saved[THETA]}) than the optimizer's {name_of(player.rule)} has "
                    f"({player.fingerprint}): a rule goes on from its own memory only; make the optimizer with the "
                    "theta that it was saved with"
                )

    def _require_length(self, player: Player, entries: list[dict[str, Any]]) -> None:
        if self.num_steps is None or not player.rule.reads_horizon:
            return
        told = {float(x) for entry in entries for k, x in entry.items() if k.endswith(".horizon")}
        other = sorted(told - {float(self.num_steps)})
        if other:
            raise ValueError(
                f"this state is of a training of {other[0]:g} steps, and the optimizer was made with num_steps="
                f"{self.num_steps}: {name_of(player.rule)} is on its way along the first; make it with num_steps="
                f"{other[0]:g} to go on there"
            )

    def _fill_groups(self) -> None:
        """Give groups what those of earlier versions did not have."""
        for group, player in zip(self.param_groups, self._players, strict=True):
            group.setdefault("weight_decay", 0.0)
            group.setdefault("maximize", False)
            group[THETA] = player.fingerprint
