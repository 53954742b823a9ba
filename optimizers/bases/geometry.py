"""Geometries of mirror descent: how far one point is from another, and in which coordinates steps are straight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from learnedopt.core import tree
from learnedopt.core.tree import Params
from learnedopt.optimizers.bases.precision import like, wide


class Geometry(ABC):
    """A Bregman divergence ``B(x, y) = psi(x) - psi(y) - <grad psi(y), x - y>`` and its mirror map ``grad psi``.

    All methods but ``start_faults`` see ONE task, whose parameters are one vector together, and work under vmap.
    """

    flat: bool = False
    """The mirror map is the identity."""

    @abstractmethod
    def divergence(self, x: Params, y: Params) -> Tensor:
        """Return ``B(x, y)``, a scalar."""

    @abstractmethod
    def to_dual(self, params: Params) -> Params:
        """Return ``grad psi(x)``, in the dtype to compute in."""

    @abstractmethod
    def from_dual(self, dual: Params) -> Params:
        """Return the point of the domain whose mirror image is ``dual``, or the closest one to it by ``B``."""

    @abstractmethod
    def start_faults(self, params: Params) -> list[str]:
        """Say, a sentence each, why batched parameters are no points to start from."""


@final
@dataclass(frozen=True)
class Euclidean(Geometry):
    """``psi = ½‖x‖²``: ``B(x, y) = ½‖x − y‖²``, and the mirror map is the identity."""

    flat = True

    def divergence(self, x: Params, y: Params) -> Tensor:
        """Return half the squared distance."""
        return torch.stack([0.5 * (wide(x[k]) - wide(y[k])).square().sum() for k in x]).sum()

    def to_dual(self, params: Params) -> Params:
        """Return the parameters."""
        return {k: wide(p) for k, p in params.items()}

    def from_dual(self, dual: Params) -> Params:
        """Return the parameters."""
        return dual

    def start_faults(self, params: Params) -> list[str]:
        """Find nothing: every point will do."""
        return []


@final
@dataclass(frozen=True)
class Entropic(Geometry):
    """``psi = Σ x log x`` on the probability simplex: ``B(x, y) = KL(x ‖ y)``, a softmax leads back from logarithms.

    All entries of a task's parameters together are one distribution. Where y is 0 and x is not, the divergence is
    infinite; a coordinate that starts at 0 stays there for ever, so no start may have one.
    """

    def divergence(self, x: Params, y: Params) -> Tensor:
        """Return KL(x ‖ y), with 0 log 0 = 0."""
        pairs = [(wide(x[k]), wide(y[k])) for k in x]
        return torch.stack([(torch.xlogy(a, a) - torch.xlogy(a, b)).sum() for a, b in pairs]).sum()

    def to_dual(self, params: Params) -> Params:
        """Return logarithms; what they leave out is a constant, which ``from_dual`` does not see."""
        return {k: wide(p).log() for k, p in params.items()}

    def from_dual(self, dual: Params) -> Params:
        """Return the softmax over all entries."""
        total = torch.cat([z.reshape(-1) for z in dual.values()]).logsumexp(0)
        return {k: (z - total).exp() for k, z in dual.items()}

    def start_faults(self, params: Params) -> list[str]:
        """Find zeros, negative entries and sums other than 1."""
        flat = wide(tree.ravel(list(params.values())).detach())
        least, sums = float(flat.min()), flat.sum(1)
        found: list[str] = []
        if not least > 0:
            found.append(
                f"its smallest entry is {least:g}, and what starts at 0 stays there: KL to it is infinite; mix the "
                "start, or the targets that it is the mean of, with the uniform distribution (Simplex(mixing=...))"
            )
        first = next(iter(params.values()))
        tolerance = 10 * flat.shape[1] * torch.finfo(first.dtype).eps
        if not bool(((sums - 1).abs() <= tolerance).all()):
            found.append(
                f"its entries sum to {sums[(sums - 1).abs().argmax()]:.6g} in place of 1; start on the simplex, at "
                "the uniform distribution for one"
            )
        return found


def differences(moved: Params, params: Params) -> Params:
    """Return what to add to ``params`` to get to ``moved``, in the parameters' dtype."""
    return {k: like(moved[k] - wide(p), p) for k, p in params.items()}
