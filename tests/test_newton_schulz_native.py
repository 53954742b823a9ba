"""The compiled orthogonalisation of small matrices against that of torch's products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learnedopt.optimizers.bases.newton_schulz import orthogonalised
from learnedopt.optimizers.kernels import lanes as lanes_module
from learnedopt.optimizers.kernels.newton_schulz_native import SMALL, Orthogonaliser, serves

SHAPES = [
    (1, 1), (1, 9), (9, 1), (4, 7), (7, 4), (8, 8), (9, 33), (20, 131), (131, 20), (33, 33), (SMALL, SMALL),
    (SMALL, 70), (200, SMALL - 1),
]  # fmt: skip
DTYPES = [torch.float32, torch.float64]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def drawn(*shape: int, decades: float = 0.0) -> Tensor:
    """Return matrices whose singular values, if there are ``decades``, lie over so many."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))
    if not decades:
        return x
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    return left * torch.logspace(0, -decades, values.shape[-1], dtype=x.dtype) @ right


def by_c(x: Tensor, **options: object) -> Tensor:
    assert serves(x), "install gcc: the next tests would test nothing"
    found = x.clone()
    Orthogonaliser([found], **options)()  # pyright: ignore[reportArgumentType]
    return found


@every_shape
@pytest.mark.parametrize("decades", [0.0, 3.0, 6.0])
def test_in_doubles_it_is_what_torch_finds(shape: tuple[int, int], decades: float) -> None:
    x = drawn(3, 2, *shape, decades=decades)
    torch.testing.assert_close(by_c(x), orthogonalised(x), rtol=1e-11, atol=1e-11)


@every_shape
@pytest.mark.parametrize("decades", [0.0, 6.0])
def test_in_floats_it_is_no_less_exact_than_torch(shape: tuple[int, int], decades: float) -> None:
    x = drawn(2, *shape, decades=decades).float()
    exact = orthogonalised(x.double())
    ours, theirs = (float((found.double() - exact).abs().max()) for found in (by_c(x), orthogonalised(x)))
    assert ours < 1e-6 + 3 * theirs and ours < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"num_steps": 0}, {"num_steps": 3}, {"coefficients": (1.5, -0.5, 0.0)}], ids=str)
def test_any_steps_and_coefficients(dtype: torch.dtype, options: dict[str, object]) -> None:
    x = drawn(2, 5, 18).to(dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    expected = orthogonalised(x, **options)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(by_c(x, **options), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_scale_does_not_matter(dtype: torch.dtype) -> None:
    x = drawn(2, 5, 18).to(dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    for scale in (torch.finfo(dtype).tiny * 100, 1e-30, 1e-9, 1e9, 1e30, torch.finfo(dtype).max / 100):
        torch.testing.assert_close(by_c(x * scale), orthogonalised(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_stay_and_what_is_not_finite_is_not_in_its_matrix_alone(dtype: torch.dtype) -> None:
    x = drawn(5, 4, 30).to(dtype)
    x[0], x[1], x[2, 1, 3], x[3, 2, 20] = 0, 0, torch.nan, torch.inf
    x[1, 2, 4] = torch.finfo(dtype).tiny / 8  # one number, and that a subnormal one
    found, expected = by_c(x), orthogonalised(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert not found[0].any() and found[2:4].isnan().all() and found[4].isfinite().all()


def test_buffers_of_several_shapes_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = [drawn(3, 5, 18), drawn(2, 2, 30, 6), drawn(0, 3, 4), drawn(1, 3, 0), drawn(4, 1, 1)]
    expected, shared = [orthogonalised(x) for x in buffers], [x.clone() for x in buffers]
    Orthogonaliser(buffers)()
    torch.testing.assert_close(buffers, expected, rtol=1e-11, atol=1e-11)
    monkeypatch.setattr(lanes_module, "SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    Orthogonaliser(shared)()
    torch.testing.assert_close(shared, buffers, rtol=0, atol=0)
    Orthogonaliser([])()


def test_it_serves_small_matrices_alone() -> None:
    assert serves(torch.zeros(2, SMALL, 200)) and serves(torch.zeros(500, SMALL))
    assert not serves(torch.zeros(SMALL + 1, SMALL + 1)) and not serves(torch.zeros(2, 300_000))
