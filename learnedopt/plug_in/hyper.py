"""The plug-in that learns while it trains: meta-gradients of one run's own windows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from learnedopt.core import tree
from learnedopt.core.carry import Carry, Tape
from learnedopt.core.counts import require_count
from learnedopt.core.estimator import as_leaves
from learnedopt.core.objective import FinalLoss, MetaObjective
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.objectives.feedback import HypergradientFeedback, scale_of
from learnedopt.plug_in import settings, shards, windows
from learnedopt.plug_in.base import RuleOptimizer, moved, require_structure, unshared
from learnedopt.plug_in.guard import Guard, PresentGradient
from learnedopt.plug_in.learner import Learner
from learnedopt.plug_in.members import (
    Member,
    common_device,
    factors_of,
    gradients_of,
    require_start,
    saved_indices,
    scalar_loss,
    values_of,
)
from learnedopt.plug_in.memory import COUNT, Entries, Layout
from learnedopt.plug_in.stepping import Updated, begun, updated
from learnedopt.plug_in.windows import Entry, Outputs, Window

_adam = functools.partial(torch.optim.Adam, lr=1e-2)
OWN = "hyper"
"""Where theta, the meta-optimizer and the window lie in a state dict, beside the rule's memory."""


@final
class HyperOptimizer(RuleOptimizer):
    """Trains ONE model by an update rule, and learns the rule's theta meanwhile: there is no meta-training before it.

    Each window of ``num_steps`` updates is differentiated as ``Truncated(num_steps, tape=Tape.FIRST_ORDER)`` does, on
    what the run itself recorded: a step's loss is ``l_t + <g_t, x - x_t>``, of which this tape needs ``.grad`` alone.
    The window's objective is known when the gradient after its last update arrives, in the next ``step()``: theta moves
    then, and the next window begins there. Everything else is as ``LearnedOptimizer`` has it: names, the factor ``lr``
    of a group (1 is the rule's whole update; schedulers may change it), parameters without a gradient, dtypes. Theta,
    the meta-optimizer's memory and the window are part of the ``state_dict``: a run that is resumed goes on to the bit.

    Args:
        params: as those of ``LearnedOptimizer``; ``model.named_parameters()`` for rules that tell tensors apart.
        rule: an update rule, which draws its own theta, or ``(rule, theta)``. Theta is copied.
        num_steps: updates a window.
        objective: what a window is to minimise. ``FinalLoss()``: the loss after its last update; ``SumOfLosses()``:
            those after each; ``HypergradientFeedback()``: OSGM's; ``TargetMatching(Bootstrap(L, step_size))``: the
            distance to where the run itself is after L - 1 further steps and a plain gradient step. Going on from
            "bootstrap", windows follow each other after num_steps + L - 1 steps; from "rollout" the run goes back to
            the window's end, parameters and memory, and goes on from there: L - 1 of num_steps + L - 1 steps only look
            ahead. Train and valid split are the same here.
        meta_optimizer: makes what moves theta from its tensors: any ``torch.optim.Optimizer``, or an online learner.
        guard: None; or ``AcceptIfBetter()``: a step that does not lower the loss on its own batch is taken back. Takes
            a closure, which is called twice a step, and windows of one step; the window's loss is that on the same
            batch.
        hint: the ``PresentGradient`` that an optimistic ``meta_optimizer`` reads.
        meta_scheduler: makes a learning-rate scheduler from the meta-optimizer, stepped after each of its steps.
        lr: as that of ``LearnedOptimizer``.
        seed: of theta, where the rule draws it.
        max_skips_in_a_row: meta-gradients that are not finite are skipped; more than so many in a row are an error.
        tape: ``Tape.FIRST_ORDER``. The full tape takes second derivatives of the loss, which gradients do not hold.

    Raises:
        TypeError: an option is of the wrong kind, or one that a learned rule does not have.
        ValueError: a meta-parameter cannot be learned by such windows, as a learned start cannot; an option is out of
            its range; or as ``LearnedOptimizer``.

    Example:
        >>> rule = learnedopt.optimizers.LearnedRates(dict(model.named_parameters()), "tensor", lr=0.1)
        >>> optimizer = HyperOptimizer(model.named_parameters(), rule)
        >>> loss = loss_fn(model(x), y)
        >>> optimizer.zero_grad()
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        rule: UpdateRule | tuple[UpdateRule, Theta],
        num_steps: int = 1,
        objective: MetaObjective = FinalLoss(),  # noqa: B008 - without a state
        meta_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = _adam,
        guard: Guard | None = None,
        *,
        hint: PresentGradient | None = None,
        meta_scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        lr: float | Tensor = 1.0,
        seed: int = 0,
        max_skips_in_a_row: int = 10,
        tape: Tape = Tape.FIRST_ORDER,
        **foreign: Any,
    ) -> None:
        require_count("num_steps", num_steps, least=1)
        require_count("max_skips_in_a_row", max_skips_in_a_row)
        settings.require_settings(num_steps, objective, guard, hint, tape, foreign)
        self.rule: UpdateRule
        self.rule, theta = settings.resolved(rule, seed)
        self.num_steps = num_steps
        self.objective = objective
        self.guard = guard
        self.hint = hint
        self._loop = windows.recorded_loop(self.rule)
        self._window: Window | None = None
        self._laid_out: Layout | None = None
        self._traced: tuple[Updated, Theta] | None = None  # the graph of a window of one step, while it is open
        super().__init__(params, {"lr": lr})
        theta = tree.to(theta, common_device(values_of(self._members())), None)
        self.learner: Learner = Learner(
            theta, self._loop.theta_scale, meta_optimizer, meta_scheduler, max_skips_in_a_row
        )
        settings.require_hint(hint, self.learner.meta_optimizer)
        self._settle()

    @property
    def theta(self) -> Theta:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The meta-parameters as they are now; what is returned does not move with them."""
        return self.learner.values

    @property
    def meta_optimizer(self) -> torch.optim.Optimizer:
        """What moves theta."""
        return self.learner.meta_optimizer

    def step(  # pyright: ignore[reportIncompatibleMethodOverride] - one signature instead of torch's two overloads
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: Tensor | float | None = None,
        outputs: Outputs | None = None,
    ) -> Any:
        """Close the window if its last gradient has come, so that theta moves; then move every parameter once.

        The gradients are those of the loss at the present parameters; clipped ones count as they are.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward()`` and returns the loss.
            loss: the loss at the present parameters, a scalar, where there is no closure; for rules and objectives
                that read it.
            outputs: the model's logits as a function of its parameters by name, on the present batch; for a matching
                of outputs, which is computed on the batch with which its window closes.

        Returns:
            The loss, as it was given or as ``closure`` returned it; None without either.

        Raises:
            RunDiverged: too many meta-gradients in a row were not finite.
            ValueError: the guard needs the closure, or the objective ``outputs``; or as that of ``LearnedOptimizer``.
        """
        settings.require_arguments(self.objective, self.guard, closure, loss, outputs)
        again, loss = closure, self._evaluated(closure, loss)
        members = self._members()
        if any(m.param.grad is not None for m in members):
            with torch.no_grad():
                if self.guard is not None and again is not None:
                    self._step_guarded(members, loss, again, self.guard)
                else:
                    self._step(members, loss, outputs)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's memory, theta, the meta-optimizer's memory, the window so far, and the groups.

        Later steps leave what was returned as it is.
        """
        first = self._members()[0].param
        kept = self.state.get(first)
        # In the state while torch's own method runs, so that its hooks see all of it.
        window = windows.packed(self._window, self._layout())
        self.state[first] = {**(kept or {}), OWN: {**self.learner.state_dict(), "window": window}}
        try:
            return super().state_dict()
        finally:
            if kept is None:
                del self.state[first]
            else:
                self.state[first] = kept

    def __getstate__(self) -> dict[str, Any]:
        own = ("rule", "learner", "num_steps", "objective", "guard", "hint", "_window", "_settled")
        return {**super().__getstate__(), **{k: self.__dict__[k] for k in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._loop, self._traced, self._laid_out = windows.recorded_loop(self.rule), None, None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group before the first step; the rule's memory and its window cannot grow afterwards.

        Raises:
            TypeError: the group sets an option that a learned rule does not have.
            ValueError: a step has been taken; or as the constructor.
        """
        if self._begun():
            raise ValueError(
                "a parameter group can be added before the first step only: the window and the rule's memory belong to "
                "the parameters that they began with; make a new optimizer with all of them"
            )
        self._laid_out = None
        super().add_param_group(param_group)

    def _settle(self) -> None:
        self._settled = True
        shards.require_known((m.name, m.param) for m in self._members())
        shards.require_here(((m.name, m.param) for m in self._members()), type(self).__name__)
        params = values_of(self._members())
        start, state = begun(self.rule, self.theta, params)
        require_start(self.rule, start)
        settings.require_learnable(self._loop, self.theta, params, state, self.num_steps, self.objective)

    def _layout(self) -> Layout:
        if self._laid_out is None:  # once: it takes the rule's first state
            params = values_of(self._members())
            state = begun(self.rule, self._theta_on(common_device(params)), params)[1]
            self._laid_out = Layout(state, params, spread=False)
        return self._laid_out

    def _recall(self, members: list[Member], params: Params) -> tuple[State, int]:
        """Return the rule's memory, or a new one, and the number of steps so far."""
        device, entries = common_device(params), {m.name: self.state.get(m.param, {}) for m in members}
        first = entries[members[0].name]
        if COUNT not in first:
            return begun(self.rule, self._theta_on(device), params)[1], 0
        return tree.to(self._layout().state(entries), device, None), first[COUNT]

    def _theta_on(self, device: torch.device) -> Theta:
        theta = self.theta
        if any(v.device != device for v in theta.values()):
            raise ValueError(
                f"the parameters lie on {device}, theta and what moves it where they lay when the optimizer was made; "
                "move the model first, then make its optimizer"
            )
        return theta

    @property
    def _one_step(self) -> bool:
        return self.num_steps == 1 and isinstance(self.objective, FinalLoss | HypergradientFeedback)

    def _entry(self, members: list[Member], params: Params, loss: Any) -> Entry:
        # Copies: the next backward() or a zero_grad() may write to the gradients.
        grads = {k: g.clone() for k, g in gradients_of(members).items()}
        value = None if loss is None else scalar_loss(loss, common_device(params))
        return windows.entry(value, grads, None if self._one_step else params, factors_of(members))

    def _begin(self, params: Params, state: State | None, entries: tuple[Entry, ...]) -> Window:
        # The parameters are moved in place.
        state = None if state is None else unshared(state, tuple(params.values()))
        return Window({k: p.clone() for k, p in params.items()}, state, entries)

    def _step(self, members: list[Member], loss: Any, outputs: Outputs | None) -> None:
        params = values_of(members)
        state, count = self._recall(members, params)
        self._theta_on(common_device(params))
        now, window = self._entry(members, params, loss), self._window
        if window is None:
            window = self._begin(params, state if count else None, (now,))
        else:
            window = window._replace(entries=(*window.entries, now))
            if len(window.entries) == settings.num_recorded(self.num_steps, self.objective):
                window = self._closed(params, state, window, outputs)
                state = state if window.state is None else window.state
        self._window = window
        self._move(members, window, state, count)

    def _closed(self, params: Params, state: State, window: Window, outputs: Outputs | None) -> Window:
        """Learn from a window, and return the one that begins where training goes on."""
        now = window.entries[-1]
        if self._one_step:
            grads = self._one_step_gradient(window, now.grads)
            onward = Carry((), params, state, 1)
        else:
            found = windows.truncated(self._loop, self.theta, self.objective, self.num_steps, window, outputs)
            grads, onward = found.grads, found.carry
        begun = self._begin(params, state, (now,))
        if onward.step < len(window.entries) - 1:
            for k, p in params.items():
                p.copy_(onward.params[k])
            begun = self._begin(params, onward.state, (window.entries[onward.step],))
        self._learn(grads, begun)
        return begun

    def _move(self, members: list[Member], window: Window, state: State, count: int) -> None:
        """Move by the update of the window's last entry; a window of one step keeps its graph for the meta-gradient."""
        now = window.entries[-1]
        if self._one_step:
            self._traced = self._trace(window)
            found = self._traced[0]
        else:
            found = self._updated(self.theta, now, state, values_of(members))
        # What is written in place from here on, or by the next backward(), must not be part of the memory.
        layout = self._layout()
        require_structure(layout, found.state, self.rule)
        kept = tree.detach(unshared(found.state, (*(m.param for m in members), *now.grads.values())))
        moved(members, found.found, now.factors, added=found.added)
        self._remember(members, layout.entries(kept), count + 1)

    def _updated(self, theta: Theta, now: Entry, state: State, params: Params) -> Updated:
        whole = all(factor in (0, 1) for factor in now.factors.values())
        return updated(self.rule, theta, now.grads, state, params, now.loss, whole=whole)

    def _remember(self, members: list[Member], entries: Entries, count: int) -> None:
        for name, param, _ in members:  # new dicts each time, so that an earlier state_dict() keeps what it held
            self.state[param] = {COUNT: count, **entries[name]}

    def _trace(self, window: Window) -> tuple[Updated, Theta]:
        """Return the window's first update with its graph, and the leaves of theta that the graph ends in."""
        first, leaves = window.entries[0], as_leaves(self.theta)
        with torch.enable_grad():
            state = window.state
            if state is None:
                state = begun(self.rule, leaves, window.params, graph=True)[1]
            return self._updated(leaves, first, state, window.params), leaves

    def _one_step_gradient(self, window: Window, cotangents: Params) -> Theta:
        # In a run that was resumed, the graph is made again.
        (updated, leaves), first = self._traced or self._trace(window), window.entries[0]
        if isinstance(self.objective, HypergradientFeedback):
            scale = scale_of(first.grads)
            cotangents = {k: scale * g for k, g in cotangents.items()}
        return windows.pulled_back(updated.found, leaves, cotangents, first.factors)

    def _learn(self, grads: Theta, ahead: Window) -> None:
        """Move theta; the hint is computed with the theta of the window that ends, where the next one begins."""
        self._traced = None
        if self.hint is not None:
            hint = self.learner.scaled.gradients(self._one_step_gradient(ahead, ahead.entries[0].grads))
            self.hint.set([hint[k] for k in self.theta])
        self.learner.learn(grads)

    def _step_guarded(self, members: list[Member], loss: Any, closure: Callable[[], Any], guard: Guard) -> None:
        """Try a step, learn from the gradient where it leads to, and take it back unless it counts."""
        params = values_of(members)
        state, count = self._recall(members, params)
        device = common_device(params)
        self._theta_on(device)
        window = self._begin(params, state if count else None, (self._entry(members, params, loss),))
        self._move(members, window, state, count)
        with torch.enable_grad():
            after_loss = closure()
        after = self._entry(members, params, after_loss)
        grads = self._one_step_gradient(window, after.grads)
        if guard(scalar_loss(loss, device), scalar_loss(after_loss, device)):
            window = self._begin(params, self._recall(members, params)[0], (after,))
        else:
            for k, p in params.items():
                p.copy_(window.params[k])
            kept = unshared(state, tuple(params.values()))
            window = self._begin(params, state, window.entries)
            self._remember(members, self._layout().entries(kept), count + 1)
        self._learn(grads, window)

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        params, indices = values_of(self._members()), saved_indices(state_dict, self.param_groups)
        _, state = begun(self.rule, self.theta, params)
        members = [(indices.get(m.param), m) for m in self._members()]
        self._require_memory(Layout(state, params, spread=False), state, state_dict, members, self.rule, (OWN,))
        first = members[0][0] if members else None
        own = state_dict["state"].get(first, {}).get(OWN)
        if own is None:
            raise ValueError(
                "this state holds no theta, so it is not of a HyperOptimizer; load it into the optimizer that it was "
                "saved from, such as a LearnedOptimizer"
            )
        self.learner.check(own)

    def _loaded(self) -> None:
        first = self._members()[0].param
        own = self.state[first].pop(OWN)
        self.learner.load_state_dict(own)
        self._window = windows.unpacked(own["window"], self._layout())
        if not self.state[first]:
            del self.state[first]
