"""Convex problems with a known smoothness: quadratics of a chosen spectrum, and logistic regression on given data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast, final

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core import tree
from learnedopt.core.task import Batch, Split, TaskFamily, Tasks
from learnedopt.core.tree import Params
from learnedopt.tasks.data import arguments, streams

Spectrum: TypeAlias = Literal["power", "geometric"]


@final
@dataclass(frozen=True)
class SpectralQuadratic(TaskFamily):
    """Quadratics ``f(x) = ½ Σ_i λ_i (q_i·(x - s))²`` of a chosen spectrum, with minimum 0 and smoothness λ_1 = 1.

    The solution s is ±1 along every eigenvector q_i, with random signs: a start at the origin has the squared distance
    ``dim`` to it. Gradient descent at the rate 1 then falls as ``T^-(1 - 1/decay)`` under the power law, as long as the
    smallest eigenvalue does not show. Parameters: ``x`` (dim,). A batch is the function, the same at every step and
    split.

    Args:
        dim: of x.
        spectrum: "power": ``λ_i = i^-decay``; "geometric": ``λ_i`` falls geometrically from 1 to ``10^-decay``.
        decay: how fast, positive.
        rotated: whether the eigenvectors are a random basis; otherwise they are the axes, which rates per coordinate
            find favourable.
        start_scale: the standard deviation of the starting point's entries; 0 starts at the origin.
        dtype: "float32" or "float64"; by default torch's default dtype when tasks are sampled.
        meta_split: changes nothing, as every split is the same distribution: sample with other generators.

    Raises:
        ValueError: an option is out of its range.
    """

    dim: int = 400
    spectrum: Spectrum = "power"
    decay: float = 3.0
    rotated: bool = False
    start_scale: float = 0.0
    dtype: arguments.DType | None = None
    meta_split: arguments.MetaSplit = "train"

    def __post_init__(self) -> None:
        arguments.require_count("dim", self.dim)
        arguments.require_choice("spectrum", self.spectrum, Spectrum)
        arguments.require_number("decay", self.decay, least=0)
        arguments.require_number("start_scale", self.start_scale, least=0)
        arguments.require_common(self.dtype, self.meta_split)

    def eigenvalues(self) -> Tensor:
        """Return λ (dim,) in float64, from 1 downwards."""
        if self.spectrum == "power":
            return torch.arange(1, self.dim + 1, dtype=torch.float64) ** -self.decay
        return 10.0 ** -(self.decay * torch.linspace(0, 1, self.dim, dtype=torch.float64))

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw the signs, the basis (num_tasks, dim, dim) where rotated, and the starting point."""
        drawn = torch.rand((num_tasks, self.dim), generator=generator, dtype=torch.float64, device=generator.device)
        signs = torch.where(drawn < 0.5, -1.0, 1.0).double()
        start = self.start_scale * streams.normal((num_tasks, self.dim), generator)
        roots = self.eigenvalues().sqrt().to(signs.device).expand(num_tasks, -1)
        tasks = {"roots": roots, "solution": signs, "start": start}
        if self.rotated:
            drawn = streams.normal((num_tasks, self.dim, self.dim), generator)
            basis = cast("Tensor", torch.linalg.qr(drawn).Q)  # pyright: ignore[reportUnknownMemberType] - no types
            tasks |= {"basis": basis, "solution": (basis @ signs.unsqueeze(-1)).squeeze(-1)}
        return tree.to(tasks, None, arguments.resolve_dtype(self.dtype))

    def init_params(self, tasks: Tasks) -> Params:
        """Start at the task's own starting point."""
        return {"x": tasks["start"].clone()}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return the function itself."""
        return {k: v for k, v in tasks.items() if k != "start"}

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the residuals √λ_i q_i·(x - s) (dim,)."""
        away = params["x"] - batch["solution"]
        return batch["roots"] * (batch["basis"].mT @ away if "basis" in batch else away)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return half the squared length of the residuals."""
        return 0.5 * self.outputs(params, batch).square().sum()


@final
@dataclass(frozen=True, eq=False)
class RegularizedLogistic(TaskFamily):
    """Logistic regression on given points: mean of ``log(1 + exp(z)) - t z``, ``z = a·w``, plus ``l2/2 · |w|²``.

    Every task is this one problem: its minimum is unique, and f is ``smoothness()``-smooth. It is not in the registry,
    for no configuration holds data. Parameters: ``weight`` (dim,), from the origin. A batch is ``{"inputs": (points,
    dim), "targets": (points,)}``, the same at every step and split.

    Args:
        inputs: (points, dim), with a column of ones where there is to be an intercept.
        targets: (points,), each 0 or 1.
        l2: the penalty's strength, positive: without it a separable problem has no minimum.

    Raises:
        ValueError: the shapes do not match, a target is neither 0 nor 1, or the strength is not positive.
    """

    inputs: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    l2: float

    def __post_init__(self) -> None:
        if self.inputs.ndim != 2 or self.targets.shape != self.inputs.shape[:1] or not len(self.inputs):
            shapes = f"{tuple(self.inputs.shape)} and {tuple(self.targets.shape)}"
            raise ValueError(f"inputs and targets have shapes {shapes}; pass (points, dim) and (points,)")
        if not bool(((self.targets == 0) | (self.targets == 1)).all()):
            raise ValueError("targets must be 0 or 1 each; compare the labels with one of the classes first")
        arguments.require_number("l2", self.l2, least=0)
        if self.l2 == 0:
            raise ValueError("l2=0 leaves a separable problem without a minimum; pass a positive strength")

    def smoothness(self) -> float:
        """Return a bound of the Hessian's eigenvalues: a quarter of the inputs' second moment's largest, plus l2."""
        inputs = self.inputs.double()
        second = inputs.T @ inputs / len(inputs)
        # torch gives it no types.
        sizes = cast("Tensor", torch.linalg.eigvalsh(second))  # pyright: ignore[reportUnknownMemberType]
        return float(sizes[-1]) / 4 + self.l2

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        """Return the points, once a task (views)."""
        targets = self.targets.to(self.inputs.dtype)
        return {k: v.expand(num_tasks, *v.shape) for k, v in (("inputs", self.inputs), ("targets", targets))}

    def init_params(self, tasks: Tasks) -> Params:
        """Start at the origin."""
        return {"weight": torch.zeros_like(tasks["inputs"][:, 0])}

    def batch(self, tasks: Tasks, step: int, split: Split) -> Batch:
        """Return all points."""
        return tasks

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the logits (points,)."""
        return batch["inputs"] @ params["weight"]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood and the penalty."""
        likelihood = functional.binary_cross_entropy_with_logits(self.outputs(params, batch), batch["targets"])
        return likelihood + 0.5 * self.l2 * params["weight"].square().sum()
