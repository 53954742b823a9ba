"""Loops of parts that do not fit, and inner objectives that are none: errors before the first inner step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import FLOAT, FromStart, Quadratic, Skewed, Tied, generic_theta, sample, template
from torch import Tensor

from learnedopt import (
    GMRES,
    Execution,
    FinalLoss,
    FirstOrder,
    GradientEstimator,
    Implicit,
    InnerLoop,
    InnerObjective,
    Neumann,
    Penalty,
    Tape,
    TaskFamily,
    TaskLoss,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    optimizers,
)
from learnedopt.core.tree import Params

pytestmark = pytest.mark.usefixtures("float64")

STILL = Quadratic(drift=0.0)
ESTIMATORS: list[GradientEstimator] = [
    Unrolled(4),
    Unrolled(4, segment=2),
    FirstOrder(4),
    Truncated(2, 4),
    TruncatedBackprop(4, 2),
    Implicit(4),
    Implicit(4, GMRES()),
    Implicit(4, Neumann(3)),
]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)


class SameName(InnerObjective):
    """An inner objective whose meta-parameter has the name of the rule's."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(0.1, dtype=FLOAT), "own": torch.tensor(0.2, dtype=FLOAT)}


@every_estimator
def test_equal_theta_keys_are_refused(estimator: GradientEstimator) -> None:
    loop = InnerLoop(STILL, optimizers.make("sgd", lr=0.1), inner_objective=SameName())
    message = r"SGD and the inner objective SameName both have meta-parameters named \['lr'\].*rename"
    with pytest.raises(ValueError, match=message):
        loop.init_theta(torch.Generator())
    theta = {"lr": torch.tensor(0.1), "own": torch.tensor(0.2)}
    with pytest.raises(ValueError, match=message):
        estimator.estimate(loop, theta, FinalLoss(), loop.start(sample(STILL)))
    with pytest.raises(ValueError, match=message):
        loop.run(theta, loop.start(sample(STILL)), 1, Tape.NONE)


class Wrong(InnerObjective):
    """Hands on what it is made with, in place of a scalar, where ``where`` says."""

    def __init__(self, where: str, value: Callable[[Params], Any]) -> None:
        self.where, self.value = where, value

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"strength": torch.tensor(0.8, dtype=FLOAT)}

    def loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Any:
        return self.value(params) if self.where == "loss" else Tied().loss(theta, family, params, batch)

    def outer_loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Any:
        return self.value(params) if self.where == "outer_loss" else family.loss(params, batch)


class WrongPenalty(Penalty):
    """A penalty a row."""

    def value(self, theta: Theta, params: Params) -> Tensor:
        return theta["strength"] * params["w"].square().sum(0)


class OfWrongPenalty(InnerObjective):
    penalty = WrongPenalty()

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"strength": torch.tensor(0.8, dtype=FLOAT)}


NO_SCALARS: dict[str, tuple[Callable[[Params], Any], str]] = {
    "a vector": (lambda params: params["w"].square().sum(0), r"got shape \(2,\)"),
    "one entry": (lambda params: params["b"].square(), r"got shape \(1,\)"),
    "a number": (lambda params: 3.0, "got a float"),
    "not finite": (lambda params: params["w"].sum() * torch.inf, "is not finite at the start"),
    "a constant": (lambda params: torch.ones((), dtype=FLOAT), "does not depend on the parameters"),
}


@every_estimator
@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("where", ["loss", "outer_loss"])
@pytest.mark.parametrize("kind", NO_SCALARS)
def test_an_inner_objective_whose_loss_is_no_scalar_to_train_on(
    estimator: GradientEstimator, kind: str, where: str, chunk_size: int
) -> None:
    value, message = NO_SCALARS[kind]
    loop = InnerLoop(STILL, FromStart(template(STILL)), Execution(chunk_size), Wrong(where, value))
    with pytest.raises(ValueError, match=rf"Wrong\.{where} .*{message}"):
        estimator.estimate(loop, generic_theta(loop), FinalLoss(), loop.start(sample(STILL)))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_penalty_that_is_no_scalar(chunk_size: int) -> None:
    loop = InnerLoop(STILL, FromStart(template(STILL)), Execution(chunk_size), OfWrongPenalty())
    with pytest.raises(ValueError, match=r"OfWrongPenalty\.loss must return a scalar tensor for one task, got shape"):
        loop.run(generic_theta(loop), loop.start(sample(STILL)), 1)


class Twice(OfWrongPenalty):
    """A loss of its own, and a penalty as well: which of them is descended is not clear."""

    def loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Tensor:
        return family.loss(params, batch) + params["w"].square().sum()


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((STILL, Skewed(), Execution(), Tied), TypeError, "is no InnerObjective; pass an instance"),
        ((STILL, Skewed(), Execution(), "proximal"), TypeError, "'proximal' is no InnerObjective"),
        ((STILL, Skewed(), Execution(), Twice()), ValueError, "Twice has a loss of its own and a penalty"),
        ((STILL, Skewed(), Execution(), TaskLoss(), 0), ValueError, "horizon=0 is not a count"),
        ((STILL, Skewed(), 2), TypeError, "execution=2 is no Execution"),
        ((STILL, Skewed), TypeError, "got Quadratic, the class Skewed; make them by name"),
        ((Quadratic, Skewed()), TypeError, "got the class Quadratic, Skewed"),
        ((STILL, "adam"), TypeError, "got Quadratic, str"),
    ],
)
def test_a_loop_of_what_it_is_not_made_of(parts: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        InnerLoop(*parts)
