"""Orthogonalised directions: the polar factor of a matrix, nearly, out of matrix products alone."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from learnedopt.core.tree import Params
from learnedopt.optimizers.bases.precision import like, wide, wide_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose slope at 0 is steep: it takes small singular values to about 1 in few steps, and keeps them in
about 0.7 to 1.2 without converging (Jordan et al. 2024, "Muon")."""


def orthogonalised(
    x: Tensor,
    num_steps: int = 4,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``x`` with its singular values made nearly equal, at a root mean square of 1; zeros where it is zero.

    From ``X = x / ‖x‖`` (Frobenius), ``num_steps`` times ``X ← aX + (bA + cA²)X`` with ``A = XXᵀ``: singular values
    move by ``s ← as + bs³ + cs⁵`` and singular vectors stay (Björck and Bowie 1971; these coefficients: Jordan et al.
    2024). Then every matrix is divided by its root mean square. The scale of ``x`` does not matter, tiny or huge.

    Differentiable any number of times, at zeros with derivatives zero; works under vmap.

    Args:
        x: (..., m, n), all leading dimensions of which are of separate matrices.
        num_steps: of the iteration.
        coefficients: a, b, c.
        dtype: of the products; see ``fast_dtype``. None: that of ``x``, or float32 if that is wider. What an
            iteration in bfloat16 returns is off by a few percent, so differentiate no such one.

    Raises:
        ValueError: ``x`` has less than two dimensions.
    """
    if x.ndim < 2:
        raise ValueError(f"x has the shape {tuple(x.shape)} and is no matrix; pass (..., m, n), vectors not at all")
    if x.numel() == 0:
        return x
    matrices = wide(x).reshape(-1, *x.shape[-2:])
    largest = matrices.detach().abs().amax((-2, -1), keepdim=True)  # without a derivative: the scale does not matter
    matrices = matrices / torch.where(largest > 0, largest, 1.0)
    signal = _over_root(matrices, matrices.square().sum((-2, -1), keepdim=True)).to(dtype or matrices.dtype)
    signal = iterated(signal, num_steps, coefficients).to(wide_dtype(x))
    return like(_over_root(signal, signal.square().mean((-2, -1), keepdim=True)).reshape(x.shape), x)


def iterated(x: Tensor, num_steps: int, coefficients: tuple[float, float, float] = COEFFICIENTS) -> Tensor:
    """Take the steps alone, from ``x`` (num_matrices, m, n), whose singular values must be at most 1."""
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalised_all(
    matrices: Mapping[str, Tensor],
    num_steps: int = 4,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    dtype: torch.dtype | None = None,
) -> Params:
    """Return ``orthogonalised`` of each, those of one shape in one batched call.

    Args:
        matrices: of two dimensions or more; those of more, such as a convolution's (out, in, height, width), are
            taken as (out, in·height·width).
        num_steps: as there.
        coefficients: as there.
        dtype: as there.

    Raises:
        ValueError: a tensor has less than two dimensions.
    """
    vectors = [name for name, x in matrices.items() if x.ndim < 2]
    if vectors:
        raise ValueError(f"{', '.join(vectors)} have less than two dimensions and no singular vectors; leave them out")
    groups: dict[tuple[tuple[int, ...], torch.dtype], list[str]] = defaultdict(list)
    flat = {name: x.flatten(1) for name, x in matrices.items()}
    for name, x in flat.items():
        groups[tuple(x.shape), x.dtype].append(name)
    moved: dict[str, Tensor] = {}
    for members in groups.values():
        stacked = torch.stack([flat[name] for name in members])
        moved |= zip(members, orthogonalised(stacked, num_steps, coefficients, dtype).unbind(), strict=True)
    return {name: moved[name].reshape(x.shape) for name, x in matrices.items()}


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """Return bfloat16 where the device multiplies matrices of it by instructions of its own, else None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bfloat16() else None


@functools.cache
def _cpu_has_bfloat16() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux: unknown, and float32 always serves
        return False
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), list[str]())
    return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(flags))


def _over_root(x: Tensor, squared: Tensor) -> Tensor:
    """Return ``x / √squared``, zero with derivatives zero where ``squared`` is 0."""
    positive = squared > 0
    return x * torch.where(positive, torch.where(positive, squared, 1.0).rsqrt(), 0.0)
