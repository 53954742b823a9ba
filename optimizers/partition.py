"""Different rules, or separately learned copies of one rule, for different tensors."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, final

import torch
from torch import Tensor

from learnedopt.core.containers import is_mapping, is_tuple
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.wrapper import prefixed, unprefixed


@final
@dataclass(frozen=True, eq=False)
class Partition(UpdateRule):
    """Give each group of tensors a rule, with meta-parameters and state, of its own.

    Each rule sees its tensors only, and the loss.

    Args:
        groups: label -> (pattern, rule). A parameter joins the first group, in the order of the dict, whose pattern
            matches its whole name; ``*``, ``?`` and ``[...]`` are wildcards as in file names.

    Theta: ``<label>/<key>``. State: a dict by label.

    Raises:
        TypeError: ``groups`` is not such a dict.
        ValueError: it is empty or a label holds a slash; at ``init``, a parameter matches no pattern, or none joins a
            group.

    Example:
        >>> rule = Partition({"bias": ("*.bias", SGD(lr=0.1)), "rest": ("*", Adam())})
        >>> list(rule.init_theta(torch.Generator()))
        ['bias/lr', 'rest/lr', 'rest/beta1', 'rest/beta2', 'rest/eps']
    """

    groups: Mapping[str, tuple[str, UpdateRule]]

    def __post_init__(self) -> None:
        if not is_mapping(self.groups) or not all(_is_group(group) for group in self.groups.items()):
            raise TypeError(f"Partition: groups={self.groups!r} is not a dict of label -> (pattern, rule)")
        wrong = [label for label in self.groups if not label or "/" in label]
        if wrong or not self.groups:
            raise ValueError(f"Partition: groups need labels without a slash, got {wrong or 'no group at all'}")

    @property
    def reads_horizon(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """Whether a group's rule does."""
        return any(rule.reads_horizon for _, rule in self.groups.values())

    def within(self, horizon: int | None) -> UpdateRule:
        """Return the partition with each group's rule as it is stepped in such a run."""
        if not self.reads_horizon:
            return self
        return Partition({label: (pattern, rule.within(horizon)) for label, (pattern, rule) in self.groups.items()})

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return all groups' theta, drawn in their order."""
        theta: Theta = {}
        for label, (_, rule) in self.groups.items():
            theta |= prefixed(label, rule.init_theta(generator))
        return theta

    def theta_scale(self) -> dict[str, float | Tensor]:
        """Return all groups' scales."""
        scale: dict[str, float | Tensor] = {}
        for label, (_, rule) in self.groups.items():
            scale |= prefixed(label, rule.theta_scale())
        return scale

    def theta_faults(self, theta: Theta) -> dict[str, str]:
        """Say what each group's rule says."""
        found: dict[str, str] = {}
        for label, (_, rule) in self.groups.items():
            found |= prefixed(label, rule.theta_faults(unprefixed(label, theta)))
        return found

    def init(self, theta: Theta, params: Params) -> tuple[Params, dict[str, Any]]:
        """Start each group as its rule does."""
        start: Params = {}
        state: dict[str, Any] = {}
        for label, names in self._assign(params).items():
            _, rule = self.groups[label]
            group_start, state[label] = rule.init(unprefixed(label, theta), {name: params[name] for name in names})
            start |= group_start
        return {name: start[name] for name in params}, state

    def start_faults(self, params: Params) -> list[str]:
        """Say what each group's rule says of its own parameters."""
        members = self._assign(params)
        return [
            f"group {label!r}: {fault}"
            for label, (_, rule) in self.groups.items()
            for fault in rule.start_faults({name: params[name] for name in members[label]})
        ]

    def update(
        self, theta: Theta, grads: Params, state: dict[str, Any], params: Params, loss: Tensor
    ) -> tuple[Params, dict[str, Any]]:
        """Move each group as its rule does."""
        deltas: Params = {}
        new_state: dict[str, Any] = {}
        for label, names in self._assign(params).items():
            _, rule = self.groups[label]
            group_grads, group_params = ({name: tensors[name] for name in names} for tensors in (grads, params))
            group_deltas, new_state[label] = rule.update(
                unprefixed(label, theta), group_grads, state[label], group_params, loss
            )
            deltas |= group_deltas
        return {name: deltas[name] for name in grads}, new_state

    def result(self, theta: Theta, params: Params, state: dict[str, Any]) -> Params:
        """Return what each group's rule does."""
        found: Params = {}
        for label, names in self._assign(params).items():
            own = {name: params[name] for name in names}
            found |= self.groups[label][1].result(unprefixed(label, theta), own, state[label])
        return {name: found[name] for name in params}

    def _assign(self, names: Iterable[str]) -> dict[str, list[str]]:
        members: dict[str, list[str]] = {label: [] for label in self.groups}
        for name in names:
            label = next((label for label, (pattern, _) in self.groups.items() if fnmatchcase(name, pattern)), None)
            if label is None:
                patterns = [pattern for pattern, _ in self.groups.values()]
                raise ValueError(
                    f'parameter {name!r} matches none of {patterns}; add a last group with the pattern "*"'
                )
            members[label].append(name)
        idle = [label for label, joined in members.items() if not joined]
        if idle:
            raise ValueError(
                f"no parameter joins the groups {idle}; the first matching pattern counts, and the parameters are "
                f"{list(names)}: correct or drop these groups"
            )
        return members


def per_tensor(rule: UpdateRule, template: Params) -> Partition:
    """Return a partition in which every tensor of ``template`` has a copy of ``rule`` with its own meta-parameters.

    Args:
        rule: the rule to copy.
        template: one task's parameters, for their names, which become the labels.
    """
    return Partition({name: (glob.escape(name), rule) for name in template})


def _is_group(item: tuple[Any, Any]) -> bool:
    label, group = item
    return (
        isinstance(label, str)
        and is_tuple(group)
        and len(group) == 2
        and isinstance(group[0], str)
        and isinstance(group[1], UpdateRule)
    )
