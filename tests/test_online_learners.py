"""Dual averaging, follow the leader and optimizers per name as torch optimizers: numbers, states, bad input."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from learnedopt import Constant, DualAveraging, FollowTheLeader, LastGradient, Linear, PerName
from learnedopt.core import weights
from learnedopt.core.named_tensors import NamedTensors
from learnedopt.meta_optimizers import registry

pytestmark = pytest.mark.usefixtures("float64")


def theta() -> NamedTensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"init/w": (2, 3), "init/b": (2,), "rule/lr": ()}
    return NamedTensors({k: torch.randn(s, generator=generator).requires_grad_() for k, s in shapes.items()})


def step(optimizer: torch.optim.Optimizer, params: list[Tensor], number: int) -> None:
    """Take a step on gradients that depend on the number of it and on where the parameters are."""
    generator = torch.Generator().manual_seed(number)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) + 0.3 * p.detach()
    optimizer.step()


def per_name(params: list[Tensor]) -> torch.optim.Optimizer:
    return PerName(
        {
            "rule/*": lambda p: DualAveraging(p, 0.1, "linear", "last-gradient", "adagrad"),
            "init/w": FollowTheLeader,
            "*/b": lambda p: torch.optim.Adam(p, 0.05),
        }
    )(params)


LEARNERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "dual averaging": lambda p: DualAveraging(p, 0.1),
    "dual averaging, optimistic": lambda p: DualAveraging(p, 0.1, Linear(), LastGradient()),
    "dual averaging, adagrad": lambda p: DualAveraging(p, 0.1, form="adagrad", averaged=False),
    "dual averaging, optimistic adagrad": lambda p: DualAveraging(p, 0.1, Linear(), LastGradient(), "adagrad"),
    "follow the leader": lambda p: FollowTheLeader(p, lambda t: t**0.5),
    "per name": per_name,
}
every_learner = pytest.mark.parametrize("name", LEARNERS)


# What every learner promises


@every_learner
def test_a_learner_goes_on_exactly_from_its_state(name: str) -> None:
    whole = theta()
    optimizer = LEARNERS[name](whole)
    for number in range(3):
        step(optimizer, whole, number)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = theta()
    for p, q in zip(other, whole, strict=True):
        p.data.copy_(q)
    resumed = LEARNERS[name](other)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    copies = [copy.deepcopy((optimizer, whole))]
    if name != "follow the leader" and name != "per name":  # whose weight or whose parts are functions without a name
        copies.append(pickle.loads(pickle.dumps((optimizer, whole))))
    for number in range(3, 6):
        step(optimizer, whole, number)
        step(resumed, other, number)
        for each, params in copies:
            step(each, params, number)
    for params in (other, *(params for _, params in copies)):
        assert all(torch.equal(p, q) for p, q in zip(params, whole, strict=True))
    assert all(not torch.equal(p, q) for p, q in zip(whole, theta(), strict=True))


@every_learner
def test_schedules_and_closures_reach_a_learner(name: str) -> None:
    params, still = theta(), theta()
    optimizer, fixed = LEARNERS[name](params), LEARNERS[name](still)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls = []
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        for p, q in zip(params, still, strict=True):
            p.grad = q.grad = torch.randn(p.shape, generator=generator)
        assert optimizer.step(lambda: calls.append(torch.is_grad_enabled()) or 7.0) == 7.0  # pyright: ignore
        fixed.step()
        if not number:
            assert all(torch.equal(p, q) for p, q in zip(params, still, strict=True))
        schedule.step()
    assert calls == [True, True]
    assert all(not torch.equal(p, q) for p, q in zip(params, still, strict=True))


@every_learner
def test_a_tensor_without_a_gradient_is_left_alone(name: str) -> None:
    params = theta()
    optimizer, before = LEARNERS[name](params), params[1].detach().clone()
    params[0].grad, params[2].grad = torch.ones(2, 3), torch.ones(())
    optimizer.step()
    assert torch.equal(params[1], before) and params[1] not in optimizer.state
    step(optimizer, params, 0)
    assert not torch.equal(params[1], before)


# Numbers


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("given", ["constant", "linear"])
def test_dual_averaging_by_hand(given: Any, averaged: bool) -> None:
    p = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    start = p.detach().clone()
    optimizer = DualAveraging(
        [p], 0.1, given, lambda params, gradients: [2 * gradients[0] + params[0]], averaged=averaged
    )
    alphas = [1.0, 1.0, 1.0, 1.0] if given == "constant" else [1.0, 2.0, 3.0, 4.0]
    total = torch.zeros(3)
    for t, gradient in enumerate(torch.tensor([[1.0, 2.0, 3.0], [-1.0, 4.0, 0.5], [2.0, -3.0, 1.0]])):
        share = alphas[t] / sum(alphas[: t + 1]) if averaged else 1.0
        p.grad, before = share * gradient, p.detach().clone()
        optimizer.step()
        total += alphas[t] * gradient
        expected = start - 0.1 * (total + alphas[t + 1] * (2 * gradient + before))
        torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=1e-14)


def test_adagrad_moves_nothing_that_had_no_gradient_and_forms_are_a_groups_own() -> None:
    p, q = (torch.tensor([3.0, 5.0], requires_grad=True) for _ in range(2))
    ones = lambda params, gradients: [torch.ones_like(g) for g in gradients]  # noqa: E731
    optimizer = DualAveraging([{"params": [p], "form": "adagrad"}, {"params": [q], "lr": 2.0}], 0.5, hint=ones)
    p.grad, q.grad = torch.tensor([0.0, -4.0]), torch.tensor([0.0, -4.0])
    optimizer.step()
    assert p.tolist() == [3.0, pytest.approx(5.0 - 0.5 * (-4.0 + 1.0) / 17.0**0.5)] and q.tolist() == [
        3.0 - 2.0,
        5.0 + 6.0,
    ]


def test_the_leader_is_the_weighted_mean_of_what_tasks_wanted() -> None:
    centres, sizes = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), [1, 4, 2, 9, 9, 3]
    w = torch.full((4,), 100.0, requires_grad=True)
    optimizer = FollowTheLeader([w], lambda t: sizes[t - 1] ** 0.5)
    for t, centre in enumerate(centres, 1):
        w.grad = w.detach() - centre
        optimizer.step()
        roots = torch.tensor([float(m) for m in sizes[:t]]).sqrt()
        torch.testing.assert_close(w.detach(), roots @ centres[:t] / roots.sum(), rtol=1e-13, atol=1e-12)
    one = torch.zeros(4, requires_grad=True)
    plain, half = FollowTheLeader([one]), FollowTheLeader([torch.zeros(4, requires_grad=True)], lr=0.5)
    for centre in centres:
        for optimizer in (plain, half):
            p = optimizer.param_groups[0]["params"][0]
            p.grad = p.detach() - centre
            optimizer.step()
    torch.testing.assert_close(one.detach(), centres.mean(0), rtol=1e-13, atol=1e-13)
    assert not torch.allclose(half.param_groups[0]["params"][0], one)


def test_parts_move_as_their_own_optimizers_move_them() -> None:
    params, alone = theta(), theta()
    by_name = dict(zip(alone.names, alone, strict=True))
    together = per_name(params)
    own = [
        DualAveraging([by_name["rule/lr"]], 0.1, "linear", "last-gradient", "adagrad"),
        FollowTheLeader([by_name["init/w"]]),
        torch.optim.Adam([by_name["init/b"]], 0.05),
    ]
    for number in range(4):
        step(together, params, number)
        for p, q in zip(params, alone, strict=True):
            q.grad = p.grad
        for optimizer in own:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, alone, strict=True))
    assert [group["lr"] for group in together.param_groups] == [0.1, 1.0, 0.05]


# Bad input


P = torch.zeros(2, requires_grad=True)
HINT = "must return one tensor of the same shape for each gradient"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DualAveraging([P], 0.0), ValueError, "DualAveraging: lr=0.0 must be positive"),
        (lambda: DualAveraging([P], float("nan")), ValueError, "lr=nan must be positive"),
        (lambda: DualAveraging([P], "0.1"), TypeError, "lr='0.1' is a str"),
        (lambda: DualAveraging([{"params": [P], "lr": -1.0}], 0.1), ValueError, "lr=-1.0 must be positive"),
        (lambda: DualAveraging([P], 0.1, "lineer"), ValueError, "none of constant, linear; did you mean 'linear'"),
        (lambda: DualAveraging([P], 0.1, lambda t: t - 3), ValueError, "gives -2 at step 1: every weight must be pos"),
        (lambda: DualAveraging([P], 0.1, lambda t: 1 / (t - 7)), ValueError, "at step 1: every weight"),
        (lambda: DualAveraging([P], 0.1, 1.0), TypeError, "cannot be called on steps"),
        (lambda: DualAveraging([P], 0.1, Linear), TypeError, "cannot be called on steps"),
        (lambda: DualAveraging([P], 0.1, lambda t: t.sum()), ValueError, r"a weight for each step, .* got shape \(\)"),
        (lambda: DualAveraging([P], 0.1, hint="last"), TypeError, "hint='last' cannot be called"),
        (lambda: DualAveraging([P], 0.1, hint=LastGradient), TypeError, "cannot be called"),
        (lambda: DualAveraging([P], 0.1, form="diagonal"), ValueError, "form='diagonal' is none of euclidean, adagrad"),
        (lambda: FollowTheLeader([P], 0.0), ValueError, "FollowTheLeader: weight=0.0 must be positive"),
        (lambda: FollowTheLeader([P], lambda t: -t), ValueError, r"weight\(1\)=-1 must be positive"),
        (lambda: FollowTheLeader([P], lr=0.0), ValueError, "lr=0.0 must be positive"),
        (lambda: PerName({}), ValueError, "no pattern at all"),
        (lambda: PerName({"*": 0.1}), TypeError, "'.' has 0.1, which cannot be called"),
        (lambda: PerName({"*": FollowTheLeader})([P]), TypeError, "PerName tells the tensors of theta apart by name"),
        (
            lambda: PerName({"init/*": FollowTheLeader})(theta()),
            ValueError,
            r"\['rule/lr'\] match none of the patterns",
        ),
        (
            lambda: PerName({"*": FollowTheLeader, "rule/*": FollowTheLeader})(theta()),
            ValueError,
            "several patterns match one tensor, {'rule/lr': ",
        ),
        (
            lambda: PerName({"*": FollowTheLeader, "rule/rl": FollowTheLeader})(theta()),
            ValueError,
            "'rule/rl' matches none of the tensors .*did you mean 'rule/lr'",
        ),
        (lambda: PerName({"*": lambda p: 3})(theta()), TypeError, "returned 3, which is no optimizer"),
        (lambda: per_name(theta()).add_param_group({"params": [P]}), ValueError, "no member would move"),
        (lambda: weights.weight_at(lambda t: 5 - t, 5), ValueError, "gives 0 at step 5"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("hint", "told"),
    [
        (lambda params, gradients: [g.reshape(-1) for g in gradients], r"\[\(2, 3\), .*\[\(6,\)"),
        (lambda params, gradients: gradients[:2], r"got \[\(2, 3\), \(2,\)\]"),
        (lambda params, gradients: [0.0] * 3, "got .'float', 'float', 'float'"),
        (lambda params, gradients: None, "got .'NoneType'"),
    ],
)
def test_a_hint_of_another_shape_is_refused_and_nothing_has_moved(hint: Any, told: str) -> None:
    params = theta()
    optimizer = DualAveraging(params, 0.1, hint=hint)
    with pytest.raises(ValueError, match=HINT + ".*" + told):
        step(optimizer, params, 0)
    assert all(torch.equal(p, q) for p, q in zip(params, theta(), strict=True))


def test_a_weight_that_turns_bad_is_refused_when_it_comes_and_nothing_has_moved() -> None:
    late = lambda t: torch.where(t > 20_000, -t, t)  # noqa: E731
    params = theta()
    optimizer = DualAveraging(params, 0.1, late)
    step(optimizer, params, 0)
    for state in optimizer.state.values():
        state["step"] = 20_000
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="gives -20001 at step 20001"):
        step(optimizer, params, 1)
    leader = FollowTheLeader(params, lambda t: 2 - t)
    step_before = [p.detach().clone() for p in params]
    assert all(torch.equal(p, q) for p, q in zip(step_before, before, strict=True))
    step(leader, params, 0)
    moved = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"weight\(2\)=0 must be positive"):
        step(leader, params, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, moved, strict=True))


# Weights, and names for what a file can hold


def test_weights_and_their_names() -> None:
    steps = torch.arange(1.0, 5.0)
    assert Constant()(steps).tolist() == [1.0] * 4 and Linear()(steps).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert weights.resolve("linear") == Linear() and weights.name_of(Constant()) == "constant"
    own = lambda t: t**2  # noqa: E731
    assert weights.resolve(own) is own and weights.name_of(own) is own and weights.weight_at(own, 3) == 9.0


def test_the_registry_makes_learners_from_words() -> None:
    made = registry.make("dual-averaging", lr=0.1, weights="linear", hint="last-gradient", form="adagrad")(theta())
    assert isinstance(made, DualAveraging) and made.weights == Linear() and made.hint == LastGradient()
    assert isinstance(registry.make("follow-the-leader", lr=1.0)(theta()), FollowTheLeader)
