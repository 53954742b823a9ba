"""Dual averaging with hints: the online learner of optimistic meta-gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from learnedopt.core.weights import Constant, Weights, WeightsName, require_positive, resolve, weight_at

Form: TypeAlias = Literal["euclidean", "adagrad"]
Hint: TypeAlias = Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]]
"""``(parameters, their gradients g_t) -> g̃_{t+1}``, one tensor for each parameter: a guess of the next gradients."""


@final
@dataclass(frozen=True)
class LastGradient:
    """The hint g̃_{t+1} = g_t. For φ(x, w) = w it is ∇f(x̄_t), the hint of Flennerhag et al. (2023)."""

    def __call__(self, params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Return the gradients."""
        return gradients


@final
class DualAveraging(torch.optim.Optimizer):
    """Dual averaging, plain or optimistic (Flennerhag et al. 2023, "Optimistic Meta-Gradients"; Nesterov 2009)::

        w_{t+1} = w_1 - β_t · (Σ_{s<=t} α_s g_s + α_{t+1} g̃_{t+1})

    with w_1 the parameters as the first step finds them: it minimises ``⟨Σ α_s g_s + α_{t+1} g̃_{t+1}, w⟩ + ‖w -
    w_1‖²/(2 β_t)``. Without a hint g̃ is 0.

    Every step sets the whole distance from w_1: a schedule that lowers ``lr`` pulls the parameters back to where they
    began, so keep it constant, or use the AdaGrad form.

    Args:
        params: as any ``torch.optim.Optimizer`` takes them.
        lr: β, positive. Euclidean form: β_t = β. For f convex and L-smooth, φ(x, w) = w and averaged iterates: β = 1/L
            for constant weights without a hint, β = 1/(4L) for linear weights with ``LastGradient``.
        weights: α_t, ``Constant()`` or ``Linear()``, their names "constant" and "linear", or a function of the step.
        hint: None; ``LastGradient()`` or its name "last-gradient"; or a function ``(params, gradients) -> hints`` of
            those parameters that have a gradient, which is g_t: the average's factor is taken out.
        form: "euclidean", or "adagrad" with a rate for each coordinate,
            ``β_t = β / sqrt(Σ_{s<=t} (α_s (g_s - g̃_s))² + (α_{t+1} g̃_{t+1})²)`` with g̃_1 = 0: of all squared gradients
            without a hint; with one of what the hints missed, and of the one in hand, which may miss by all of itself
            (Duchi et al. 2011; Rakhlin and Sridharan 2013). A coordinate of which the sum is 0 stays where it began.
        averaged: whether gradients are those of ``Averaged(rule, weights)`` with the same weights, whose parameters
            are x̄_t: the engine's gradient is then ρ_t g_t with ρ_t = α_t / Σ_{s<=t} α_s, so that α_t g_t is it times
            Σ_{s<=t} α_s. False takes gradients as g_t themselves.

    State of each parameter: ``step``, ``total`` (Σ α_s), ``start`` (w_1), ``sum`` (Σ α_s g_s); in the AdaGrad form
    ``squares``, and ``hint`` (α_{t+1} g̃_{t+1}) where there is one.

    Raises:
        TypeError, ValueError: ``lr`` or a weight is not positive; the form or a name is unknown; at a step, a hint has
            another shape than its gradient, and nothing has moved then.

    Example:
        >>> MetaTrainer(loop, Truncated(1), FinalLoss(), lambda p: DualAveraging(p, 0.25, Linear(), LastGradient()))
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        weights: Weights | WeightsName = Constant(),
        hint: Hint | Literal["last-gradient"] | None = None,
        form: Form = "euclidean",
        averaged: bool = True,
    ) -> None:
        self.weights: Weights = resolve(weights)
        self.hint: Hint | None = _resolve_hint(hint)
        if form not in get_args(Form):
            raise ValueError(f"DualAveraging: form={form!r} is none of {', '.join(get_args(Form))}")
        super().__init__(params, {"lr": lr, "form": form, "averaged": averaged})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have a rate and a form of its own."""
        require_positive("DualAveraging", "lr", param_group.get("lr", self.defaults["lr"]))
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Keep what torch's own leaves out of copies."""
        return {**super().__getstate__(), "weights": self.weights, "hint": self.hint}

    @torch.no_grad()
    # One signature in place of torch's two overloads.
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move the parameters that have a gradient, and return what ``closure`` does."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        states = [self._state(p, group["form"]) for p, group in moved]
        weights = [weight_at(self.weights, state["step"] + 1) for state in states]
        totals = [state["total"] + weight for state, weight in zip(states, weights, strict=True)]
        factors = [
            total if group["averaged"] else weight
            for total, weight, (_, group) in zip(totals, weights, moved, strict=True)
        ]
        weighted = [factor * p.grad for factor, (p, _) in zip(factors, moved, strict=True)]
        hints = self._hints([p for p, _ in moved], [x / weight for x, weight in zip(weighted, weights, strict=True)])
        for (p, group), state, total, gradient, hint in zip(moved, states, totals, weighted, hints, strict=True):
            state["step"], state["total"] = state["step"] + 1, total
            ahead = None if hint is None else weight_at(self.weights, state["step"] + 1) * hint
            p.copy_(state["start"] - group["lr"] * _direction(state, gradient, ahead))
        return loss

    def _state(self, p: Tensor, form: Form) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state.update(step=0, total=0.0, start=p.clone(), sum=torch.zeros_like(p))
            if form == "adagrad":
                state["squares"] = torch.zeros_like(p)
                if self.hint is not None:
                    state["hint"] = torch.zeros_like(p)
        return state

    def _hints(self, params: list[Tensor], gradients: list[Tensor]) -> Sequence[Tensor | None]:
        if self.hint is None:
            return [None] * len(params)
        # Copies: a hint that writes to what it is given would change a step that no error tells of.
        hints = self.hint([p.clone() for p in params], [g.clone() for g in gradients])
        wanted = [tuple(g.shape) for g in gradients]
        given: list[Any] = [*hints] if isinstance(hints, list | tuple) else [hints]
        found = [tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__ for h in given]
        if found != wanted:
            raise ValueError(
                f"the hint {self.hint!r} must return one tensor of the same shape for each gradient, {wanted}, got "
                f"{found}; it is a guess of the next gradients, in their order"
            )
        return given


def _direction(state: dict[str, Any], gradient: Tensor, ahead: Tensor | None) -> Tensor:
    """Take a weighted gradient into the sums, and return what β times is the distance from the start."""
    state["sum"] = state["sum"] + gradient
    total = state["sum"] if ahead is None else state["sum"] + ahead
    if "squares" not in state:
        return total
    missed = gradient - state["hint"] if "hint" in state else gradient
    state["squares"] = state["squares"] + missed.square()
    if ahead is not None:
        state["hint"] = ahead
    # The hint in hand may miss by all of itself: without it a coordinate whose first gradients were tiny is thrown as
    # far as its first hint is larger than they were.
    squares = state["squares"] if ahead is None else state["squares"] + ahead.square()
    # No small number in the denominator: where there was nothing to learn from, nothing moves.
    return torch.where(state["squares"] > 0, total / squares.sqrt(), 0.0)


def _resolve_hint(hint: Hint | str | None) -> Hint | None:
    if hint == "last-gradient":
        return LastGradient()
    if hint is None or (callable(hint) and not isinstance(hint, type)):
        return hint
    raise TypeError(
        f"DualAveraging: hint={hint!r} cannot be called; pass None, LastGradient(), its name 'last-gradient', or a "
        "function (params, gradients) -> list of tensors"
    )
