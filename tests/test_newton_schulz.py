"""Newton-Schulz against singular values computed in float64."""

from __future__ import annotations

import pytest
import torch

from learnedopt.optimizers.bases import newton_schulz
from learnedopt.optimizers.bases.newton_schulz import COEFFICIENTS, fast_dtype, orthogonalised, orthogonalised_all

SHAPES = [(5, 5), (4, 7), (7, 4), (1, 6), (6, 1)]
IDS = ["square", "wide", "tall", "row", "column"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def from_singular_values(x: torch.Tensor, num_steps: int) -> torch.Tensor:
    """The same by the singular values: U p(p(...p(S))) V, at a root mean square of 1."""
    a, b, c = COEFFICIENTS
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values = values / values.norm()
    for _ in range(num_steps):
        values = a * values + b * values**3 + c * values**5
    product = left @ values.diag() @ right
    return product / product.square().mean().sqrt()


@pytest.mark.parametrize("num_steps", [0, 1, 4, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_singular_values_move_by_the_quintic(shape, num_steps):
    x = normal(*shape)
    torch.testing.assert_close(orthogonalised(x, num_steps), from_singular_values(x, num_steps), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_near_the_polar_factor_of_what_is_well_conditioned(shape):
    left, values, right = torch.linalg.svd(normal(*shape), full_matrices=False)
    x = left @ torch.linspace(1, 3, len(values), dtype=torch.float64).diag() @ right
    moved = torch.linalg.svdvals(orthogonalised(x)) / max(shape) ** 0.5
    assert moved.min() > 0.7 and moved.max() < 1.3  # 1 were the polar factor at a root mean square of 1
    cosine = torch.cosine_similarity(orthogonalised(x).flatten(), (left @ right).flatten(), dim=0)
    assert cosine > 0.975


def test_other_coefficients():
    x = normal(4, 6)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    converged = orthogonalised(x, 40, (15 / 8, -10 / 8, 3 / 8))  # these converge, slowly
    torch.testing.assert_close(converged, left @ right * 6**0.5, rtol=1e-8, atol=1e-8)


def test_root_mean_square_is_1_at_any_scale():
    x = normal(2, 3, 4, 6).float()
    expected = orthogonalised(x)
    torch.testing.assert_close(expected.square().mean((-2, -1)), torch.ones(2, 3))
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(orthogonalised(x * scale), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 4), (4, 3)], ids=["batch", "tall"])
def test_gradients_by_finite_differences(shape):
    x = normal(*shape).requires_grad_()
    assert torch.autograd.gradcheck(orthogonalised, (x,))
    assert torch.autograd.gradgradcheck(orthogonalised, (x,))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp loads what was scripted
def test_tangents_by_finite_differences():
    x, along, width = normal(4, 3), normal(4, 3, seed=1), 1e-6
    tangent = torch.func.jvp(orthogonalised, (x,), (along,))[1]
    difference = (orthogonalised(x + width * along) - orthogonalised(x - width * along)) / (2 * width)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-7)


def test_zero_stays_zero_with_finite_derivatives():
    x = torch.stack([torch.zeros(3, 4, dtype=torch.float64), normal(3, 4)]).requires_grad_()
    moved = orthogonalised(x)
    (gradient,) = torch.autograd.grad((moved * normal(2, 3, 4, seed=1)).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert not moved[0].any() and not gradient[0].any() and not second[0].any()
    assert gradient[1].any() and second[1].isfinite().all()


def test_batched_is_one_by_one():
    x = normal(2, 3, 4, 5)
    each = torch.stack([orthogonalised(row) for row in x.reshape(6, 4, 5)]).reshape(x.shape)
    torch.testing.assert_close(orthogonalised(x), each)
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(orthogonalised))(x), each)


def test_derivatives_under_vmap():
    x, weights = normal(3, 4, 5), normal(4, 5, seed=1)

    def value(x):
        return (orthogonalised(x) * weights).sum()

    each = torch.stack([torch.func.grad(value)(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(value))(x), each)


def test_all_of_one_shape_in_one_call(monkeypatch):
    shapes = {"a": (4, 5), "conv": (4, 2, 3, 3), "b": (4, 5), "c": (5, 4), "flat": (4, 18)}
    matrices = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    calls = []

    def counted(x, *rest):
        calls.append(tuple(x.shape))
        return orthogonalised(x, *rest)

    monkeypatch.setattr(newton_schulz, "orthogonalised", counted)
    moved = orthogonalised_all(matrices)
    assert calls == [(2, 4, 5), (2, 4, 18), (1, 5, 4)]
    assert list(moved) == list(matrices)
    for name, x in matrices.items():
        torch.testing.assert_close(moved[name], orthogonalised(x.flatten(1)).reshape(x.shape))


def test_half_precision_is_computed_in_float32():
    x = normal(4, 6).bfloat16()
    moved = orthogonalised(x)
    assert moved.dtype is torch.bfloat16
    torch.testing.assert_close(moved, orthogonalised(x.double()).bfloat16())


def test_products_in_bfloat16_are_near_those_in_float32():
    x = normal(2, 48, 64).float()
    fast = orthogonalised(x, dtype=torch.bfloat16)
    assert fast.dtype is torch.float32
    torch.testing.assert_close(fast.square().mean((-2, -1)), torch.ones(2))
    gap = (fast - orthogonalised(x)).square().mean().sqrt()
    assert 1e-4 < gap < 0.06


def test_fast_dtype():
    assert fast_dtype(torch.device("cpu")) in (torch.bfloat16, None)
    assert fast_dtype(torch.device("meta")) is None


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        orthogonalised(normal(3))
    with pytest.raises(ValueError, match="bias have less than two"):
        orthogonalised_all({"weight": normal(3, 3), "bias": normal(3)})
