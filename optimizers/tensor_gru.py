"""One recurrent network for every tensor: it sets rate, momentum and how much of a quasi-Newton step is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from learnedopt.core.counts import require_count
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases import cells
from learnedopt.optimizers.bases.hand_designed import check_number
from learnedopt.optimizers.bases.precision import wide, wide_dtype, zeros

NUM_INPUTS = 9
_LARGEST = 2.0
"""Bound of the network's inputs."""
_FURTHEST = 16.0
"""Bound of what the log-rate has moved by in all, so that no run of whatever length makes it infinite."""
_FLATTEST = 1e-3
"""Cosine of step and change of gradient below which a curvature is no more than rounding, or is negative."""
_LONGEST = 4.0
"""Bound of what the quasi-Newton step adds along the last step, in steps."""


class Memory(NamedTuple):
    """What the rule keeps of a task."""

    grad: Params
    """The last gradient, as the parameters; 0 at first."""
    step: Params
    """The last step, likewise."""
    hidden: Tensor
    """(tensors, hidden_size)."""
    change: Tensor
    """What each log-rate has moved by, (tensors,)."""
    log_loss: Tensor
    """Of the last step, a scalar."""
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride] - no use of a tuple's method
    """Steps taken, a scalar."""


class _Products(NamedTuple):
    """Inner products (tensors,) of gradient g, last gradient p, last step s and change of gradient y = g - p."""

    gg: Tensor
    gp: Tensor
    gs: Tensor
    gy: Tensor
    pp: Tensor
    ss: Tensor
    sy: Tensor
    yy: Tensor


@final
@dataclass(frozen=True)
class TensorGRU(UpdateRule):
    """Heavy ball and memoryless BFGS, blended and paced by a GRU with one set of weights and one state a tensor.

    Per step and tensor with gradient g, last gradient p, last step s, y = g - p, the GRU's state h and inputs z:

        h <- GRU(z, h),    (o1, o2, o3) = head (h, z)
        rate <- rate * exp(max_change * tanh o1),    momentum = sigmoid(logit_momentum + o2),    k = tanh o3
        a = k * g.s / s.y,    q = g - a y
        delta = -rate * q + ((1 - k) * momentum + k * rate * y.q / s.y - a) s

    rate starts at exp(log_lr). With k = 0 this is gradient descent with momentum (Polyak 1964); with k = 1 it is the
    step of memoryless BFGS on the initial matrix rate * I (Shanno 1978; Nocedal and Wright 2006, equation 7.20 with
    one pair), which corrects the last step to its line's minimum and goes on conjugate to it. The head starts at zero:
    untrained, the rule is gradient descent with momentum at the constructor's values.

    The inputs do not change with the units of the loss or of the parameters, nor the tensor's size, once log_lr fits:

        ln(loss / last loss) / 2,    ln(|g| / |p|) / 2,    cos(g, p),    cos(g, s),    ln(1 + t) / 6
        ln(s.s / s.y / rate) / 2 and ln(s.y / y.y / rate) / 2,  the rates of Barzilai and Borwein (1988)
        ln(loss / |g|^2 / rate) / 2,  that of Polyak (1987) for losses whose minimum is 0;    1 where s and y are known

    each within ±2, and 0 where it is not known: at the first step, of a zero gradient. A cosine of s and y counts as at
    least 1/100 in the logarithms; where it is below 1/1000, k is 0. g.s / s.y and rate * y.q / s.y are kept within ±4,
    ln(rate) within ±16 of log_lr. A loss of 0 or less counts as the smallest number.

    Args:
        lr: the rate that every tensor starts with.
        momentum: likewise, between 0 and 1.
        hidden_size: units of the GRU. With 16 there are 1,325 weights.
        max_change: bound on how far a log-rate moves in a step.

    Theta: ``log_lr``, ``logit_momentum``, scalars; ``gru/input`` (3 hidden_size, 9), ``gru/hidden`` (3 hidden_size,
    hidden_size), ``gru/bias`` (3 hidden_size,); ``head`` (3, hidden_size + 9).
    State: see ``Memory``: twice the parameters, as Adam's.

    Raises:
        TypeError: an option is no number.
        ValueError: an option is out of its range.
    """

    lr: float = 0.01
    momentum: float = 0.9
    hidden_size: int = 16
    max_change: float = 3.0

    def __post_init__(self) -> None:
        tiny, owner = math.ulp(0.0), type(self).__name__
        check_number(owner, "lr", self.lr, tiny, math.inf)
        check_number(owner, "momentum", self.momentum, tiny, 1.0)
        check_number(owner, "max_change", self.max_change, tiny, math.inf)
        require_count(f"{owner}: hidden_size", self.hidden_size, least=1)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the constructor's values, a GRU from U(-1/sqrt(hidden_size), 1/sqrt(hidden_size)), and a zero head."""
        size, bound, device = self.hidden_size, 1 / math.sqrt(self.hidden_size), generator.device

        def uniform(*shape: int) -> Tensor:
            return (2 * torch.rand(shape, generator=generator, device=device) - 1) * bound

        logit = math.log(self.momentum) - math.log1p(-self.momentum)
        return {
            "log_lr": torch.tensor(math.log(self.lr), device=device),
            "logit_momentum": torch.tensor(logit, device=device),
            "gru/input": uniform(3 * size, NUM_INPUTS),
            "gru/hidden": uniform(3 * size, size),
            "gru/bias": uniform(3 * size),
            "head": torch.zeros(3, size + NUM_INPUTS, device=device),
        }

    def theta_scale(self) -> dict[str, float | Tensor]:
        """A step of one moves log-rate and logit by 1, the GRU by the bound of its draw, the head by a tenth."""
        bound = 1 / math.sqrt(self.hidden_size)
        return {**dict.fromkeys(("gru/input", "gru/hidden", "gru/bias"), bound), "head": 0.1}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Memory]:
        """Start where the parameters are, with no gradient, no step and a zero state."""
        dtype, device = wide_dtype(theta["head"]), next(iter(params.values())).device

        def none(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        hidden, change = none(len(params), self.hidden_size), none(len(params))
        return params, Memory(zeros(params), zeros(params), hidden, change, none(), none())

    def update(self, theta: Theta, grads: Params, state: Memory, params: Params, loss: Tensor) -> tuple[Params, Memory]:
        """Set each tensor's numbers, then step in the span of its gradient and of what it remembers."""
        theta = {name: value.to(state.hidden.dtype) for name, value in theta.items()}
        found = {k: wide(grads[k]) for k in state.grad}
        changes = {k: g - state.grad[k] for k, g in found.items()}
        dots = _products(found, changes, state)
        log_loss = loss.to(state.hidden.dtype).clamp(min=_tiny(state.hidden)).log()
        inputs = _inputs(dots, state, theta["log_lr"] + state.change, log_loss)
        hidden = cells.gru(theta["gru/input"], theta["gru/hidden"], theta["gru/bias"], inputs, state.hidden)
        out = (torch.cat([hidden, inputs], dim=1) @ theta["head"].T).unbind(1)
        change = (state.change + self.max_change * out[0].tanh()).clamp(-_FURTHEST, _FURTHEST)
        rate, momentum = (theta["log_lr"] + change).exp(), (theta["logit_momentum"] + out[1]).sigmoid()
        of_change, of_step = _secant(dots, rate, momentum, out[2].tanh())
        deltas: Params = {}
        steps: Params = {}
        for i, (name, grad) in enumerate(found.items()):
            along, against, r = (x[i].to(grad.dtype) for x in (of_step, of_change, rate))
            steps[name] = along * state.step[name] - r * (grad - against * changes[name])
            deltas[name] = steps[name].to(grads[name].dtype)
        return deltas, Memory(found, steps, hidden, change, log_loss, state.count + 1)


def _products(grads: Params, changes: Params, state: Memory) -> _Products:
    """Return the inner products of each tensor's four vectors: one small matrix product a tensor."""
    grams: list[Tensor] = []
    for name, grad in grads.items():
        rows = torch.stack([grad, state.grad[name], state.step[name], changes[name]]).reshape(4, -1)
        grams.append((rows @ rows.T).to(state.hidden.dtype))
    gram = torch.stack(grams)
    (gg, gp, gs, gy), pp, (ss, sy), yy = gram[:, 0].unbind(1), gram[:, 1, 1], gram[:, 2, 2:].unbind(1), gram[:, 3, 3]
    return _Products(gg, gp, gs, gy, pp, ss, sy, yy)


def _inputs(dots: _Products, state: Memory, log_rate: Tensor, log_loss: Tensor) -> Tensor:
    """Return what the network sees, (tensors, 9)."""
    log_loss = log_loss.expand_as(log_rate)
    fallen = torch.where(state.count > 0, log_loss - state.log_loss, 0.0)
    gg, seen = _log(dots.gg)
    pp, seen_before = _log(dots.pp)
    ss, moved = _log(dots.ss)
    yy, changed = _log(dots.yy)
    known = moved & changed
    angle = _cosine(dots.sy, dots.ss, dots.yy).clamp(min=1e-2).log()
    ratio = (ss - yy) / 2 - log_rate
    return torch.stack(
        [
            (fallen / 2),
            torch.where(seen & seen_before, (gg - pp) / 4, 0.0),
            torch.where(known, (ratio - angle) / 2, 0.0),
            torch.where(known, (ratio + angle) / 2, 0.0),
            torch.where(seen, (log_loss - gg - log_rate) / 2, 0.0),
            _cosine(dots.gp, dots.gg, dots.pp),
            _cosine(dots.gs, dots.gg, dots.ss),
            (state.count.log1p() / 6).expand_as(log_rate),
            known.to(log_rate.dtype),
        ],
        dim=1,
    ).clamp(-_LARGEST, _LARGEST)


def _secant(dots: _Products, rate: Tensor, momentum: Tensor, blend: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much of y leaves the gradient, and how much of the last step is taken again; both (tensors,)."""
    curved = _cosine(dots.sy, dots.ss, dots.yy) > _FLATTEST
    sy = torch.where(curved, dots.sy, 1.0)
    blend = torch.where(curved, blend, 0.0)
    corrected = blend * (dots.gs / sy).clamp(-_LONGEST, _LONGEST)
    conjugate = rate * (dots.gy - corrected * dots.yy) / sy
    return corrected, (1 - blend) * momentum + blend * conjugate.clamp(-_LONGEST, _LONGEST) - corrected


def _tiny(x: Tensor) -> float:
    """Return the smallest squared length that counts: its inverse, which derivatives hold, is far from infinite."""
    return torch.finfo(x.dtype).tiny * 2.0**20


def _log(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithm of squared lengths, and where these count; elsewhere it is 0 with derivative 0."""
    counts = x > _tiny(x)
    return torch.where(counts, x, 1.0).log(), counts


def _cosine(product: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the cosine of two vectors from their product and squared lengths; 0 where one of these does not count."""
    counts = (left > _tiny(left)) & (right > _tiny(right))
    lengths = torch.where(counts, left, 1.0).sqrt() * torch.where(counts, right, 1.0).sqrt()
    return torch.where(counts, product, 0.0) / lengths
