"""Momentum made orthogonal for hidden matrices, AdamW for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, cast, final, get_args

import torch
from torch import Tensor

from learnedopt.core.counts import require_count
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases.hand_designed import DECAY_RATE, NOT_NEGATIVE, HandDesigned, sqrt
from learnedopt.optimizers.bases.kinds import Kind, kinds_of
from learnedopt.optimizers.bases.newton_schulz import iterated
from learnedopt.optimizers.bases.precision import wide, wide_dtype, zeros

Adjust: TypeAlias = Literal["original", "match_rms_adamw"]
Hidden: TypeAlias = Literal["first", "middle", "last"]
_KINDS: dict[str, Kind] = {"first": Kind.FIRST, "middle": Kind.MIDDLE, "last": Kind.LAST}
_LEAST_NORM = 1e-7  # a matrix of a smaller norm moves less


@final
@dataclass(frozen=True)
class Muon(HandDesigned):
    """Muon (Jordan et al. 2024) for hidden matrices, as ``torch.optim.Muon``, and AdamW for everything else.

        b <- momentum * b + (1 - momentum) * g,    o = orthogonal((1 - momentum) * g + momentum * b)
        delta = -lr * (s * o + weight_decay * x)

    with "orthogonal" some Newton-Schulz steps from ``x / |x|``, which bring all singular values near 1, and s by
    ``adjust``: sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns)), at which an entry moves about as far as
    AdamW's (Liu et al. 2025, equation 4). A convolution's weights are a matrix of its outputs by all the rest. Head,
    embeddings and vectors move by AdamW at the rate ``ratio * lr``.

    What is a hidden matrix is told by names and shapes, see ``kinds_of``: of a net with a single one it is the head.
    torch computes "orthogonal" in bfloat16; here it is in the dtype of the rule's other arithmetic.

    Args:
        lr: learning rate.
        momentum: decay of the average of hidden matrices' gradients.
        weight_decay: share of each parameter that a step of rate 1 would take away; 0 switches it off.
        ratio: of AdamW's learning rate to ``lr``.
        beta1: AdamW's decay of the average of gradients.
        beta2: AdamW's decay of the average of squared gradients.
        eps: added to AdamW's root for stability.
        adjust: what s is.
        num_newton_schulz: steps of the iteration.
        orthogonal: the kinds of matrices that count as hidden: "first", "middle" or "last".
        learn: the hyperparameters in theta; None for all that are switched on.

    State: ``buffer``, b of the hidden matrices; ``mean`` and ``square`` of the others; ``step`` (scalar).
    """

    lr: float = 1e-3
    momentum: float = 0.95
    weight_decay: float = 0.1
    ratio: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    adjust: Adjust = "original"
    num_newton_schulz: int = 5
    orthogonal: tuple[Hidden, ...] = ("first", "middle")

    coordinatewise = False

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "lr": NOT_NEGATIVE,
        "momentum": DECAY_RATE,
        "weight_decay": NOT_NEGATIVE,
        "ratio": NOT_NEGATIVE,
        "beta1": DECAY_RATE,
        "beta2": DECAY_RATE,
        "eps": NOT_NEGATIVE,
    }
    optional: ClassVar[tuple[str, ...]] = ("weight_decay",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("num_newton_schulz", self.num_newton_schulz, least=1)
        if self.adjust not in get_args(Adjust):
            raise ValueError(f"Muon: adjust={self.adjust!r} is none of {', '.join(get_args(Adjust))}")
        if not isinstance(cast("object", self.orthogonal), tuple) or not {*self.orthogonal} <= _KINDS.keys():
            raise ValueError(f"Muon: orthogonal={self.orthogonal!r} is no tuple of some of {', '.join(_KINDS)}")

    def hidden(self, params: Params) -> list[str]:
        """Return the names of the matrices whose momentum is made orthogonal."""
        wanted = {_KINDS[name] for name in self.orthogonal}
        return [name for name, (kind, *_) in kinds_of(params).items() if kind in wanted]

    def init(self, theta: Theta, params: Params) -> tuple[Params, dict[str, Any]]:
        """Start where the parameters are, with zero averages."""
        hidden = self.hidden(params)
        matrices, rest = ({k: p for k, p in params.items() if (k in hidden) is kind} for kind in (True, False))
        first = next(iter(params.values()))
        step = torch.zeros((), dtype=wide_dtype(first), device=first.device)
        return params, {"buffer": zeros(matrices), "mean": zeros(rest), "square": zeros(rest), "step": step}

    def update(
        self, theta: Theta, grads: Params, state: dict[str, Any], params: Params, loss: Tensor
    ) -> tuple[Params, dict[str, Any]]:
        """Step against hidden matrices' orthogonal momentum, and against AdamW's direction elsewhere."""
        step = state["step"] + 1
        values = self.values(theta, grads.values())
        exact = self.values(theta, [step])[step.dtype]
        corrections = 1 - exact["beta1"] ** step, (1 - exact["beta2"] ** step).sqrt()
        buffers: Params = {}
        ahead: Params = {}
        means: Params = {}
        squares: Params = {}
        directions: Params = {}
        for name, grad in grads.items():
            hyper, grad = values[wide_dtype(grad)], wide(grad)
            if name in state["buffer"]:
                momentum = hyper["momentum"]
                buffers[name] = momentum * state["buffer"][name] + (1 - momentum) * grad
                ahead[name] = (1 - momentum) * grad + momentum * buffers[name]
                continue
            means[name] = hyper["beta1"] * state["mean"][name] + (1 - hyper["beta1"]) * grad
            squares[name] = hyper["beta2"] * state["square"][name] + (1 - hyper["beta2"]) * grad * grad
            correction1, correction2 = (c.to(grad.dtype) for c in corrections)
            root = sqrt(squares[name]) / correction2 + hyper["eps"]
            directions[name] = means[name] / correction1 / root
        directions |= self._orthogonal(ahead)
        deltas: Params = {}
        for name, grad in grads.items():
            hyper = values[wide_dtype(grad)]
            rate = hyper["lr"] if name in buffers else hyper["ratio"] * hyper["lr"]
            deltas[name] = (-rate * self.decayed(hyper, directions[name], params[name])).to(grad.dtype)
        return deltas, {"buffer": buffers, "mean": means, "square": squares, "step": step}

    def _orthogonal(self, moments: Params) -> Params:
        """Return s * o of each; those of one shape and dtype are iterated on together."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, moment in moments.items():
            groups.setdefault((moment.shape, moment.dtype), []).append(name)
        found: Params = {}
        for names in groups.values():
            stacked = torch.stack([moments[name].flatten(1) for name in names])
            # Not divided by its root mean square in the end, as `orthogonalised` does it: torch's is not.
            stacked = stacked / sqrt(stacked.square().sum((-2, -1), keepdim=True)).clamp(min=_LEAST_NORM)
            for name, matrix in zip(names, iterated(stacked, self.num_newton_schulz).unbind(), strict=True):
                found[name] = (self._factor(*matrix.shape) * matrix).reshape(moments[name].shape)
        return found

    def _factor(self, rows: int, columns: int) -> float:
        if self.adjust == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))
