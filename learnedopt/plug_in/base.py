"""What optimizers that move a user's own model by an update rule have in common: members, memory, state dicts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.plug_in import shards
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


class Updated(NamedTuple):
    """What a rule answered: deltas or, where it ``added`` them itself, new parameters; and its new state."""

    found: Params
    state: State
    added: bool
    written: bool = False
    """The new parameters are in the parameters already."""


class RuleOptimizer(torch.optim.Optimizer):
    """The base of ``LearnedOptimizer`` and ``HyperOptimizer``: everything but what becomes of theta.

    The rule's memory lies with the first parameter, by the path to each leaf, beside the count ``step`` that every
    parameter has. It keeps its own dtype, whatever the parameters' is.
    """

    rule: UpdateRule
    theta: Theta
    _layout: Layout | None = None
    _settled: bool = False
    _whole: bool = False

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; the rule's memory keeps the dtype it was saved with.

        Raises:
            ValueError: the memory is of another rule or of other parameters, or the groups differ.
        """
        given: dict[str, Any] = {}

        def note(_: Any, final: dict[str, Any]) -> None:
            self._check_state(final)
            given.update(final)

        def restore(_: Any) -> None:
            # torch has cast the memory to the parameters' dtype: put the saved tensors in their place.
            indices = [i for group in given["param_groups"] for i in group["params"]]
            for index, member in zip(indices, self._members(), strict=True):
                if index in given["state"]:
                    self.state[member.param] = dict(given["state"][index])
            self._loaded()

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._layout = None  # a function cannot be pickled; it is made again at the next step

    @property
    def _mover(self) -> UpdateRule:
        """What is stepped: the rule, with a clock around it where it reads the horizon."""
        return self.rule

    @abstractmethod
    def _settle(self) -> None:
        """See that the rule takes these parameters."""

    @abstractmethod
    def _theta_on(self, device: torch.device) -> Theta:
        """Return theta's values on the parameters' device."""

    def _loaded(self) -> None:
        """Take what else a state dict held out of ``self.state``."""

    def _own_entries(self) -> tuple[str, ...]:
        """Return the keys of the first parameter's state that are neither ``step`` nor the rule's memory."""
        return ()

    def _members(self) -> list[Member]:
        members: list[Member] = []
        for group in self.param_groups:
            names = group.get("param_names") or map(str, range(len(members), len(members) + len(group["params"])))
            members += [Member(name, p, group) for name, p in zip(names, group["params"], strict=True)]
        return members

    def _begun(self) -> bool:
        return any("step" in memory for memory in self.state.values())

    def _evaluated(self, closure: Callable[[], Any] | None, loss: Any) -> Any:
        if closure is None:
            return loss
        if loss is not None:
            raise ValueError("step got a closure and a loss; pass one of them: the closure returns the loss")
        with torch.enable_grad():
            return closure()

    def _init(self, params: Params, leaves: Theta | None = None) -> tuple[Params, State]:
        """Ask the rule for its start, with a graph to ``leaves`` where there are any."""
        theta = leaves if leaves is not None else self._theta_on(common_device(params))
        try:
            with torch.set_grad_enabled(leaves is not None):
                start, state = self._mover.init(theta, params)
        except KeyError as error:
            raise ValueError(unknown_names(self.rule, params, error)) from error
        if {k: x.shape for k, x in start.items()} != {k: p.shape for k, p in params.items()}:
            raise ValueError(
                f"{name_of(self.rule)} starts from parameters {shapes(start)}, the optimizer's are {shapes(params)}; "
                "pass model.named_parameters() of a model like the one that the rule was made for"
            )
        return start, () if state is None else state

    def _laid_out(self, members: list[Member]) -> Layout:
        if self._layout is None:
            _, state = self._init(values_of(members, self._whole))
            self._layout = Layout(tuple(leaves_by_path(state)), tree.flatten(state)[1])
        return self._layout

    def _recall(self, members: list[Member], params: Params) -> tuple[State, int]:
        """Return the rule's memory, or a new one, and the number of steps so far."""
        device, memory = common_device(params), self.state.get(members[0].param, {})
        if "step" not in memory:
            return self._init(params)[1], 0
        layout = self._laid_out(members)
        state = layout.rebuild([shards.seen(memory[k], self._whole) for k in layout.keys])
        return tree.to(state, device, None), memory["step"]

    def _gradients(self, members: list[Member], params: Params) -> Params:
        grads = {}
        for name, param, _ in members:
            grad = param.grad
            if grad is not None and grad.layout is not torch.strided:
                raise ValueError(
                    f"the gradient of {name!r} is sparse ({grad.layout}), and a learned rule moves every coordinate; "
                    "build the layer with sparse=False, or give its parameters another optimizer"
                )
            grads[name] = (
                torch.zeros_like(params[name]) if grad is None else shards.seen(grad.detach(), self._whole, param)
            )
        return grads

    def _update(
        self, theta: Theta, grads: Params, state: State, params: Params, loss: Any, factors: dict[str, float],
        *, in_place: bool = False,
    ) -> Updated:  # fmt: skip
        """Call the rule.

        Args:
            theta: its values, on the parameters' device.
            grads: what ``_gradients`` returned.
            state: the rule's memory.
            params: the parameters' values.
            loss: what ``step`` was told, or None.
            factors: by what each parameter's update will be multiplied.
            in_place: whether ``state`` and ``params`` may be overwritten.
        """
        # A rule that reads no loss does not mind None; one that does must not be given an invented number.
        scalar: Any = None if loss is None else scalar_loss(loss, common_device(params))
        kernel, arguments = self._mover.kernel, (theta, grads, state, params, scalar)
        # Whole steps are taken as the engine takes them; parts of one need the deltas.
        whole = all(factor in (0, 1) for factor in factors.values())
        try:
            if kernel is not None and in_place and whole and all(factors.values()) and kernel.step_in_place(*arguments):
                return Updated(params, state, True, True)
            stepped = kernel.step(*arguments) if kernel is not None and whole else None
            if stepped is not None:
                found, state = stepped
            else:
                deltas = kernel.update_in_place(*arguments) if kernel is not None and in_place else None
                found, state = (deltas, state) if deltas is not None else self._mover.update(*arguments)
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
        return Updated(found, () if state is None else state, stepped is not None)

    def _factors(self, members: list[Member]) -> dict[str, float]:
        """Return by what each parameter's update is multiplied; 0 where there is no gradient."""
        return {name: 0.0 if param.grad is None else float(group["lr"]) for name, param, group in members}

    def _apply(
        self, members: list[Member], updated: Updated, grads: Params, count: int, factors: dict[str, float]
    ) -> None:
        """Move every parameter by its factor times the update, and keep the rule's new memory."""
        layout, memory = self._laid_out(members), leaves_by_path(updated.state)
        if memory.keys() != set(layout.keys) or not all(isinstance(x, Tensor) for x in memory.values()):
            kinds = {k: type(x).__name__ for k, x in memory.items()}
            raise ValueError(
                f"{name_of(self.rule)}.update must return a state of the same structure as it was given, with tensors "
                f"as leaves: expected {list(layout.keys)}, got {kinds}"
            )
        # What is written in place from here on, or by the next backward(), must not be part of the memory.
        memory = unshared(memory, (*(shards.local(m.param) for m in members), *grads.values()))
        for name, param, _ in members:
            found, factor = updated.found[name], factors[name]
            if factor != 0 and not updated.written:  # 0 times an infinite update would not be nothing
                here, found = shards.local(param.detach()), shards.own_piece(found, param, self._whole)
                if updated.added:
                    here.copy_(found)
                else:
                    here.add_(found.to(param.dtype), alpha=factor)
        self._remember(members, {k: memory[k].detach() for k in layout.keys}, count + 1)

    def _remember(self, members: list[Member], memory: dict[str, Any], count: int) -> None:
        for _, param, _ in members:  # an entry for every parameter: tools that save by parameter look for one
            self.state[param] = {"step": count}
        # A new dict each time, so that an earlier state_dict() keeps what it held.
        for name, param, _ in members:
            shape = values_of([Member(name, param, {})], self._whole)[name].shape if memory else ()
            for k, x in memory.items():
                if k.endswith(f"[{name!r}]") and x.shape[x.ndim - len(shape) :] == shape:
                    memory[k] = shards.kept(x, param, self._whole)
        self.state[members[0].param] = {"step": count, **memory}

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError where a rule's memory that is to be loaded does not fit; a fresh optimizer has none."""
        members, own = self._members(), self._own_entries()
        memories = {i: {k: x for k, x in one.items() if k not in own} for i, one in state_dict["state"].items()}
        if not members or not any(memories.values()):
            return
        _, state = self._init(values_of(members, self._whole))
        first = next((i for group in state_dict["param_groups"] for i in group["params"]), None)
        got = shapes(memories.get(first, {}))
        expected = {"step": (), **shapes(leaves_by_path(state))}
        if expected != got:
            raise ValueError(
                f"this state is not of {name_of(self.rule)} with these parameters: expected {expected}, got {got}; "
                "make the optimizer with the rule and the parameters, in the order, that it was saved with"
            )


def unshared(found: tree.Tree, written: tuple[Tensor, ...]) -> tree.Tree:
    """Return a tree whose leaves share no memory with tensors that are written to in place."""
    taken = {x.untyped_storage().data_ptr() for x in written}
    return tree.tree_map(lambda x: x.clone() if x.untyped_storage().data_ptr() in taken else x, found)
