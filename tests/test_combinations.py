"""Every registered rule x inner objective x objective x estimator agrees with a named oracle, or is refused.

One table says which, with the reason: every rule on the task's loss, and every inner objective under a few rules. One
test walks over so much of it that any two choices meet, and a long one over all of it. What joins a registry is
enrolled by that alone: by default it must agree everywhere, and what is refused about it has to be written down here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from implicit_oracle import implicit_gradient
from oracles import Reference, relative_error, worst
from perturbed_oracle import Posed, evolution, persistent
from problems import FLOAT, Both, Labelled, Quadratic, generic_theta, newcomers, sample, template

import learnedopt
from learnedopt import (
    GMRES,
    BootstrappedTarget,
    Combined,
    ConjugateGradient,
    EvolutionStrategies,
    FinalLoss,
    FirstOrder,
    ForwardMode,
    GradientEstimator,
    Implicit,
    InnerLoop,
    InnerObjective,
    KLDivergence,
    LogMeans,
    MeanLogLoss,
    MetaTrainer,
    MomentMatching,
    Neumann,
    OfLosses,
    PersistentES,
    Proximal,
    RegretBound,
    SumOfLosses,
    Tape,
    TargetMatching,
    TaskByTask,
    TaskFamily,
    TaskLoss,
    Tasks,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    UpdateRule,
    estimators,
    inner_objectives,
    objectives,
    optimizers,
)
from learnedopt.core.estimator import Estimate
from learnedopt.core.objective import MetaObjective, TaskMean
from learnedopt.core.tree import Params
from learnedopt.estimators.registry import ESTIMATORS as ALL_ESTIMATORS
from learnedopt.inner_objectives import registry as objective_registry
from learnedopt.objectives.error_rate import ErrorRate
from learnedopt.objectives.registry import OBJECTIVES as ALL_OBJECTIVES
from learnedopt.optimizers import registry

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # Four steps solve nothing: the dense oracle is taken at the same unsolved point.
    pytest.mark.filterwarnings("ignore:the inner problem has not converged"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch's own forward mode
]

NUM_STEPS = 4
HORIZON = 20
"""Longer than any run, with the steps of targets: past it a schedule stands still, and nothing depends on theta."""

OBJECTIVES: dict[str, MetaObjective] = {
    "final loss": FinalLoss(),
    "sum of losses": SumOfLosses(),
    "mean log loss": MeanLogLoss(),
    "log means": LogMeans(last=0.5),
    "bootstrapped": BootstrappedTarget(3, 0.2),
    "bootstrapped kl": BootstrappedTarget(2, 0.3, "train", KLDivergence()),
    "regret bound": RegretBound(3),
    "moments": MomentMatching(3),
}
"""Those of which one stands for its kind; others of the registry join by themselves, see ``walked_objectives``."""


RULES: dict[str, Callable[[Params], UpdateRule]] = {
    "descent": lambda like: optimizers.make("sgd", lr=0.1, learn=()),
    "fixed momentum": lambda like: optimizers.make("momentum", lr=0.1, momentum=0.6, learn=()),
    "fixed clip": lambda like: optimizers.make("clip", rule=optimizers.make("sgd", lr=0.1, learn=()), max_norm=0.7),
    "momentum": lambda like: optimizers.example("momentum", like),
    # Of gradients as they are: the logarithm of those that theta moves through zero has no differences to compare with.
    "lstm": lambda like: optimizers.make("lstm", hidden_size=3, preprocess_factor=None),
    "maml": lambda like: optimizers.example("maml", like),
}
"""Rules that the inner objectives are walked with: first those without a meta-parameter of their own."""

OWN: dict[str, Callable[[Params], InnerObjective]] = {
    "proximal, learned": lambda like: Proximal(like, 0.8, learn=True),
    "a user's own": lambda like: Both(),
}
"""Inner objectives beside the registered ones."""


def loop_of(rule: str, inner: str) -> InnerLoop:
    """Return the loop of a combination: on the task's loss of a quadratic, or on another of a classifier."""
    family: TaskFamily
    if inner == "task-loss":
        family = Quadratic()
        return InnerLoop(family, optimizers.example(rule, template(family)), horizon=HORIZON)
    family = Labelled()
    like = template(family)
    objective = OWN[inner](like) if inner in OWN else inner_objectives.example(inner, like, 8, 2, (3,))
    return InnerLoop(family, RULES[rule](like), inner_objective=objective)


class Problem(NamedTuple):
    """What an oracle is asked about."""

    loop: InnerLoop
    theta: Theta
    objective: MetaObjective
    tasks: Tasks
    estimator: GradientEstimator | None = None
    first: Any = None

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


def windows_by_hand(num_steps: int, *, full: bool, through: bool = False) -> Oracle:
    """Return the oracle that compares each window with a loop from where the last one ended, cut by hand.

    With ``through`` it is not cut: the window's objective is differentiated through all steps before it.

    The bootstrapped target's further steps come between windows, so its windows start later.
    """

    def oracle(problem: Problem, found: list[Estimate]) -> float:
        errors = []
        ahead = problem.objective.target.rule_steps if isinstance(problem.objective, TargetMatching) else 0
        for i, estimate in enumerate(found):
            start = i * (num_steps + ahead)
            reference = problem.reference(num_steps, full=full, skip=start, through=through)
            errors.append(relative_error(estimate.grads, reference.gradient()))
        return worst(errors)

    return oracle


def dense_solve(*, num_terms: int | None = None, step_map: bool = False) -> Oracle:
    """Return the oracle that solves the linear system with dense matrices, at the same end of the inner steps."""

    def oracle(problem: Problem, found: list[Estimate]) -> float:
        # Elsewhere the solution is a stationary point of an inner objective that theta enters.
        own, rests = not problem.loop.inner_objective.is_task_loss, not isinstance(problem.loop.rule, optimizers.LSTM)
        on_step_map = step_map or not (own and rests)
        expected = implicit_gradient(*problem[:4], NUM_STEPS, step_map=on_step_map, num_terms=num_terms)
        return relative_error(found[0].grads, expected)

    return oracle


def particles_by_hand(problem: Problem, found: list[Estimate]) -> float:
    """Compare with every perturbed copy walked by itself."""
    estimator, carry = problem.estimator, problem.first
    posed = Posed(*problem[:4])
    if isinstance(estimator, EvolutionStrategies):
        expected = [evolution(posed, estimator, carry)]
    else:
        assert isinstance(estimator, PersistentES)
        expected = persistent(posed, estimator, carry, len(found))
    return worst(relative_error(a.grads, b) for a, b in zip(found, expected, strict=True))


def mean_of_both_tapes(problem: Problem, found: list[Estimate]) -> float:
    """Compare with the mean of two loops, of which one holds gradients and losses as they were."""
    gradients = [problem.reference(NUM_STEPS, full=full).gradient() for full in (True, False)]
    return relative_error(found[0].grads, {k: (g + gradients[1][k]) / 2 for k, g in gradients[0].items()})


ESTIMATORS = {
    "unrolled": Entry(Unrolled(NUM_STEPS), 1, finite_differences(NUM_STEPS, full=True), 1e-7),
    "first order": Entry(FirstOrder(NUM_STEPS), 1, finite_differences(NUM_STEPS, full=False), 1e-7),
    "no steps": Entry(Unrolled(0), 1, finite_differences(0, full=True), 1e-7),
    "segments": Entry(Unrolled(NUM_STEPS, segment=3), 1, plain_unroll, 1e-12),
    "truncated": Entry(Truncated(2, 20), 2, windows_by_hand(2, full=False), 1e-12),
    "truncated full": Entry(Truncated(2, 20, Tape.FULL), 2, windows_by_hand(2, full=True), 1e-12),
    "k-rmd": Entry(TruncatedBackprop(NUM_STEPS, 3), 1, last_steps_by_hand, 1e-12),
    "combined": Entry(Combined(Unrolled(NUM_STEPS), FirstOrder(NUM_STEPS)), 1, mean_of_both_tapes, 1e-12),
    "task by task": Entry(TaskByTask(Unrolled(NUM_STEPS)), 1, plain_unroll, 1e-12),
    "forward": Entry(ForwardMode(NUM_STEPS), 1, plain_unroll, 1e-12),
    "forward blocks": Entry(ForwardMode(NUM_STEPS, block_size=1000), 1, plain_unroll, 1e-12),
    "forward windows": Entry(ForwardMode(2, 20), 2, windows_by_hand(2, full=True, through=True), 1e-12),
    "implicit cg": Entry(Implicit(NUM_STEPS, ConjugateGradient(5)), 1, dense_solve(), 1e-10),
    "implicit neumann": Entry(Implicit(NUM_STEPS, Neumann(6)), 1, dense_solve(num_terms=6, step_map=True), 1e-12),
    "implicit gmres": Entry(Implicit(NUM_STEPS, GMRES(200)), 1, dense_solve(), 1e-10),
    "evolution": Entry(EvolutionStrategies(NUM_STEPS, 2, 0.01), 1, particles_by_hand, 1e-9),
    "persistent": Entry(PersistentES(2, 6, 2, 0.01), 2, particles_by_hand, 1e-9),
    "noise reuse": Entry(PersistentES(2, 6, 2, 0.01, reuse_noise=True), 2, particles_by_hand, 1e-9),
}
"""Those that have an oracle of their own; others of the registry join by themselves, see ``walked_estimators``."""


def walked_estimators() -> dict[str, Entry]:
    """Return all: what is registered and not in the table must agree with differences through all of its steps."""
    new = newcomers(ALL_ESTIMATORS, [entry.estimator for entry in ESTIMATORS.values()], NUM_STEPS)
    oracle = finite_differences(NUM_STEPS, full=True)
    return {**ESTIMATORS, **{name: Entry(each, 1, oracle, 1e-7) for name, each in new.items()}}


def walked_objectives() -> dict[str, MetaObjective]:
    """Return all, those that are registered and not in the table as they are by default."""
    return {**OBJECTIVES, **newcomers(ALL_OBJECTIVES, OBJECTIVES.values(), besides=OF_OTHER_TESTS)}


OF_OTHER_TESTS = ("LeaderAndRadius", "HypergradientFeedback", "ErrorRate")
"""Objectives made for one composition, held to its recursion in tests of their own: FMRL's start and radius
(``test_fmrl``), and OSGM's windows of one step (``test_hyper``), whose start enters without a graph. The last has no
gradient (``test_few_shot``)."""


class Refusal(NamedTuple):
    """Combinations that cannot work, and what the error says about it; None stands for all."""

    estimators: tuple[str, ...] | None
    rules: tuple[str, ...] | None
    inners: tuple[str, ...] | None
    objectives: tuple[str, ...] | None
    reason: str


IMPLICIT = ("implicit cg", "implicit neumann", "implicit gmres")
FORWARD = ("forward", "forward blocks", "forward windows")
STEPPING = (
    "unrolled",
    "first order",
    "segments",
    "truncated",
    "truncated full",
    "k-rmd",
    "combined",
    "task by task",
    *FORWARD,
)
PERTURBING = ("evolution", "persistent", "noise reuse")
DETACHED = ("first order", "truncated", "combined")
"""Estimators whose tape, or one of whose tapes, is ``Tape.FIRST_ORDER``."""
WITHOUT_START = (
    "sgd", "momentum", "nesterov", "rmsprop", "adam", "lstm", "recurrent-hyperparameters", "learned-rates", "clip",
    "partition", "averaged", "iterate", "mirror-descent", "projected", "balanced-rates", "reparametrized", "recorded",
    "small-mlp", "step-rates", "tensor-gru", "rnnprop", "celo2",
    "adamw", "nadam", "muon", "schedule-free", "scheduled",
    "normalised", "normalised-mlp", "normalised-lstm", "general",
)  # fmt: skip
"""Rules that start where the task does."""
STARTS_ONLY = ("maml", "anil")
"""Rules whose theta is nothing but a start, through which alone it moves anything."""
STARTS_AND_MORE = ("meta-sgd", "learned-init", "aruba")
ALL_RULES = {*optimizers.names(), *RULES}
RATED, BALANCED = ("sgd", "learned-rates", "meta-sgd"), ("balanced-rates", "aruba")
"""Rules whose rates a regret bound reads, and rules whose moments are matched."""
FROM_START = ("regret bound", "moments")
"""Objectives that take the steps of a task themselves."""
OF_STEPS = tuple(OBJECTIVES.keys() - {*FROM_START})
TASK_LOSS = ("task-loss",)
PULLED = ("proximal", "proximal, learned")
"""Inner objectives that pull to the learned start."""
INSIDE = ("l2", "weighted-examples", "learned-loss", "distilled", "proximal, learned")
"""Inner objectives whose own theta enters what is descended, and nothing else."""
UNTIED = ("l2", "weighted-examples", "learned-loss", "distilled", "a user's own")
"""Inner objectives that do not know the learned start."""

REFUSED = [
    # There is nothing to pull to; and with a rule without theta nothing to learn either.
    Refusal(None, (*RULES.keys() - {"maml"},), PULLED, None, "pulls to the rule's learned start|theta is empty"),
    # These take their steps themselves, from the start, and read of theta what their own rules have.
    Refusal(STEPPING, None, None, FROM_START, r"takes its own 3 steps|\.reads_theta names"),
    Refusal(
        ("no steps",), (*ALL_RULES - {*RATED, "step-rates"},), None, ("regret bound",),
        r"\.reads_theta names|no path to the objective through 0|theta has no 'rule/lr/w'",
    ),
    Refusal(("no steps",), ("step-rates",), None, ("regret bound",), "of one rate for all steps"),
    Refusal(("no steps",), (*ALL_RULES - {*BALANCED},), None, ("moments",), r"\.reads_theta names"),
    # Of what is held fixed, differences of values know nothing.
    Refusal(
        PERTURBING, None, None, ("bootstrapped", "bootstrapped kl", *FROM_START),
        r"holds a part of itself fixed|\.reads_theta names",
    ),
    # Nothing but a start moves the end of an inner loop without steps.
    Refusal(
        ("no steps",), (*WITHOUT_START, *STARTS_AND_MORE), TASK_LOSS, OF_STEPS, "no path to the objective through 0 "
    ),
    Refusal(("no steps",), None, INSIDE, None, "no path to the objective through 0 recorded"),
    Refusal(("no steps",), ("momentum", "lstm"), None, None, "no path to the objective through 0 recorded"),
    # Updates of a length that the gradients do not set: a target of several steps moves away as their rate grows.
    Refusal(
        (*STEPPING, *IMPLICIT), ("celo2", "rnnprop", "general"), TASK_LOSS, ("bootstrapped",),
        "updates keep their length",
    ),
    # What is descended enters an update as a gradient, which this tape cuts from theta.
    Refusal(DETACHED, None, INSIDE, None, "no path to the objective through . recorded inner steps with the first-ord"),
    # Theta's only path is by the outer loss, which the distance to a target does not read.
    Refusal(
        (*DETACHED, "no steps"), None, ("a user's own",), ("bootstrapped", "bootstrapped kl"),
        r"\['gain', 'tilt'\] have no path to the objective through the objective TargetMatching",
    ),
    # The start lies before the steps that are recorded, and these do not pull towards it.
    Refusal(
        ("k-rmd",), (*STARTS_ONLY, *STARTS_AND_MORE), (*TASK_LOSS, *UNTIED), None,
        "'?(rule/)?init/.*no path to the objective through 3",
    ),
    # A solution does not know the way that led to it ...
    Refusal(
        IMPLICIT, None, None, ("sum of losses", "mean log loss", "log means", *FROM_START),
        "reads the losses along the way",
    ),
    # ... nor its starting point, nor how fast it was reached.
    Refusal(
        IMPLICIT,
        (
            "sgd", "momentum", "nesterov", "rmsprop", "learned-rates", "balanced-rates", "clip", "partition",
            "reparametrized", "mirror-descent", "projected", "maml", *STARTS_AND_MORE,
        ),
        TASK_LOSS, None, "do not move the solution",
    ),
    Refusal(IMPLICIT, ("maml",), UNTIED, None, "do not move the solution"),
    # On the step map this shows at the solution alone, where a rate's effect vanishes with the step.
    Refusal(("implicit cg", "implicit gmres"), ("momentum",), UNTIED, None, "do not move the solution"),
    Refusal(
        IMPLICIT,
        (
            "adam", "averaged", "recorded", "recurrent-hyperparameters", "small-mlp", "step-rates", "tensor-gru",
            "rnnprop", "celo2",
            "adamw", "nadam", "muon", "schedule-free", "scheduled",
            "normalised", "normalised-mlp", "normalised-lstm", "general",
        ),
        TASK_LOSS, None, "counts its steps",
    ),
    # A recurrent network's step map has no symmetry that conjugate gradient could use.
    Refusal(("implicit cg",), ("lstm",), None, None, "needs a symmetric system"),
]  # fmt: skip


def cases() -> Iterator[tuple[str, str, str, str]]:
    """Yield estimator, rule, inner objective and objective of every combination."""
    assert {"task-loss"} <= set(inner_objectives.names())
    pairs = [(rule, "task-loss") for rule in optimizers.names()]
    pairs += [(rule, inner) for inner in (*inner_objectives.names(), *OWN) if inner != "task-loss" for rule in RULES]
    objectives, estimators = [*walked_objectives()], [*walked_estimators()]
    for shift in range(len(objectives)):
        for i, estimator in enumerate(estimators):
            for j, (rule, inner) in enumerate(pairs):
                yield estimator, rule, inner, objectives[(i + j + shift) % len(objectives)]


def covering() -> Iterator[tuple[str, str, str, str]]:
    """Yield combinations in which any two choices meet that meet in the whole table; rule and inner objective are one.

    They meet in agreement wherever they do so at all, and so do they at each row that refuses, of estimators and
    objectives with rules alone. Objectives take turns in ``cases``, so that few combinations do: an eighth of all.
    """
    met = set()
    for case in cases():
        estimator, rule, inner, objective = case
        row, moved = refusal(*case), (rule, inner)
        if row is None:
            meets = {(estimator, moved), (moved, objective), (estimator, objective)}
        else:
            number = REFUSED.index(row)
            meets = {(number, estimator), (number, *moved), (number, objective)}
        if not meets <= met:
            met |= meets
            yield case


def refusal(estimator: str, rule: str, inner: str, objective: str) -> Refusal | None:
    """Return the row of the table that refuses a combination."""
    for row in REFUSED:
        if all(
            names is None or name in names
            for name, names in zip((estimator, rule, inner, objective), row[:4], strict=True)
        ):
            return row
    return None


def check(estimator: str, rule: str, inner: str, objective: str) -> None:
    """Take the estimates of a combination, and hold them to the table."""
    entry, loop = walked_estimators()[estimator], loop_of(rule, inner)
    # With other tasks of the classifier some meta-gradients all but cancel, and differences have nothing to measure.
    tasks = sample(loop.family, seed=5 if inner == "task-loss" else 7)
    theta = generic_theta(loop)
    if objective == "regret bound":  # of rates well above zero
        theta = {k: v.abs() + 0.1 if "lr" in k else v for k, v in theta.items()}
    problem = Problem(loop, theta, walked_objectives()[objective], tasks, entry.estimator)

    def take() -> list[Estimate]:
        nonlocal problem
        carry = entry.estimator.start(loop, theta, tasks, torch.Generator().manual_seed(3))
        found, problem = [], problem._replace(first=carry)
        for _ in range(entry.num_estimates):
            found.append(entry.estimator.estimate(loop, problem.theta, problem.objective, carry))
            carry = found[-1].carry
        return found

    row = refusal(estimator, rule, inner, objective)
    if row is not None:
        with pytest.raises(ValueError, match=row.reason):
            take()
        return
    found = take()
    assert entry.oracle(problem, found) <= entry.tolerance


@pytest.mark.parametrize(("estimator", "rule", "inner", "objective"), [*covering()])
def test_combination(estimator: str, rule: str, inner: str, objective: str) -> None:
    check(estimator, rule, inner, objective)


@pytest.mark.long
@pytest.mark.parametrize("estimator", walked_estimators())
@pytest.mark.parametrize(("rule", "inner"), dict.fromkeys(case[1:3] for case in cases()))
def test_all_combinations(estimator: str, rule: str, inner: str) -> None:
    for objective in walked_objectives():
        check(estimator, rule, inner, objective)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128], ids=["integers", "bits", "complex"])
@pytest.mark.parametrize("estimator", walked_estimators())
def test_theta_that_is_not_of_real_numbers_is_refused(estimator: str, dtype: torch.dtype) -> None:
    loop, entry = loop_of("sgd", "task-loss"), walked_estimators()[estimator]
    tasks, theta = sample(loop.family), generic_theta(loop)
    carry = entry.estimator.start(loop, theta, tasks, torch.Generator().manual_seed(0))
    wrong = {k: torch.ones_like(v, dtype=dtype) if k == "lr" else v for k, v in theta.items()}
    told = rf"\{{'lr': '{dtype}'\}} are no real floating-point numbers.*as an option of its owner"
    with pytest.raises(ValueError, match=told):
        entry.estimator.estimate(loop, wrong, FinalLoss(), carry)
    with pytest.raises(ValueError, match=told):
        MetaTrainer(loop, entry.estimator, FinalLoss(), tracker=None, theta=wrong)


class Newcomer(UpdateRule):
    """A rule that nobody wrote into the table."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"lr": torch.tensor(0.1, dtype=FLOAT)}

    def init(self, theta, params):
        return params, ()

    def update(self, theta, grads, state, params, loss):
        return {k: -theta["lr"] * g for k, g in grads.items()}, state


class Stranger(InnerObjective):
    """An inner objective that nobody wrote into the table."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"factor": torch.tensor(0.7, dtype=FLOAT)}

    def loss(self, theta, family, params, batch):
        return theta["factor"] * family.loss(params, batch)


def test_a_newly_registered_rule_is_enrolled_and_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.RULES, "registered", {})
    optimizers.register("newcomer", Newcomer)
    assert ("implicit gmres", "newcomer", "task-loss", "final loss") in [*cases()]
    check("unrolled", "newcomer", "task-loss", "final loss")
    with pytest.raises(ValueError, match="do not move the solution"):  # true, but the table does not say so
        check("implicit gmres", "newcomer", "task-loss", "final loss")


def test_a_newly_registered_inner_objective_is_enrolled_and_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    known = objective_registry.INNER_OBJECTIVES
    monkeypatch.setattr(known, "registered", dict(known.registered))
    inner_objectives.register("stranger", Stranger)
    assert ("unrolled", "descent", "stranger", "final loss") in [*cases()]
    check("unrolled", "descent", "stranger", "final loss")
    with pytest.raises(ValueError, match="no path to the objective"):  # true, but the table does not say so
        check("first order", "descent", "stranger", "final loss")


@dataclass(frozen=True)
class Exact(GradientEstimator):
    """An estimator that nobody wrote into a table: through all steps, times ``factor``."""

    num_steps: int
    factor: float = 1.0

    def estimate(self, loop, theta, objective, carry):
        found = Unrolled(self.num_steps).estimate(loop, theta, objective, carry)
        return found._replace(grads={k: self.factor * g for k, g in found.grads.items()})


@dataclass(frozen=True)
class Inexact(Exact):
    """Another one, which is wrong by a hundredth."""

    factor: float = 1.01


@dataclass(frozen=True)
class Squared(OfLosses):
    """A meta-objective that nobody wrote into a table."""

    def of_losses(self, before, end):
        return end**2


def test_a_newly_registered_estimator_or_objective_is_enrolled_and_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ALL_ESTIMATORS, "registered", {})
    monkeypatch.setattr(ALL_OBJECTIVES, "registered", {})
    estimators.register(Exact)
    objectives.register(Squared)
    assert {("Exact", "momentum", "task-loss", "Squared"), ("k-rmd", "sgd", "task-loss", "Squared")} <= {*cases()}
    check("Exact", "momentum", "task-loss", "Squared")
    estimators.register(Inexact)
    with pytest.raises(AssertionError):
        check("Inexact", "momentum", "task-loss", "Squared")


def test_a_refusal_that_does_not_happen_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_combinations.REFUSED", [Refusal(("unrolled",), ("sgd",), None, None, "no path")])
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check("unrolled", "sgd", "task-loss", "final loss")


def test_the_table_knows_every_estimator_objective_and_rule_and_nothing_else() -> None:
    public = [getattr(learnedopt, name) for name in learnedopt.__all__ if name[0].isupper() and name not in LAZY]
    classes = [x for x in public if isinstance(x, type)]
    estimators = {x for x in classes if issubclass(x, GradientEstimator) and x is not GradientEstimator}
    objectives = {x for x in classes if issubclass(x, TaskMean) and x not in (TaskMean, OfLosses)}
    inners = {x for x in classes if issubclass(x, InnerObjective) and x is not InnerObjective}
    assert estimators == {*ALL_ESTIMATORS} == {type(entry.estimator) for entry in walked_estimators().values()}
    known = {kind for kind in ALL_OBJECTIVES if isinstance(kind, type)}
    assert objectives | {ErrorRate} == known
    others = {kind for kind in known if kind.__name__ in OF_OTHER_TESTS}
    assert known - others == {type(objective) for objective in walked_objectives().values()}
    named = {type(loop_of("maml", inner).inner_objective) for inner in inner_objectives.names()}
    assert inners == named and TaskLoss in named
    used = {id(row) for row in (refusal(*case) for case in cases()) if row is not None}
    assert used == {id(row) for row in REFUSED}
    assert {name for row in REFUSED for name in row.rules or ()} <= {*optimizers.names(), *RULES}
    assert {name for row in REFUSED for name in row.inners or ()} <= {*inner_objectives.names(), *OWN}


LAZY = ("LearnedOptimizer", "MetaTrainer", "Validation")
"""Public names of the edge, which is another business."""
