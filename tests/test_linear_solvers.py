"""The iterative solvers against dense linear algebra, one system a task, each with its own difficulty."""

from __future__ import annotations

import pytest
import torch
from problems import FLOAT
from torch import Tensor

from learnedopt import GMRES, ConjugateGradient, LinearSolver, Neumann
from learnedopt.estimators.linear_solvers import Operator, asymmetry

DIM = 6


def operator_of(matrices: Tensor) -> Operator:
    return lambda rows: torch.einsum("nij,nj->ni", matrices, rows)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT)


def with_eigenvalues(values: list[list[float]]) -> Tensor:
    """Return symmetric matrices with these eigenvalues in random bases."""
    q = torch.linalg.qr(normal(len(values), DIM, DIM, seed=1)).Q
    return q @ torch.diag_embed(torch.tensor(values, dtype=FLOAT)) @ q.mT


def errors(x: Tensor, expected: Tensor) -> Tensor:
    return (x - expected).norm(dim=1) / expected.norm(dim=1)


SPECTRA = [[1.0, 2, 3, 4, 5, 6], [0.5, 0.5, 0.5, 4, 4, 4], [2.0] * 6]
NUM_DISTINCT = [6, 2, 1]


@pytest.mark.parametrize("solver", [ConjugateGradient(12), GMRES(12)])
def test_each_task_takes_as_many_iterations_as_it_has_distinct_eigenvalues(solver: LinearSolver) -> None:
    a, b = with_eigenvalues(SPECTRA), normal(3, DIM)
    solution = solver.solve(operator_of(a), b)
    assert errors(solution.x, torch.linalg.solve(a, b)).max() < 1e-13
    assert solution.residual.max() < 1e-13
    needed = [type(solver)(k).solve(operator_of(a), b).residual < 1e-13 for k in range(1, 7)]
    assert [1 + [bool(row[i]) for row in needed].index(True) for i in range(3)] == NUM_DISTINCT


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 5])
def test_too_few_iterations_are_reported_as_they_are(num_iterations: int) -> None:
    a, b = with_eigenvalues(SPECTRA), normal(3, DIM)
    for solver in (ConjugateGradient(num_iterations), GMRES(num_iterations)):
        solution = solver.solve(operator_of(a), b)
        true = (b - operator_of(a)(solution.x)).norm(dim=1) / b.norm(dim=1)
        torch.testing.assert_close(solution.residual, true, rtol=1e-12, atol=1e-16)
        assert solution.residual[0] > 1e-4 and solution.iterations[0] == num_iterations


def test_conjugate_gradient_minimises_the_energy_norm_over_its_krylov_space() -> None:
    a, b = with_eigenvalues([SPECTRA[0]]), normal(1, DIM)
    x = ConjugateGradient(3).solve(operator_of(a), b).x[0]
    krylov = torch.stack([torch.linalg.matrix_power(a[0], k) @ b[0] for k in range(3)], dim=1)
    best = krylov @ torch.linalg.solve(krylov.mT @ a[0] @ krylov, krylov.mT @ b[0])
    torch.testing.assert_close(x, best, rtol=1e-10, atol=1e-12)


def test_gmres_minimises_the_residual_over_its_krylov_space() -> None:
    a, b = normal(1, DIM, DIM) + 3 * torch.eye(DIM, dtype=FLOAT), normal(1, DIM, seed=4)
    x = GMRES(3).solve(operator_of(a), b).x[0]
    krylov = torch.stack([torch.linalg.matrix_power(a[0], k) @ b[0] for k in range(3)], dim=1)
    best = krylov @ torch.linalg.lstsq(a[0] @ krylov, b[0, :, None]).solution[:, 0]
    torch.testing.assert_close(x, best, rtol=1e-10, atol=1e-12)


def test_damping_solves_the_damped_system_and_reports_its_residual() -> None:
    a, b = with_eigenvalues(SPECTRA), normal(3, DIM)
    solution = ConjugateGradient(10, damping=0.7).solve(operator_of(a), b)
    expected = torch.linalg.solve(a + 0.7 * torch.eye(DIM, dtype=FLOAT), b)
    assert errors(solution.x, expected).max() < 1e-13
    assert solution.residual.max() < 1e-13


@pytest.mark.parametrize("num_iterations", [1, 3])
def test_a_truncated_solution_is_reported_with_its_own_residual(num_iterations: int) -> None:
    a, b = with_eigenvalues([[-3.0, -2, -1, 1, 2, 3], [1.0, 2, 3, 4, 5, 6], [-1.0] * 6]), normal(3, DIM)
    solution = ConjugateGradient(num_iterations, truncate=True).solve(operator_of(a), b)
    true = (b - operator_of(a)(solution.x)).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(solution.residual, true, rtol=1e-12, atol=1e-16)
    assert torch.equal(solution.x[2], b[2]) and solution.iterations[2] == 0


def test_gmres_solves_what_is_not_symmetric() -> None:
    a = normal(4, DIM, DIM, seed=2) + 4 * torch.eye(DIM, dtype=FLOAT)
    a[1] = torch.eye(DIM, dtype=FLOAT).roll(1, 0)  # a cyclic shift: no progress at all before the last iteration
    b = normal(4, DIM)
    b[1] = torch.eye(DIM, dtype=FLOAT)[0]
    solution = GMRES().solve(operator_of(a), b)
    assert errors(solution.x, torch.linalg.solve(a, b)).max() < 1e-12
    assert solution.residual.max() < 1e-13
    assert GMRES(DIM - 1).solve(operator_of(a), b).residual[1] == 1


def test_gmres_of_a_singular_but_consistent_system_ends_at_a_solution() -> None:
    a = torch.diag_embed(torch.tensor([[1.0, 2, 3, 4, 0, 0]], dtype=FLOAT))
    b = torch.tensor([[1.0, 1, 1, 1, 0, 0]], dtype=FLOAT)
    solution = GMRES().solve(operator_of(a), b)
    torch.testing.assert_close(solution.x, torch.tensor([[1, 1 / 2, 1 / 3, 1 / 4, 0, 0]], dtype=FLOAT))
    assert solution.residual.max() < 1e-13


def test_gmres_of_an_inconsistent_system_says_so() -> None:
    nilpotent = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]], dtype=FLOAT)
    solution = GMRES().solve(operator_of(nilpotent), torch.tensor([[0.0, 1.0]], dtype=FLOAT))
    assert solution.x.isfinite().all() and solution.residual[0] > 0.5


@pytest.mark.parametrize("num_terms", [1, 2, 7])
def test_neumann_sums_as_many_terms_as_it_is_asked_for(num_terms: int) -> None:
    m = 0.2 * normal(3, DIM, DIM)
    b = normal(3, DIM, seed=3)
    solution = Neumann(num_terms).solve(operator_of(torch.eye(DIM, dtype=FLOAT) - m), b)
    expected = sum(torch.linalg.matrix_power(m, k) @ b[:, :, None] for k in range(num_terms))
    assert isinstance(expected, Tensor)
    assert errors(solution.x, expected[:, :, 0]).max() < 1e-13
    assert solution.iterations.tolist() == [num_terms] * 3


def test_neumann_with_a_step_size_converges_on_any_definite_operator() -> None:
    a, b = with_eigenvalues(SPECTRA), normal(3, DIM)
    solution = Neumann(300, step_size=0.3).solve(operator_of(a), b)
    assert errors(solution.x, torch.linalg.solve(a, b)).max() < 1e-13
    short = Neumann(3, step_size=0.3).solve(operator_of(a), b).x
    m = torch.eye(DIM, dtype=FLOAT) - 0.3 * a
    expected = 0.3 * (b[:, :, None] + m @ b[:, :, None] + m @ m @ b[:, :, None])[:, :, 0]
    assert errors(short, expected).max() < 1e-13


SOLVERS = [ConjugateGradient(8), ConjugateGradient(8, damping=0.5), Neumann(40, step_size=0.1), GMRES()]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_tasks_do_not_mix(solver: LinearSolver) -> None:
    a, b = with_eigenvalues(SPECTRA), normal(3, DIM)
    together = solver.solve(operator_of(a), b)
    for i in range(3):
        alone = solver.solve(operator_of(a[i : i + 1]), b[i : i + 1])
        assert errors(together.x[i : i + 1], alone.x).max() < 1e-12


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_zero_right_hand_side_is_solved_by_zero(solver: LinearSolver) -> None:
    a, b = with_eigenvalues(SPECTRA), normal(3, DIM)
    b[1] = 0
    solution = solver.solve(operator_of(a), b)
    assert not solution.x[1].any() and solution.residual[1] == 0
    assert solution.x[0].any() and solution.x[2].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_what_is_not_finite_is_not_solved_by_zero_and_spares_the_others(solver: LinearSolver, value: float) -> None:
    a, b = with_eigenvalues(SPECTRA), normal(3, DIM)
    expected = solver.solve(operator_of(a), b).x
    b[1, 2] = value
    solution = solver.solve(operator_of(a), b)
    assert not solution.x[1].isfinite().all() and not solution.residual[1] <= 1
    alone = solver.solve(operator_of(a[1:2]), b[1:2])
    assert not alone.x.isfinite().all() and not alone.residual[0] <= 1
    assert errors(solution.x[::2], expected[::2]).max() < 1e-12


def test_asymmetry_tells_symmetric_operators_from_others() -> None:
    symmetric, skewed = with_eigenvalues(SPECTRA), with_eigenvalues(SPECTRA)
    skewed[1, 0, 5] += 1e-3
    b = normal(3, DIM)
    assert asymmetry(operator_of(symmetric), b).max() < 1e-15
    assert (asymmetry(operator_of(skewed), b) > 1e-6).tolist() == [False, True, False]
