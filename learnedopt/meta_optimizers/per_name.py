"""Meta-optimizers of their own for the parts of theta, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, cast, final

import torch
from torch import Tensor

from learnedopt.core.named_tensors import NamedTensors, names_of
from learnedopt.core.registry import nearest
from learnedopt.core.theta_scale import ThetaItself

Factory: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer]


@final
@dataclass(frozen=True)
class PerName:
    """Makes one optimizer out of several, each of which moves the tensors whose names match its pattern.

    Args:
        factories: pattern, as ``fnmatch`` reads them -> what makes an optimizer of a list of tensors. Each is handed
            ``NamedTensors`` of its own.

    Raises:
        TypeError: what it is called on has no names; a factory makes no optimizer.
        ValueError: there is no pattern; a name matches none or several of them, or a pattern no name.

    Example:
        >>> MetaTrainer(loop, estimator, objective, PerName({"init/*": FollowTheLeader, "rule/*": Adam}))
    """

    factories: Mapping[str, Factory]

    def __post_init__(self) -> None:
        if not self.factories:
            raise ValueError("PerName: there is no pattern at all; pass {pattern: factory}, such as {'*': Adam}")
        for pattern, factory in self.factories.items():
            if not callable(factory):
                raise TypeError(
                    f"PerName: {pattern!r} has {factory!r}, which cannot be called; pass a function of a list of "
                    "tensors that returns an optimizer, such as lambda params: torch.optim.Adam(params, 1e-3)"
                )

    def __call__(self, params: list[Tensor]) -> Members:
        """Return the optimizer of all tensors."""
        names = names_of(params, "PerName")
        theta = dict(zip(names, params, strict=True))
        self._require_each_once(names)
        parts = {
            pattern: NamedTensors({name: x for name, x in theta.items() if fnmatchcase(name, pattern)})
            for pattern in self.factories
        }
        members = [factory(parts[pattern]) for pattern, factory in self.factories.items()]
        for pattern, member in zip(self.factories, members, strict=True):
            if not isinstance(cast("object", member), torch.optim.Optimizer):
                raise TypeError(f"PerName: the factory of {pattern!r} returned {member!r}, which is no optimizer")
        return Members(members)

    def _require_each_once(self, names: list[str]) -> None:
        matches = {name: [p for p in self.factories if fnmatchcase(name, p)] for name in names}
        lost = [name for name, found in matches.items() if not found]
        if lost:
            raise ValueError(
                f"PerName: {lost} match none of the patterns {[*self.factories]}, so that nothing would move them; add "
                "a pattern for them"
            )
        twice = {name: found for name, found in matches.items() if len(found) > 1}
        if twice:
            raise ValueError(f"PerName: several patterns match one tensor, {twice}; each must match exactly one")
        idle = [p for p in self.factories if not any(p in found for found in matches.values())]
        if idle:
            raise ValueError(f"PerName: {idle[0]!r} matches none of the tensors {names}{nearest(idle[0], names)}")


@final
class Members(torch.optim.Optimizer, ThetaItself):
    """Optimizers of different tensors as one: groups in the order of the members, one state, one ``state_dict``.

    The groups are the members' own, so that a schedule of learning rates reaches them.
    """

    def __init__(self, members: list[torch.optim.Optimizer]) -> None:
        groups = [group for member in members for group in member.param_groups]
        super().__init__([{"params": [*group["params"]]} for group in groups], {})
        self.param_groups = groups
        self.members = members
        for member in members:
            self.state.update(member.state)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group that no member would move."""
        if "members" in self.__dict__:
            raise ValueError("no member would move a group that is added here; add it to one of .members before")
        super().add_param_group(param_group)

    def taken_as_theta(self) -> list[Tensor]:
        """Return the tensors of those members that are of theta itself."""
        return [p for each in self.members if isinstance(each, ThetaItself) for p in each.taken_as_theta()]

    # One signature in place of torch's two overloads.
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Let each member take a step, and return what ``closure`` does, which is called once."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for member in self.members:
            member.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state of every member."""
        super().load_state_dict(state_dict)
        # torch puts new containers in place of the old ones.
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        """Keep what torch's own leaves out of copies."""
        return {**super().__getstate__(), "members": self.members}

    def _share(self) -> None:
        """Give the members the groups and the one state of all, in which each finds its own tensors."""
        groups = iter(self.param_groups)
        for member in self.members:
            member.param_groups = [next(groups) for _ in member.param_groups]
            member.state = self.state
