"""Meta-gradients through the inner loop: against differences, closed forms, loops cut by hand, and another library."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from oracles import Reference, data, gradient_of, relative_error
from problems import (
    FLOAT,
    Anchored,
    FromStart,
    Quadratic,
    Sensitive,
    Skewed,
    TanhMLP,
    Tied,
    generic_theta,
    imaml_loop,
    sample,
    template,
)
from torch import Tensor, nn
from torch.nn import functional
from turns import by_turns

from learnedopt import (
    GMRES,
    BootstrappedTarget,
    ConjugateGradient,
    Execution,
    FinalLoss,
    FirstOrder,
    GradientEstimator,
    Implicit,
    InnerLoop,
    KLDivergence,
    LogMeans,
    MeanLogLoss,
    Neumann,
    SumOfLosses,
    Tape,
    TaskFamily,
    TaskLoss,
    Tasks,
    Theta,
    Truncated,
    TruncatedBackprop,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.objective import MetaObjective, TaskMean

pytestmark = pytest.mark.usefixtures("float64")

OBJECTIVES = [
    FinalLoss(),
    SumOfLosses(),
    MeanLogLoss(),
    LogMeans(2.0, last=0.5),
    CHASED := BootstrappedTarget(3, 0.2),
    BootstrappedTarget(2, 0.3, "train", KLDivergence()),
]
TAPES = [Tape.FULL, Tape.FIRST_ORDER]


def variants(family: TaskFamily) -> dict[str, UpdateRule]:
    """Return rules that the registry's examples leave out: every switch on, and compositions."""
    like = template(family)
    lstm = optimizers.make("lstm", hidden_size=3)
    groups = {"first": ("w*", lstm), "rest": ("*", optimizers.make("adam"))}
    return {
        "dampened momentum": optimizers.make("momentum", dampening=0.2, weight_decay=0.1),
        "centered rmsprop": optimizers.make("rmsprop", centered=True, momentum=0.5, weight_decay=0.1),
        "decayed adam": optimizers.make("adam", weight_decay=0.1),
        "lstm on a learned start": optimizers.make("learned-init", template=like, rule=lstm),
        "clipped norm": optimizers.make("clip", rule=optimizers.make("nesterov"), max_norm=0.7),
        "partition": optimizers.make("partition", groups=groups),
    }


PROXIMAL = ("imaml", "learned strength")
OF_ONE_LENGTH = ("celo2", "rnnprop", "general")
"""Rules that a target of several steps under the squared distance is refused to."""
HORIZON = 5
"""Of rules that read it; no run here is longer."""


def loop_of(name: str, family: TaskFamily, execution: Execution = Execution()) -> InnerLoop:  # noqa: B008
    """Return the loop of a rule, or of MAML's rule on a proximal inner objective."""
    if name in PROXIMAL:
        return imaml_loop(family, execution, learn=name == "learned strength")
    rule = optimizers.example(name, template(family)) if name in optimizers.names() else variants(family)[name]
    return InnerLoop(family, rule, execution, horizon=HORIZON if rule.reads_horizon else None)


def told(value: Any) -> str | None:
    """Return how a value is called in the name of a test."""
    if isinstance(value, TaskMean):
        return "kl" if value is OBJECTIVES[-1] else type(value).__name__
    return value.value if isinstance(value, Tape) else type(value).__name__ if isinstance(value, UpdateRule) else None


@pytest.mark.parametrize(
    ("tape", "name", "objective"),
    by_turns(product(TAPES, [*optimizers.names(), *variants(TanhMLP()), *PROXIMAL]), [*product(OBJECTIVES)]),
    ids=told,
)
def test_a_network_matches_finite_differences(name: str, objective: MetaObjective, tape: Tape) -> None:
    """Detached tapes with the recorded gradients and losses held; a bootstrapped target at its base value."""
    family, num_steps = TanhMLP(), 3
    loop = loop_of(name, family)
    theta, tasks = generic_theta(loop), sample(family, 1)
    if name == "learned strength" and tape is Tape.FIRST_ORDER:
        with pytest.raises(ValueError, match=r"\['strength'\] have no path.*first-order tape"):
            Unrolled(num_steps, tape).estimate(loop, theta, objective, loop.start(tasks))
        return
    if name in OF_ONE_LENGTH and objective is CHASED:
        with pytest.raises(ValueError, match="updates keep their length"):
            Unrolled(num_steps, tape).estimate(loop, theta, objective, loop.start(tasks))
        return
    found = Unrolled(num_steps, tape).estimate(loop, theta, objective, loop.start(tasks))
    reference = Reference(loop, theta, objective, tasks, num_steps, full=tape is Tape.FULL)
    assert abs(float(found.loss) - float(reference.value(theta).detach())) < 1e-12
    assert reference.difference_error(found.grads) < 1e-7


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=told)
@pytest.mark.parametrize("tape", TAPES, ids=told)
@pytest.mark.parametrize("rule", [Anchored(), Skewed(), Sensitive()], ids=told)
def test_awkward_rules_match_a_plain_loop(
    rule: UpdateRule, objective: MetaObjective, chunk_size: int, tape: Tape
) -> None:
    loop = InnerLoop(Quadratic(), rule, Execution(chunk_size))
    theta, tasks = generic_theta(rule), sample(Quadratic(), 3)
    expected = Reference(loop, theta, objective, tasks, 5, full=tape is Tape.FULL).gradient()
    for segment in (None, 1, 2):
        found = Unrolled(5, tape, segment=segment).estimate(loop, theta, objective, loop.start(tasks))
        assert relative_error(found.grads, expected) < 1e-12


@pytest.mark.parametrize("tape", TAPES, ids=told)
@pytest.mark.parametrize("name", ["lstm", "adam", "meta-sgd", "lstm on a learned start", "partition", "imaml"])
def test_segments_match_the_plain_unroll(name: str, tape: Tape) -> None:
    family = TanhMLP()
    loop = loop_of(name, family, Execution(2))
    theta, carry = generic_theta(loop), loop.start(sample(family, 3))
    for objective in (SumOfLosses(), BootstrappedTarget(2, 0.3, "train", KLDivergence())):
        plain = Unrolled(5, tape).estimate(loop, theta, objective, carry)
        for segment in (1, 2, 9):
            found = Unrolled(5, tape, segment=segment).estimate(loop, theta, objective, carry)
            assert abs(float(found.loss - plain.loss)) < 1e-12
            assert relative_error(found.grads, plain.grads) < 1e-12


def test_offloaded_segments_are_put_aside_and_match(monkeypatch: pytest.MonkeyPatch) -> None:
    family = TanhMLP()
    rule = optimizers.example("adam", template(family))
    loop, theta = InnerLoop(family, rule), generic_theta(rule)
    carry, kept = loop.start(sample(family, 2)), []
    expected = Unrolled(5).estimate(loop, theta, SumOfLosses(), carry)
    on_cpu = torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", lambda **how: kept.append(how) or on_cpu(**how))
    found = Unrolled(5, segment=2, offload=True).estimate(loop, theta, SumOfLosses(), carry)
    assert relative_error(found.grads, expected.grads) < 1e-12
    assert kept == 6 * [{"pin_memory": False}]  # two tasks, three segments


def test_windows_without_a_horizon_go_on_for_ever() -> None:
    family = Quadratic()
    loop = loop_of("momentum", family)
    theta, tasks = generic_theta(loop), sample(family)
    carry = loop.start(tasks)
    for window in range(12):
        found = Truncated(3).estimate(loop, theta, FinalLoss(), carry)
        bounded = Truncated(3, 36).estimate(loop, theta, FinalLoss(), carry)
        assert all(torch.equal(found.grads[k], g) for k, g in bounded.grads.items())
        carry = found.carry
        assert carry.step == 3 * window + 3 and (bounded.carry is None) == (window == 11)


def test_segments_go_on_from_a_begun_carry() -> None:
    family = TanhMLP()
    loop = loop_of("lstm", family)
    theta = generic_theta(loop)
    carry = loop.run(theta, loop.start(sample(family)), 3, Tape.NONE).end
    plain = Unrolled(4).estimate(loop, theta, SumOfLosses(), carry)
    found = Unrolled(4, segment=3).estimate(loop, theta, SumOfLosses(), carry)
    assert relative_error(found.grads, plain.grads) < 1e-12


@pytest.mark.parametrize(
    ("name", "tape", "chunk_size"),
    by_turns(product([*optimizers.names(), "imaml"]), [*product(TAPES, (1, 2))]),
    ids=told,
)
def test_one_window_as_long_as_the_horizon_is_the_unroll_exactly(name: str, chunk_size: int, tape: Tape) -> None:
    family = TanhMLP()
    loop = loop_of(name, family, Execution(chunk_size))
    theta, carry = generic_theta(loop), loop.start(sample(family, 3))
    whole = Unrolled(4, tape).estimate(loop, theta, SumOfLosses(), carry)
    window = Truncated(4, 4, tape).estimate(loop, theta, SumOfLosses(), carry)
    assert window.carry is None and torch.equal(window.loss, whole.loss)
    assert all(torch.equal(window.grads[k], g) for k, g in whole.grads.items())


@pytest.mark.parametrize("tape", TAPES, ids=told)
@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("name", ["lstm", "adam", "imaml", "meta-sgd", "lstm on a learned start"])
def test_windows_are_unrolls_detached_by_hand_and_the_episode_ends(name: str, chunk_size: int, tape: Tape) -> None:
    family = TanhMLP()
    loop = loop_of(name, family, Execution(chunk_size))
    theta, tasks = generic_theta(loop), sample(family, 3)
    carry, lost = loop.start(tasks), [k for k in theta if k.startswith("init/") and name != "imaml"]
    if name == "imaml" and tape is Tape.FIRST_ORDER:
        lost = [k for k in theta if k.startswith("init/")]  # the pull is part of the gradient, which is detached
    for window in range(3):
        found = Truncated(2, 6, tape).estimate(loop, theta, SumOfLosses(), carry)
        reference = Reference(loop, theta, SumOfLosses(), tasks, 2, full=tape is Tape.FULL, skip=2 * window)
        assert relative_error(found.grads, reference.gradient()) < 1e-12
        assert found.info.get("zero_gradient", []) == (sorted(lost) if window else [])
        assert all(bool(found.grads[k].any()) == (k not in lost or window == 0) for k in theta)
        assert found.info["losses"].shape == (2,)
        carry = found.carry
        if window < 2:
            assert carry is not None and carry.step == 2 * window + 2
            assert not any(p.requires_grad for p in carry.params.values())
    assert carry is None


def test_k_rmd_of_all_steps_is_the_unroll_and_of_fewer_is_cut_by_hand() -> None:
    family = TanhMLP()
    loop = loop_of("lstm", family)
    theta, tasks = generic_theta(loop), sample(family)
    whole = Unrolled(5).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    for num_backward_steps in (1, 3, 5):
        found = TruncatedBackprop(5, num_backward_steps).estimate(loop, theta, FinalLoss(), loop.start(tasks))
        skip = 5 - num_backward_steps
        expected = Reference(loop, theta, FinalLoss(), tasks, num_backward_steps, skip=skip, whole=True).gradient()
        assert relative_error(found.grads, expected) < 1e-12
        assert float(found.loss) == pytest.approx(float(whole.loss), rel=1e-14)
        torch.testing.assert_close(found.info["losses"], whole.info["losses"], rtol=1e-14, atol=0)
        assert found.carry is None


class PartlyDead(Quadratic):
    """A quadratic of which two coordinates are never seen, as border pixels are not."""

    def loss(self, params: dict[str, Tensor], batch: Tasks) -> Tensor:
        alive = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=FLOAT)
        return super().loss({**params, "w": params["w"] * alive}, batch)


@pytest.mark.parametrize("tape", TAPES, ids=told)
@pytest.mark.parametrize("name", [*optimizers.names(), *variants(Quadratic()), *PROXIMAL])
def test_coordinates_without_a_gradient_leave_no_nan(name: str, tape: Tape) -> None:
    """Roots and logarithms have no derivative at 0."""
    family = PartlyDead()
    loop = loop_of(name, family)
    theta, tasks = generic_theta(loop), sample(family, 1)
    if name == "learned strength" and tape is Tape.FIRST_ORDER:
        with pytest.raises(ValueError, match="no path"):
            Unrolled(3, tape).estimate(loop, theta, SumOfLosses(), loop.start(tasks))
        return
    found = Unrolled(3, tape).estimate(loop, theta, SumOfLosses(), loop.start(tasks))
    reference = Reference(loop, theta, SumOfLosses(), tasks, 3, full=tape is Tape.FULL)
    assert reference.difference_error(found.grads) < 1e-7


class Scalar(TaskFamily):
    """``h x^2 / 2`` with a start and a curvature per task."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        return {
            "h": torch.linspace(0.7, 2.1, num_tasks, dtype=FLOAT),
            "x": torch.linspace(-1, 3, num_tasks, dtype=FLOAT),
        }

    def init_params(self, tasks: Tasks) -> dict[str, Tensor]:
        return {"x": tasks["x"]}

    def batch(self, tasks: Tasks, step: int, split: str) -> Tasks:
        return tasks

    def loss(self, params: dict[str, Tensor], batch: Tasks) -> Tensor:
        return 0.5 * batch["h"] * params["x"] ** 2


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_the_scalar_check_of_exact_and_detached_gradients(num_steps: int) -> None:
    """f = h x^2 / 2 with a learned rate a, so that x_K = (1 - a h)^K x_0."""
    family, a = Scalar(), 0.3
    tasks = sample(family, 4)
    loop, theta = InnerLoop(family, optimizers.make("sgd")), {"lr": torch.tensor(a, dtype=FLOAT)}
    h, x0 = tasks["h"], tasks["x"]
    x = (1 - a * h) ** num_steps * x0
    exact = (-num_steps * h**2 * (1 - a * h) ** (2 * num_steps - 1) * x0**2).mean()
    detached = (-h * x * x0 * (1 - (1 - a * h) ** num_steps) / a).mean()
    full = Unrolled(num_steps).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    first = FirstOrder(num_steps).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    torch.testing.assert_close(full.grads["lr"], exact, rtol=1e-13, atol=0)
    torch.testing.assert_close(first.grads["lr"], detached, rtol=1e-13, atol=0)
    assert num_steps == 1 or not torch.isclose(exact, detached, rtol=1e-3)


def test_meta_sgd_has_its_closed_form_on_quadratics() -> None:
    family = Quadratic()
    tasks = sample(family, 3)
    loop = InnerLoop(family, optimizers.make("meta-sgd", template=template(family)))
    theta = generic_theta(loop)

    def flat(prefix: str) -> Tensor:
        return torch.cat([theta[f"{prefix}/{k}"].reshape(-1) for k in ("w", "b")])

    x0, rates = flat("init"), flat("rule/lr")
    start, lr = torch.zeros(5, dtype=FLOAT), torch.zeros(5, dtype=FLOAT)
    for i in range(3):
        task = {k: v[i : i + 1] for k, v in tasks.items()}
        train, valid = data(family, task, 0, "train"), data(family, task, 1, "valid")
        gradient = train["hessian"] @ x0 - train["c"]
        test_gradient = valid["hessian"] @ (x0 - rates * gradient) - valid["c"]
        lr -= gradient * test_gradient / 3
        start += (torch.eye(5, dtype=FLOAT) - train["hessian"] @ torch.diag(rates)) @ test_gradient / 3
    found = Unrolled(1).estimate(loop, theta, FinalLoss(), loop.start(tasks)).grads
    for prefix, expected in (("init", start), ("rule/lr", lr)):
        got = torch.cat([found[f"{prefix}/{k}"].reshape(-1) for k in ("w", "b")])
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov"])
def test_another_library_gives_the_same_meta_gradient(name: str) -> None:
    """``higher`` on a small network: the start, and the learning rate, through four steps with mini-batches."""
    higher = pytest.importorskip("higher")
    family = TanhMLP()
    task = sample(family, 1)
    like = {k: p[0] for k, p in family.init_params(task).items()}
    loop = InnerLoop(family, optimizers.make("learned-init", rule=optimizers.make(name, learn=("lr",)), template=like))
    theta = {**{f"init/{k}": p + 0.1 for k, p in like.items()}, "rule/lr": torch.tensor(0.15, dtype=FLOAT)}
    found = Unrolled(4).estimate(loop, theta, FinalLoss(), loop.start(task))

    model = nn.ParameterDict({k: nn.Parameter(theta[f"init/{k}"].clone()) for k in like})
    lr = torch.tensor(0.15, dtype=FLOAT, requires_grad=True)
    kinds = {
        "sgd": torch.optim.SGD(model.parameters(), lr=0.15),
        "momentum": torch.optim.SGD(model.parameters(), lr=0.15, momentum=0.9),
        "nesterov": torch.optim.SGD(model.parameters(), lr=0.15, momentum=0.9, nesterov=True),
    }
    starts = list(model.parameters())
    names = list(dict(model.named_parameters()))
    functional_model = higher.monkeypatch(model, copy_initial_weights=False)
    stepper = higher.get_diff_optim(kinds[name], starts, fmodel=functional_model, override={"lr": [lr]})

    def loss_at(step: int, split: str) -> Tensor:
        batch = data(family, task, step, split)
        params = dict(zip(names, functional_model.parameters(), strict=True))
        hidden = (batch["x"] @ params["w1"] + params["b1"]).tanh()
        return functional.cross_entropy(hidden @ params["w2"], batch["y"])

    for step in range(4):
        stepper.step(loss_at(step, "train"))
    value = loss_at(4, "valid")
    expected = torch.autograd.grad(value, [*starts, lr])
    assert abs(float(found.loss) - float(value.detach())) < 1e-12
    wanted = {**{f"init/{k}": g for k, g in zip(names, expected, strict=False)}, "rule/lr": expected[-1]}
    assert relative_error(found.grads, wanted) < 1e-10


STILL = Quadratic(drift=0.0)
ESTIMATORS: dict[str, tuple[GradientEstimator, UpdateRule, TaskFamily]] = {
    "unrolled": (Unrolled(4), optimizers.make("lstm", hidden_size=3), TanhMLP()),
    "adam": (Unrolled(4), optimizers.make("adam"), TanhMLP()),
    "first order": (FirstOrder(4), optimizers.make("lstm", hidden_size=3), TanhMLP()),
    "segments": (Unrolled(5, segment=2), optimizers.make("momentum"), TanhMLP()),
    "no state": (Unrolled(4), Skewed(), Quadratic()),
    "flags and counts": (Unrolled(4, segment=3), Anchored(), Quadratic()),
    "truncated": (Truncated(2, 4), optimizers.make("lstm", hidden_size=3), TanhMLP()),
    "k-rmd": (TruncatedBackprop(5, 2), optimizers.make("rmsprop"), TanhMLP()),
    "implicit cg": (Implicit(50, ConjugateGradient(5)), FromStart(template(STILL)), STILL),
    "implicit neumann": (Implicit(50, Neumann(9)), FromStart(template(STILL)), STILL),
    "implicit gmres": (Implicit(70, GMRES()), Skewed(), STILL),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_tasks_one_by_one_in_chunks_and_all_at_once_agree(name: str) -> None:
    estimator, rule, family = ESTIMATORS[name]
    objective = Tied() if isinstance(rule, FromStart) else TaskLoss()
    tasks, found = sample(family, 5), {}
    theta = generic_theta(InnerLoop(family, rule, inner_objective=objective))
    for chunk_size in (1, 2, 99):
        loop = InnerLoop(family, rule, Execution(chunk_size), objective)
        found[chunk_size] = estimator.estimate(loop, theta, FinalLoss(), loop.start(tasks))
    for chunk_size, other in found.items():
        assert abs(float(other.loss - found[1].loss)) < 1e-12, chunk_size
        assert relative_error(other.grads, found[1].grads) < 1e-12
        torch.testing.assert_close(other.info["losses"], found[1].info["losses"], rtol=1e-12, atol=1e-13)
        if found[1].carry is not None:
            assert relative_error(other.carry.params, found[1].carry.params) < 1e-12
    alone = []
    for i in range(5):
        loop = InnerLoop(family, rule, inner_objective=objective)
        one = {k: v[i : i + 1] for k, v in tasks.items()}
        alone.append(estimator.estimate(loop, theta, FinalLoss(), loop.start(one)).grads)
    mean = {k: torch.stack([g[k] for g in alone]).mean(0) for k in theta}
    assert relative_error(found[1].grads, mean) < 1e-11


class Delayed(UpdateRule):
    """A rule whose meta-parameter reaches the parameters five steps after it has entered the state."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"kick": torch.tensor(0.3, dtype=FLOAT)}

    def init(self, theta, params):
        return params, tuple({k: torch.zeros_like(p) for k, p in params.items()} for _ in range(5))

    def update(self, theta, grads, state, params, loss):
        return state[-1], ({k: -theta["kick"] * g for k, g in grads.items()}, *state[:-1])


def test_a_late_path_is_a_path() -> None:
    family, rule = Quadratic(), Delayed()
    tasks = sample(family)
    loop, theta = InnerLoop(family, rule), generic_theta(rule)
    with pytest.raises(ValueError, match=r"'kick'.*no path to the objective through 5 recorded"):
        Unrolled(5).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    found = Unrolled(7).estimate(loop, theta, FinalLoss(), loop.start(tasks))
    assert relative_error(found.grads, Reference(loop, theta, FinalLoss(), tasks, 7).gradient()) < 1e-12


def test_an_objective_of_ones_own_is_differentiated_as_it_is() -> None:
    family = TanhMLP()
    loop = InnerLoop(family, optimizers.make("lstm", hidden_size=3))
    theta, tasks = generic_theta(loop), sample(family, 3)

    def weighted(loop: InnerLoop, theta: Theta, rollout) -> Tensor:
        lengths = torch.stack([v.square().sum() for v in theta.values()]).sum()
        return (rollout.losses * torch.arange(1, 5)[:, None]).sum(0).mean() + 0.1 * lengths

    found = Unrolled(4).estimate(loop, theta, weighted, loop.start(tasks))

    def value(theta: Theta) -> Tensor:
        return weighted(loop, theta, loop.run(theta, loop.start(tasks), 4, Tape.FULL))

    assert relative_error(found.grads, gradient_of(value, theta)) < 1e-13
