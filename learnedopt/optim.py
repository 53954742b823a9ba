"""The plug-in: a learned update rule as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from learnedopt.checkpoint import resolve_rule
from learnedopt.core import tree
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.plug_in.members import (
    Layout,
    Member,
    common_device,
    leaves_by_path,
    name_of,
    require_group,
    scalar_loss,
    shapes,
    unknown_names,
    values_of,
)


class LearnedOptimizer(torch.optim.Optimizer):
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
        adopt_start: bool = False,
        **foreign: Any,
    ) -> None:
        if foreign:
            raise TypeError(
                f"LearnedOptimizer has no option {', '.join(map(repr, foreign))}: what a step does is learned, and in "
                "theta; its options are lr and adopt_start"
            )
        self.rule, self.theta = resolve_rule(rule)
        self.adopt_start = adopt_start
        self._layout: Layout | None = None
        self._settled = False
        self._owned = False  # whether nobody else can hold the memory, so that it may be overwritten
        super().__init__(params, {"lr": lr})
        self._settle()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group before the first step; a rule's memory cannot grow afterwards.

        Raises:
            TypeError: the group sets an option that a learned rule does not have.
            ValueError: a step has been taken; or as the constructor.
        """
        if self._begun():
            raise ValueError(
                "a parameter group can be added before the first step only: the rule's memory belongs to the "
                "parameters that it began with; make a new optimizer with all of them"
            )
        super().add_param_group(param_group)
        try:
            require_group(self.param_groups[-1], [m.name for m in self._members()])
            if self._settled:  # the constructor settles when all its groups are there
                self._settle()
        except BaseException:
            self.param_groups.pop()
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
            ValueError: the rule reads the loss and got none; both are given; a gradient is sparse; the loss is not a
                scalar; the parameters lie on several devices; the rule does not know them by name.
        """
        if closure is not None:
            if loss is not None:
                raise ValueError("step got a closure and a loss; pass one of them: the closure returns the loss")
            with torch.enable_grad():
                loss = closure()
        members = self._members()
        if any(m.param.grad is not None for m in members):
            with torch.no_grad():
                self._move(members, loss)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's memory, the step count and the groups; later steps leave what was returned as it is."""
        self._owned = False
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; the rule's memory keeps the dtype it was saved with.

        Raises:
            ValueError: the memory is of another rule or of other parameters, or the groups differ.
        """
        given: dict[str, Any] = {}
        self._owned = False

        def note(_: Any, final: dict[str, Any]) -> None:
            self._check_state(final)
            given.update(final)

        def restore(_: Any) -> None:
            # torch has cast the memory to the parameters' dtype: put the saved tensors in their place.
            indices = [i for group in given["param_groups"] for i in group["params"]]
            for index, member in zip(indices, self._members(), strict=True):
                if index in given["state"]:
                    self.state[member.param] = dict(given["state"][index])

        # Hooks of the user's may change what is loaded: note it after them, and restore it before theirs see it.
        hooks = [
            self.register_load_state_dict_pre_hook(note),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._owned = False
        own = {"rule": self.rule, "theta": self.theta, "adopt_start": self.adopt_start, "_settled": self._settled}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._layout = None  # a function cannot be pickled; it is made again at the next step
        self._owned = False

    def _members(self) -> list[Member]:
        members: list[Member] = []
        for group in self.param_groups:
            names = group.get("param_names") or map(str, range(len(members), len(members) + len(group["params"])))
            members += [Member(name, p, group) for name, p in zip(names, group["params"], strict=True)]
        return members

    def _begun(self) -> bool:
        return any("step" in memory for memory in self.state.values())

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
        for name in changed:
            params[name].copy_(start[name])

    def _init(self, params: Params) -> tuple[Params, State]:
        device = common_device(params)
        self.theta = tree.to(self.theta, device, None)
        try:
            with torch.no_grad():
                start, state = self.rule.init(self.theta, params)
        except KeyError as error:
            raise ValueError(unknown_names(self.rule, params, error)) from error
        if {k: x.shape for k, x in start.items()} != {k: p.shape for k, p in params.items()}:
            raise ValueError(
                f"{name_of(self.rule)} starts from parameters {shapes(start)}, the optimizer's are {shapes(params)}; "
                "pass model.named_parameters() of a model like the one that the rule was made for"
            )
        return start, () if state is None else state

    def _move(self, members: list[Member], loss: Any) -> None:
        params = values_of(members)
        layout, state, count = self._recall(members, params)
        grads = self._gradients(members, params)
        # Whole steps are taken as the engine takes them; parts of one need the deltas.
        whole = all(float(group["lr"]) == 1 for _, _, group in members)
        found, new_state, added = self._update(grads, state, params, loss, whole)
        memory = leaves_by_path(new_state)
        if memory.keys() != set(layout.keys) or not all(isinstance(x, Tensor) for x in memory.values()):
            raise ValueError(
                f"{name_of(self.rule)}.update must return a state of the same structure as it was given, with tensors "
                f"as leaves: expected {list(layout.keys)}, got { {k: type(x).__name__ for k, x in memory.items()} }"
            )
        # What is written in place from here on, or by the next backward(), must not be part of the memory.
        written = {x.untyped_storage().data_ptr() for x in (*params.values(), *grads.values())}
        memory = {k: x.clone() if x.untyped_storage().data_ptr() in written else x for k, x in memory.items()}
        memory = {k: memory[k] for k in layout.keys}
        for name, param, group in members:
            lr = float(group["lr"])
            if param.grad is not None and lr != 0:  # 0 times an infinite update would not be nothing
                if added:
                    param.copy_(found[name])
                else:
                    param.add_(found[name].to(param.dtype), alpha=lr)
            # An entry for every parameter: tools that save by parameter look for one.
            self.state[param] = {"step": count + 1}
        # A new dict each time, so that an earlier state_dict() keeps what it held.
        self.state[members[0].param] = {"step": count + 1, **memory}
        self._owned = True

    def _recall(self, members: list[Member], params: Params) -> tuple[Layout, State, int]:
        """Return how the rule's memory is laid out, the memory, or a new one, and the number of steps so far."""
        device, memory = common_device(params), self.state.get(members[0].param, {})
        self.theta = tree.to(self.theta, device, None)
        if self._layout is None or "step" not in memory:
            _, state = self._init(params)
            self._layout = Layout(tuple(leaves_by_path(state)), tree.flatten(state)[1])
            if "step" not in memory:
                return self._layout, state, 0
        state = self._layout.rebuild([memory[k] for k in self._layout.keys])
        return self._layout, tree.to(state, device, None), memory["step"]

    def _gradients(self, members: list[Member], params: Params) -> Params:
        grads = {}
        for name, param, _ in members:
            grad = param.grad
            if grad is not None and grad.layout is not torch.strided:
                raise ValueError(
                    f"the gradient of {name!r} is sparse ({grad.layout}), and a learned rule moves every coordinate; "
                    "build the layer with sparse=False, or give its parameters another optimizer"
                )
            grads[name] = torch.zeros_like(params[name]) if grad is None else grad.detach()
        return grads

    def _update(
        self, grads: Params, state: State, params: Params, loss: Any, whole: bool
    ) -> tuple[Params, State, bool]:
        """Return the deltas or, where the rule adds them itself, new parameters; the new state; and which it is."""
        # A rule that reads no loss does not mind None; one that does must not be given an invented number.
        scalar: Any = None if loss is None else scalar_loss(loss, common_device(params))
        kernel, arguments = self.rule.kernel, (self.theta, grads, state, params, scalar)
        try:
            stepped = kernel.step(*arguments) if kernel is not None and whole else None
            if stepped is not None:
                found, state = stepped
            else:
                deltas = kernel.update_in_place(*arguments) if kernel is not None and self._owned else None
                found, state = (deltas, state) if deltas is not None else self.rule.update(*arguments)
        except KeyError as error:
            raise ValueError(unknown_names(self.rule, params, error)) from error
        except (TypeError, AttributeError) as error:
            if loss is not None:
                raise
            raise ValueError(
                f"{name_of(self.rule)}.update failed without the loss ({type(error).__name__}: {error}); a rule that "
                "reads the loss needs step(loss=loss) or step(closure)"
            ) from error
        if {k: d.shape for k, d in found.items()} != {k: p.shape for k, p in params.items()}:
            raise ValueError(
                f"{name_of(self.rule)}.update must return one delta of the same shape per parameter: expected "
                f"{shapes(params)}, got {shapes(found)}"
            )
        return found, () if state is None else state, stepped is not None

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError where a rule's memory that is to be loaded does not fit; a fresh optimizer has none."""
        members, memories = self._members(), state_dict["state"]
        if not members or not any(memories.values()):
            return
        _, state = self._init(values_of(members))
        first = next((i for group in state_dict["param_groups"] for i in group["params"]), None)
        got = shapes(memories.get(first, {}))
        expected = {"step": (), **shapes(leaves_by_path(state))}
        if expected != got:
            raise ValueError(
                f"this state is not of {name_of(self.rule)} with these parameters: expected {expected}, got {got}; "
                "make the optimizer with the rule and the parameters, in the order, that it was saved with"
            )
