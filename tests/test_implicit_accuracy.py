"""Accuracy of implicit meta-gradients against inner steps: the claims of the figure, on the figure's own problems."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.results_implicit_accuracy import (
    DIM,
    NUM_POINTS,
    NUM_PROBLEMS,
    RATE,
    STEPS,
    STRENGTH,
    Regressions,
    closed_form,
    measure,
)

FEW_STEPS, FEW_PROBLEMS = (1, 2, 5, 10, 20, 50, 100, 400), 10
EXACT, ALL_CG = "iMAML, exact solve", f"iMAML, {DIM} CG"
ROUND_OFF = 1e-12

Errors = dict[str, list[float]]


@pytest.fixture(scope="module")
def few() -> Errors:
    """Return the errors on a few problems."""
    return measure(FEW_STEPS, FEW_PROBLEMS)


def curves_in_closed_form(steps: tuple[int, ...], num_problems: int) -> Errors:
    """Return the mean errors of MAML and of exact solves for gradient descent, whose steps contract by I - rate P.

    K steps end at ``M^K start + (I - M^K) x*`` and have the Jacobian ``M^K + (I - M^K) J``, ``J = strength P^-1``.
    """
    tasks, eye = Regressions().sample(num_problems, torch.Generator().manual_seed(0)), torch.eye(DIM).double()
    start = torch.ones(DIM, 1, dtype=torch.float64)
    inputs, targets = tasks["inputs"], tasks["targets"][..., None]
    a, b = inputs.mT @ inputs / NUM_POINTS, inputs.mT @ targets / NUM_POINTS
    p = a[:, 0] + STRENGTH * eye
    solution, jacobian = torch.linalg.solve(p, b[:, 0] + STRENGTH * start), STRENGTH * torch.linalg.inv(p)

    def mean_error(grads: Tensor) -> float:
        exact = jacobian @ (a[:, 1] @ solution - b[:, 1])
        return float(((grads - exact).norm(dim=1) / exact.norm(dim=1)).mean())

    errors: Errors = {"MAML": [], EXACT: []}
    for num_steps in steps:
        power = torch.linalg.matrix_power(eye - RATE * p, num_steps)
        pull = a[:, 1] @ (power @ start + (eye - power) @ solution) - b[:, 1]
        errors["MAML"].append(mean_error((power + (eye - power) @ jacobian) @ pull))
        errors[EXACT].append(mean_error(jacobian @ pull))
    return errors


def check_claims(errors: Errors, steps: tuple[int, ...]) -> None:
    """Check what Rajeswaran et al. (2019), figure 2a, shows."""
    for num_steps, exact, maml in zip(steps, errors[EXACT], errors["MAML"], strict=True):
        if num_steps <= 100:
            assert ROUND_OFF < exact < maml, f"{num_steps} steps"
    two, five, every = (errors[k][-1] for k in ("iMAML, 2 CG", "iMAML, 5 CG", ALL_CG))
    assert two > 1e-2
    assert 1e-9 < five < 0.5 * two
    assert every < 1e-9
    for label in ("iMAML, 2 CG", "iMAML, 5 CG"):
        curve = errors[label]
        assert curve[-1] == pytest.approx(curve[steps.index(100)], rel=0.05), "a floor"
        assert curve[0] < errors["MAML"][0], "below MAML at first"
        assert errors["MAML"][-1] < 1e-3 * curve[-1], "crossed by MAML"


def test_claims_on_a_few_problems(few: Errors) -> None:
    check_claims(few, FEW_STEPS)


@pytest.mark.parametrize("label", ["MAML", EXACT])
def test_errors_equal_their_closed_form(few: Errors, label: str) -> None:
    expected = curves_in_closed_form(FEW_STEPS, FEW_PROBLEMS)[label]
    assert few[label] == pytest.approx(expected, rel=1e-6, abs=ROUND_OFF)


def test_exact_solves_beat_maml_at_every_number_of_steps_in_closed_form() -> None:
    errors = curves_in_closed_form(tuple(range(1, 101)), NUM_PROBLEMS)
    assert all(ROUND_OFF < exact < maml for exact, maml in zip(errors[EXACT], errors["MAML"], strict=True))


def test_the_problems_are_ill_conditioned() -> None:
    inputs = Regressions().sample(50, torch.Generator().manual_seed(1))["inputs"]
    assert torch.linalg.cond(inputs.mT @ inputs).median() > 500


def test_the_closed_form_is_the_gradient_of_the_test_loss_at_the_solution() -> None:
    tasks = Regressions().sample(3, torch.Generator().manual_seed(2))
    start = torch.randn(DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def test_losses(start: Tensor) -> Tensor:
        train, valid = (Regressions().batch(tasks, 0, split) for split in ("train", "valid"))
        eye = (STRENGTH * NUM_POINTS) ** 0.5 * torch.eye(DIM).double().expand(3, DIM, DIM)
        rows = torch.cat([train["inputs"], eye], dim=1)
        wanted = torch.cat([train["targets"], (STRENGTH * NUM_POINTS) ** 0.5 * start.expand(3, DIM)], dim=1)
        solution = torch.linalg.lstsq(rows, wanted[..., None]).solution
        residuals = (valid["inputs"] @ solution).squeeze(2) - valid["targets"]
        return 0.5 * residuals.square().mean(1)

    expected = torch.autograd.functional.jacobian(test_losses, start)
    assert torch.allclose(closed_form(tasks, start), expected, rtol=1e-10, atol=0)


@pytest.mark.long
def test_claims_on_all_problems() -> None:
    errors = measure()
    check_claims(errors, STEPS)
    assert errors["MAML"][-1] < errors[ALL_CG][-1], "the floor that round-off leaves is crossed too"
