"""Every registered rule x objective x estimator agrees with a named oracle, or is refused with a reason.

One table says which, and one test walks all of it. A rule that joins the registry is enrolled by that alone: by default
it must agree everywhere, and what is refused about it has to be written down here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from oracles import Reference, implicit_gradient, relative_error, worst
from problems import FLOAT, Quadratic, generic_theta, sample, template

import learnedopt
from learnedopt import (
    GMRES,
    BootstrappedTarget,
    ConjugateGradient,
    FinalLoss,
    FirstOrder,
    GradientEstimator,
    Implicit,
    InnerLoop,
    KLDivergence,
    MeanLogLoss,
    Neumann,
    SumOfLosses,
    Tape,
    Tasks,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.estimator import Estimate
from learnedopt.core.objective import MetaObjective, TaskMean
from learnedopt.optimizers import registry

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # Four steps solve nothing: the dense oracle is taken at the same unsolved point.
    pytest.mark.filterwarnings("ignore:the inner problem has not converged"),
]

NUM_STEPS = 4

OBJECTIVES: dict[str, MetaObjective] = {
    "final loss": FinalLoss(),
    "sum of losses": SumOfLosses(),
    "mean log loss": MeanLogLoss(),
    "bootstrapped": BootstrappedTarget(3, 0.2),
    "bootstrapped kl": BootstrappedTarget(2, 0.3, "train", KLDivergence()),
}


class Problem(NamedTuple):
    """What an oracle is asked about."""

    loop: InnerLoop
    theta: Theta
    objective: MetaObjective
    tasks: Tasks

    def reference(self, num_steps: int, **options: Any) -> Reference:
        """Return the plain loop over the same problem."""
        return Reference(self.loop, self.theta, self.objective, self.tasks, num_steps, **options)


Oracle = Callable[[Problem, list[Estimate]], float]


class Entry(NamedTuple):
    """An estimator, how many estimates to take in a row, and the oracle that returns their worst relative error."""

    estimator: GradientEstimator
    num_estimates: int
    oracle: Oracle
    tolerance: float


def finite_differences(num_steps: int, *, full: bool) -> Oracle:
    """Return the oracle that compares with differences of values (recorded gradients held where detached)."""
    return lambda problem, found: problem.reference(num_steps, full=full).difference_error(found[0].grads)


def plain_unroll(problem: Problem, found: list[Estimate]) -> float:
    """Compare with a loop that stores everything."""
    return relative_error(found[0].grads, problem.reference(NUM_STEPS).gradient())


def last_steps_by_hand(problem: Problem, found: list[Estimate]) -> float:
    """Compare with a loop through all steps that is cut by hand before the last three."""
    reference = problem.reference(3, skip=NUM_STEPS - 3, whole=True)
    return relative_error(found[0].grads, reference.gradient())


def windows_by_hand(num_steps: int, *, full: bool) -> Oracle:
    """Return the oracle that compares each window with a loop from where the last one ended, cut by hand.

    The bootstrapped target's further steps come between windows, so its windows start later.
    """

    def oracle(problem: Problem, found: list[Estimate]) -> float:
        errors = []
        ahead = problem.objective.num_target_steps - 1 if isinstance(problem.objective, BootstrappedTarget) else 0
        for i, estimate in enumerate(found):
            start = i * (num_steps + ahead)
            errors.append(
                relative_error(estimate.grads, problem.reference(num_steps, full=full, skip=start).gradient())
            )
        return worst(errors)

    return oracle


def dense_solve(*, num_terms: int | None = None, step_map: bool = False) -> Oracle:
    """Return the oracle that solves the linear system with dense matrices, at the same end of the inner steps."""

    def oracle(problem: Problem, found: list[Estimate]) -> float:
        on_step_map = step_map or not problem.loop.rule.has_regularizer
        expected = implicit_gradient(*problem, NUM_STEPS, step_map=on_step_map, num_terms=num_terms)
        return relative_error(found[0].grads, expected)

    return oracle


ESTIMATORS = {
    "unrolled": Entry(Unrolled(NUM_STEPS), 1, finite_differences(NUM_STEPS, full=True), 1e-7),
    "first order": Entry(FirstOrder(NUM_STEPS), 1, finite_differences(NUM_STEPS, full=False), 1e-7),
    "no steps": Entry(Unrolled(0), 1, finite_differences(0, full=True), 1e-7),
    "segments": Entry(Unrolled(NUM_STEPS, segment=3), 1, plain_unroll, 1e-12),
    "truncated": Entry(Truncated(2, 20), 2, windows_by_hand(2, full=False), 1e-12),
    "truncated full": Entry(Truncated(2, 20, Tape.FULL), 2, windows_by_hand(2, full=True), 1e-12),
    "k-rmd": Entry(TruncatedBackprop(NUM_STEPS, 3), 1, last_steps_by_hand, 1e-12),
    "implicit cg": Entry(Implicit(NUM_STEPS, ConjugateGradient(5)), 1, dense_solve(), 1e-10),
    "implicit neumann": Entry(Implicit(NUM_STEPS, Neumann(6)), 1, dense_solve(num_terms=6, step_map=True), 1e-12),
    "implicit gmres": Entry(Implicit(NUM_STEPS, GMRES(200)), 1, dense_solve(), 1e-10),
}


class Refusal(NamedTuple):
    """Combinations that cannot work, and what the error says about it; None stands for all."""

    estimators: tuple[str, ...]
    rules: tuple[str, ...] | None
    objectives: tuple[str, ...] | None
    reason: str


IMPLICIT = ("implicit cg", "implicit neumann", "implicit gmres")
WITHOUT_START = ("sgd", "momentum", "nesterov", "rmsprop", "adam", "lstm", "learned-rates", "clip", "partition")
"""Rules that start where the task does."""
STARTS_ONLY = ("maml", "anil")
"""Rules whose theta is nothing but a start, through which alone it moves anything."""
STARTS_AND_MORE = ("meta-sgd", "learned-init")

REFUSED = [
    # Nothing but a start moves the end of an inner loop without steps.
    Refusal(("no steps",), (*WITHOUT_START, *STARTS_AND_MORE), None, "no path to the objective through 0 recorded"),
    # The start lies before the steps that are recorded, and these rules do not pull towards it.
    Refusal(("k-rmd",), (*STARTS_ONLY, *STARTS_AND_MORE), None, "'?(rule/)?init/.*no path to the objective through 3"),
    # A solution does not know the way that led to it ...
    Refusal(IMPLICIT, None, ("sum of losses", "mean log loss"), "reads the losses along the way"),
    # ... nor its starting point, nor how fast it was reached.
    Refusal(
        IMPLICIT,
        (
            "sgd",
            "momentum",
            "nesterov",
            "rmsprop",
            "learned-rates",
            "clip",
            "partition",
            *STARTS_ONLY,
            *STARTS_AND_MORE,
        ),
        None,
        "do not move the solution",
    ),
    Refusal(IMPLICIT, ("adam",), None, "counts its steps"),
    # A recurrent network's step map has no symmetry that conjugate gradient could use.
    Refusal(("implicit cg",), ("lstm",), None, "needs a symmetric system"),
]


def cases() -> Iterator[tuple[str, str, str]]:
    """Yield estimator, rule and objective of every combination."""
    for estimator in ESTIMATORS:
        for rule in optimizers.names():
            for objective in OBJECTIVES:
                yield estimator, rule, objective


def refusal(estimator: str, rule: str, objective: str) -> Refusal | None:
    """Return the row of the table that refuses a combination."""
    for row in REFUSED:
        if (
            estimator in row.estimators
            and (row.rules is None or rule in row.rules)
            and (row.objectives is None or objective in row.objectives)
        ):
            return row
    return None


def check(estimator: str, rule: str, objective: str) -> None:
    """Take the estimates of a combination, and hold them to the table."""
    entry, family = ESTIMATORS[estimator], Quadratic()
    loop = InnerLoop(family, optimizers.example(rule, template(family)))
    problem = Problem(loop, generic_theta(loop.rule), OBJECTIVES[objective], sample(family))

    def take() -> list[Estimate]:
        found, carry = [], loop.start(problem.tasks)
        for _ in range(entry.num_estimates):
            found.append(entry.estimator.estimate(loop, problem.theta, problem.objective, carry))
            carry = found[-1].carry
        return found

    row = refusal(estimator, rule, objective)
    if row is not None:
        with pytest.raises(ValueError, match=row.reason):
            take()
        return
    assert entry.oracle(problem, take()) <= entry.tolerance


@pytest.mark.parametrize(("estimator", "rule", "objective"), [*cases()])
def test_combination(estimator: str, rule: str, objective: str) -> None:
    check(estimator, rule, objective)


class Newcomer(UpdateRule):
    """A rule that nobody wrote into the table."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(0.1, dtype=FLOAT)}

    def init(self, theta, params):
        return params, ()

    def update(self, theta, grads, state, params, loss):
        return {k: -theta["lr"] * g for k, g in grads.items()}, state


def test_a_newly_registered_rule_is_enrolled_and_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.RULES, "registered", {})
    optimizers.register("newcomer", Newcomer)
    assert ("implicit gmres", "newcomer", "final loss") in [*cases()]
    check("unrolled", "newcomer", "final loss")
    with pytest.raises(ValueError, match="do not move the solution"):  # true, but the table does not say so
        check("implicit gmres", "newcomer", "final loss")


def test_a_refusal_that_does_not_happen_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_combinations.REFUSED", [Refusal(("unrolled",), ("sgd",), None, "no path")])
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check("unrolled", "sgd", "final loss")


def test_the_table_knows_every_estimator_objective_and_rule_and_nothing_else() -> None:
    public = [getattr(learnedopt, name) for name in learnedopt.__all__ if name[0].isupper() and name not in LAZY]
    classes = [x for x in public if isinstance(x, type)]
    estimators = {x for x in classes if issubclass(x, GradientEstimator) and x is not GradientEstimator}
    objectives = {x for x in classes if issubclass(x, TaskMean)}
    assert estimators == {type(entry.estimator) for entry in ESTIMATORS.values()}
    assert objectives == {type(objective) for objective in OBJECTIVES.values()}
    used = {id(row) for row in (refusal(*case) for case in cases()) if row is not None}
    assert used == {id(row) for row in REFUSED}
    named = {name for row in REFUSED for name in row.rules or ()}
    assert named <= set(optimizers.names())


LAZY = ("LearnedOptimizer", "MetaTrainer", "Validation")
"""Public names of the edge, which is another business."""
