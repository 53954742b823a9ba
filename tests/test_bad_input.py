"""What cannot work ends in a clear error before the first inner step; what did not converge, in a warning after it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import FLOAT, FromStart, Quadratic, Skewed, Tied, generic_theta, sample, template, tied_loop
from torch import Tensor

from learnedopt import (
    GMRES,
    BootstrappedTarget,
    Carry,
    ConjugateGradient,
    ConvergenceWarning,
    Execution,
    FinalLoss,
    FirstOrder,
    GradientEstimator,
    Implicit,
    InnerLoop,
    InnerObjective,
    LogMeans,
    MeanLogLoss,
    Neumann,
    Proximal,
    SumOfLosses,
    Tape,
    TaskLoss,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.objective import MetaObjective

pytestmark = pytest.mark.usefixtures("float64")


class Watched(Quadratic):
    """Remembers where its loss was taken."""

    def __init__(self) -> None:
        super().__init__(drift=0.0)
        self.points: list[Tensor] = []

    def loss(self, params, batch):
        self.points.append(params["w"].detach().clone())
        return super().loss(params, batch)


NUM_TASKS = 2
ESTIMATORS = [
    Unrolled(4),
    Unrolled(4, segment=2),
    FirstOrder(4),
    Truncated(2, 4),
    TruncatedBackprop(4, 2),
    Implicit(4),
    Implicit(4, GMRES()),
    Implicit(4, Neumann(3)),
]


def refuses(
    message: str,
    rule: UpdateRule,
    estimator: GradientEstimator,
    objective: MetaObjective | None = None,
    *,
    inner: InnerObjective | None = None,
    num_passes: int = 1,
    probed: bool = False,
) -> None:
    """Assert the error, and that no inner step was taken: the loss was never looked at anywhere but at the start.

    Where ``probed``, theta's paths through an inner objective are looked for by a few updates at stand-in gradients:
    then the number of passes alone tells.
    """
    family = Watched()
    tasks = sample(family, NUM_TASKS)
    # Unvetted: vetting has tests of its own, and evaluates the loss away from the start.
    loop = InnerLoop(family, rule, Execution(1, vet=False), inner or TaskLoss())
    theta = generic_theta(loop)
    with pytest.raises(ValueError, match=message):
        estimator.estimate(loop, theta, objective or FinalLoss(), loop.start(tasks))
    starts = family.init_params(tasks)["w"]
    if any(k.endswith("init/w") or k == "start/w" for k in rule.init_theta(torch.Generator())):
        starts = torch.stack([v for k, v in theta.items() if k in ("init/w", "start/w")])
    at_start = all(any(torch.equal(point, start) for start in starts) for point in family.points)
    assert at_start or probed, "an inner step was taken"
    assert len(family.points) <= num_passes * NUM_TASKS


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize(
    ("theta", "shown"),
    [
        ({"lr": torch.tensor(0.1), "momentum": torch.tensor(0.9)}, r"expected .*strength.*got \{'lr': \(\)"),
        (
            {"start/w": torch.zeros(2, 2), "start/b": torch.zeros(3), "strength": torch.tensor(1.0)},
            r"'start/b': \(3,\)",
        ),
        ({}, r"got \{\}"),
        ({"start/w": torch.zeros(2, 2), "start/b": torch.zeros(1), "strength": 1.0}, r"'strength': 1\.0"),
        ([torch.zeros(2, 2)], "got list"),
        (torch.zeros(2, 2), "got Tensor"),
    ],
)
def test_theta_of_another_rule_or_shape(estimator: GradientEstimator, theta: Any, shown: str) -> None:
    family = Watched()
    loop = tied_loop(family)
    with pytest.raises(ValueError, match=rf"this theta is not one of FromStart on Tied: .*{shown}.*init_theta"):
        estimator.estimate(loop, theta, FinalLoss(), loop.start(sample(family)))
    assert not family.points


def test_theta_of_another_family() -> None:
    """The start has the right shape for its rule, but not for what is trained."""
    rule = FromStart({"w": torch.zeros(3, 2), "b": torch.zeros(1)})
    refuses(r"starts from parameters .*\(2, 3, 2\).*the family's are .*\(2, 2, 2\).*template", rule, Unrolled(2))
    wrong = {"w": torch.zeros(2, 2, dtype=FLOAT), "c": torch.zeros(1, dtype=FLOAT)}
    refuses("build the rule with a template", optimizers.make("maml", template=wrong), Unrolled(2))


def vector(self: Any, params: Any, batch: Any) -> Tensor:
    return params["w"].square().sum(0)


def one_entry(self: Any, params: Any, batch: Any) -> Tensor:
    return params["w"].square().sum().reshape(1)


def number(self: Any, params: Any, batch: Any) -> float:
    return 3.0


def undefined(self: Any, params: Any, batch: Any) -> Tensor:
    return params["w"].sum().abs().neg().log()


def overflowing(self: Any, params: Any, batch: Any) -> Tensor:
    return params["w"].sum() + math.inf


def constant(self: Any, params: Any, batch: Any) -> Tensor:
    return batch["c"].square().sum()


def detached(self: Any, params: Any, batch: Any) -> Tensor:
    return params["w"].detach().square().sum()


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (vector, r"loss must return a scalar tensor for one task, got shape \(2,\)"),
        (one_entry, r"loss must return a scalar tensor for one task, got shape \(1,\)"),
        (number, "loss must return a scalar tensor for one task, got a float"),
        (undefined, r"loss is not finite at the start: \[nan, nan\]"),
        (overflowing, r"loss is not finite at the start: \[inf, inf\]"),
        (constant, r"loss does not depend on the parameters \['b', 'w'\]"),
        (detached, r"loss does not depend on the parameters \['b', 'w'\]"),
    ],
)
def test_a_family_whose_loss_cannot_be_trained_on(
    estimator: GradientEstimator, loss: Callable[..., Any], message: str, chunk_size: int
) -> None:
    calls = []

    class Bad(Quadratic):
        def loss(self, params, batch):
            calls.append(1)
            return loss(self, params, batch)

    loop = tied_loop(Bad(0.0), Execution(chunk_size))
    with pytest.raises(ValueError, match=rf"Bad\.{message}"):
        estimator.estimate(loop, generic_theta(loop), FinalLoss(), loop.start(sample(loop.family)))
    assert len(calls) <= NUM_TASKS // chunk_size


def test_a_loss_that_reads_some_of_the_parameters_is_fine() -> None:
    class Partial(Quadratic):
        def loss(self, params, batch):
            return params["w"].square().sum()

    loop = InnerLoop(Partial(), optimizers.make("sgd"))
    found = Unrolled(2).estimate(loop, generic_theta(loop), FinalLoss(), loop.start(sample(loop.family)))
    assert found.grads["lr"] < 0


@pytest.mark.parametrize(("window", "horizon", "better"), [(3, 10, "9 or 12"), (20, 30, "20 or 40"), (7, 5, "7 or 7")])
def test_a_horizon_that_is_no_multiple_of_the_window(window: int, horizon: int, better: str) -> None:
    with pytest.raises(
        ValueError, match=f"horizon={horizon} is not a multiple of the window num_steps={window}.*{better}"
    ):
        Truncated(window, horizon)


@pytest.mark.parametrize("solver", [ConjugateGradient(5), GMRES(), Neumann(5)], ids=str)
@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("sgd", r"\['lr'\]"),
        ("momentum", r"\['lr', 'momentum'\]"),
        ("rmsprop", r"\['alpha', 'eps', 'lr'\]"),
        ("learned-rates", r"\['lr/b', 'lr/w'\]"),
        ("maml", r"\['init/b', 'init/w'\]"),
        ("meta-sgd", r"\['init/b', 'init/w', 'rule/lr/b', 'rule/lr/w'\]"),
    ],
)
def test_an_implicit_gradient_of_what_does_not_move_the_solution(name: str, entries: str, solver: Any) -> None:
    rule = optimizers.example(name, template(Quadratic()))
    message = rf"{entries} do not move the solution .*unrolled estimator"
    refuses(message, rule, Implicit(50, solver), num_passes=2)  # the second: what the objective reads of theta itself


class Warmup(UpdateRule):
    """Descent on weight decay too, at a rate that a counter sets."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"decay": torch.tensor(0.3, dtype=FLOAT)}

    def init(self, theta, params):
        return params, {"count": torch.zeros((), dtype=self.dtype)}

    def update(self, theta, grads, state, params, loss):
        rate = 0.1 / (1 + state["count"])
        return {k: -rate * (g + theta["decay"] * params[k]) for k, g in grads.items()}, {"count": state["count"] + 1}


@pytest.mark.parametrize("solver", [GMRES(), Neumann(5)], ids=str)
def test_rules_that_count_have_no_fixed_point(solver: Any) -> None:
    rules = [
        optimizers.make("adam", weight_decay=0.1, learn=("weight_decay",)),
        optimizers.make("clip", rule=optimizers.make("adam", weight_decay=0.1), max_value=1.0),
        Warmup(torch.int64),
        Warmup(FLOAT),
    ]
    for rule in rules:
        refuses("counts its steps.*no fixed point", rule, Implicit(50, solver))


def test_a_rule_that_counts_may_descend_an_inner_objective_of_its_own() -> None:
    class Counting(FromStart):
        def init(self, theta, params):
            return super().init(theta, params)[0], {"count": torch.zeros((), dtype=FLOAT)}

        def update(self, theta, grads, state, params, loss):
            return {k: -self.lr * g for k, g in grads.items()}, {"count": state["count"] + 1}

    family = Quadratic(0.0)
    loop = InnerLoop(family, Counting(template(family)), inner_objective=Tied())
    theta, carry = generic_theta(loop), loop.start(sample(family))
    expected = Implicit(100).estimate(tied_loop(family), theta, FinalLoss(), carry)
    found = Implicit(100).estimate(loop, theta, FinalLoss(), carry)
    assert all(torch.equal(found.grads[k], g) for k, g in expected.grads.items())
    with pytest.raises(ValueError, match="counts its steps"):  # the step map has no fixed point, whatever is descended
        Implicit(100, Neumann(5)).estimate(loop, theta, FinalLoss(), carry)


def test_conjugate_gradient_on_a_step_map_without_symmetry() -> None:
    rules = [Skewed(), optimizers.make("momentum", lr=0.1, weight_decay=0.3, learn=("weight_decay",))]
    for rule in rules:
        loop = InnerLoop(Quadratic(0.0), rule)
        carry = loop.start(sample(loop.family))
        with pytest.raises(ValueError, match=r"needs a symmetric system.*differ by \d.*use GMRES\(...\) or Neumann"):
            Implicit(50, ConjugateGradient(5)).estimate(loop, generic_theta(rule), FinalLoss(), carry)


def test_conjugate_gradient_on_a_symmetric_step_map() -> None:
    rule = optimizers.make("sgd", lr=0.35, weight_decay=0.3, learn=("weight_decay",))
    loop = InnerLoop(Quadratic(0.0), rule)
    carry = loop.start(sample(loop.family))
    found = Implicit(150, ConjugateGradient(5)).estimate(loop, generic_theta(rule), FinalLoss(), carry)
    path = Unrolled(150).estimate(loop, generic_theta(rule), FinalLoss(), carry)
    torch.testing.assert_close(found.grads, path.grads, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "objective", [FinalLoss(), SumOfLosses(), BootstrappedTarget(2, 0.1)], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize(
    ("estimator", "name", "entries", "how"),
    [
        (Unrolled(0), "sgd", r"\['lr'\]", "0 recorded inner steps with the full tape"),
        (Unrolled(0, segment=3), "meta-sgd", r"\['rule/lr/b', 'rule/lr/w'\]", "0 recorded"),
        (TruncatedBackprop(4, 0), "imaml", r"\['init/b', 'init/w'\]", "0 recorded"),
        (TruncatedBackprop(4, 3), "maml", r"\['init/b', 'init/w'\]", "3 recorded"),
        (FirstOrder(4), "strength", r"\['strength'\]", "4 recorded inner steps with the first-order tape"),
        (Truncated(2, 4), "strength", r"\['strength'\]", "2 recorded inner steps with the first-order tape"),
        (Unrolled(4), "idle", r"\['idle'\]", "4 recorded"),
    ],
)
def test_a_meta_parameter_without_a_path_is_named(
    estimator: GradientEstimator, name: str, entries: str, how: str, objective: MetaObjective
) -> None:
    class Idle(FromStart):
        def init_theta(self, generator: torch.Generator) -> Theta:
            return {**super().init_theta(generator), "idle": torch.ones(3, dtype=FLOAT)}

    like = template(Quadratic())
    message = rf"{entries} have no path to the objective through {how}.*silent zero"
    maml = optimizers.make("maml", template=like)
    on_inner = {
        "imaml": (maml, Proximal(like)),
        "strength": (maml, Proximal(like, learn=True)),
        "idle": (Idle(like), Tied()),
    }
    if name in on_inner:
        rule, inner = on_inner[name]
        refuses(message, rule, estimator, objective, inner=inner, num_passes=9, probed=True)
    else:
        refuses(message, optimizers.example(name, like), estimator, objective)


@pytest.mark.parametrize("estimator", [Unrolled(4), Truncated(2, 4), Implicit(50)], ids=str)
def test_an_objective_that_does_not_read_the_inner_loop(estimator: GradientEstimator) -> None:
    loop = tied_loop(Quadratic(0.0), lr=0.3)
    theta, carry = generic_theta(loop), loop.start(sample(loop.family))
    theta = {k: 1 * v for k, v in theta.items()}
    blind = [
        lambda loop, theta, rollout: loop.losses(theta, rollout.end, "valid").detach().mean(),
        lambda loop, theta, rollout: torch.ones(()),
        lambda loop, theta, rollout: theta["strength"] ** 2,
    ]
    if isinstance(estimator, Truncated):
        estimator = Truncated(2, 4, Tape.FULL)
    for objective in blind:
        with pytest.raises(ValueError, match=r"\['start/b', 'start/w'.*no path to the objective"):
            estimator.estimate(loop, theta, objective, carry)


NEGATIVE: list[tuple[Callable[[], Any], str]] = [
    (lambda: Unrolled(-1), "num_steps=-1 is not a count"),
    (lambda: Unrolled(2.5), "num_steps=2.5 is not a count"),  # type: ignore[arg-type]
    (lambda: Unrolled(True), "num_steps=True is not a count"),
    (lambda: Unrolled(4, segment=0), "segment=0 is not a count; pass an integer of at least 1"),
    (lambda: Unrolled(4, offload=True), "offload=True moves the starts of segments, and there are none; pass segment="),
    (lambda: Execution(compile=True, mixed_mode=True), "compile=True and mixed_mode=True exclude each other"),
    (lambda: Unrolled(4, Tape.NONE), "records nothing"),
    (lambda: FirstOrder(-3), "num_steps=-3"),
    (lambda: Truncated(0, 4), "num_steps=0 is not a count; pass an integer of at least 1"),
    (lambda: Truncated(2, -4), "horizon=-4 is not a count"),
    (lambda: Truncated(2, 4, Tape.NONE), "records nothing"),
    (lambda: TruncatedBackprop(4, -1), "num_backward_steps=-1 is not a count"),
    (lambda: TruncatedBackprop(4, 5), r"num_backward_steps=5 exceeds num_steps=4.*Unrolled\(num_steps\)"),
    (lambda: Implicit(-1), "num_steps=-1 is not a count"),
    (lambda: Implicit(4, tolerance=0.0), "tolerance=0.0 .*must be positive"),
    (lambda: Implicit(4, tolerance=math.nan), "tolerance=nan"),
    (lambda: ConjugateGradient(0), "num_iterations=0"),
    (lambda: ConjugateGradient(5, damping=-0.1), "damping=-0.1 must not be negative"),
    (lambda: ConjugateGradient(5, damping=math.nan), "damping=nan"),
    (lambda: Neumann(0), "num_terms=0"),
    (lambda: Neumann(5, step_size=0.0), "step_size=0.0 must be positive"),
    (lambda: Neumann(5, step_size=-1.0), "step_size=-1.0 must be positive"),
    (lambda: GMRES(-5), "num_iterations=-5"),
    (lambda: GMRES(tolerance=-1.0), "tolerance=-1.0 is a relative residual"),
    (lambda: BootstrappedTarget(0, 0.1), "num_target_steps=0 is not a count; pass an integer of at least 1"),
    (lambda: BootstrappedTarget(2, -0.1), "step_size=-0.1 must be positive"),
    (lambda: BootstrappedTarget(2, math.nan), "step_size=nan must be positive"),
    (lambda: BootstrappedTarget(2, 0.1, "test"), "split='test' is neither"),  # type: ignore[arg-type]
    (lambda: Execution(0), "chunk_size=0 is not a count; pass an integer of at least 1"),
    (lambda: Execution(-2), "chunk_size=-2"),
    (lambda: Execution(2.0), "chunk_size=2.0"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "message"), NEGATIVE, ids=[message[:30] for _, message in NEGATIVE])
def test_negative_counts_and_rates(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_negative_number_of_steps_in_a_run() -> None:
    loop = InnerLoop(Quadratic(), optimizers.make("sgd"))
    with pytest.raises(ValueError, match="num_steps=-2 is not a count"):
        loop.run(generic_theta(loop), loop.start(sample(loop.family)), -2)


def test_what_is_no_linear_solver() -> None:
    with pytest.raises(TypeError, match=r"solver=5 is no LinearSolver; pass ConjugateGradient\(10\)"):
        Implicit(4, solver=5)  # type: ignore[arg-type]


def summed(loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
    return loop.losses(theta, rollout.end, "valid").sum()


def worst_task(loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
    return loop.losses(theta, rollout.end, "valid").max()


def root_mean_square(loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
    return loop.losses(theta, rollout.end, "valid").square().mean().sqrt()


def summed_path(loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
    return rollout.losses.sum()


def path_median(loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
    return rollout.losses.median()


@pytest.mark.parametrize("objective", [summed, worst_task, root_mean_square, summed_path, path_median])
@pytest.mark.parametrize("estimator", ESTIMATORS[:6], ids=str)
def test_an_objective_that_is_no_mean_over_tasks(estimator: GradientEstimator, objective: MetaObjective) -> None:
    rule, inner, num_passes = FromStart(template(Quadratic())), Tied(), 5
    if isinstance(estimator, Truncated) or estimator == FirstOrder(4):
        rule, inner, num_passes = optimizers.make("sgd"), TaskLoss(), 4
    # Whether it is a mean shows in its value on two tasks and on each alone: forward passes, all at the start.
    message = rf"the objective {objective.__name__} is not a mean over tasks: on two tasks it gives"
    refuses(message, rule, estimator, objective, inner=inner, num_passes=num_passes)


def path_of_the_worst_task(loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
    return rollout.losses.mean(0).max()


def test_an_objective_that_is_no_mean_is_noticed_on_tasks_that_start_alike() -> None:
    loop = InnerLoop(Quadratic(), optimizers.make("sgd"))
    twins = {k: v.expand(2, *v.shape[1:]) for k, v in sample(loop.family, 1).items()}
    with pytest.raises(ValueError, match="path_of_the_worst_task is not a mean over tasks"):
        Unrolled(2).estimate(loop, generic_theta(loop), path_of_the_worst_task, loop.start(twins))


def test_a_sum_over_a_single_task_is_still_a_sum() -> None:
    loop = InnerLoop(Quadratic(), optimizers.make("sgd"))
    with pytest.raises(ValueError, match="not a mean over tasks"):
        Unrolled(2).estimate(loop, generic_theta(loop), summed, loop.start(sample(loop.family, 1)))


def test_a_matching_that_is_no_distance_per_task() -> None:
    objective = BootstrappedTarget(2, 0.1, matching=lambda loop, target, end, split: end.params["w"].square().sum())
    loop = InnerLoop(Quadratic(), optimizers.make("sgd"))
    with pytest.raises(ValueError, match=r"one distance per task, shape \(2,\), got \(\)"):
        Unrolled(2).estimate(loop, generic_theta(loop), objective, loop.start(sample(loop.family)))


def per_task(loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
    return loop.losses(theta, rollout.end, "valid")


def as_number(loop: InnerLoop, theta: Theta, rollout: Any) -> float:
    return float(loop.losses(theta, rollout.end, "valid").mean().detach())


@pytest.mark.parametrize("estimator", [Unrolled(4), Implicit(4)], ids=str)
def test_an_objective_that_returns_no_scalar(estimator: GradientEstimator) -> None:
    for message, objective in ((r"a tensor of shape \(2,\)", per_task), ("float", as_number)):
        rule, message = FromStart(template(Quadratic())), f"must return a scalar tensor, got {message}"
        refuses(message, rule, estimator, objective, inner=Tied(), num_passes=5)  # type: ignore[arg-type]


def path_mean(loop: InnerLoop, theta: Theta, rollout: Any) -> Tensor:
    return loop.losses(theta, rollout.end, "valid").mean() + 0.1 * rollout.losses.mean()


@pytest.mark.parametrize("objective", [SumOfLosses(), MeanLogLoss(), LogMeans(), path_mean])
@pytest.mark.parametrize("solver", [ConjugateGradient(5), GMRES(), Neumann(5)], ids=str)
def test_an_objective_of_the_path_under_an_implicit_gradient(objective: MetaObjective, solver: Any) -> None:
    refuses(
        "reads the losses along the way; use an objective of the end",
        FromStart(template(Quadratic())),
        Implicit(4, solver),
        objective,
        inner=Tied(),
        num_passes=6,
    )


def test_an_unconverged_inner_problem_warns_after_the_run() -> None:
    loop = tied_loop(Quadratic(0.0), lr=0.01)
    with pytest.warns(ConvergenceWarning, match=r"after 5 steps: stationarity .* linear residual .*Take more steps"):
        found = Implicit(5).estimate(loop, generic_theta(loop), FinalLoss(), loop.start(sample(loop.family)))
    assert all(g.isfinite().all() and g.any() for g in found.grads.values())


@pytest.mark.parametrize(
    ("returned", "got"),
    [(lambda carry: carry.params, "dict"), (lambda carry: carry._replace(state=None), "without a state")],
)
def test_an_inner_solver_that_returns_no_carry(returned: Callable[[Carry], Any], got: str) -> None:
    loop = tied_loop(Quadratic(0.0))
    carry = loop.start(sample(loop.family))
    with pytest.raises(TypeError, match=rf"must return a begun Carry.*got .*{got}"):
        Implicit(5, inner=lambda loop, theta, carry, num_steps: returned(carry)).estimate(
            loop, generic_theta(loop), FinalLoss(), carry
        )


def test_a_carry_that_has_not_begun_has_no_losses() -> None:
    loop = InnerLoop(Quadratic(), optimizers.make("sgd"))
    with pytest.raises(ValueError, match=r"the carry has not begun: pass it through loop\.begin"):
        loop.losses({}, loop.start(sample(loop.family)), "train")


def test_tasks_and_parameters_that_are_not_batched() -> None:
    family = Quadratic()
    loop = InnerLoop(family, optimizers.make("sgd"))
    tasks = sample(family, 3)
    with pytest.raises(ValueError, match="must share one leading dimension"):
        loop.start({**tasks, "c": tasks["c"][:2]})
    with pytest.raises(ValueError, match="needs tensors as leaves"):
        loop.start({})

    class Unbatched(Quadratic):
        def init_params(self, tasks):
            return {"w": torch.zeros(2, 2), "b": torch.zeros(2)}

    with pytest.raises(ValueError, match=r"Unbatched\.init_params must return .*leading dimension of 3 tasks"):
        InnerLoop(Unbatched(), loop.rule).start(tasks)

    class OneBatch(Quadratic):
        def batch(self, tasks, step, split):
            return {k: v[:1] for k, v in super().batch(tasks, step, split).items()}

    once = InnerLoop(OneBatch(), loop.rule)
    with pytest.raises(ValueError, match=r"OneBatch\.batch must return a leading dimension of 3 tasks, got 1"):
        once.begin(generic_theta(loop), once.start(tasks))
