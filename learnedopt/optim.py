"""The plug-in: a learned update rule as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from learnedopt.checkpoint import resolve_rule
from learnedopt.core import tree
from learnedopt.core.counts import require_count
from learnedopt.core.horizon import Clock, HorizonWarning
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.plug_in.base import RuleOptimizer
from learnedopt.plug_in.guard_rail import Guard, GuardReport, Learned, Rail, split
from learnedopt.plug_in.members import common_device, leaves_by_path, name_of, require_start, scalar_loss, values_of


@final
class LearnedOptimizer(RuleOptimizer):
    """Moves a model's parameters by a learned update rule, as the engine's inner step does, to the same bits.

        deltas, state = rule.update(theta, grads, state, params, loss),    param += lr * delta

    The rule sees the parameters of all groups together, in their order, and ``grads`` is what ``backward()`` left (a
    penalty that theta was trained with is yours to add). A parameter whose ``grad`` is None is not moved: the rule sees
    a zero gradient there, so that the memory it keeps for the other coordinates stays theirs. Without any gradient at
    all nothing happens. Theta is fixed, and not part of the ``state_dict``: construct the optimizer as it was, then
    load. The rule's memory keeps its own dtype, whatever the parameters' is.

    Args:
        params: parameters, ``model.named_parameters()``, or groups of them, each with an ``lr`` of its own if it
            likes. Rules that tell tensors apart (a learned start, rates per coordinate, a partition) need the names;
            without names a parameter is called by its number, from "0" on.
        rule: the name of a packaged optimizer, the path of a checkpoint, or ``(rule, theta)``; theta is copied.
        lr: factor on the whole update. 1 is what the rule was trained with, 0 moves nothing; schedulers may change it.
        num_steps: steps of the whole training, which a rule that reads the horizon must be told. Past it its schedule
            stays at its end, with one warning.
        adopt_start: let a rule with a learned start overwrite the parameters with it, now. Weights that are to be kept,
            as when training is resumed, are loaded after this.

    Raises:
        FileNotFoundError: there is no such checkpoint and no such packaged name.
        TypeError: an option is one that a learned rule does not have, such as ``fused``; ``rule`` is none of the three.
        ValueError: theta belongs to another rule or shape; ``lr`` is negative; a parameter is not real and floating; a
            name occurs twice; the rule does not know the parameters, or would change them without ``adopt_start``.

    Example:
        >>> optimizer = LearnedOptimizer(model.parameters(), "lstm-mnist")
        >>> loss = loss_fn(model(x), y)
        >>> optimizer.zero_grad()
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        rule: str | Path | tuple[UpdateRule, Theta],
        *,
        lr: float | Tensor = 1.0,
        num_steps: int | None = None,
        adopt_start: bool = False,
        guard: bool | Guard = True,
        **foreign: Any,
    ) -> None:
        if foreign:
            raise TypeError(
                f"LearnedOptimizer has no option {', '.join(map(repr, foreign))}: what a step does is learned, and in "
                "theta; its options are lr, num_steps, adopt_start and guard"
            )
        self.rule, self.theta = resolve_rule(rule)
        if num_steps is not None:
            require_count("num_steps", num_steps, least=1)
        self.adopt_start, self.num_steps = adopt_start, num_steps
        self.rule.within(num_steps)  # refused now where it needs a horizon
        self._owned = False  # whether nobody else can hold the memory, so that it may be overwritten
        self._rail: Rail | None = None
        super().__init__(params, {"lr": lr})
        self._settle()
        if guard:
            horizon = num_steps if self.rule.reads_horizon else None
            self._rail = Rail(Guard() if guard is True else guard, self.param_groups, horizon, num_steps)

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
            ValueError: the rule reads the loss and got none; both are given; a gradient is sparse; the loss is not a
                scalar; the parameters lie on several devices; the rule does not know them by name.
        """
        loss = self._evaluated(closure, loss)
        if self._rail is None or all(float(group["lr"]) == 0 for group in self.param_groups):
            self._step_learned(loss)
        elif any(p.grad is not None for group in self.param_groups for p in group["params"]):
            told = None if loss is None else scalar_loss(loss, torch.device("cpu"))
            learned = Learned(lambda: self._step_learned(loss), self._forget, self._set_clock)
            with torch.no_grad():
                self._rail.step(self.param_groups, told, learned)
        return loss

    @property
    def guarded(self) -> bool:
        """Whether there is a guard."""
        return self._rail is not None

    def guard_report(self) -> GuardReport:
        """Return who is in control, every hand-over, and what the guard cannot see.

        Raises:
            ValueError: there is no guard.
        """
        if self._rail is None:
            raise ValueError("this optimizer was made with guard=False, so there is nothing to report")
        return self._rail.report()

    def _step_learned(self, loss: Any) -> None:
        """Take a step of the rule's."""
        members = self._members()
        if any(m.param.grad is not None for m in members):
            with torch.no_grad():
                params = values_of(members)
                state, count = self._recall(members, params)
                self._require_end(count + 1)
                theta, grads = self._theta_on(common_device(params)), self._gradients(members, params)
                factors = self._factors(members)
                updated = self._update(theta, grads, state, params, loss, factors, in_place=self._owned)
                self._apply(members, updated, grads, count, factors)
            self._owned = True

    def _forget(self) -> None:
        self.state.clear()

    def _set_clock(self, step: int) -> None:
        members = self._members()
        params = values_of(members)
        state, count = self._recall(members, params)
        if count and isinstance(state, Clock):
            state = state._replace(step=torch.full_like(state.step, step))
            self._remember(members, leaves_by_path(state), count)

    def _init(self, params: Params, leaves: Theta | None = None) -> tuple[Params, State]:
        start, state = super()._init(params, leaves)
        if self._rail is not None and isinstance(state, Clock):  # a rule that comes back late is told so
            state = state._replace(step=state.step + self._rail.watch.step)
        return start, state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; the fallback moves them, too."""
        super().add_param_group(param_group)
        if self._rail is not None:
            self._rail.add(self.param_groups[-1])

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's memory, the guard's, the step count and the groups.

        Later steps leave what was returned as it is.
        """
        self._owned = False
        if self._rail is None or not self._rail.watch.step:
            return super().state_dict()
        members = self._members()
        kept = {m.param: self.state[m.param] for m in members if m.param in self.state}
        # In the state while torch's own method runs, so that its hooks see all of it.
        for member, own in zip(members, self._rail.entries([m.param for m in members]), strict=True):
            self.state[member.param] = {**kept.get(member.param, {}), **own}
        try:
            return super().state_dict()
        finally:
            self.state.clear()
            self.state.update(kept)

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
        own = {k: self.__dict__[k] for k in ("rule", "theta", "adopt_start", "num_steps", "_settled", "_rail")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._owned = False

    def _loaded(self) -> None:
        members, found = self._members(), []
        for member in members:
            kept, own = split(self.state.get(member.param, {}))
            found.append(own)
            if kept:
                self.state[member.param] = kept
            else:
                self.state.pop(member.param, None)
        if self._rail is not None and (self._begun() or any(found)):
            self._rail.recall([m.param for m in members], found)

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        halves = {i: split(one) for i, one in state_dict["state"].items()}
        state_dict = {**state_dict, "state": {i: kept for i, (kept, _) in halves.items()}}
        if self._rail is None and any(own for _, own in halves.values()) and not any(state_dict["state"].values()):
            raise ValueError(
                "this state was saved while the guard's fallback moved the parameters, so it holds no memory of the "
                "rule's; make the optimizer with guard=True"
            )
        super()._check_state(state_dict)
        if self.num_steps is None or not self.rule.reads_horizon:
            return
        told = {float(x) for one in state_dict["state"].values() for k, x in one.items() if k.endswith(".horizon")}
        other = sorted(told - {float(self.num_steps)})
        if other:
            raise ValueError(
                f"this state is of a training of {other[0]:g} steps, and the optimizer was made with num_steps="
                f"{self.num_steps}: {name_of(self.rule)} is on its way along the first; make it with num_steps="
                f"{other[0]:g} to go on there"
            )

    @property
    def _mover(self) -> UpdateRule:
        return self.rule.within(self.num_steps)

    def _settle(self) -> None:
        """See that the rule takes these parameters, and put its start into them if that was allowed."""
        self._settled = True
        members = self._members()
        if not members:
            return
        params = values_of(members)
        start, _ = self._init(params)
        changed = [k for k, p in params.items() if start[k] is not p and not torch.equal(start[k].to(p), p)]
        if changed and not self.adopt_start:
            raise ValueError(
                f"{name_of(self.rule)} has a start of its own, which would overwrite the parameters {changed}; pass "
                "adopt_start=True to let it, or use a rule without a learned start to train on from the present values"
            )
        require_start(self.rule, start)
        for name in changed:
            params[name].copy_(start[name])

    def _require_end(self, step: int) -> None:
        """Warn at the first step past the horizon that the rule reads."""
        if self.rule.reads_horizon and self.num_steps is not None and step == self.num_steps + 1:
            warnings.warn(
                f"step {step} is past the num_steps={self.num_steps} that {name_of(self.rule)} was told: its schedule "
                "stays at its end. Make the optimizer with the number of steps of the whole training",
                HorizonWarning,
                stacklevel=4,
            )

    def _theta_on(self, device: torch.device) -> Theta:
        self.theta = tree.to(self.theta, device, None)
        return self.theta
