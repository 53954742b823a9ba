"""What the recipes of inner objectives are to show: ridge against its closed forms, wrong labels found on MNIST."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import results_learned_loss as learned_loss
from benchmarks import results_reweighting as reweighting
from benchmarks import results_ridge as ridge
from learnedopt import L2, FinalLoss, Implicit, InnerLoop, Unrolled, recipes
from learnedopt.estimators.hessian_free import HessianFree
from learnedopt.estimators.linear_solvers import ConjugateGradient
from learnedopt.optimizers import SGD
from learnedopt.run import build
from learnedopt.tasks import NoisyImages


def test_the_ridge_recipes_meta_gradient_is_the_closed_form() -> None:
    tasks = ridge.FAMILY.sample(6, torch.Generator().manual_seed(0))
    at = torch.linspace(-3, 0, ridge.DIM, dtype=torch.float64)
    exact = ridge.exact_gradient(tasks, at)
    for i in range(ridge.DIM):
        step = 1e-5 * torch.eye(ridge.DIM, dtype=torch.float64)[i]
        losses = [ridge.held_out(tasks, (at + sign * step).exp()) for sign in (1, -1)]
        assert float((losses[0] - losses[1]) / 2e-5) == pytest.approx(float(exact[i]), rel=1e-6, abs=1e-8)
    template = {"weight": torch.zeros(ridge.DIM, dtype=torch.float64)}
    loop = InnerLoop(ridge.FAMILY, SGD(0.1, learn=()), inner_objective=L2(template, 0.1, per="coordinate"))
    estimator = Implicit(3, ConjugateGradient(2 * ridge.DIM), inner=HessianFree(2 * ridge.DIM))
    found = estimator.estimate(loop, {ridge.KEY: at}, FinalLoss(), loop.start(tasks))
    torch.testing.assert_close(found.grads[ridge.KEY], exact, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.loss, ridge.held_out(tasks, at.exp()), rtol=1e-12, atol=0)


def test_the_posterior_means_strengths_have_no_meta_gradient() -> None:
    """The best strengths in closed form: there the mean meta-gradient over tasks is noise about 0."""
    strengths = torch.full((ridge.DIM,), 1e9, dtype=torch.float64)
    strengths[: ridge.RELEVANT] = ridge.NOISE**2 / ridge.NUM_POINTS
    tasks = [ridge.FAMILY.sample(500, torch.Generator().manual_seed(seed)) for seed in range(30)]

    def gradients(log_factor: float) -> torch.Tensor:
        at = strengths.log() + log_factor
        return torch.stack([ridge.exact_gradient(each, at)[: ridge.RELEVANT] for each in tasks])

    error = gradients(0.0).std(0) / len(tasks) ** 0.5
    assert (gradients(0.0).mean(0).abs() < 4 * error).all()
    assert (gradients(1.0).mean(0) > 4 * error).all()  # too strong


def test_the_area_under_the_curve_by_hand() -> None:
    positive = torch.tensor([True, True, False, False])
    for scores, area in (([2.0, 3.0, 0.0, 1.0], 1.0), ([0.0, 3.0, 1.0, 2.0], 0.5), ([1.0, 2.0, 1.0, 0.0], 0.875)):
        assert reweighting.area_under_curve(torch.tensor(scores), positive) == area


@pytest.mark.usefixtures("float64")
def test_the_learned_loss_begins_as_the_plain_one() -> None:
    loop = build(learned_loss.RECIPE)[0]
    tasks = loop.family.sample(20, torch.Generator().manual_seed(0))
    theta = loop.init_theta(torch.Generator().manual_seed(0))
    found = learned_loss.losses(loop, theta, tasks)
    assert learned_loss.RECIPE.estimator == Unrolled(learned_loss.RECIPE.validation.num_steps)
    torch.testing.assert_close(found, learned_loss.plain(loop, 0.03, tasks), rtol=1e-9, atol=0)
    theta = {k: v + 0.1 for k, v in theta.items()}
    assert (learned_loss.losses(loop, theta, tasks) - found).abs().min() > 1e-4


@pytest.mark.usefixtures("float64")
def test_the_learned_loss_recipes_meta_gradient_is_a_difference_of_test_losses() -> None:
    loop = build(learned_loss.RECIPE)[0]
    tasks = loop.family.sample(3, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    theta = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in loop.init_theta(generator).items()}
    grads = learned_loss.RECIPE.estimator.estimate(loop, theta, FinalLoss(), loop.start(tasks)).grads
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()

    def value(length: float) -> float:
        moved = {k: v + length * grads[k] / norm for k, v in theta.items()}
        return float(learned_loss.losses(loop, moved, tasks).mean())

    assert (value(1e-6) - value(-1e-6)) / 2e-6 == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.long
def test_wrong_labels_are_found_and_learned_weights_are_as_good_as_knowing_them(data_root: Path) -> None:
    assert (data_root / "MNIST" / "raw").is_dir()
    family = NoisyImages(**recipes.meta_training("reweighting-mnist").family.options)
    wrong = family.wrong_labels()
    theta, losses = reweighting.meta_train(family)
    assert losses[-1] < 0.4 * losses[0]
    assert reweighting.area_under_curve(-theta["example_weights"], wrong) >= 0.95
    learned, alone = reweighting.compare(family, theta, wrong)[:2]
    assert learned.accuracy >= alone.accuracy - 0.5
