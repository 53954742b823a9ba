"""Almost no inner loop: only the head moves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import final

import torch
from torch import Tensor

from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import check_number
from learnedopt.optimizers.bases.precision import wide
from learnedopt.optimizers.learned_init import check_template, initial_start, learned_start


@final
@dataclass(frozen=True, eq=False)
class ANIL(UpdateRule):
    """A learned start from which gradient descent moves the head alone (Raghu et al. 2020, section 5).

    The body, which is everything else, stays at theta's start in the inner loop and is learned by the outer one.

    Args:
        template: one task's parameters; the start is initialised to their values.
        head: which parameters move: a pattern of their whole names, with ``*``, ``?`` and ``[...]`` as in file names.
        lr: the head's learning rate.
        learn_lr: whether ``lr`` is in theta.

    Theta: ``init/<param>``, body and head; ``lr`` (scalar), raw, where it is learned.

    Raises:
        TypeError: ``lr`` is not a number.
        ValueError: ``lr`` is negative; the template holds no floating-point tensors; ``head`` matches none of them; at
            ``init``, the task's parameters are not like the template.
    """

    template: Params = field(repr=False)
    head: str = "head.*"
    lr: float = 0.1
    learn_lr: bool = False

    def __post_init__(self) -> None:
        check_template(type(self).__name__, self.template)
        check_number(type(self).__name__, "lr", self.lr, 0.0, math.inf)
        if not any(fnmatchcase(name, self.head) for name in self.template):
            raise ValueError(
                f"ANIL: head={self.head!r} matches none of the parameters {list(self.template)}, so nothing would "
                "move; pass a pattern of the last layer's names"
            )

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return copies of the template, and the rate where it is learned."""
        rate = {"lr": torch.tensor(float(self.lr), device=generator.device)} if self.learn_lr else {}
        return {**initial_start(self.template), **rate}

    def init(self, theta: Theta, params: Params) -> tuple[Params, tuple[()]]:
        """Start at theta's start; there is no memory."""
        return learned_start(theta, params), ()

    def update(
        self, theta: Theta, grads: Params, state: tuple[()], params: Params, loss: Tensor
    ) -> tuple[Params, tuple[()]]:
        """Step against the head's gradient."""
        lr = theta["lr"] if self.learn_lr else self.lr
        deltas = {
            name: (-lr * wide(g)).to(g.dtype) if fnmatchcase(name, self.head) else torch.zeros_like(g)
            for name, g in grads.items()
        }
        return deltas, state
