"""The rule that goes where theta is: what moves theta is then the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from learnedopt.core.rule import State, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.precision import wide, wide_dtype
from learnedopt.optimizers.bases.wrapper import prefixed
from learnedopt.optimizers.learned_init import check_template, template_faults


@final
@dataclass(frozen=True, eq=False)
class Iterate(UpdateRule):
    """``φ(x, w) = w``: every step puts the parameters at theta, wherever they were (Flennerhag et al. 2023, section 3).

    The meta-gradient of one step is the gradient of the loss at w: ``Truncated(1)`` and any meta-optimizer then train
    the parameters themselves. With averaged iterates, ``Averaged(Iterate(template))``, dual averaging is momentum.

    Args:
        template: one task's parameters, where theta starts.

    Theta: ``iterate/<param>``, as the template. State: none.

    Raises:
        ValueError: the template holds no floating-point tensors.
    """

    template: Params = field(repr=False)

    def __post_init__(self) -> None:
        check_template(type(self).__name__, self.template)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return copies of the template."""
        return prefixed("iterate", {name: value.detach().clone() for name, value in self.template.items()})

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start where the parameters are; there is no memory."""
        return params, ()

    def start_faults(self, params: Params) -> list[str]:
        """Say which parameters the template does not have."""
        return template_faults(self.template, params)

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Return the way to theta."""
        return {
            name: (theta[f"iterate/{name}"].to(wide_dtype(p)) - wide(p)).to(p.dtype) for name, p in params.items()
        }, state
