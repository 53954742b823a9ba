"""Solutions that are easily mistaken: at rest from the start, refused once, at a start of zeros, read from behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import FLOAT, Quadratic, sample, template
from torch import Tensor

import learnedopt
from learnedopt import (
    ConjugateGradient,
    Estimate,
    Execution,
    FinalLoss,
    FirstOrder,
    GradientEstimator,
    Implicit,
    InnerLoop,
    InnerObjective,
    MetaTrainer,
    Neumann,
    Proximal,
    TruncatedBackprop,
    Unrolled,
    UpdateRule,
)

pytestmark = pytest.mark.usefixtures("float64")
STILL = Quadratic(drift=0.0)


class Moved(InnerObjective):
    """The family's loss, shifted by theta."""

    def init_theta(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"shift": torch.tensor(0.4)}

    def loss(self, theta: Any, family: Any, params: Any, batch: Any) -> Tensor:
        return family.loss(params, batch) + theta["shift"] * params["w"].sum()


def sgd(**options: Any) -> UpdateRule:
    return learnedopt.optimizers.make("sgd", lr=0.2, learn=(), **options)


def shift(loop: InnerLoop, estimator: GradientEstimator, carry: Any) -> float:
    return float(estimator.estimate(loop, {"shift": torch.tensor(0.4)}, FinalLoss(), carry).grads["shift"])


@pytest.mark.parametrize("solver", [ConjugateGradient(20), Neumann(400)])
def test_what_starts_where_it_ends_is_moved_all_the_same(solver: Any) -> None:
    loop = InnerLoop(STILL, sgd(), inner_objective=Moved())
    theta = {"shift": torch.tensor(0.4)}
    begun = loop.begin(theta, loop.start(sample(STILL)))
    solved = loop.run(theta, begun, 400, learnedopt.Tape.NONE).end
    expected = shift(loop, Unrolled(400), solved)
    assert abs(expected) > 0.1
    assert shift(loop, Implicit(3, solver), solved) == pytest.approx(expected, rel=1e-8)


class Decays(UpdateRule):
    """Descent whose learned rate moves no solution, though its update at zero gradient depends on it."""

    def init_theta(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"lr": torch.tensor(0.2)}

    def init(self, theta: Any, params: Any) -> Any:
        return params, ()

    def update(self, theta: Any, grads: Any, state: Any, params: Any, loss: Any) -> Any:
        return {k: -theta["lr"] * (g + 0.1 * params[k]) for k, g in grads.items()}, state


def test_a_refusal_is_repeated() -> None:
    loop = InnerLoop(STILL, Decays())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\['lr'\] do not move the solution"):
            Implicit(300).estimate(loop, {"lr": torch.tensor(0.2)}, FinalLoss(), loop.start(sample(STILL)))


class Priced(Moved):
    """A price that enters the outer loss alone."""

    def init_theta(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"shift": torch.tensor(0.4), "price": torch.tensor(0.3)}

    def outer_loss(self, theta: Any, family: Any, params: Any, batch: Any) -> Tensor:
        return family.loss(params, batch) + theta["price"] ** 2


def test_what_an_objective_does_not_read_is_refused_after_one_that_does() -> None:
    loop = InnerLoop(STILL, sgd(), inner_objective=Priced())
    theta, carry = loop.init_theta(torch.Generator()), loop.start(sample(STILL))
    found = Implicit(300).estimate(loop, theta, FinalLoss(), carry)
    assert float(found.grads["price"]) == pytest.approx(0.6)

    def length(loop: InnerLoop, theta: Any, rollout: Any) -> Tensor:
        return rollout.end.params["w"].square().sum((1, 2)).mean()

    with pytest.raises(ValueError, match=r"\['price'\]"):
        Implicit(300).estimate(loop, theta, length, carry)


def test_a_weight_decay_is_seen_from_a_start_at_zero() -> None:
    loop = InnerLoop(STILL, learnedopt.optimizers.make("sgd", lr=0.2, weight_decay=0.3, learn=("weight_decay",)))
    loop = InnerLoop(STILL, loop.rule, inner_objective=Moved())
    theta = {"weight_decay": torch.tensor(0.3), "shift": torch.tensor(0.4)}
    fresh = loop.start(sample(STILL))
    fresh = fresh._replace(params={k: torch.zeros_like(p) for k, p in fresh.params.items()})
    found, right = (e.estimate(loop, theta, FinalLoss(), fresh) for e in (Implicit(400), Unrolled(400)))
    torch.testing.assert_close(found.grads, right.grads, rtol=1e-8, atol=0)


def test_an_objective_of_the_start_is_refused_where_no_gradient_flows_through_it() -> None:
    like = template(STILL)
    rule = learnedopt.optimizers.make("maml", template=like, lr=0.2)
    loop = InnerLoop(STILL, rule, inner_objective=Proximal(like, 0.5))

    def regret(loop: InnerLoop, theta: Any, rollout: Any) -> Tensor:
        losses = [loop.losses(theta, carry, "valid") for carry in (rollout.end, rollout.start)]
        return (losses[0] - losses[1]).mean()

    theta, carry = loop.init_theta(torch.Generator()), loop.start(sample(STILL))
    for estimator in (Implicit(100), TruncatedBackprop(20, 10)):
        with pytest.raises(ValueError, match="regret reads the rollout's start"):
            estimator.estimate(loop, theta, regret, carry)
    assert Unrolled(20).estimate(loop, theta, regret, carry).grads


class Masked(Decays):
    """Reads the parameters without a gradient."""

    def __init__(self, coordinatewise: bool) -> None:
        self.coordinatewise = coordinatewise

    def update(self, theta: Any, grads: Any, state: Any, params: Any, loss: Any) -> Any:
        return {k: -theta["lr"] * (g + 0.5 * params[k].detach()) for k, g in grads.items()}, state


def test_a_rule_that_reads_parameters_without_a_gradient_is_unrolled() -> None:
    found = []
    for says in (True, False):
        loop = InnerLoop(STILL, Masked(says), Execution(2))
        theta = {"lr": torch.tensor(0.1, dtype=FLOAT)}
        found.append(FirstOrder(5).estimate(loop, theta, FinalLoss(), loop.start(sample(STILL))).grads["lr"])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


class Mine(GradientEstimator):
    """An estimator of a user's own, which asks nothing of the loop."""

    def estimate(self, loop: Any, theta: Any, objective: Any, carry: Any) -> Estimate:
        return Estimate(torch.tensor(1.0), {k: torch.ones_like(v) for k, v in theta.items()}, None, {})


class Noisy(Quadratic):
    def loss(self, params: Any, batch: Any) -> Tensor:
        return super().loss(params, batch) * (1 + 0.1 * torch.randn(()))


def test_the_trainer_vets_a_loop_whatever_the_estimator_asks() -> None:
    with pytest.raises(ValueError, match="draws from torch's global generator"):
        MetaTrainer(InnerLoop(Noisy(), Decays()), Mine(), FinalLoss(), tracker=None).run(1)


@pytest.mark.parametrize("name", ["regularizer", "has_regularizer", "step", "adjoint"])
def test_what_rules_had_before_is_refused_and_not_left_out(name: str) -> None:
    with pytest.raises(TypeError, match=f"defines {name}.*(InnerObjective|kernel)"):
        type("Old", (Decays,), {name: lambda self: None})


class Captures(Decays):
    """Has a parameter beside theta."""

    def __init__(self) -> None:
        self.factor = torch.nn.Parameter(torch.tensor(1.5))

    def update(self, theta: Any, grads: Any, state: Any, params: Any, loss: Any) -> Any:
        return {k: -self.factor * theta["lr"] * g for k, g in grads.items()}, state


def test_a_rule_that_learns_beside_theta_is_refused() -> None:
    loop = InnerLoop(STILL, Captures())
    with pytest.raises(ValueError, match=r"Captures reaches tensors of shapes \[\(\)\].*put them into theta"):
        Unrolled(3).estimate(loop, {"lr": torch.tensor(0.1)}, FinalLoss(), loop.start(sample(STILL)))
