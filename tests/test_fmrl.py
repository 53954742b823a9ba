"""FMRL (Balcan, Khodak and Talwalkar 2019) through the meta-trainer, against the whole recursion written by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from learnedopt import (
    BestInHindsight,
    Execution,
    FinalLoss,
    FollowTheLeader,
    FollowTheRegularizedLeader,
    GuessAndGrow,
    InnerLoop,
    LastIterate,
    LeaderAndRadius,
    MetaTrainer,
    PerName,
    ProjectedGradient,
    RegularizedSolution,
    SumOfLossesSolver,
    Target,
    TargetMatching,
    TaskFamily,
    Unrolled,
)
from learnedopt.core.named_tensors import NamedTensors
from learnedopt.core.objective import TaskMean
from learnedopt.evaluation.regret import RecordedTasks, Regret, regret
from learnedopt.optimizers import Ball, Entropic, LearnedInit, MirrorDescent, Projected, Simplex
from learnedopt.tasks import Clusters, Experts, LogisticRegression

pytestmark = pytest.mark.usefixtures("float64")

M, T, G, D0, GAMMA = 5, 12, 1.3, 0.1, 1.2
ALL = Execution(chunk_size=10_000)


def family(shape: Any = "quadratic", **options: Any) -> Clusters:
    return Clusters(dim=3, num_losses=M, shape=shape, **{"noise": 0.3, "radius": 0.6, **options})


def learner(**options: Any) -> MirrorDescent:
    return MirrorDescent(lipschitz=G, num_steps=M, **options)


def train(
    tasks: TaskFamily,
    rule: Any,
    objective: TaskMean,
    meta_optimizer: Any,
    num_tasks: int = T,
    start: Tensor | None = None,
) -> tuple[RecordedTasks, MetaTrainer]:
    """Meta-train on ``num_tasks`` tasks, one a meta-step, from the origin; return what was met."""
    template = {"x": torch.zeros(3) if start is None else start}
    recorded = RecordedTasks(objective)
    loop = InnerLoop(tasks, LearnedInit(rule, template))
    trainer = MetaTrainer(loop, Unrolled(0), recorded, meta_optimizer, tracker=None, seed=3)
    trainer.run(num_tasks)
    return recorded, trainer


GROW = PerName({"init/*": lambda p: FollowTheLeader(p, math.sqrt(M)), "*radius": lambda p: GuessAndGrow(p, GAMMA)})


def ball(x: Tensor, radius: float) -> Tensor:
    return x * min(1.0, radius / float(x.norm()))


def descent(points: Tensor, phi: Tensor, eta: float, radius: float) -> Tensor:
    x = phi
    for c in points:
        x = ball(x - eta * (x - c), radius)
    return x


@pytest.mark.parametrize("grows", [False, True], ids=["known radius", "guess and grow"])
@pytest.mark.parametrize("kind", ["FAL", "FLI online", "FLI batch"])
def test_the_recursion_is_the_one_written_by_hand(kind: str, grows: bool) -> None:
    """Quadratics in a ball: ``phi <- phi + (sqrt m / S)(target - phi)``, and D grows where the target is further."""
    onto, start_radius = Ball(1.1), 1.0 if kind == "FLI online" and grows else D0 if grows else 0.8
    own = learner(radius=start_radius, learn=("radius",) if grows else ())
    target: dict[str, Target] = {
        "FAL": BestInHindsight(ProjectedGradient(onto), M),
        "FLI online": LastIterate(M),
        "FLI batch": BestInHindsight(FollowTheRegularizedLeader(own, onto), M),
    }
    objective = LeaderAndRadius(target[kind]) if grows else TargetMatching(target[kind])
    follow: Any = GROW if grows else lambda p: FollowTheLeader(p, math.sqrt(M))
    met, trainer = train(family(), Projected(own, onto), objective, follow)

    phi, radius, total, path = torch.zeros(3), start_radius, 0.0, []
    for t, points in enumerate(met.tasks["points"][:, 0], start=1):
        path.append((phi, radius))
        inverse = G * math.sqrt(M) / radius
        found = {
            "FAL": lambda points=points: ball(points.mean(0), 1.1),
            "FLI online": lambda points=points, phi=phi, inverse=inverse: descent(points, phi, 1 / inverse, 1.1),
            "FLI batch": lambda points=points, phi=phi, inverse=inverse: ball(
                (points.sum(0) + inverse * phi) / (M + inverse), 1.1
            ),
        }[kind]()
        if grows and t > 1 and float((phi - found).norm()) > radius:
            radius *= GAMMA
        total += math.sqrt(M)
        phi = phi + math.sqrt(M) / total * (found - phi)
    torch.testing.assert_close(met.thetas["init/x"], torch.stack([p for p, _ in path]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trainer.theta["init/x"].detach(), phi, rtol=1e-12, atol=1e-12)
    if grows:
        radii = torch.tensor([d for _, d in path])
        torch.testing.assert_close(met.thetas["rule/rule/radius"], radii, rtol=1e-12, atol=1e-12)
        assert float(radii[1]) == start_radius  # the first task changes nothing
        assert (float(trainer.theta["rule/rule/radius"].detach()) > start_radius) == (kind != "FLI online")


def test_fal_gives_the_mean_of_the_tasks_optima() -> None:
    objective = TargetMatching(BestInHindsight(SumOfLossesSolver(), M))
    met, trainer = train(family(), learner(), objective, FollowTheLeader)
    optima = met.tasks["points"][:, 0].mean(1)
    torch.testing.assert_close(trainer.theta["init/x"].detach(), optima.mean(0), rtol=1e-12, atol=1e-12)
    for t in range(1, T):
        torch.testing.assert_close(met.thetas["init/x"][t], optima[:t].mean(0), rtol=1e-12, atol=1e-12)


def test_tasks_are_weighted_by_their_losses() -> None:
    """Weights 1, 2, 3, ... in place of sqrt(m): the weighted mean."""
    objective = TargetMatching(BestInHindsight(ProjectedGradient(), M))
    met, trainer = train(family(), learner(), objective, lambda p: FollowTheLeader(p, lambda t: float(t)))
    optima, weights = met.tasks["points"][:, 0].mean(1), torch.arange(1.0, T + 1)
    expected = (weights[:, None] * optima).sum(0) / weights.sum()
    torch.testing.assert_close(trainer.theta["init/x"].detach(), expected, rtol=1e-12, atol=1e-12)


def test_the_regularised_leader_is_the_regularised_solution_at_the_radius() -> None:
    eta = 0.8 / (G * math.sqrt(M))
    same: list[Tensor] = []
    for target in (
        BestInHindsight(FollowTheRegularizedLeader(learner(radius=0.8)), M),
        RegularizedSolution(SumOfLossesSolver(), M, strength=1 / eta),
        RegularizedSolution(ProjectedGradient(), M, strength=1 / eta),
    ):
        met, _ = train(family("distance"), learner(radius=0.8), TargetMatching(target), FollowTheLeader)
        same.append(met.thetas["init/x"])
    torch.testing.assert_close(same[1], same[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(same[2], same[0], rtol=1e-12, atol=1e-12)


def test_the_entropic_leader_is_the_mean_of_mixed_vertices() -> None:
    tasks = Experts(num_experts=3, num_losses=M)
    objective = TargetMatching(BestInHindsight(ProjectedGradient(Simplex(mixing=0.1)), M))
    rule = MirrorDescent(Entropic(), num_steps=M)
    met, trainer = train(tasks, rule, objective, FollowTheLeader, start=torch.full((3,), 1 / 3))
    best = torch.nn.functional.one_hot(met.tasks["costs"][:, 0].sum(1).argmin(1), 3)
    mean = (0.9 * best + 0.1 / 3).mean(0)
    torch.testing.assert_close(trainer.theta["init/x"].detach(), mean, rtol=1e-12, atol=1e-12)
    pure = TargetMatching(BestInHindsight(ProjectedGradient(Simplex()), M))
    with pytest.raises(ValueError, match=r"smallest entry is 0.*mix the start, or the targets.*uniform"):
        train(tasks, rule, pure, FollowTheLeader, start=torch.full((3,), 1 / 3))


def test_the_radius_grows_to_that_of_the_optima_with_fal_and_stays_with_fli() -> None:
    """FLI deadlocks where the mean gradient is below G / sqrt(m): no last iterate is further away than the guess."""
    tasks, bound = family("distance", radius=0.6, noise=1.0, width=0.5), 1.05 * math.sqrt(M)  # gradients are below 1
    ends = {}
    for name, target in (("FAL", BestInHindsight(ProjectedGradient(), M)), ("FLI", LastIterate(M))):
        own = MirrorDescent(radius=D0, lipschitz=bound, num_steps=M, learn=("radius",))
        met, trainer = train(tasks, own, LeaderAndRadius(target), GROW, 60)
        ends[name] = float(trainer.theta["rule/radius"].detach())
        assert bool((met.thetas["rule/radius"].diff() >= 0).all())
    assert ends["FLI"] == D0
    assert 0.5 < ends["FAL"] < 1.2  # it overshoots the optima's own radius


# Regret over tasks.


@pytest.mark.parametrize("leads", [False, True], ids=["descent", "leader"])
@pytest.mark.parametrize("geometry", ["euclidean", "entropic"])
def test_task_averaged_regret_is_within_its_bound_and_below_a_single_tasks(geometry: str, leads: bool) -> None:
    euclidean, num_tasks = geometry == "euclidean", 40
    tasks = Clusters(dim=3, num_losses=20, radius=0.1, noise=0.1) if euclidean else Experts(3, 20, concentration=0.1)
    onto: Any = Ball(1.5) if euclidean else Simplex(mixing=0.05)
    own = MirrorDescent(
        *(() if euclidean else (Entropic(),)), radius=0.1, num_steps=20, learn=("radius",) if euclidean else ()
    )
    rule = Projected(own, onto) if euclidean else own
    start = torch.zeros(3) if euclidean else torch.full((3,), 1 / 3)
    best = BestInHindsight(ProjectedGradient(onto), 20)
    met, trainer = train(
        tasks,
        rule,
        LeaderAndRadius(best) if euclidean else TargetMatching(best),
        GROW if euclidean else FollowTheLeader,
        num_tasks,
        start,
    )
    leader = FollowTheRegularizedLeader(own, onto if euclidean else None, tolerance=1e-8) if leads else None
    loop = InnerLoop(tasks, trainer.loop.rule, ALL)
    found = regret(loop, own, met.thetas, met.tasks, 20, ProjectedGradient(onto), leader)
    averages, bounds = found.averaged()
    assert bool((averages <= bounds).all()) and float(averages[-1]) > 0
    alone = {k: v[:1].expand(v.shape) for k, v in met.thetas.items()}
    if euclidean:
        alone["rule/rule/radius"] = torch.full((num_tasks,), 1.5)
    single = regret(loop, own, alone, met.tasks, 20, ProjectedGradient(onto), leader)
    assert float(found.regret[10:].mean()) < 0.7 * float(single.regret[10:].mean())
    if euclidean:
        nothing = {k: 0 * v if k.endswith("radius") else v for k, v in alone.items()}
        with pytest.raises(ValueError, match=r"radius' must be positive, its least entry is 0"):
            regret(loop, own, nothing, met.tasks, 20, ProjectedGradient(onto))


def test_what_is_not_a_number_is_not_within_a_bound() -> None:
    regrets = torch.tensor([1.0, 5.0, -9.0, math.nan])
    assert Regret(regrets, torch.full((4,), 2.0), regrets, regrets).violations() == 2


def test_what_is_recorded_is_what_was_met() -> None:
    objective = RecordedTasks(FinalLoss())
    loop = InnerLoop(family(), LearnedInit(learner(), {"x": torch.zeros(3)}))
    theta = loop.init_theta(torch.Generator())
    tasks = loop.family.sample(3, torch.Generator().manual_seed(0))
    value = Unrolled(0).estimate(loop, theta, objective, loop.start(tasks)).loss
    assert float(value) == pytest.approx(float(Unrolled(0).estimate(loop, theta, FinalLoss(), loop.start(tasks)).loss))
    assert torch.equal(objective.tasks["points"], tasks["points"])
    assert objective.thetas["init/x"].shape == (3, 3) and objective.end_only
    theta["init/x"].add_(1.0)
    assert float(objective.thetas["init/x"].abs().max()) == 0


# The objective and its meta-optimizer.


@pytest.mark.parametrize(("radius", "grows"), [(0.2, True), (5.0, False)])
def test_leader_and_radius_has_the_gradient_that_it_says(radius: float, grows: bool) -> None:
    loop = InnerLoop(family(), LearnedInit(learner(radius=radius, learn=("radius",)), {"x": torch.zeros(3)}), ALL)
    theta = loop.init_theta(torch.Generator())
    tasks = loop.family.sample(4, torch.Generator().manual_seed(0))
    objective = LeaderAndRadius(BestInHindsight(ProjectedGradient(), M))
    found = Unrolled(0).estimate(loop, theta, objective, loop.start(tasks))
    optima = tasks["points"][:, 0].mean(1)
    torch.testing.assert_close(found.grads["init/x"], -optima.mean(0), rtol=1e-12, atol=1e-12)
    distances = optima.norm(dim=1)
    assert bool((distances > radius).all()) == grows
    slope = -1 / radius if grows else 0.0
    assert float(found.grads["rule/radius"]) == pytest.approx(slope, rel=1e-12)
    value = 0.5 * distances.square().mean() + (distances.log() - math.log(radius)).clamp(min=0).mean()
    assert float(found.loss) == pytest.approx(float(value), rel=1e-12)
    doubled = LeaderAndRadius(objective.target, divergence=lambda *args: 4 * (args[1].params["x"] ** 2).sum(1) / 2)
    value = 0.5 * distances.square().mean() + ((2 * distances).log() - math.log(radius)).clamp(min=0).mean()
    assert float(Unrolled(0).estimate(loop, theta, doubled, loop.start(tasks)).loss) == pytest.approx(float(value))


def test_guess_and_grow_multiplies_where_the_gradient_is_negative_from_the_second_step_on() -> None:
    guess = torch.tensor([0.1, 0.2], requires_grad=True)
    optimizer = GuessAndGrow([guess], factor=1.5)
    for gradient, expected in (
        ([-1.0, -1.0], [0.1, 0.2]),
        ([-1.0, 2.0], [0.15, 0.2]),
        ([0.0, -1e-9], [0.15, 0.3]),
    ):
        guess.grad = torch.tensor(gradient)
        optimizer.step()
        torch.testing.assert_close(guess.detach(), torch.tensor(expected))
    saved = copy.deepcopy(optimizer.state_dict())
    other = GuessAndGrow([guess], factor=3.0)
    other.load_state_dict(saved)
    guess.grad = torch.tensor([-1.0, 1.0])
    other.step()
    torch.testing.assert_close(guess.detach(), torch.tensor([0.225, 0.3]))  # the factor and the count were saved


def test_a_run_goes_on_exactly_where_it_stopped(tmp_path: Any) -> None:
    own = learner(radius=D0, learn=("radius",))
    loop = InnerLoop(family(), LearnedInit(own, {"x": torch.zeros(3)}))
    objective = LeaderAndRadius(BestInHindsight(ProjectedGradient(), M))

    def trainer(**options: Any) -> MetaTrainer:
        return MetaTrainer(loop, Unrolled(0), objective, GROW, tracker=None, seed=3, **options)

    whole = trainer().run(8).theta
    path = tmp_path / "checkpoint.pt"
    trainer(checkpoint=path).run(5)
    resumed = trainer(checkpoint=path).run(8).theta
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    assert float(whole["rule/radius"]) > D0


# What cannot work is said.


def separable(solver: Any) -> Callable[[], Any]:
    def run() -> Any:
        rule = LearnedInit(MirrorDescent(num_steps=1), {"weight": torch.zeros(5)})
        loop = InnerLoop(LogisticRegression(dim=5, num_train=4), rule)
        objective = TargetMatching(BestInHindsight(solver, 1))
        return MetaTrainer(loop, Unrolled(0), objective, FollowTheLeader, tracker=None).run(1)

    return run


def objective_on(rule: MirrorDescent, **options: Any) -> Callable[[], Any]:
    objective = LeaderAndRadius(LastIterate(M), **options)
    return lambda: train(family(), rule, objective, GROW if rule.learned else FollowTheLeader, 1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GuessAndGrow([torch.ones(1)], factor=1.0), ValueError, r"factor=1\.0 does not let a guess grow"),
        (lambda: GuessAndGrow([torch.ones(1)], factor="2"), TypeError, "factor='2' is a str"),  # type: ignore[arg-type]
        (lambda: GuessAndGrow([torch.zeros(1)]), ValueError, "a guess of 0 stays there"),
        (lambda: GuessAndGrow(NamedTensors({"radius": torch.tensor(-1.0)})), ValueError, "a guess of -1"),
        (lambda: LeaderAndRadius(FinalLoss()), TypeError, "is no Target"),  # type: ignore[arg-type]
        (lambda: LeaderAndRadius(LastIterate(1), divergence=1.0), TypeError, "cannot be called"),  # type: ignore[arg-type]
        (objective_on(learner()), ValueError, r"radius.* matches none|one radius is wanted"),
        (objective_on(learner(learn=("radius",)), radius="*rate"), ValueError, r"'\*rate'"),
        (separable(ProjectedGradient(max_iterations=200)), ValueError, "no minimum of the losses.*separable"),
        (separable(SumOfLossesSolver()), ValueError, "minimi"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
