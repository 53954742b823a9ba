"""What a training run has cost so far, kept in its own state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from learnedopt.core.counts import require_count
from learnedopt.core.rule import State
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.precision import wide_dtype
from learnedopt.optimizers.bases.wrapper import Wrapper, unprefixed


@final
@dataclass(frozen=True, eq=False)
class Recorded(Wrapper):
    """Keep the losses of a run's first ``num_steps`` steps in its state; it moves as ``rule`` does.

    Whatever an objective or estimator tries beside the run is dropped with the state it ends in, and what training goes
    on from is counted once, be it one window's end or a bootstrapped target's steps ahead. The losses carry no graph.

    Args:
        rule: the rule that moves.
        num_steps: how many losses are kept, at least 1; steps beyond are not recorded.

    Theta: ``rule/<key>``, the rule's own. State: ``rule``, its own; ``losses`` (num_steps,), the loss before each
    update, 0 where the run has not been yet; ``step`` (scalar), the number of updates taken.

    Raises:
        ValueError: ``num_steps`` is not a positive count.
    """

    num_steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("num_steps", self.num_steps, least=1)

    @property
    def coordinatewise(self) -> bool:
        """It is not: its state holds a count and losses, which belong to no coordinate."""
        return False

    def init(self, theta: Theta, params: Params) -> tuple[Params, dict[str, Any]]:
        """Start as the rule does, with no loss recorded."""
        params, state = self.rule.init(unprefixed("rule", theta), params)
        first = next(iter(params.values()))
        return params, {
            "rule": state,
            "losses": first.new_zeros(self.num_steps, dtype=wide_dtype(first)),
            "step": torch.zeros((), dtype=torch.int64, device=first.device),
        }

    def update(
        self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor
    ) -> tuple[Params, dict[str, Any]]:
        """Move as the rule does, and write the loss into its place."""
        deltas, moved = self.rule.update(unprefixed("rule", theta), grads, state["rule"], params, loss)
        now = torch.arange(self.num_steps, device=loss.device) == state["step"]
        losses = torch.where(now, loss.detach().to(state["losses"].dtype), state["losses"])
        return deltas, {"rule": moved, "losses": losses, "step": state["step"] + 1}

    def result(self, theta: Theta, params: Params, state: State) -> Params:
        """Return what the rule does."""
        return super().result(theta, params, state["rule"])
