"""A rule whose iterates are averaged, with the parameters at the average."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from learnedopt.core.rule import State
from learnedopt.core.tree import Params, Theta
from learnedopt.core.weights import Weights, WeightsName, name_of, resolve
from learnedopt.optimizers.bases.precision import wide
from learnedopt.optimizers.bases.wrapper import Wrapper, unprefixed


@final
@dataclass(frozen=True, eq=False)
class Averaged(Wrapper):
    """The parameters are the weighted mean x̄ of a rule's iterates (Flennerhag et al. 2023, section 3).

    That is::

        x_t = φ(x̄_{t-1}, w_t);    x̄_t = (1 - ρ_t) x̄_{t-1} + ρ_t x_t,    ρ_t = α_t / Σ_{s<=t} α_s

    with φ the rule, which moves from the average and sees the gradient there: the change of x̄ is ρ_t times the rule's
    own. So a meta-gradient of one step, ∇_w f(x̄_t), is ρ_t times g_t = Dφ(x̄_{t-1}, w_t)ᵀ∇f(x̄_t); ``DualAveraging`` with
    ``averaged=True`` and the same weights takes the factor out.

    Args:
        rule: φ.
        weights: α_t, ``Constant()``, ``Linear()``, the names "constant" and "linear" of these, or a function of the
            step, which no configuration can hold.

    Theta: ``rule/<key>``, the rule's own. State: ``step`` and ``total`` (Σ α_s), float64 scalars; ``rule``, the rule's.

    Raises:
        TypeError, ValueError: ``rule`` is no update rule; a weight is not positive, or not one for each step.

    Example:
        >>> rule = Averaged(Iterate({"x": torch.zeros(3)}), "linear")
    """

    weights: Weights | WeightsName = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        # A configuration holds words: weights that have a name are kept by it.
        object.__setattr__(self, "weights", name_of(resolve(self.weights)))

    @cached_property
    def _weights(self) -> Weights:
        return resolve(self.weights)

    def init(self, theta: Theta, params: Params) -> tuple[Params, dict[str, Any]]:
        """Start where the rule starts, with no iterate in the average: the first replaces it."""
        params, state = self.rule.init(unprefixed("rule", theta), params)
        zero = torch.zeros((), dtype=torch.float64, device=next(iter(params.values())).device)
        return params, {"step": zero, "total": zero.clone(), "rule": state}

    def update(
        self, theta: Theta, grads: Params, state: dict[str, Any], params: Params, loss: Tensor
    ) -> tuple[Params, State]:
        """Move the average towards where the rule moves to."""
        # In the dtype to compute in, so that only the share of a delta is rounded to the parameters'.
        wide_grads, wide_params = ({k: wide(x) for k, x in tensors.items()} for tensors in (grads, params))
        deltas, inner = super().update(theta, wide_grads, state["rule"], wide_params, loss)
        step = state["step"] + 1
        weight = self._weights(step)
        total = state["total"] + weight
        share = weight / total
        moved = {k: (share.to(deltas[k].dtype) * deltas[k]).to(grad.dtype) for k, grad in grads.items()}
        return moved, {"step": step, "total": total, "rule": inner}

    def result(self, theta: Theta, params: Params, state: State) -> Params:
        """Return the average, which the parameters are."""
        return params
