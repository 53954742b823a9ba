"""What targets, matchings and their objective refuse, before the first step where it can be known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import FLOAT, Quadratic, TanhMLP, generic_theta, sample, template
from torch import Tensor

import learnedopt
from learnedopt import (
    BestInHindsight,
    Bootstrap,
    BootstrappedTarget,
    InnerLoop,
    KLDivergence,
    LastIterate,
    RegularizedSolution,
    SumOfLossesSolver,
    Target,
    TargetMatching,
    TaskFamily,
    Theta,
    Truncated,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.tree import Params
from learnedopt.objectives.direction import is_normalised

pytestmark = pytest.mark.usefixtures("float64")

SOLVER = SumOfLossesSolver()


# What runs away


@pytest.mark.parametrize(
    ("name", "expected"),
    [("adam", True), ("rmsprop", True), ("sgd", False), ("momentum", False), ("lstm", False), ("clip", False),
     ("meta-sgd", False), ("learned-rates", False)],
)  # fmt: skip
def test_which_rules_keep_the_length_of_their_updates(name: str, expected: bool) -> None:
    family = TanhMLP()
    loop = InnerLoop(family, optimizers.example(name, template(family)))
    theta = {k: v.to(FLOAT) for k, v in loop.init_theta(torch.Generator().manual_seed(0)).items()}
    assert is_normalised(loop, theta, loop.begin(theta, loop.start(sample(family)))) is expected


class Signs(UpdateRule):
    """Sign descent at a learned or fixed rate, from a learned start."""

    def __init__(self, *, learn: bool) -> None:
        self.learn = learn

    def init_theta(self, generator: torch.Generator) -> Theta:
        rate = {"rate": torch.tensor(0.05)} if self.learn else {}
        return {"start/w": torch.ones(2, 2), "start/b": torch.ones(1), **rate}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return {k: theta[f"start/{k}"] for k in params}, ()

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        return {k: -theta.get("rate", torch.tensor(0.05)) * g.sign() for k, g in grads.items()}, state


@pytest.mark.parametrize("target", [Bootstrap(2, 0.1), LastIterate(1)], ids=lambda t: type(t).__name__)
def test_the_squared_distance_ahead_of_a_normalised_direction_is_refused(target: Target) -> None:
    loop = InnerLoop(Quadratic(), Signs(learn=True))
    theta, carry = loop.init_theta(torch.Generator()), loop.start(sample(loop.family))
    for estimator in (Unrolled(2), Truncated(2, 4)):
        with pytest.raises(
            ValueError, match=r"Signs's updates keep their length.*KLDivergence\(\).*num_target_steps=1"
        ):
            estimator.estimate(loop, theta, TargetMatching(target), carry)


def test_a_direction_that_is_normalised_for_one_tensor_alone_is_refused() -> None:
    parts = {"a": ("w", optimizers.Adam(learn=("lr",))), "b": ("b", optimizers.SGD(learn=("lr",)))}
    loop = InnerLoop(Quadratic(), optimizers.Partition(parts))
    theta, carry = loop.init_theta(torch.Generator()), loop.start(sample(loop.family))
    with pytest.raises(ValueError, match="Partition's updates keep their length"):
        Unrolled(2).estimate(loop, theta, TargetMatching(LastIterate(1)), carry)


def test_what_cannot_run_away_is_not_refused() -> None:
    family = Quadratic()
    learned, fixed = (InnerLoop(family, Signs(learn=learn)) for learn in (True, False))
    theta = learned.init_theta(torch.Generator())
    start = {k: v for k, v in theta.items() if k != "rate"}
    carry = learned.start(sample(family))
    for objective in (
        BootstrappedTarget(1, 0.1),
        BootstrappedTarget(3, 0.1, matching=KLDivergence()),
        TargetMatching(BestInHindsight(SOLVER, 3)),
    ):
        assert Unrolled(2).estimate(learned, theta, objective, carry).loss > 0
    for num_steps in (0, 2):  # nothing but a start is learned
        assert Unrolled(num_steps).estimate(fixed, start, BootstrappedTarget(3, 0.1), carry).loss > 0


# Other bad input


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: Bootstrap(0, 0.1), ValueError, "num_target_steps=0 is not a count"),
        (lambda: Bootstrap(2, 0.0), ValueError, "step_size=0.0 must be positive"),
        (lambda: Bootstrap(2, float("inf")), ValueError, "step_size=inf must be positive and finite"),
        (lambda: Bootstrap(2, "0.1"), TypeError, "step_size='0.1' is a str"),  # type: ignore[arg-type]
        (lambda: Bootstrap(2, 0.1, "test"), ValueError, "split='test' is neither"),  # type: ignore[arg-type]
        (lambda: LastIterate(0), ValueError, "num_steps=0 is not a count"),
        (lambda: BestInHindsight(SOLVER, 0), ValueError, "num_steps=0 is not a count"),
        (lambda: BestInHindsight(SumOfLossesSolver, 3), TypeError, "cannot be called .* pass SumOfLossesSolver"),  # type: ignore[arg-type]
        (lambda: RegularizedSolution(SOLVER, 3, 0.0), ValueError, "strength=0.0 draws to the end and must be positive"),
        (lambda: TargetMatching(3), TypeError, "target=3 is no Target"),  # type: ignore[arg-type]
        (lambda: TargetMatching(Bootstrap), TypeError, "is no Target"),  # type: ignore[arg-type]
        (lambda: TargetMatching(LastIterate(1), KLDivergence), TypeError, "matching=.* cannot be called"),  # type: ignore[arg-type]
        (lambda: TargetMatching(LastIterate(1), continue_from="end"), ValueError, "continue_from='end' is neither"),  # type: ignore[arg-type]
        (lambda: KLDivergence("backward"), ValueError, "direction='backward' is neither"),  # type: ignore[arg-type]
        (lambda: KLDivergence(split="test"), ValueError, "split='test' is neither"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_targets_and_matchings_refuse_what_cannot_be(make: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        make()


@pytest.mark.parametrize("name", ["linear-regression", "logistic", "sine", "quadratic"])
def test_divergence_of_outputs_that_are_no_distributions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = learnedopt.tasks.make(name)
    loop = InnerLoop(family, optimizers.make("sgd"))
    theta, carry = loop.init_theta(torch.Generator()), loop.start(sample(family))
    monkeypatch.setattr(InnerLoop, "run", lambda *args, **kwargs: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=r"no logits .*at least two classes; use SquaredDistance"):
        Unrolled(2).estimate(loop, theta, BootstrappedTarget(1, 0.1, matching=KLDivergence()), carry)


def test_a_family_without_outputs_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(Quadratic):
        outputs = TaskFamily.outputs

    loop = InnerLoop(Bare(), optimizers.make("sgd"))
    theta, carry = generic_theta(loop), loop.start(sample(loop.family))
    monkeypatch.setattr(InnerLoop, "run", lambda *args, **kwargs: pytest.fail("a step was taken"))
    with pytest.raises(NotImplementedError, match="Bare has no outputs; define outputs"):
        Unrolled(2).estimate(loop, theta, BootstrappedTarget(1, 0.1, matching=KLDivergence()), carry)


def test_a_solver_that_returns_something_else() -> None:
    loop = InnerLoop(Quadratic(), optimizers.make("sgd"))
    theta = generic_theta(loop)
    carry = loop.begin(theta, loop.start(sample(loop.family)))
    with pytest.raises(TypeError, match="must return the carry it was given with other parameters"):
        BestInHindsight(lambda loop, theta, carry, num_steps: carry.params, 2).find(loop, theta, carry)  # type: ignore[arg-type,return-value]
