"""Learned directions for matrices, normalised and orthogonalised, and AdamW for the rest: after Celo2 (2026)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor

from learnedopt.core.counts import require_count
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers.bases import frame, frame_features
from learnedopt.optimizers.bases.frame import Decays, Memory, Moments
from learnedopt.optimizers.bases.frame_features import NUM_ROWS
from learnedopt.optimizers.bases.hand_designed import check_number, sqrt
from learnedopt.optimizers.bases.joined import ALL, Layout
from learnedopt.optimizers.bases.kinds import Kind, kinds_of
from learnedopt.optimizers.bases.newton_schulz import orthogonalised_all
from learnedopt.optimizers.bases.precision import wide

_KEPT = (0.9, 0.99, 0.999)
"""What the averages m1, m2 and v keep in a step, at the start."""
_EPS = 1e-8
"""AdamW's, added to the root."""
_FLOOR = 1e-10
"""Of root mean squares: it makes those of zeros differentiable, and is no part of any other."""


@final
@dataclass(frozen=True)
class Celo2(UpdateRule):
    """A network proposes matrices' updates, whose size is then fixed; vectors and embeddings are AdamW's.

    After the description of Celo2 (2026): a small network for every coordinate whose proposal is divided by its root
    mean square and orthogonalised, so that the rate alone says how far a matrix moves, and AdamW where a direction of
    a matrix has no meaning. Per step and tensor x with gradient g, averages m1, m2 of g and v of g^2, all corrected for
    their start at zero, and t the updates before this:

        (d, s) = MLP(the features of ``optimizers.bases.frame_features``, tanh(t / 10 - 1))        of each coordinate
        u = m1 / RMS(m1) + d e^s,    u <- N(u),    delta = -e^log_rate (u + e^weight_decay x)      matrices
        delta = -e^rest_rate (m1 / (sqrt(v) + 1e-8) + e^weight_decay x)      the rest; the decay of embeddings alone

    N(u) is ``orthogonalised(u)``, four Newton-Schulz steps to a root mean square of 1 (Jordan et al. 2024, Muon), or
    u / RMS(u). The network's last layer starts at zero: untrained, this is Muon with decoupled decay on matrices
    (convolutions are (out, in * height * width)) beside AdamW on the rest. A coordinate that never had a gradient gets
    nothing from the network. Rates are constant; a schedule is the ``lr`` of ``LearnedOptimizer``, a factor on both.

    Args:
        lr: root mean square of a matrix's update at the start.
        rest_lr: AdamW's rate at the start.
        weight_decay: at the start, over the rate; 0 switches it off, for good.
        units: of the network's hidden layer.
        orthogonalise: whether N does; without it, matrices start with normalised momentum.

    Theta: ``log_rate``, ``rest_rate``, ``weight_decay`` (), logarithms; ``decay`` (3,), logits of what m1, m2 and v
    keep; ``hidden/weight`` (units, 9), ``hidden/bias`` (units,), ``output/weight`` (2, units), ``output/bias`` (2,).
    State: the ``Memory`` of the normalised rules' frame, without an averaged iterate.

    Raises:
        TypeError, ValueError: an option is not of its kind, or out of its range.
    """

    lr: float = 0.02
    rest_lr: float = 3e-3
    weight_decay: float = 1e-2
    units: int = 8
    orthogonalise: bool = True

    def __post_init__(self) -> None:
        owner, tiny = type(self).__name__, math.ulp(0.0)
        check_number(owner, "lr", self.lr, tiny, math.inf)
        check_number(owner, "rest_lr", self.rest_lr, tiny, math.inf)
        check_number(owner, "weight_decay", self.weight_decay, 0.0, math.inf)
        require_count(f"{owner}: units", self.units, least=1)
        if not isinstance(cast("object", self.orthogonalise), bool):
            raise TypeError(f"{owner}: orthogonalise={self.orthogonalise!r} is neither True nor False")

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Return the constructor's values, a hidden layer from N(0, 1 / inputs), and a last layer of zeros."""
        device, inputs = generator.device, NUM_ROWS + 1
        base = {"log_rate": math.log(self.lr), "rest_rate": math.log(self.rest_lr)}
        if self.weight_decay:
            base["weight_decay"] = math.log(self.weight_decay)
        weight = torch.randn(self.units, inputs, generator=generator, device=device) / math.sqrt(inputs)
        return {
            **{name: torch.tensor(value, device=device) for name, value in base.items()},
            "decay": torch.tensor(_KEPT, device=device).logit(),
            "hidden/weight": weight,
            "hidden/bias": torch.zeros(self.units, device=device),
            "output/weight": torch.zeros(2, self.units, device=device),
            "output/bias": torch.zeros(2, device=device),
        }

    def theta_scale(self) -> dict[str, float | Tensor]:
        """Return how far each kind of number moves in a step of size one."""
        network = {"hidden/weight": 0.15, "hidden/bias": 0.15, "output/weight": 0.06, "output/bias": 0.06}
        base = {"log_rate": 0.2, "rest_rate": 0.2, "decay": 0.4}
        return {**base, **({"weight_decay": 0.7} if self.weight_decay else {}), **network}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Memory]:
        """Start where the parameters are, with zero averages."""
        return params, frame.start(params)._replace(average={})

    def update(self, theta: Theta, grads: Params, state: Memory, params: Params, loss: Tensor) -> tuple[Params, Memory]:
        """Move matrices by the network's directions, and the rest by AdamW."""
        theta, kinds = frame.in_dtype(theta, params), kinds_of(params)
        tensors, memory = frame.moments(grads, state, Decays(*theta["decay"].unbind()))
        matrices = [k for k, p in params.items() if p.ndim >= 2 and kinds[k].kind is not Kind.EMBEDDING]
        learned = self._directions(theta, {k: tensors[k] for k in matrices}, params, state.step) if matrices else {}
        decay = theta["weight_decay"].exp() if self.weight_decay else 0.0
        rate, rest_rate = theta["log_rate"].exp(), theta["rest_rate"].exp()
        deltas: Params = {}
        for name, p in params.items():
            found = learned[name] if name in learned else _adam(tensors[name])
            along = found + decay * wide(p) if p.ndim >= 2 else found
            deltas[name] = (-(rate if name in learned else rest_rate) * along).to(p.dtype)
        return deltas, memory

    def _directions(self, theta: Theta, tensors: dict[str, Moments], params: Params, step: Tensor) -> Params:
        """Return the matrices' directions, of a root mean square of 1."""
        at = {name: wide(params[name]) for name in tensors}
        weight = theta["hidden/weight"]
        bias = theta["hidden/bias"] + weight[:, -1] * (step / 10 - 1).tanh()
        layout = Layout(at)
        joined = Moments(
            *(layout.join(dict(zip(at, each, strict=True)))[ALL] for each in zip(*tensors.values(), strict=True))
        )
        (mean,) = layout.spread(layout.means(joined.square)[None]).unbind()
        rows = frame_features.rows(joined, mean, layout.join(at)[ALL], layout).to(weight.dtype)
        hidden = torch.addmm(bias[:, None], weight[:, :-1], rows).tanh()
        direction, size = torch.addmm(theta["output/bias"][:, None], theta["output/weight"], hidden).unbind(0)
        added = layout.pieces(frame_features.alive(joined) * direction * size.exp())
        proposed = {name: _over_rms(tensor.first) + added[name] for name, tensor in tensors.items()}
        if self.orthogonalise:
            return orthogonalised_all(proposed)
        return {name: _over_rms(u) for name, u in proposed.items()}


def _adam(tensor: Moments) -> Tensor:
    return tensor.first / (sqrt(tensor.square) + _EPS)


def _over_rms(x: Tensor) -> Tensor:
    return x / frame.rms(x, _FLOOR)
