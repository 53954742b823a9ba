"""Learned optimizers in ``higher`` (Grefenstette et al. 2019): importing this module registers ``LearnedOptimizer``.

    import higher, learnedopt.bridges.higher

    optimizer = LearnedOptimizer(model.named_parameters(), (rule, theta))
    with higher.innerloop_ctx(model, optimizer, override={"theta": [theta]}) as (fmodel, diffopt):
        for x, y in batches:
            diffopt.step(loss_fn(fmodel(x), y))
        torch.autograd.grad(loss_fn(fmodel(x), y), [*theta.values()])    # or with respect to fmodel's first weights

The way back, higher's own optimizers as update rules, is ``HigherRule``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from learnedopt.bridges.higher_rule import HigherRule
from learnedopt.checkpoint import check_theta
from learnedopt.core import tree
from learnedopt.core.containers import is_dict
from learnedopt.core.tree import Params, Theta
from learnedopt.optim import LearnedOptimizer
from learnedopt.plug_in.cohorts import Cohort, Player, formed
from learnedopt.plug_in.members import Member, common_device, name_of
from learnedopt.plug_in.memory import COUNT
from learnedopt.plug_in.shards import Kind, kind_of
from learnedopt.plug_in.stepping import begun

try:
    # higher has no types.
    from higher.optim import DifferentiableOptimizer, register_optim  # pyright: ignore[reportMissingTypeStubs]
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        f"learnedopt.bridges.higher needs the package higher ({_error}); install learnedopt[bridges]"
    ) from _error

__all__ = ["DifferentiableLearnedOptimizer", "HigherRule"]


class Place(NamedTuple):
    """Where a parameter stands: its name, the number of its group, and its own in that."""

    name: str
    group: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - no use of a tuple's method


@final
class DifferentiableLearnedOptimizer(DifferentiableOptimizer):
    """What ``higher`` makes of a ``LearnedOptimizer``: the same steps with a graph, as ``Unrolled`` takes them.

    The bare rule moves the parameters: a guard decides by comparing numbers, which has no derivative, and plays no
    part. Groups, ``lr``, ``weight_decay``, ``maximize``, a rule of a group's own, and parameters that the loss does not
    reach, are as in ``LearnedOptimizer``; its memory so far is copied, and kept in the rule's own dtype (a
    ``state_dtype`` rounds at random, which has no derivative). Where ``track_higher_grads`` is False nothing is
    recorded.

    ``override`` takes ``lr`` and ``weight_decay`` as tensors, and ``theta``: a dict like the rule's, whose tensors may
    require gradients. A rule with a learned start then starts from this theta's, in the place of the model's weights;
    without it, the start lies in the model, whose first weights have its gradient.

    Raises:
        TypeError: ``theta`` is no dict.
        ValueError: a parameter lies in pieces on several processes; theta is of another rule or shape; groups of one
            rule are given different ones; a start has no model to be put into, or lies in one that ``higher`` has not
            been given.
    """

    def __init__(self, other: LearnedOptimizer, reference_params: Iterable[Tensor], *args: Any, **options: Any) -> None:
        reference = list(reference_params)
        if any(kind_of(p) is not Kind.WHOLE for p in reference):
            raise ValueError(
                "some parameters are tensor subclasses, such as the pieces of fully_shard, and higher knows plain "
                "tensors alone; meta-train on a model that is whole in each process"
            )
        super().__init__(other, reference, *args, **options)  # pyright: ignore[reportUnknownMemberType] - higher's
        self._other, self._loss = other, None
        at = {id(p): (g, i) for g, group in enumerate(other.param_groups) for i, p in enumerate(group["params"])}
        # What LearnedOptimizer keeps to itself, and to this other half of it.
        parts = other._parts()  # pyright: ignore[reportPrivateUsage]
        self._places = [(player, [Place(m.name, *at[id(m.param)]) for m in members]) for player, members in parts]
        if not other._begun():  # pyright: ignore[reportPrivateUsage]
            self._start(reference)

    def step(self, loss: Tensor, *args: Any, **options: Any) -> Any:
        """Move the parameters against the gradient of a loss, see ``higher``; rules that read the loss are told it."""
        self._loss = loss
        try:
            return super().step(loss, *args, **options)  # pyright: ignore[reportUnknownMemberType] - higher's
        finally:
            self._loss = None

    # higher hands gradients over by position alone.
    def _update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, grouped_grads: list[list[Tensor | None]], **_: Any
    ) -> None:
        with torch.set_grad_enabled(self._track_higher_grads):
            for player, places in self._places:
                theta = self._theta(player, places)
                player = player if theta is player.theta else replace(player, theta=theta)
                params = {p.name: self.param_groups[p.group]["params"][p.index] for p in places}
                grads = {p.name: grouped_grads[p.group][p.index] for p in places}
                at = {p.name: p for p in places}
                for cohort in formed(*self._seen(player, places, params, grads)):
                    self._other._require_end(cohort)  # pyright: ignore[reportPrivateUsage]
                    self._move(cohort, params, grads, at)

    def _seen(
        self, player: Player, places: list[Place], params: Params, grads: dict[str, Tensor | None]
    ) -> tuple[Player, list[Member], dict[Tensor, dict[str, Any]]]:
        """Return what ``formed`` takes: values without a graph, whose gradients say who moves, and the memory."""
        members: list[Member] = []
        kept: dict[Tensor, dict[str, Any]] = {}
        for place in places:
            value, grad = params[place.name].detach(), grads[place.name]
            value.grad = None if grad is None else grad.detach()
            members.append(Member(place.name, value, self.param_groups[place.group]))
            kept[value] = self.state[place.group].get(place.index, {})
        return player, members, kept

    def _move(self, cohort: Cohort, params: Params, grads: dict[str, Tensor | None], at: dict[str, Place]) -> None:
        """Put new parameters of a cohort into their groups, and new memory into the state."""
        player, groups = cohort.player, {m.name: m.group for m in cohort.members}
        params = {k: params[k] for k in groups}
        found = {k: grads[k] for k in groups}
        signed = {k: torch.zeros_like(params[k]) if g is None else _signed(g, groups[k]) for k, g in found.items()}
        climbs = all(group["maximize"] for group in groups.values())
        loss: Any = None if self._loss is None else (-self._loss if climbs else self._loss).reshape(())
        theta = player.theta_on(common_device(params))
        state = cohort.state
        if cohort.fresh:
            state = player.begun(cohort.members, params, graph=torch.is_grad_enabled())
        deltas, state = player.mover.update(theta, signed, state, params, loss)
        entries, before = cohort.layout.entries(state), cohort.layout.entries(cohort.state)
        for name, group in groups.items():
            place, still = at[name], name in cohort.still
            if still:
                entries[name].update({k: x for k, x in before[name].items() if k not in cohort.layout.common})
            else:
                self.param_groups[place.group]["params"][place.index] = _moved(params[name], deltas[name], group)
            count = self.state[place.group].get(place.index, {}).get(COUNT, 0) + (not still)
            self.state[place.group][place.index] = {COUNT: count, **entries[name]}

    def _theta(self, player: Player, places: list[Place]) -> Theta:
        """Return the theta that an override gave a rule, or its own."""
        given = [self.param_groups[g].get("theta") for g in dict.fromkeys(p.group for p in places)]
        told = [x for x in given if not isinstance(x, str) and x is not None]  # a string is a fingerprint
        if not told:
            return player.theta
        if not is_dict(told[0]):
            raise TypeError(f"override: theta is a {type(told[0]).__name__}; pass [theta], a list of dicts of tensors")
        if any(x is not told[0] for x in given):
            raise ValueError(
                f"override: the groups of {name_of(player.rule)} are given different thetas, but it moves them all at "
                "once; pass one, or give the groups rules of their own"
            )
        check_theta(player.rule, told[0], "override")
        return told[0]

    def _start(self, reference: list[Tensor]) -> None:
        """Put the learned start of an override's theta into the model."""
        model: Any = self._fmodel
        patched: Any = None if model is None else model.fast_params
        fast: list[Any] = list(reference if patched is None else patched)
        index = {(g, i): j for g, own in enumerate(self._group_to_param_list) for i, j in enumerate(own)}
        for player, places in self._places:
            theta = self._theta(player, places)
            params = {p.name: fast[index[p.group, p.index]] for p in places}
            start, _ = begun(player.rule.within(player.num_steps), theta, params, graph=self._track_higher_grads)
            learned = [k for k, x in params.items() if start[k] is not x]
            if not learned:
                continue
            if theta is player.theta:  # it was adopted, and lies in the model
                if not all(torch.equal(start[k].to(x), x) for k, x in params.items()):
                    raise ValueError(
                        f"{name_of(player.rule)} has a start of its own, which is not in the model that higher was "
                        "given; make the optimizer of that model's parameters, or override theta"
                    )
                continue
            if model is None or patched is None:
                raise ValueError(
                    f"{name_of(player.rule)} starts from theta, and there is no model to put its start into: pass "
                    "fmodel, as higher.innerloop_ctx does, or begin at the start yourself and override theta later"
                )
            for place in places:
                fast[index[place.group, place.index]] = start[place.name]
            model.update_params(fast)  # pyright: ignore[reportCallIssue] - modules have any attribute


def _signed(grad: Tensor, group: dict[str, Any]) -> Tensor:
    return -grad if group["maximize"] else grad


def _moved(param: Tensor, delta: Tensor, group: dict[str, Any]) -> Tensor:
    """Return a parameter after a step of its group; numbers that change nothing cost nothing."""
    lr, decay = group["lr"], group["weight_decay"]
    if not isinstance(lr, Tensor) and lr == 0:  # 0 times an infinite update would not be nothing
        return param
    step = delta if not isinstance(lr, Tensor) and lr == 1 else lr * delta
    kept = param if not isinstance(decay, Tensor) and decay == 0 else param - lr * decay * param
    return kept + tree.in_dtype_of(param, step)


register_optim(LearnedOptimizer, DifferentiableLearnedOptimizer)  # pyright: ignore[reportArgumentType] - the class
