"""Gradient descent with momentum whose hyperparameters a small recurrent network sets, tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor

from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases import cells
from learnedopt.optimizers.bases.hand_designed import check_number, sqrt
from learnedopt.optimizers.bases.precision import wide, wide_dtype, zeros

State = dict[str, Any]

_SHORTEST_MEMORY = 10
"""Steps after which a running mean becomes an exponential one: until then it is the plain mean."""
_LARGEST = 2.0
"""Bound of the network's inputs: the logarithm of what is exactly 0 must not drown the others."""


@final
@dataclass(frozen=True)
class RecurrentHyperparameters(UpdateRule):
    """Heavy-ball momentum with a rate, momentum and weight decay for each tensor and step, set by a GRU.

    Per step and tensor x with gradient g, momentum buffer b and the GRU's state h (one set of weights, one state a
    tensor):

        h <- GRU(s, h),    (o_1, o_2, o_3) = max_change * tanh(head h)
        rate = exp(log_lr + o_1),    momentum = sigmoid(logit_momentum + o_2),    decay = exp(log_weight_decay + o_3)
        b <- momentum * b + d,    delta = -rate * (b + decay * x),    d = g, or g / RMS(g) where ``normalized``

    The head starts at zero, and with it the rule is gradient descent with momentum and decoupled weight decay at the
    constructor's values. The statistics s do not change where loss and gradients are scaled, nor with the tensor's
    size; B is b before this step, R the last rate, t the steps taken:

        log RMS(g) / mean,    cos(g, B),    log(R RMS(B) / RMS(x)) / 5,    log(1 + t) / 5,    log(loss / mean)

    each within ±2, logarithms of 0 at the bound; "mean" is the running geometric mean, this step's included, over all
    steps and from the tenth on with weight 1/10. The last is there where ``reads_loss``. Sources: a learned controller
    of the step size from such statistics is Daniel et al. (2016); the GRU is Cho et al. (2014), its gates as in
    ``torch.nn.GRUCell`` with ``bias_hh`` 0.

    Args:
        lr: the rate that all tensors start with.
        momentum: likewise, between 0 and 1.
        weight_decay: likewise; 0 switches decay off, for good.
        hidden_size: units of the GRU.
        max_change: bound on what the network adds to log-rate, logit of momentum and logarithm of decay.
        normalized: momentum averages gradients of RMS 1, so that the rate alone says how far a step goes. A squared
            distance to a bootstrapped target of several steps then grows with the rate itself and drives it up: match
            outputs, or bound the target.
        reads_loss: the network sees the loss too, which must be positive; ``LearnedOptimizer`` then needs it.

    Theta: ``log_lr``, ``logit_momentum``, ``log_weight_decay``, scalars; ``gru/input`` (3 hidden_size, inputs),
    ``gru/hidden`` (3 hidden_size, hidden_size), ``gru/bias`` (3 hidden_size,), in the order reset, update, candidate;
    ``head`` (outputs, hidden_size).
    State: ``buffer``, as the parameters; ``hidden`` (tensors, hidden_size); ``log_rate`` (tensors,) and ``means``
    (tensors, 1 or 2), the running means; ``step``.

    Raises:
        TypeError: an option is no number.
        ValueError: an option is out of its range.

    Example:
        >>> rule = RecurrentHyperparameters(lr=0.3)
        >>> theta = rule.init_theta(torch.Generator().manual_seed(0))
        >>> optimizer = LearnedOptimizer(model.parameters(), (rule, theta))  # momentum SGD until theta is trained
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    hidden_size: int = 16
    max_change: float = 3.0
    normalized: bool = False
    reads_loss: bool = False

    def __post_init__(self) -> None:
        tiny, owner = math.ulp(0.0), type(self).__name__
        check_number(owner, "lr", self.lr, tiny, math.inf)
        check_number(owner, "momentum", self.momentum, tiny, 1.0)
        check_number(owner, "weight_decay", self.weight_decay, 0.0, math.inf)
        check_number(owner, "max_change", self.max_change, tiny, math.inf)
        size = cast("object", self.hidden_size)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{owner}: hidden_size={self.hidden_size!r} is no number of units; pass one of at least 1")

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the constructor's values, a GRU from U(-1/sqrt(hidden_size), 1/sqrt(hidden_size)), and a zero head."""
        size, bound, device = self.hidden_size, 1 / math.sqrt(self.hidden_size), generator.device

        def uniform(*shape: int) -> Tensor:
            return (2 * torch.rand(shape, generator=generator, device=device) - 1) * bound

        logit = math.log(self.momentum) - math.log1p(-self.momentum)
        base = {"log_lr": math.log(self.lr), "logit_momentum": logit}
        if self.weight_decay:
            base["log_weight_decay"] = math.log(self.weight_decay)
        return {
            **{name: torch.tensor(value, device=device) for name, value in base.items()},
            "gru/input": uniform(3 * size, 5 if self.reads_loss else 4),
            "gru/hidden": uniform(3 * size, size),
            "gru/bias": uniform(3 * size),
            "head": torch.zeros(len(base), size, device=device),
        }

    def init(self, theta: Theta, params: Params) -> tuple[Params, State]:
        """Start where the parameters are, with zero buffers and a zero state."""
        dtype, device = wide_dtype(theta["head"]), next(iter(params.values())).device

        def none(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        memory = {"hidden": none(len(params), self.hidden_size), "log_rate": none(len(params))}
        memory |= {"means": none(len(params), 1 + self.reads_loss), "step": none()}
        return params, {"buffer": zeros(params), **memory}

    def update(self, theta: Theta, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Params, State]:
        """Set each tensor's hyperparameters, then step against its buffer."""
        theta = {name: value.to(wide_dtype(theta["head"])) for name, value in theta.items()}
        inputs, means, rms = self._statistics(grads, state, params, loss)
        hidden = cells.gru(theta["gru/input"], theta["gru/hidden"], theta["gru/bias"], inputs, state["hidden"])
        changes = (self.max_change * (hidden @ theta["head"].T).tanh()).unbind(1)
        log_rate = theta["log_lr"] + changes[0]
        momentum = (theta["logit_momentum"] + changes[1]).sigmoid()
        decay = (theta["log_weight_decay"] + changes[2]).exp() if self.weight_decay else None
        deltas: Params = {}
        buffers: Params = {}
        for i, (name, buffer) in enumerate(state["buffer"].items()):
            grad, dtype = wide(grads[name]), buffer.dtype
            if self.normalized:
                # A tensor without a gradient has nothing to normalise, and stays at 0.
                grad = grad / torch.where(rms[i] > 0, rms[i], 1.0).to(dtype)
            buffers[name] = momentum[i].to(dtype) * buffer + grad
            along = buffers[name] if decay is None else buffers[name] + decay[i].to(dtype) * wide(params[name])
            deltas[name] = (-log_rate[i].exp().to(dtype) * along).to(grads[name].dtype)
        new = {"hidden": hidden, "log_rate": log_rate, "means": means, "step": state["step"] + 1}
        return deltas, {"buffer": buffers, **new}

    def _statistics(self, grads: Params, state: State, params: Params, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs (tensors, 4 or 5), the running means after this step, and RMS(g) (tensors,)."""
        dtype, names = state["hidden"].dtype, [*state["buffer"]]

        def means_of(left: Params, right: Params) -> Tensor:
            return torch.stack([(wide(left[k]) * wide(right[k])).mean().to(dtype) for k in names])

        buffers = state["buffer"]
        of_grads, of_buffers, of_params = (sqrt(means_of(x, x)) for x in (grads, buffers, params))
        both = (of_grads > 0) & (of_buffers > 0)
        cosine = torch.where(both, means_of(grads, buffers) / torch.where(both, of_grads * of_buffers, 1.0), 0.0)
        seen = [_log(of_grads)]
        if self.reads_loss:
            seen.append(loss.to(dtype).log().expand(len(names)))
        logs = torch.stack(seen, dim=1)
        weight = (1 / (state["step"] + 1)).clamp(min=1 / _SHORTEST_MEMORY)
        means = state["means"] + weight * (logs - state["means"])
        moved = (state["log_rate"] + _log(of_buffers) - _log(of_params)) / 5
        time = (state["step"].log1p() / 5).expand(len(names))
        inputs = torch.cat([logs - means, torch.stack([cosine, moved, time], dim=1)], dim=1)
        return inputs.clamp(-_LARGEST, _LARGEST), means, of_grads


def _log(x: Tensor) -> Tensor:
    """Return the logarithm of ``x >= 0``; at 0 that of the smallest normal number, with derivative 0."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).log()
