"""What mixed mode hands on: theta in the inner loss, what has no path, and how a loss is judged at its first call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from oracles import difference_error, relative_error
from problems import TanhMLP, generic_theta, sample, template
from torch import Tensor
from torch.nn import functional

from learnedopt import Execution, FinalLoss, InnerLoop, SumOfLosses, Tasks, Theta, Unrolled, UpdateRule, optimizers
from learnedopt.core import mixed_mode
from learnedopt.core.mixed_mode import Plan, value_and_gradient
from learnedopt.core.tree import Params

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch's own forward mode
]

Loss = Callable[[Params, Theta, Tensor], Tensor]
Take = Callable[[Callable[[Params, Theta], Tensor], Params, Theta], tuple[Tensor, list[Tensor]]]
Outer = Callable[[Params, Tensor], Tensor]


def plain(losses: Callable[[Params, Theta], Tensor], params: Params, theta: Theta) -> tuple[Tensor, list[Tensor]]:
    """Take value and gradient as the plain tape does."""
    values = losses(params, theta)
    return values, [
        *torch.autograd.grad(values.sum(), list(params.values()), create_graph=True, materialize_grads=True)
    ]


def mixed(plans: dict[Hashable, Plan] | None = None) -> Take:
    held = {} if plans is None else plans
    return lambda losses, params, theta: value_and_gradient(losses, params, theta, held)


def unroll(take: Take, loss: Loss, theta: Theta, data: Tensor, starts: Params, outer: Outer, per_task: bool) -> Tensor:
    """Descend for three steps from a start that theta moves; data (num_tasks, ...), or one task's without it."""
    batched = data.ndim == 3
    params = {k: p + theta["start"].sum() * 0.1 for k, p in starts.items()}
    seen = torch.zeros(())
    for _ in range(3):
        params = {k: p if p.requires_grad else p.requires_grad_() for k, p in params.items()}
        if batched:
            mapped = torch.func.vmap(loss, in_dims=(0, 0 if per_task else None, 0))
            values, grads = take(lambda params, theta, f=mapped: f(params, theta, data), params, theta)
        else:
            values, grads = take(lambda params, theta: loss(params, theta, data), params, theta)
        seen = seen + (values * torch.linspace(1, 2, len(data) if batched else 1)).sum()
        params = {k: p - 0.3 * g for (k, p), g in zip(params.items(), grads, strict=True)}
    return outer(params, seen)


def outer(params: Params, seen: Tensor) -> Tensor:
    return sum((p.sin().sum() for p in params.values()), 0.1 * seen)


def outer_of_ends(params: Params, seen: Tensor) -> Tensor:
    return sum((p.sin().sum() for p in params.values()), torch.zeros(()))


def weighted(params: Params, theta: Theta, data: Tensor) -> Tensor:
    """Weights per example, a decay per coordinate, a correction of the targets and a constant, all learned."""
    inputs, targets = data[:, :3], data[:, 3]
    errors = (inputs @ params["w"]).tanh() * params["scale"] - targets - theta["shift"]
    decay = (theta["decay"].exp() * params["w"] ** 2).sum()
    return (theta["weight"].sigmoid() * errors**2).mean() + decay + theta["constant"] * theta["shift"]


def cumulated(params: Params, theta: Theta, data: Tensor) -> Tensor:
    """The same with an operation that forward mode is not trusted with."""
    return weighted(params, theta, data) + params["w"].cumprod(0).sum() * theta["shift"]


THETA = {"weight": (5,), "decay": (3,), "shift": (), "constant": (), "start": (2,), "fixed": (2,)}


def problem(num_tasks: int | None, per_task: bool) -> tuple[Theta, Tensor, Params]:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int, batched: bool = True) -> Tensor:
        return torch.randn(((num_tasks,) if num_tasks and batched else ()) + shape, generator=generator)

    theta = {k: 0.5 * normal(*shape, batched=per_task) for k, shape in THETA.items()}
    return theta, normal(5, 4), {"w": normal(3), "scale": 1 + 0.1 * normal()}


def gradients(take: Take, loss: Loss, num_tasks: int | None, per_task: bool = False, outer: Outer = outer) -> Any:
    """Return the gradient of each meta-parameter, None where it has no path; ``fixed`` requires none."""
    theta, data, starts = problem(num_tasks, per_task)
    leaves = {k: x.requires_grad_(k != "fixed") for k, x in theta.items()}
    wanted = {k: x for k, x in leaves.items() if x.requires_grad}
    value = unroll(take, loss, leaves, data, starts, outer, per_task)
    return dict(zip(wanted, torch.autograd.grad(value, list(wanted.values()), allow_unused=True), strict=True))


TASKS = {"one": (None, False), "three": (3, False), "three with a theta each": (3, True)}


@pytest.mark.parametrize("loss", [weighted, cumulated])
@pytest.mark.parametrize(("num_tasks", "per_task"), TASKS.values(), ids=TASKS)
def test_theta_in_the_loss_gets_the_gradient_of_the_plain_tape(
    loss: Loss, num_tasks: int | None, per_task: bool
) -> None:
    plans: dict[Hashable, Plan] = {}
    found = gradients(mixed(plans), loss, num_tasks, per_task)
    assert [bool(plan.reason) for plan in plans.values()] == [loss is cumulated]
    assert relative_error(found, gradients(plain, loss, num_tasks, per_task)) < 1e-12
    assert all(g.abs().max() > 1e-4 for g in found.values())

    def value(theta: Theta) -> float:
        _, data, starts = problem(num_tasks, per_task)
        return unroll(plain, loss, theta, data, starts, outer, per_task).item()

    theta = {k: x for k, x in problem(num_tasks, per_task)[0].items() if k in found}
    fixed = problem(num_tasks, per_task)[0]["fixed"]
    assert difference_error(lambda theta: value({**theta, "fixed": fixed}), theta, found) < 1e-7


@pytest.mark.parametrize("loss", [weighted, cumulated])
@pytest.mark.parametrize("num_tasks", [None, 3])
@pytest.mark.parametrize("outer", [outer, outer_of_ends])
def test_what_has_no_path_on_the_plain_tape_has_none_here(loss: Loss, num_tasks: int | None, outer: Outer) -> None:
    """A constant of the inner loss moves its values alone; nothing reads ``fixed``, which requires a gradient here."""

    def missing(take: Take) -> set[str]:
        theta, data, starts = problem(num_tasks, False)
        leaves = {k: x.requires_grad_() for k, x in theta.items()}
        value = unroll(take, loss, leaves, data, starts, outer, False)
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        return {k for k, g in zip(leaves, found, strict=True) if g is None}

    assert missing(plain) == {"fixed"} | ({"constant"} if outer is outer_of_ends else set())
    assert missing(mixed()) == missing(plain)


def unread(params: Params, theta: Theta) -> Tensor:
    return (params["w"] ** 2).sum() + (params["linear"] * 3.0).sum() + theta["constant"]


@pytest.mark.parametrize("take", [plain, mixed()], ids=["plain", "mixed"])
def test_the_gradient_of_each_parameter_depends_on_what_it_depends_on_on_the_plain_tape(take: Take) -> None:
    params = {k: torch.linspace(1, 2, 3).requires_grad_() for k in ("w", "never read", "linear")}
    theta = {"constant": torch.tensor(2.0).requires_grad_(), "count": torch.tensor(3)}
    values, grads = take(unread, params, theta)
    assert [g.tolist() for g in grads] == [[2.0, 3.0, 4.0], [0.0] * 3, [3.0] * 3]

    def reached(output: Tensor) -> list[str]:
        if not output.requires_grad:
            return []
        leaves = {**params, "constant": theta["constant"]}
        found = torch.autograd.grad(output.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
        return [k for k, g in zip(leaves, found, strict=True) if g is not None]

    assert reached(values) == ["w", "linear", "constant"]
    assert [reached(g) for g in grads] == [["w"], [], []]


class Unread(TanhMLP):
    """With a parameter that the loss never reads."""

    def init_params(self, tasks: Tasks) -> Params:
        return {"spare": tasks["w2"], **super().init_params(tasks)}


class OwnRates(UpdateRule):
    """Descent at a learned rate a parameter."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {f"rate/{k}": torch.tensor(0.1 + 0.1 * i) for i, k in enumerate(("spare", "w1", "b1", "w2"))}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, ()

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        return {k: -theta[f"rate/{k}"] * g for k, g in grads.items()}, state


@pytest.mark.parametrize("mixed_mode", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("own_rates", [True, False])
def test_an_unread_parameter_is_an_error_in_both_modes(own_rates: bool, chunk_size: int, mixed_mode: bool) -> None:
    family = Unread()
    rule = OwnRates() if own_rates else optimizers.example("maml", template(family))
    loop = InnerLoop(family, rule, Execution(chunk_size, mixed_mode=mixed_mode))
    name = "rate/spare" if own_rates else "init/spare"
    with pytest.raises(ValueError, match=rf"the meta-parameters \['{name}'\] have no path to the objective"):
        Unrolled(2).estimate(loop, generic_theta(rule), FinalLoss(), loop.start(sample(family)))


class Reversal(torch.autograd.Function):
    """The identity, whose gradient is reversed: a gradient field of no potential."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return -cotangents[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].clone()


class Doubled(torch.autograd.Function):
    """Twice the input, without a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return 2 * cotangents[0]


def stopped(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.sin()


OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "detach": (lambda x: x * x.sin().detach(), None),
    "no_grad": (lambda x: x * stopped(x), "torch.no_grad"),
    "reversal": (lambda x: x.cos() * Reversal.apply(x), "other second derivatives"),
    "no forward derivative": (lambda x: Doubled.apply(x).sin(), "jvp"),
    "not a number": (lambda x: (x - x).square().sum().sqrt() + x.sin(), "other second derivatives"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_loss_that_forward_mode_gets_wrong_is_found_and_told_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    operation, reason = OPERATIONS[name]

    def loss(params: Params, theta: Theta, data: Tensor) -> Tensor:
        return ((data[:, :3] @ operation(params["w"])) ** 2).mean() + (params["scale"] - theta["shift"]) ** 2

    with caplog.at_level(logging.WARNING, "learnedopt"):
        found = gradients(mixed(), loss, None)
    expected = gradients(plain, loss, None)
    assert {k for k, g in found.items() if g is None} == {k for k, g in expected.items() if g is None}
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-12, atol=1e-14, equal_nan=True)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (reason is not None) and all(reason in text for text in said if reason)


def test_a_loss_without_second_derivatives_fails_only_where_the_plain_tape_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def loss(params: Params, theta: Theta) -> Tensor:
        return functional.hardsigmoid(params["w"]).square().sum() + theta["shift"]

    def take(mode: Take) -> tuple[list[Tensor], Theta]:
        theta = {"shift": torch.tensor(0.3).requires_grad_()}
        params = {"w": torch.linspace(-1, 1, 3).requires_grad_()}
        values, grads = mode(loss, params, theta)
        assert torch.autograd.grad(values, theta["shift"], retain_graph=True)[0] == 1  # needs no second derivative
        return grads, params

    with caplog.at_level(logging.WARNING, "learnedopt"):
        results = [take(plain), take(mixed())]
    assert "no second derivative of it (RuntimeError: derivative for aten::hardsigmoid_backward" in caplog.text
    for grads, params in results:
        with pytest.raises(RuntimeError, match="hardsigmoid_backward is not implemented"):
            torch.autograd.grad(grads[0].sum(), params["w"])


def test_a_random_loss_is_refused() -> None:
    family = TanhMLP()
    family.loss = lambda params, batch: functional.cross_entropy(  # type: ignore[method-assign]
        functional.dropout(batch["x"] @ params["w1"] + params["b1"], 0.5) @ params["w2"], batch["y"]
    )
    # Vetting would say so before.
    loop = InnerLoop(family, optimizers.example("maml", template(family)), Execution(mixed_mode=True, vet=False))
    with pytest.raises(ValueError, match="for the same arguments, but mixed_mode=True calls it again"):
        Unrolled(2).estimate(loop, generic_theta(loop.rule), SumOfLosses(), loop.start(sample(family)))


def test_a_loss_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    plan = mixed_mode._plan
    monkeypatch.setattr(mixed_mode, "_plan", lambda *arguments: tried.append(1) or plan(*arguments))
    loop = InnerLoop(TanhMLP(), optimizers.example("maml", template(TanhMLP())), Execution(2, mixed_mode=True))
    for _ in range(2):
        Unrolled(3).estimate(loop, generic_theta(loop.rule), FinalLoss(), loop.start(sample(TanhMLP(), 3)))
    assert len(tried) == 2  # a chunk of two tasks, and one of one


def test_single_precision_is_no_reason_to_yield() -> None:
    plans: dict[Hashable, Plan] = {}
    theta, data, starts = problem(3, False)
    theta, starts = ({k: x.float().requires_grad_() for k, x in tensors.items()} for tensors in (theta, starts))
    mapped = torch.func.vmap(weighted, in_dims=(0, None, 0))
    value_and_gradient(lambda params, theta: mapped(params, theta, data.float()), starts, theta, plans)
    assert [plan.reason for plan in plans.values()] == [None]
