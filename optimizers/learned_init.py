"""A learned start for any rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from learnedopt.core.containers import is_mapping
from learnedopt.core.rule import Kernel, State
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.wrapper import Wrapper, handed_on, prefixed, unprefixed

NO_MIXTURE = (
    "No template serves a mixture of families of different shapes: that takes a rule whose meta-parameters belong to "
    "no tensor or coordinate"
)


@final
@dataclass(frozen=True, eq=False)
class LearnedInit(Wrapper):
    """Run ``rule`` from a learned start instead of the task's own, as MAML does (Finn et al. 2017).

    Args:
        rule: the rule that moves.
        template: one task's parameters; the start is initialised to their values and keeps their dtype.

    Theta: ``init/<param>``, the start, as the template; ``rule/<key>``, the rule's own.

    Raises:
        ValueError: the template holds no floating-point tensors; at ``init``, the task's parameters are not like it.

    Example:
        >>> rule = LearnedInit(SGD(lr=0.1), template={"w": torch.zeros(3)})
        >>> list(rule.init_theta(torch.Generator()))
        ['init/w', 'rule/lr']
    """

    template: Params = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(type(self).__name__, self.template)

    @property
    def kernel(self) -> Kernel | None:  # pyright: ignore[reportIncompatibleVariableOverride] - read, never set
        """The rule's own: a start changes no update."""
        return handed_on(self.rule)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return copies of the template, and the rule's theta."""
        return {**initial_start(self.template), **super().init_theta(generator)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start at theta's start, with the rule's state there."""
        return self.rule.init(unprefixed("rule", theta), learned_start(theta, params))


def check_template(owner: str, template: object) -> None:
    """Raise ValueError unless ``template`` is a dict of floating-point tensors."""
    if is_mapping(template) and template:
        wrong = [k for k, v in template.items() if not isinstance(v, Tensor) or not v.is_floating_point()]
        if not wrong:
            return
        got = f"a dict whose {wrong} are no floating-point tensors"
    else:
        got = "an empty one" if is_mapping(template) else type(template).__name__
    raise ValueError(
        f"{owner}: template must be one task's parameters, a dict of floating-point tensors by name, got {got}; take "
        "it from family.init_params(tasks), without the leading dimension of tasks"
    )


def template_faults(template: Params, params: Params, *, shapes: bool = True) -> list[str]:
    """Say which of a batch's starting parameters have no meta-parameters of their own, in words for ``start_faults``.

    Args:
        template: one task's parameters, that there are meta-parameters for.
        params: batched.
        shapes: whether those belong to coordinates, so that shapes count as well as names.
    """
    wrong = [
        f"{name} {tuple(p.shape[1:])}"
        for name, p in params.items()
        if name not in template or (shapes and template[name].shape != p.shape[1:])
    ]
    if not wrong:
        return []
    here = ", ".join(f"{name} {tuple(p.shape)}" for name, p in template.items())
    return [
        f"it has meta-parameters for a template of {here}, and none for {', '.join(wrong)}; build the rule with a "
        f"template of this family. {NO_MIXTURE}"
    ]


def initial_start(template: Params) -> Theta:
    """Return theta's entries ``init/<param>`` at the template's values."""
    return prefixed("init", {name: value.detach().clone() for name, value in template.items()})


def learned_start(theta: Theta, params: Params) -> Params:
    """Return theta's start, in the order of the task's parameters.

    Raises:
        ValueError: the task's parameters have other names or shapes.
    """
    start = unprefixed("init", theta)
    learned, task = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (start, params))
    if learned != task:
        raise ValueError(
            f"the learned start is one of parameters {learned}, the task's are {task}; build the rule with a template "
            f"of this family. {NO_MIXTURE}"
        )
    return {name: start[name] for name in params}
