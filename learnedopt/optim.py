"""The plug-in: a learned update rule as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from learnedopt.cards import card, past_horizon, trained_horizon
from learnedopt.checkpoint import resolve_rule
from learnedopt.core.containers import is_dict
from learnedopt.core.counts import require_count
from learnedopt.core.horizon import HorizonWarning
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Theta
from learnedopt.core.user_warning import warn_user
from learnedopt.plug_in.cohorts import Cohort, Player
from learnedopt.plug_in.guard_rail import Guard, GuardReport, Learned, Rail
from learnedopt.plug_in.guard_state import held, recall, require, without
from learnedopt.plug_in.members import (
    name_of,
    scalar_loss,
)
from learnedopt.plug_in.moving import THETA, MovedByRules
from learnedopt.plug_in.state_dtype import require_state_dtype


@final
class LearnedOptimizer(MovedByRules):
    """Moves a model's parameters by a learned update rule, each of its steps to the bit as the engine's inner one is.

        deltas, state = rule.update(theta, grads, state, params, loss)
        param <- param - lr weight_decay param + lr delta

    The rule sees the parameters of all its groups together, in their order, and ``grads`` is what ``backward()`` left
    (a penalty that theta was trained with is yours to add). A parameter whose ``grad`` is None is left alone, and so is
    the memory that is its own. Theta is fixed, and not part of the ``state_dict``: construct the optimizer as it was,
    then load. The rule's memory keeps its own dtype, whatever the parameters' is, and lies with each parameter by its
    position: names play no part in it.

    Args:
        params: parameters, ``model.named_parameters()``, or groups of them, each with ``lr``, ``weight_decay``,
            ``maximize`` and ``rule`` of its own if it likes. Rules that tell tensors apart (a learned start, rates per
            coordinate, a partition) need the names; without names a parameter is called by its number, from "0" on.
        rule: the name of a packaged optimizer, the path of a checkpoint, or ``(rule, theta)``; theta is copied.
        lr: factor on the whole update. 1 is what the rule was trained with, 0 moves nothing; schedulers may change it.
        weight_decay: share of a parameter that a step takes off beside the rule's update, times ``lr``.
        maximize: climb: the rule is told the negative gradient, and the negative loss where all its groups climb.
        num_steps: steps of the whole training, which a rule that reads the horizon must be told. Past it a guarded
            rule gives way, and the schedule of a bare one stays at its end, with one warning.
        adopt_start: let a rule with a learned start overwrite the parameters with it, now. Weights that are to be kept,
            as when training is resumed, are loaded after this.
        state_dtype: ``torch.bfloat16`` keeps memory in half the bytes between steps, rounded at random.
        guard: whether the rule is watched beside a safe fallback, and gives way where that does better: see ``Guard``,
            and ``guard_report()``. False is the bare rule, to the bit.

    Raises:
        FileNotFoundError: there is no such checkpoint and no such packaged name.
        TypeError: an option is one that a learned rule does not have, such as ``fused``; ``rule`` is none of the three;
            ``guard`` is none, or its fallback cannot be one.
        ValueError: theta belongs to another rule or shape; ``lr`` or ``weight_decay`` is negative; a parameter is
            complex; a name occurs twice; the rule does not know the parameters, or would change them without
            ``adopt_start``.

    Example:
        >>> optimizer = LearnedOptimizer(model.parameters(), "lstm-mnist")
        >>> loss = loss_fn(model(x), y)
        >>> optimizer.zero_grad()
        >>> loss.backward()
        >>> optimizer.step(loss=loss)  # without the loss, the guard cannot see whether it falls
    """

    _options = ("lr", "weight_decay", "maximize", "rule")

    def __init__(
        self,
        params: ParamsT,
        rule: str | Path | tuple[UpdateRule, Theta],
        *,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        num_steps: int | None = None,
        adopt_start: bool = False,
        state_dtype: torch.dtype | None = None,
        guard: bool | Guard = True,
        **foreign: Any,
    ) -> None:
        if foreign:
            raise TypeError(
                f"LearnedOptimizer has no option {', '.join(map(repr, foreign))}: what a step does is learned, and in "
                "theta; its options are lr, weight_decay, maximize, num_steps, adopt_start, state_dtype "
                "and guard"
            )
        if num_steps is not None:
            require_count("num_steps", num_steps, least=1)
        require_state_dtype(state_dtype)
        if not isinstance(cast("object", guard), bool | Guard):
            raise TypeError(f"guard={guard!r} is no guard; pass True, False, or learnedopt.Guard(...) with its options")
        self.adopt_start = adopt_start
        self.num_steps = num_steps
        self._state_dtype = state_dtype
        self._player = self._resolved(rule)
        self._players: list[Player] = []  # of each group
        self._owned = False  # whether nobody else can hold the memory, so that it may be overwritten
        self._together: list[Cohort] = []  # as the last step had them
        self._rail: Rail | None = None
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})
        self._settle()
        if guard:
            self._rail = self._guarded_by(Guard() if guard is True else guard)

    @property
    def rule(self) -> UpdateRule:
        """The rule that was given; groups may have others."""
        return self._player.rule

    @property
    def theta(self) -> Theta:
        """Its meta-parameters."""
        return self._player.theta

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; after the first step only where its rule moves each parameter by itself, or is a new one.

        Raises:
            TypeError: the group sets an option that a learned rule does not have.
            ValueError: steps have been taken and the rule ties parameters together; or as the constructor.
        """
        param_group = dict(param_group) if is_dict(param_group) else param_group
        own = param_group.pop("rule", None) if is_dict(param_group) else None
        player = self._player if own is None else self._resolved(own)
        if self._begun() and player in self._players and not player.rule.coordinatewise:
            raise ValueError(
                f"{name_of(player.rule)} ties parameters together, so a parameter group can be added before the first "
                "step only: its memory belongs to the parameters that it began with. Make a new optimizer with all of "
                'them, or give the group a rule of its own: {"params": ..., "rule": ...}'
            )
        self._players.append(player)
        count = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            self.param_groups[-1][THETA] = player.fingerprint
            if self._rail is not None:
                self._rail.add(self.param_groups[-1])
        except BaseException:
            self._players.pop()
            del self.param_groups[count:]
            raise

    def step(  # pyright: ignore[reportIncompatibleMethodOverride] - one signature instead of torch's two overloads
        self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None
    ) -> Any:
        """Move every parameter that has a gradient, once.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward()`` and returns the loss.
            loss: the loss at the present parameters, a scalar, where there is no closure. Most rules do not read it.

        Returns:
            The loss, as it was given or as ``closure`` returned it; None without either.

        Raises:
            TypeError: the loss is given in the closure's place.
            ValueError: a parameter group was removed; the rule reads the loss and got none; both are given; a gradient
                is sparse; the loss is not a scalar; the parameters lie on several devices; the rule does not know them
                by name.
        """
        if len(self._players) != len(self.param_groups):
            raise ValueError(
                f"the optimizer was made with {len(self._players)} parameter groups and has {len(self.param_groups)} "
                "now: which rule moves which cannot be told. Add groups by add_param_group; in place of removing one, "
                "set its lr to 0 or its parameters' requires_grad to False"
            )
        loss = self._evaluated(closure, loss)
        rail, groups = self._rail, self.param_groups
        if rail is None:
            self._step_learned(loss)
        elif all(float(group["lr"]) == 0 for group in groups):  # nothing moves but memory: there is nothing to watch
            if rail.watch.learned_moves and rail.finite(groups):
                self._step_learned(loss)
        else:
            told = None if loss is None else scalar_loss(loss, torch.device("cpu"))
            rail.step(groups, told, Learned(lambda: self._step_watched(loss), self._forget, self._set_clock))
        return loss

    def _guarded_by(self, guard: Guard) -> Rail:
        readers = [player for player in self._players if player.rule.reads_horizon]
        # A schedule is trusted to gain at its end where its theta is known to, in runs as long as this one.
        told = self.num_steps or 0
        trusted = bool(readers) and all(
            player.known_steps is not None and told <= player.known_steps for player in readers
        )
        return Rail(guard, self.param_groups, told if readers else None, self.num_steps, trusted=trusted)

    def guard_report(self) -> GuardReport:
        """Return who is in control, every hand-over, and what the guard cannot see.

        Raises:
            ValueError: there is no guard.
        """
        if self._rail is None:
            raise ValueError("this optimizer was made with guard=False, so there is nothing to report")
        return self._rail.report()

    def _step_watched(self, loss: Any) -> None:
        if self._rail is not None and not self._begun():
            for player in self._players:  # a rule that comes back late is told how late it is
                player.behind = self._rail.watch.step
        self._step_learned(loss)

    def _forget(self) -> None:
        self.state.clear()
        self._together = []

    def _set_clock(self, step: int) -> None:
        for player, members in self._parts():
            for _, param, _ in members if player.rule.reads_horizon else ():
                entry = self.state.get(param, {})
                clocks = {key.removesuffix("horizon") + "step" for key in entry if key.endswith(".horizon")} & {*entry}
                if clocks:
                    self.state[param] = {**entry, **{key: torch.full_like(entry[key], step) for key in clocks}}

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's memory, the guard's, the step counts and the groups.

        Later steps leave what was returned as it is.
        """
        self._owned = False
        with held(self.state, self._rail, [p for group in self.param_groups for p in group["params"]]):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; the rule's memory keeps the dtype it was saved with.

        Raises:
            ValueError: the memory is of another rule or of other parameters, the groups differ, or the rule was told
                another ``num_steps``.
        """
        self._owned = False
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self._owned = False
        own = {
            k: self.__dict__[k]
            for k in ("_player", "_players", "adopt_start", "num_steps", "_state_dtype", "_settled", "_rail")
        }
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._owned, self._together = False, []

    @staticmethod
    def _known(rule: Any) -> tuple[Any, int | None]:
        """Return the card of a rule that was given by name or path, and the steps that its theta is known to hold."""
        if not isinstance(rule, str | Path):
            return None, None
        found = card(rule)
        return found, trained_horizon(found)

    def _resolved(self, rule: Any) -> Player:
        found = Player(*resolve_rule(rule), self.num_steps, *self._known(rule))
        found.mover  # noqa: B018 - refused now where it needs a horizon
        if found.card is not None and found.rule.reads_horizon:
            unknown = past_horizon(found.card, self.num_steps or 0)
            if unknown is not None:
                warn_user(unknown, HorizonWarning)
        return found

    def _require_end(self, cohort: Cohort) -> None:
        """Warn at the first step past the horizon that the rule reads, or past what is known of its theta."""
        player, step = cohort.player, cohort.count + 1
        if player.rule.reads_horizon:
            if self.num_steps is None or step != self.num_steps + 1:
                return
            text = (
                f"step {step} is past the num_steps={self.num_steps} that {name_of(player.rule)} was told: its "
                "schedule stays at its end. Make the optimizer with the number of steps of the whole training"
            )
        elif player.known_steps is not None and step == player.known_steps + 1:
            text = str(past_horizon(player.card, step))
        else:
            return
        if not player.warned:  # parameters of another age get there later
            player.warned = True
            warn_user(text, HorizonWarning)

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        if self._rail is not None:
            require(state_dict, self._rail, [p for group in self.param_groups for p in group["params"]])
        super()._check_state(without(state_dict, guarded=self._rail is not None))

    def _loaded(self) -> None:
        recall(self.state, self._rail, [p for group in self.param_groups for p in group["params"]])
        self._fill_groups()
