"""Learning while training: windows of one run against the engine's own, the written recursions, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plug_in_cases import bare
from problems import FLOAT, Sensitive, TanhMLP, sample
from torch import Tensor, nn

from learnedopt import (
    AcceptIfBetter,
    BestInHindsight,
    Bootstrap,
    BootstrappedTarget,
    DualAveraging,
    Execution,
    FinalLoss,
    HypergradientFeedback,
    HyperOptimizer,
    InnerLoop,
    KLDivergence,
    LastIterate,
    MeanLogLoss,
    MetaTrainer,
    PresentGradient,
    SumOfLosses,
    Tape,
    TargetMatching,
    Truncated,
    Unrolled,
    UpdateRule,
)
from learnedopt.core import tree
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers import (
    LSTM,
    SGD,
    Adam,
    Averaged,
    Clip,
    LearnedInit,
    LearnedRates,
    Momentum,
    Nesterov,
    per_tensor,
)
from learnedopt.plug_in.learner import RunDiverged

EXACT = 1e-12


class Run(TanhMLP):
    """One training run: whatever reads a step's loss reads the same batch."""

    def __init__(self, fixed: bool = False) -> None:
        self.fixed = fixed  # the same batch at every step

    def batch(self, tasks: Any, step: int, split: str) -> Any:
        return super().batch(tasks, 0 if self.fixed else step, "train")


class LogRate(UpdateRule):
    """Adam's direction at a learned logarithm of the rate for each tensor; an average that theta does not enter."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {f"log/{k}": torch.tensor(-3.0, dtype=FLOAT) for k in TEMPLATE}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, Adam(1.0, learn=()).init({}, params)[1]

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        deltas, state = Adam(1.0, learn=()).update({}, grads, state, params, loss)
        return {k: theta[f"log/{k}"].exp() * d for k, d in deltas.items()}, state


FAMILY = Run()
TASKS = sample(FAMILY, 1)
TEMPLATE: Params = tree.squeeze(FAMILY.init_params(TASKS))
RULES: dict[str, UpdateRule] = {
    "rates per tensor": per_tensor(SGD(0.2), TEMPLATE),
    "rates per coordinate": LearnedRates(TEMPLATE, "coordinate", lr=0.2),
    "averaged": Averaged(LearnedRates(TEMPLATE, "tensor", lr=0.3), "linear"),
    "momentum": Momentum(0.1, 0.5),
    "log rates": LogRate(),
    "lstm": LSTM(hidden_size=4),
    "reads the loss": Sensitive(),
    "clipped nesterov": Clip(Nesterov(0.1, 0.5, weight_decay=0.1), 0.5),
}
OBJECTIVES: dict[str, Any] = {
    "final": FinalLoss(),
    "sum": SumOfLosses(),
    "log": MeanLogLoss(),
    "feedback": HypergradientFeedback(),
    "bootstrap 1": BootstrappedTarget(1, 0.3),
    "bootstrap 3": TargetMatching(Bootstrap(3, 0.3)),
    "last iterate": TargetMatching(LastIterate(2)),
}


def sgd(lr: float) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Heavy ball: the meta-optimizer's memory counts too."""
    return lambda params: torch.optim.SGD(params, lr, momentum=0.5)


def start(rule: UpdateRule) -> tuple[UpdateRule, Theta]:
    theta = rule.init_theta(torch.Generator().manual_seed(1))
    return rule, {k: v.to(FLOAT) for k, v in theta.items()}


def variables() -> Params:
    return {k: p.clone().requires_grad_() for k, p in TEMPLATE.items()}


def backward(params: Params, step: int, family: Run = FAMILY) -> Tensor:
    for p in params.values():
        p.grad = None
    loss = family.loss(params, tree.squeeze(family.batch(TASKS, step, "train")))
    loss.backward()
    return loss.detach()


def learned(optimizer: HyperOptimizer, params: Params, num: int, family: Run = FAMILY) -> list[Theta]:
    """Train until theta has moved so many times, and return it after each."""
    found: list[Theta] = []
    for step in range(1000):
        before = optimizer.theta
        outputs = None
        if isinstance(getattr(optimizer.objective, "matching", None), KLDivergence):
            batch = tree.squeeze(family.batch(TASKS, step, "train"))
            outputs = lambda at, batch=batch: family.outputs(at, batch)  # noqa: E731
        optimizer.step(loss=backward(params, step, family), outputs=outputs)
        if optimizer.theta is not before:
            found.append(optimizer.theta)
        if len(found) == num:
            return found
    raise AssertionError("theta did not move")


def engine(
    rule: tuple[UpdateRule, Theta], estimator: Any, objective: Any, make: Any, num: int, family: Run = FAMILY
) -> list[Theta]:
    """Return theta after each meta-step of ``MetaTrainer`` on the family that the run is one task of."""

    class OneTask(type(family)):
        def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
            return TASKS

    loop = InnerLoop(OneTask(family.fixed), rule[0], Execution(vet=False))
    trainer = MetaTrainer(loop, estimator, objective, make, None, theta=rule[1])
    return [trainer.run(i).theta for i in range(1, num + 1)]


def difference(a: list[Theta], b: list[Theta]) -> float:
    assert len(a) == len(b)
    moved = max(float((a[-1][k] - a[0][k]).abs().max()) for k in a[0])
    assert moved > 1e-4  # or there is nothing to compare
    return max(float((x[k] - y[k]).abs().max()) for x, y in zip(a, b, strict=True) for k in x)


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rule", RULES)
def test_windows_are_those_of_the_engine(rule: str, objective: str, num_steps: int) -> None:
    begun, wanted = start(RULES[rule]), OBJECTIVES[objective]
    if rule == "log rates" and objective in ("bootstrap 3", "last iterate"):
        with pytest.raises(ValueError, match="keep their length"):  # by the engine too
            HyperOptimizer([*variables().items()], begun, num_steps, wanted)
        return
    make = sgd({"log": 0.003, "feedback": 0.003}.get(objective, 0.02))
    params = variables()
    found = learned(HyperOptimizer([*params.items()], begun, num_steps, wanted, make), params, 8)
    expected = engine(begun, Truncated(num_steps, tape=Tape.FIRST_ORDER), wanted, make, 8)
    assert difference(found, expected) <= EXACT


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_matching_of_outputs_reads_the_function_that_step_is_given(direction: Any, num_steps: int) -> None:
    family, begun, make = Run(fixed=True), start(RULES["momentum"]), sgd(0.3)
    objective = TargetMatching(Bootstrap(3, 0.3), KLDivergence(direction))
    params = variables()
    optimizer = HyperOptimizer([*params.items()], begun, num_steps, objective, make)
    found = learned(optimizer, params, 8, family)
    expected = engine(begun, Truncated(num_steps, tape=Tape.FIRST_ORDER), objective, make, 8, family)
    assert difference(found, expected) <= EXACT


@pytest.mark.parametrize("rule", ["momentum", "lstm"])
def test_a_run_goes_on_from_its_window_s_end(rule: str) -> None:
    """What is run ahead is taken back, memory included; with one batch throughout the engine does the same."""
    family, begun, make = Run(fixed=True), start(RULES[rule]), sgd(0.02)
    objective = BootstrappedTarget(4, 0.3, continue_from="rollout")
    params = variables()
    found = learned(HyperOptimizer([*params.items()], begun, 2, objective, make), params, 10, family)
    expected = engine(begun, Truncated(2, tape=Tape.FIRST_ORDER), objective, make, 10, family)
    assert difference(found, expected) <= EXACT


class Halved(UpdateRule):
    """A rule whose updates of one parameter are halved from its third step on, and those of another left out."""

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule

    def init_theta(self, generator: torch.Generator) -> Theta:
        return self.rule.init_theta(generator)

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        start, state = self.rule.init(theta, params)
        return start, (state, torch.zeros((), dtype=torch.int64))

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        grads = {**grads, "b1": torch.zeros_like(grads["b1"])}
        deltas, own = self.rule.update(theta, grads, state[0], params, loss)
        half = torch.where(state[1] >= 2, 0.5, 1.0).to(FLOAT)
        deltas = {k: {"w1": half, "b1": 0.0, "w2": 1.0}[k] * d for k, d in deltas.items()}
        return deltas, (own, state[1] + 1)


class FrozenBias(Run):
    """The bias is no parameter of the loss's gradient."""

    def loss(self, params: Params, batch: Any) -> Tensor:
        return super().loss({**params, "b1": params["b1"].detach()}, batch)


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("rule", ["momentum", "lstm"])
def test_a_group_s_factor_and_a_missing_gradient_are_part_of_a_window(rule: str, num_steps: int) -> None:
    begun, family, make = start(RULES[rule]), FrozenBias(), sgd(0.05)
    params = variables()
    groups: list[dict[str, Any]] = [{"params": [(k, p)]} for k, p in params.items()]
    optimizer = HyperOptimizer(groups, begun, num_steps, meta_optimizer=make)
    factors = [lambda step: 1.0 if step < 2 else 0.5, lambda _: 1.0, lambda _: 1.0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    found, step = [], 0
    while len(found) < 6:
        before = optimizer.theta
        optimizer.step(loss=backward(params, step, family))
        scheduler.step()
        step += 1
        found += [] if optimizer.theta is before else [optimizer.theta]
    assert torch.equal(params["b1"], TEMPLATE["b1"])
    halved = (Halved(begun[0]), begun[1])
    expected = engine(halved, Truncated(num_steps, tape=Tape.FIRST_ORDER), FinalLoss(), make, 6, family)
    assert difference(found, expected) <= EXACT


# What is learned: the written recursions.


class Bowl(nn.Module):
    """``Σ h x²/2`` from the same start."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=FLOAT))

    def forward(self) -> Tensor:
        return (HESSIAN * self.x.square()).sum() / 2


HESSIAN = torch.tensor([0.5, 1.0, 3.0], dtype=FLOAT)


def rates(model: nn.Module, lr: float) -> LearnedRates:
    return LearnedRates({k: p.detach() for k, p in model.named_parameters()}, "coordinate", lr=lr)


def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("optimistic", [False, True])
@pytest.mark.parametrize("form", ["euclidean", "adagrad"])
def test_plain_and_optimistic_rates_follow_the_written_recursion(form: Any, optimistic: bool) -> None:
    """algorithms: g_t = -∇f(x_{t-1})∘∇f(x_t), hint -∇f(x_t)²; dual averaging from w_1, AdaGrad on what hints missed."""
    model, hint, beta = Bowl(), PresentGradient() if optimistic else None, {"euclidean": 0.002, "adagrad": 0.05}[form]
    optimizer = HyperOptimizer(
        model.named_parameters(),
        rates(model, 0.1),
        hint=hint,
        meta_optimizer=lambda p: DualAveraging(p, beta, hint=hint, form=form, averaged=False),
    )
    x, w1 = model.x.detach().clone(), torch.full((3,), 0.1, dtype=FLOAT)
    w, total, squares, ahead, last = w1.clone(), torch.zeros(3, dtype=FLOAT), 0.0, torch.zeros(3, dtype=FLOAT), None
    for _ in range(30):
        closure = closure_of(model, optimizer)
        optimizer.step(closure)
        gradient = HESSIAN * x
        if last is not None:
            g = -last * gradient
            total, squares = total + g, squares + (g - ahead).square()
            ahead = -gradient.square() if optimistic else ahead
            scale = (squares + ahead.square()).sqrt() if form == "adagrad" else 1.0
            w = w1 - beta * (total + (ahead if optimistic else 0)) / scale
        x, last = x - w * gradient, gradient
        assert (model.x - x).abs().max() <= EXACT
        assert (optimizer.theta["lr/x"] - w).abs().max() <= EXACT
    assert (w - w1).abs().max() > 0.01


@pytest.mark.parametrize("lr", [0.01, 1.5])
def test_osgm_follows_the_written_recursion_null_steps_included(lr: float) -> None:
    model = Bowl()
    optimizer = HyperOptimizer(
        model.named_parameters(),
        rates(model, lr),
        objective=HypergradientFeedback(),
        meta_optimizer=lambda p: torch.optim.Adagrad(p, 0.3, eps=0.0),
        guard=AcceptIfBetter(),
    )
    x, w, squares = model.x.detach().clone(), torch.full((3,), lr, dtype=FLOAT), torch.zeros(3, dtype=FLOAT)
    accepted = 0
    for _ in range(25):
        before = optimizer.step(closure_of(model, optimizer))
        value, gradient = (HESSIAN * x * x).sum() / 2, HESSIAN * x
        assert abs(before - value) <= EXACT
        tried = x - w * gradient
        g = -(HESSIAN * tried) * gradient / gradient.square().sum()
        squares = squares + g.square()
        w = w - 0.3 * g / squares.sqrt()
        if (HESSIAN * tried * tried).sum() / 2 < value:
            x, accepted = tried, accepted + 1
        assert (model.x - x).abs().max() <= EXACT
        assert (optimizer.theta["lr/x"] - w).abs().max() <= EXACT
    assert model().detach() < 0.2  # from 16
    assert (accepted == 25) is (lr == 0.01)  # the large start begins with null steps


def test_a_null_step_leaves_the_rule_s_memory_alone() -> None:
    model = Bowl()
    optimizer = HyperOptimizer(
        model.named_parameters(), start(Momentum(10.0, 0.9)), meta_optimizer=sgd(0.1), guard=lambda before, after: False
    )
    closure, theta = closure_of(model, optimizer), optimizer.theta
    optimizer.step(closure)
    kept = copy.deepcopy(optimizer.state_dict()["state"][0])
    assert torch.equal(model.x.detach(), Bowl().x.detach())
    assert kept["step"] == 1 and not any(bool(v.any()) for k, v in kept.items() if "buffer" in k)
    assert not torch.equal(optimizer.theta["lr"], theta["lr"])


@pytest.mark.parametrize("num_steps", [1, 3])
def test_feedback_is_the_relative_progress_on_every_task(num_steps: int) -> None:
    family = TanhMLP()
    tasks = sample(family, 3)
    rule = LearnedRates(tree.squeeze(tree.narrow(family.init_params(tasks), 0, 1)), "coordinate", lr=0.2)
    loop, (_, theta) = InnerLoop(family, rule, Execution(vet=False)), start(rule)
    found = Unrolled(num_steps, Tape.FIRST_ORDER).estimate(loop, theta, HypergradientFeedback(), loop.start(tasks))
    values, grads = [], []
    for i in range(3):
        one = tree.narrow(tasks, i, i + 1)
        rollout = loop.run(theta, loop.start(one), num_steps, Tape.NONE)

        def gradient(carry: Any, split: Any) -> tuple[Tensor, Params]:
            leaves = {k: p.detach().clone().requires_grad_() for k, p in carry.params.items()}
            loss = loop.losses(theta, carry._replace(params=leaves), split).sum()
            return loss, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

        (f0, g0), (f1, g1) = gradient(rollout.start, "train"), gradient(rollout.end, "valid")
        squares = torch.stack([g.square().sum() for g in g0.values()]).sum()
        values.append((f1 - f0) / squares)
        grads.append({k: (-g0[k] * g1[k] / squares)[0] for k in g0})
    assert abs(found.loss - torch.stack(values).mean()) <= EXACT
    if num_steps == 1:
        for k in TEMPLATE:
            expected = torch.stack([g[k] for g in grads]).mean(0)
            assert (found.grads[f"lr/{k}"] - expected).abs().max() <= EXACT


def test_feedback_of_a_vanishing_gradient_is_zero() -> None:
    model = Bowl()
    with torch.no_grad():
        model.x.zero_()
    optimizer = HyperOptimizer(model.named_parameters(), rates(model, 0.1), objective=HypergradientFeedback())
    theta = optimizer.theta["lr/x"]
    for _ in range(3):
        optimizer.step(closure_of(model, optimizer))
    assert torch.equal(optimizer.theta["lr/x"], theta)


# Conventions of torch.optim.


def settings() -> dict[str, Callable[[Params], HyperOptimizer]]:
    def hinted(params: Params) -> HyperOptimizer:
        hint = PresentGradient()
        return HyperOptimizer(
            [*params.items()],
            start(RULES["rates per coordinate"]),
            hint=hint,
            meta_optimizer=lambda p: DualAveraging(p, 0.1, hint=hint, form="adagrad", averaged=False),
        )

    def of(rule: str, num_steps: int, objective: Any, **options: Any) -> Callable[[Params], HyperOptimizer]:
        return lambda params: HyperOptimizer(
            [*params.items()], start(RULES[rule]), num_steps, objective, lambda p: torch.optim.Adam(p, 0.01), **options
        )

    return {
        "one step": of("log rates", 1, FinalLoss()),
        "one step, kernel": of("rates per tensor", 1, HypergradientFeedback()),
        "long": of("lstm", 4, SumOfLosses()),
        "bootstrap": of("momentum", 3, BootstrappedTarget(3, 0.3)),
        "rollout": of("clipped nesterov", 2, BootstrappedTarget(3, 0.3, continue_from="rollout")),
        "guarded": of("momentum", 1, FinalLoss(), guard=AcceptIfBetter()),
        "scheduled": of(
            "momentum", 2, FinalLoss(), meta_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7)
        ),
        "part of a step": of("log rates", 3, FinalLoss(), lr=0.5),
        "hinted": hinted,
    }


SETTINGS = settings()


def advance(optimizer: HyperOptimizer, params: Params, steps: range) -> list[Tensor]:
    """Train, and return all that can differ."""
    seen: list[Tensor] = []
    for step in steps:
        if optimizer.guard is None:
            optimizer.step(loss=backward(params, step))
        else:
            optimizer.step(lambda step=step: backward(params, step))
        seen += [x.detach().clone() for x in (*params.values(), *optimizer.theta.values())]
    return seen


def through_a_file(optimizer: HyperOptimizer, params: Params, make: Any) -> tuple[HyperOptimizer, Params]:
    buffer = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, buffer)
    buffer.seek(0)
    found = torch.load(buffer, weights_only=True)
    fresh = {k: p.detach().clone().requires_grad_() for k, p in found["params"].items()}
    other = make(fresh)
    other.load_state_dict(found["optimizer"])
    return other, fresh


def through_pickle(optimizer: HyperOptimizer, params: Params, make: Any) -> tuple[HyperOptimizer, Params]:
    return pickle.loads(pickle.dumps((optimizer, params)))


def through_deepcopy(optimizer: HyperOptimizer, params: Params, make: Any) -> tuple[HyperOptimizer, Params]:
    return copy.deepcopy((optimizer, params))


@pytest.mark.parametrize("through", [through_a_file, through_pickle, through_deepcopy])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_resumes_to_the_bit_wherever_it_stopped(setting: str, through: Any) -> None:
    make, params = SETTINGS[setting], variables()
    optimizer = make(params)
    advance(optimizer, params, range(6))  # in the middle of a window of 4
    other, fresh = through(optimizer, params, make)
    here, there = (advance(o, p, range(6, 15)) for o, p in ((optimizer, params), (other, fresh)))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert not torch.equal(here[0], here[-len(TEMPLATE) - len(optimizer.theta)])


@pytest.mark.parametrize("setting", ["one step", "bootstrap"])
def test_a_state_dict_stays_what_it_was_and_a_fresh_one_loads(setting: str) -> None:
    make, params = SETTINGS[setting], variables()
    optimizer = make(params)
    empty = optimizer.state_dict()
    advance(optimizer, params, range(5))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    advance(optimizer, params, range(5, 9))
    assert equal(state, kept)
    optimizer.load_state_dict(state)
    assert equal(state, kept)
    assert equal(optimizer.state_dict(), kept)
    optimizer.load_state_dict(empty)
    assert equal(optimizer.state_dict(), empty)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_gradients_may_be_cleared_in_place_and_parameters_keep_their_dtype() -> None:
    first, second = variables(), variables()
    for params, clear in ((first, True), (second, False)):
        optimizer = SETTINGS["bootstrap"](params)
        for step in range(8):
            optimizer.step(loss=backward(params, step))
            if clear:
                for p in params.values():
                    assert p.grad is not None
                    p.grad.fill_(torch.nan)
    assert all(torch.equal(first[k], second[k]) for k in first)
    half = {k: p.detach().to(torch.bfloat16).requires_grad_() for k, p in TEMPLATE.items()}
    optimizer = HyperOptimizer([*half.items()], per_tensor(SGD(0.2), half), 2)
    for _ in range(5):
        for p in half.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(p.dtype is torch.bfloat16 for p in half.values())
    assert all(v.dtype is torch.float32 and float(v) > 0.2 for v in optimizer.theta.values())  # along the gradient


def test_without_a_gradient_nothing_happens_and_a_step_returns_its_loss() -> None:
    params = variables()
    optimizer = SETTINGS["one step"](params)
    assert optimizer.step() is None
    assert not optimizer.state
    loss = backward(params, 0)
    assert optimizer.step(loss=loss) is loss
    here = FAMILY.loss(params, tree.squeeze(FAMILY.batch(TASKS, 1, "train"))).detach()
    assert torch.equal(optimizer.step(lambda: backward(params, 1)), here)


def test_a_meta_scheduler_steps_after_each_window() -> None:
    params = variables()
    optimizer = SETTINGS["scheduled"](params)
    advance(optimizer, params, range(7))  # three windows of 2 have closed
    assert optimizer.meta_optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.7**3)
    with pytest.raises(ValueError, match="has a meta_scheduler, the other has none"):
        other = HyperOptimizer([*variables().items()], start(RULES["momentum"]), 2)
        optimizer.load_state_dict(other.state_dict())


def test_theta_is_drawn_from_the_seed_and_handed_on_with_its_names() -> None:
    named: list[list[str]] = []

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        named.append(params.names)  # pyright: ignore[reportAttributeAccessIssue]
        return torch.optim.Adam(params)

    first, second, third = (
        HyperOptimizer([*variables().items()], LSTM(hidden_size=4), 2, meta_optimizer=make, seed=seed)
        for seed in (0, 0, 1)
    )
    assert named[0] == [*first.theta]
    assert torch.equal(first.theta["lstm1/weight"], second.theta["lstm1/weight"])
    assert not torch.equal(first.theta["lstm1/weight"], third.theta["lstm1/weight"])


def test_meta_gradients_that_are_not_finite_are_skipped_and_counted_up_to_a_limit() -> None:
    model = nn.Linear(2, 1)
    optimizer = HyperOptimizer(model.named_parameters(), Momentum(0.1, 0.5), max_skips_in_a_row=2)
    theta = optimizer.theta["lr"]

    def step(value: float) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.step()

    step(1.0)
    step(torch.nan)
    assert optimizer.learner.num_skipped == 1 and optimizer.theta["lr"] is theta
    step(1.0)  # the memory holds the NaN by now
    with pytest.raises(RunDiverged, match="3 meta-gradients in a row were not finite, so that theta cannot move"):
        step(1.0)


# What is refused.


def example(**options: Any) -> HyperOptimizer:
    rule = options.pop("rule", per_tensor(SGD(0.1), TEMPLATE))
    return HyperOptimizer([*variables().items()], rule, **options)


class Idle(UpdateRule):
    """A meta-parameter that enters an update of the second step alone, another that never does."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"rate": torch.tensor(0.1), "late": torch.tensor(0.1), "never": torch.tensor(0.1)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, {"last": {k: torch.zeros_like(p) for k, p in params.items()}}

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        deltas = {k: -theta["rate"].to(g) * g - state["last"][k] for k, g in grads.items()}
        return deltas, {"last": {k: theta["late"].to(g) * g for k, g in grads.items()}}


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "foreign": ({"betas": (0.9, 0.99)}, TypeError, "HyperOptimizer has no option 'betas'"),
    "no rule": ({"rule": "adam"}, TypeError, "rule='adam' is neither an update rule nor"),
    "full tape": ({"tape": Tape.FULL}, ValueError, "the full tape has to differentiate them once more"),
    "no steps": ({"num_steps": 0}, ValueError, "num_steps=0"),
    "a class": ({"objective": FinalLoss}, TypeError, "pass an instance, such as FinalLoss"),
    "solved": (
        {"objective": TargetMatching(BestInHindsight(lambda *a, **k: a[2], 3))},
        ValueError,
        "at which the run has never been",
    ),
    "normalised": ({"rule": LogRate(), "objective": BootstrappedTarget(2, 0.1)}, ValueError, "keep their length"),
    "learned start": (
        {"rule": LearnedInit(SGD(0.1), TEMPLATE)},
        ValueError,
        "a start cannot be learned from its windows",
    ),
    "no path": ({"rule": Idle(), "num_steps": 3}, ValueError, r"\['never'\] have no path"),
    "no path in one step": ({"rule": Idle()}, ValueError, r"\['late', 'never'\] have no path"),
    "nothing to learn": ({"rule": SGD(0.1, learn=())}, ValueError, "theta is empty"),
    "theta of another": ({"rule": (SGD(0.1), {"rate": torch.zeros(())})}, ValueError, "this theta is not one of SGD"),
    "names": ({"rule": LearnedRates({"other": torch.zeros(2)})}, ValueError, "other .*none for w1"),
    "guarded window": ({"guard": AcceptIfBetter(), "num_steps": 2}, ValueError, "a guard may take any step back"),
    "guard's kind": ({"guard": "better"}, TypeError, "guard='better' cannot be called"),
    "hinted window": ({"hint": PresentGradient(), "num_steps": 2}, ValueError, "PresentGradient is exact for windows"),
    "hint's kind": ({"hint": "last-gradient"}, TypeError, "hint='last-gradient' is no PresentGradient"),
    "hint of an average": (
        {"hint": PresentGradient(), "meta_optimizer": lambda p: DualAveraging(p, 0.1)},
        ValueError,
        "pass averaged=False",
    ),
    "meta-optimizer's kind": ({"meta_optimizer": lambda p: p}, TypeError, "meta_optimizer must make a torch.optim"),
    "meta-optimizer of others": (
        {"meta_optimizer": lambda p: torch.optim.Adam([torch.zeros((), requires_grad=True)])},
        ValueError,
        "must move the tensors that it is handed",
    ),
    "factor": ({"lr": -1.0}, ValueError, "lr=-1.0 must not be negative"),
    "not a mean": ({"objective": lambda loop, theta, rollout: rollout.losses.sum()}, ValueError, "not a mean over"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_the_first_step(case: str) -> None:
    options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        example(**options)


def test_what_only_a_closure_or_outputs_can_tell_is_asked_for() -> None:
    with pytest.raises(ValueError, match="gradients do not hold the second: pass step"):
        example(guard=AcceptIfBetter()).step()
    objective = TargetMatching(Bootstrap(2, 0.1), KLDivergence())
    with pytest.raises(ValueError, match=r"pass step\(outputs=lambda params"):
        example(objective=objective).step()


def test_a_hint_that_nobody_computes_is_refused() -> None:
    params, hint = variables(), PresentGradient()
    optimizer = HyperOptimizer(
        [*params.items()],
        per_tensor(SGD(0.1), TEMPLATE),
        meta_optimizer=lambda p: DualAveraging(p, 0.1, hint=hint, averaged=False),
    )
    with pytest.raises(ValueError, match="the same object to HyperOptimizer"):
        advance(optimizer, params, range(2))


def test_an_objective_of_one_s_own_reads_what_was_recorded_and_no_more() -> None:
    def last(loop: Any, theta: Theta, rollout: Any) -> Tensor:
        return loop.losses(theta, rollout.end, "valid").mean()

    def beyond(loop: Any, theta: Theta, rollout: Any) -> Tensor:
        return loop.losses(theta, rollout.end._replace(step=rollout.end.step + 1), "valid").mean()

    params, make = variables(), sgd(0.1)
    begun = start(RULES["momentum"])
    found = learned(HyperOptimizer([*params.items()], begun, 1, last, make), params, 5)
    assert difference(found, engine(begun, Truncated(1), FinalLoss(), make, 5)) <= EXACT
    with pytest.raises(ValueError, match="asks for the loss 2 steps after the window's start"):
        example(objective=beyond)


def test_gradients_of_another_layout_and_groups_that_come_late_are_refused() -> None:
    model = nn.Embedding(3, 2, sparse=True)
    optimizer = HyperOptimizer(model.named_parameters(), Momentum(0.1, 0.5))
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="is sparse"):
        optimizer.step()
    params = variables()
    optimizer = SETTINGS["one step"](params)
    advance(optimizer, params, range(1))
    with pytest.raises(ValueError, match="before the first step only"):
        optimizer.add_param_group({"params": [("more", torch.zeros(2, requires_grad=True))]})
    with pytest.raises(ValueError, match="learned rules move real floating-point"):
        HyperOptimizer([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], Momentum())


def test_state_dicts_of_others_are_refused_and_change_nothing() -> None:
    params = variables()
    optimizer = SETTINGS["bootstrap"](params)
    advance(optimizer, params, range(3))
    kept = optimizer.state_dict()
    frozen = bare([*params.items()], start(RULES["momentum"]))
    backward(params, 0)
    frozen.step()
    with pytest.raises(ValueError, match="this state holds no theta"):
        optimizer.load_state_dict(frozen.state_dict())
    other = SETTINGS["one step"](variables())
    with pytest.raises(ValueError, match="this state is not of Momentum"):
        advanced = variables()
        other = SETTINGS["one step"](advanced)
        advance(other, advanced, range(2))
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="this state holds a theta of shapes"):
        optimizer.load_state_dict(example(rule=LearnedRates(TEMPLATE, "coordinate")).state_dict())
    assert equal(optimizer.state_dict(), kept)


def test_a_rule_may_keep_what_it_is_given() -> None:
    """A state that holds theta, parameters and gradients as they are: nothing in it moves with them."""

    class Keeper(UpdateRule):
        def init_theta(self, generator: torch.Generator) -> Theta:
            return {"rate": torch.tensor(0.3, dtype=FLOAT)}

        def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
            return params, {"rate": theta["rate"], "at": params, "grads": params}

        def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
            pull = {k: 0.1 * (state["at"][k] - p) - 0.01 * state["grads"][k] for k, p in params.items()}
            deltas = {k: -(theta["rate"] + 0.1 * state["rate"]) * g + pull[k] for k, g in grads.items()}
            return deltas, {"rate": theta["rate"], "at": params, "grads": grads}

    for num_steps in (1, 3):
        params, make, begun = variables(), sgd(0.1), start(Keeper())
        found = learned(HyperOptimizer([*params.items()], begun, num_steps, meta_optimizer=make), params, 6)
        expected = engine(begun, Truncated(num_steps, tape=Tape.FIRST_ORDER), FinalLoss(), make, 6)
        assert difference(found, expected) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_theta_of_half_precision_parameters_is_learned_in_float32(dtype: torch.dtype) -> None:
    param = torch.full((3,), 2.0, dtype=dtype, requires_grad=True)
    optimizer = HyperOptimizer([("w", param)], LearnedRates({"w": param.detach()}, "coordinate", lr=0.05))
    for _ in range(20):
        optimizer.zero_grad()
        (0.5 * param.float().square().sum()).backward()
        optimizer.step()
    assert all(v.dtype is torch.float32 and bool(v.isfinite().all()) for v in optimizer.theta.values())
    assert bool((param.abs() < 1.0).all())


def test_an_objective_that_divides_by_losses_asks_for_them_at_once() -> None:
    params = variables()
    optimizer = HyperOptimizer([*params.items()], start(RULES["momentum"]), 2, MeanLogLoss())
    backward(params, 0)
    with pytest.raises(ValueError, match=r"pass step\(loss=loss\)"):
        optimizer.step()
