"""What optimizers that move a user's own model by an update rule have in common: members, memory, state dicts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params
from learnedopt.plug_in import shards
from learnedopt.plug_in.members import Member, members_of, name_of, require_group, shapes
from learnedopt.plug_in.memory import COUNT, Layout


class RuleOptimizer(torch.optim.Optimizer):
    """The base of ``LearnedOptimizer`` and ``HyperOptimizer``: everything but what becomes of theta.

    The rule's memory lies with the parameter that it belongs to, see ``Layout``, beside its count ``step``. It keeps
    its own dtype, whatever the parameters' is.
    """

    _options: tuple[str, ...] = ("lr",)
    _settled: bool = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; where the rule ties parameters together, before the first step.

        Raises:
            TypeError: the group sets an option that a learned rule does not have.
            ValueError: a step has been taken, and the rule's memory cannot grow; or as the constructor.
        """
        super().add_param_group(param_group)
        try:
            require_group(self.param_groups[-1], [m.name for m in self._members()], self._options)
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
            if [len(g["params"]) for g in final["param_groups"]] == [len(g["params"]) for g in self.param_groups]:
                self._check_state(final)  # else torch says what differs
            given.update(final)

        def restore(_: Any) -> None:
            # torch has cast the memory to the parameters' dtype: put the saved tensors in their place.
            indices = [i for group in given["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for index, param in zip(indices, params, strict=True):
                if index in given["state"]:
                    self.state[param] = dict(given["state"][index])
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

    @abstractmethod
    def _settle(self) -> None:
        """See that the rule takes these parameters."""

    @abstractmethod
    def _check_state(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError where what is to be loaded does not fit."""

    def _loaded(self) -> None:
        """Take what else a state dict held out of ``self.state``."""

    def _members(self) -> list[Member]:
        return members_of(self.param_groups)

    def _begun(self) -> bool:
        return any(COUNT in entry for entry in self.state.values())

    def _evaluated(self, closure: Callable[[], Any] | None, loss: Any) -> Any:
        if closure is None:
            return loss
        if not callable(closure):
            raise TypeError(
                f"step takes a closure first, and was given a {type(closure).__name__}: pass the loss by its name, "
                "step(loss=loss)"
            )
        with torch.enable_grad():
            found = closure()
        if found is not None and loss is not None:
            raise ValueError("step got a closure that returns the loss, and a loss; pass one of them")
        return loss if found is None else found  # some frameworks hand in a closure always, that does nothing

    def _require_memory(
        self, layout: Layout, state: State, state_dict: dict[str, Any], members: list[tuple[Any, Member]],
        rule: UpdateRule, own: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """Raise ValueError where a rule's memory that is to be loaded does not fit; a fresh optimizer has none.

        Args:
            layout: of the rule's memory for these parameters.
            state: the rule's first.
            state_dict: what is to be loaded.
            members: the parameters of this rule, each with its index in the state dict.
            rule: whose memory it is to be.
            own: further keys of the first entry.
        """
        wanted = layout.entries(state)
        saved = {m.name: {k: x for k, x in state_dict["state"].get(i, {}).items() if k not in own} for i, m in members}
        for name, entry in saved.items():
            count = entry.get(COUNT, 0 if not entry else None)
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(
                    f"this state is not of {name_of(rule)} with these parameters: the entry of {name!r} has "
                    f"step={count!r}, which is no number of steps; load what state_dict() returned, as it was"
                )
        # Rules that move each parameter by itself have nothing of those that have not been moved yet.
        missing = {name for name, entry in saved.items() if not entry} if layout.spread else set[str]()
        if not any(saved.values()):
            return
        expected = {name: {COUNT: (), **shapes(entry)} for name, entry in wanted.items() if name not in missing}
        got = {name: shapes(entry) for name, entry in saved.items() if name not in missing}
        wrong = next((name for name in expected if expected[name] != got[name]), None)
        if wrong is not None:
            raise ValueError(
                f"this state is not of {name_of(rule)} with these parameters: for {wrong!r} expected "
                f"{expected[wrong]}, got {got[wrong]}; make the optimizer with the rule and the parameters, in the "
                "order, that it was saved with"
            )


def moved(
    members: list[Member], found: Params, factors: dict[str, float], *, added: bool,
    decays: dict[str, float] | None = None, gather: bool = False,
) -> None:  # fmt: skip
    """Add updates to the parameters.

    Args:
        members: the parameters.
        found: deltas or, where they are ``added`` already, new values.
        factors: on the deltas; a parameter with 0 is left alone.
        added: see ``found``; only where all factors are 0 or 1.
        decays: share of a parameter that is taken off, as it was before the update.
        gather: whether updates are of whole tensors, where this process has a piece.
    """
    for name, param, _ in members:
        factor = factors[name]
        if factor == 0:  # 0 times an infinite update would not be nothing
            continue
        decay = 0.0 if decays is None else decays[name]
        value, param = shards.own_piece(found[name], param, gather), shards.local(param)
        if added:
            param.copy_(value if decay == 0 else value - decay * param)
            continue
        if decay != 0:
            param.mul_(1 - decay)
        param.add_(value.to(param.dtype), alpha=factor)


def unshared(found: tree.Tree, written: tuple[Tensor, ...]) -> tree.Tree:
    """Return a tree whose leaves share no memory with tensors that are written to in place."""
    taken = {x.untyped_storage().data_ptr() for x in written}
    return tree.tree_map(lambda x: x.clone() if x.untyped_storage().data_ptr() in taken else x, found)


def require_structure(layout: Layout, state: State, rule: UpdateRule) -> None:
    """Raise ValueError where a state that a rule answered is of another structure."""
    if not layout.fits(state):
        found = tree.tree_map(lambda x: type(x).__name__, state)
        raise ValueError(
            f"{name_of(rule)}.update must return a state of the same structure as it was given, with tensors as "
            f"leaves: expected {[place.key for place in layout.places]}, got {found}"
        )
