"""Rules and inputs that are allowed and easily forgotten: odd states, mixed dtypes, theta that changes a system."""

from __future__ import annotations

from typing import Any, final

import pytest
import torch
from plug_in_cases import bare
from problems import sample
from torch import Tensor

from learnedopt import (
    ConjugateGradient,
    Execution,
    FinalLoss,
    Implicit,
    InnerLoop,
    InnerObjective,
    MetaTrainer,
    Penalty,
    Proximal,
    Tape,
    TaskFamily,
    Unrolled,
    UpdateRule,
    optimizers,
)
from learnedopt.core.rule import Kernel
from learnedopt.optimizers import SGD

pytestmark = pytest.mark.usefixtures("float64")


class Scaled(TaskFamily):
    """A vector and a scalar parameter; a loss of two terms."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        """Draw centres."""
        return {"center": torch.randn(num_tasks, 3, generator=generator).to(self.dtype)}

    def init_params(self, tasks: Any) -> dict[str, Tensor]:
        """Start off the optimum."""
        center = tasks["center"]
        return {"w": 0.5 * center + 1, "log_scale": torch.full((len(center),), 0.3, dtype=self.dtype)}

    def batch(self, tasks: Any, step: int, split: str) -> Any:
        """Return the centre, moved on the other split."""
        return {"center": tasks["center"] + 0.1 * (split == "valid")}

    def loss(self, params: dict[str, Tensor], batch: Any) -> Tensor:
        """Return a distance plus a penalty."""
        distance = (params["w"] * params["log_scale"].exp() - batch["center"]).square().mean()
        return distance + 0.1 * params["w"].square().sum() + 0.05 * params["log_scale"].square()


class Descent(UpdateRule):
    """Gradient descent that keeps whatever state it is made with."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def init_theta(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the rate."""
        return {"lr": torch.tensor(0.1)}

    def init(self, theta: Any, params: Any) -> Any:
        """Start where the task does."""
        return params, self.state

    def update(self, theta: Any, grads: Any, state: Any, params: Any, loss: Tensor) -> Any:
        """Descend."""
        return {k: -theta["lr"] * g for k, g in grads.items()}, state


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize(
    "state", [None, (), {}, torch.zeros(()), torch.zeros(2), {"a": {}, "b": torch.ones(1)}], ids=repr
)
def test_any_tree_of_tensors_is_a_state(state: Any, chunk_size: int) -> None:
    loop = InnerLoop(Scaled(), Descent(state), Execution(chunk_size))
    theta = loop.rule.init_theta(torch.Generator())
    carry = loop.start(sample(loop.family, 3))
    found = Unrolled(3).estimate(loop, theta, FinalLoss(), carry)
    expected = Unrolled(3).estimate(InnerLoop(Scaled(), Descent()), theta, FinalLoss(), carry)
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-12, atol=0)
    begun = loop.begin(theta, carry)
    half = loop.run(theta, loop.run(theta, begun, 2, Tape.NONE).end, 1, Tape.NONE).end
    torch.testing.assert_close(half.params, loop.run(theta, begun, 3, Tape.NONE).end.params, rtol=0, atol=0)


def test_a_state_of_numbers_is_refused_by_the_plug_in_and_the_engine() -> None:
    loop = InnerLoop(Scaled(), Descent({"t": 0}))
    with pytest.raises(ValueError, match=r"state with .*int.* as leaves"):
        loop.run({"lr": torch.tensor(0.1)}, loop.start(sample(loop.family)), 1)


def test_a_wider_theta_does_not_change_the_parameters_dtype() -> None:
    loop = InnerLoop(Scaled(torch.float32), Descent())
    end = loop.run({"lr": torch.tensor(0.1, dtype=torch.float64)}, loop.start(sample(loop.family)), 2, Tape.NONE).end
    assert {k: p.dtype for k, p in end.params.items()} == {"w": torch.float32, "log_scale": torch.float32}


def test_deltas_that_would_merely_broadcast_are_refused() -> None:
    class Broadcasts(Descent):
        def update(self, theta: Any, grads: Any, state: Any, params: Any, loss: Tensor) -> Any:
            return dict.fromkeys(grads, -theta["lr"]), state

    loop = InnerLoop(Scaled(), Broadcasts())
    with pytest.raises(ValueError, match="one delta of the same shape per parameter"):
        loop.run({"lr": torch.tensor(0.1)}, loop.start(sample(loop.family)), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_plug_in_takes_the_engines_step_to_the_bit(dtype: torch.dtype) -> None:
    family = Scaled(dtype)
    tasks = sample(family, 1)
    own = {k: p[0].clone() for k, p in family.init_params(tasks).items()}
    rule = optimizers.make("maml", template={k: 0.9 * p for k, p in own.items()}, lr=0.07)
    theta = rule.init_theta(torch.Generator())
    loop = InnerLoop(family, rule)
    params = {k: torch.nn.Parameter(p) for k, p in own.items()}
    plug_in = bare(params.items(), (rule, theta), adopt_start=True)
    for step in range(5):
        plug_in.zero_grad()
        family.loss(params, {k: v[0] for k, v in family.batch(tasks, step, "train").items()}).backward()
        plug_in.step()
    end = loop.run(theta, loop.start(tasks), 5, Tape.NONE).end
    assert all(torch.equal(params[k], p[0]) for k, p in end.params.items())


class Network(UpdateRule):
    """A step map ``x -> W tanh(x) + b`` that does not look at the loss."""

    def init_theta(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return W = 0, at which one step solves the problem and the system is symmetric."""
        return {"W": torch.zeros(2, 2), "b": torch.tensor([0.3, -0.2])}

    def init(self, theta: Any, params: Any) -> Any:
        """Start where the task does."""
        return params, ()

    def update(self, theta: Any, grads: Any, state: Any, params: Any, loss: Tensor) -> Any:
        """Move to the image."""
        return {"x": theta["W"] @ params["x"].tanh() + theta["b"] - params["x"]}, state


class Bowl(TaskFamily):
    """A two-dimensional bowl."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        """Draw centres."""
        return {"center": torch.randn(num_tasks, 2, generator=generator)}

    def init_params(self, tasks: Any) -> dict[str, Tensor]:
        """Start at zero."""
        return {"x": torch.zeros_like(tasks["center"])}

    def batch(self, tasks: Any, step: int, split: str) -> Any:
        """Return the centre."""
        return tasks

    def loss(self, params: dict[str, Tensor], batch: Any) -> Tensor:
        """Return the squared distance."""
        return (params["x"] - batch["center"]).square().sum()


def test_a_step_map_that_one_step_solves_has_an_implicit_gradient() -> None:
    loop = InnerLoop(Bowl(), Network())
    theta = loop.rule.init_theta(torch.Generator())
    carry = loop.start(sample(loop.family))
    implicit = Implicit(20, ConjugateGradient(2)).estimate(loop, theta, FinalLoss(), carry)
    unrolled = Unrolled(20).estimate(loop, theta, FinalLoss(), carry)
    torch.testing.assert_close(implicit.grads, unrolled.grads, rtol=1e-12, atol=1e-14)


def test_symmetry_is_looked_at_for_every_theta() -> None:
    loop = InnerLoop(Bowl(), Network())
    theta = loop.rule.init_theta(torch.Generator())
    carry = loop.start(sample(loop.family))
    Implicit(40, ConjugateGradient(2)).estimate(loop, theta, FinalLoss(), carry)  # symmetric here
    skewed = {**theta, "W": torch.tensor([[0.1, 0.5], [-0.3, 0.2]])}
    with pytest.raises(ValueError, match="not"):
        Implicit(40, ConjugateGradient(2)).estimate(loop, skewed, FinalLoss(), carry)


def test_what_cannot_work_is_said_before_the_first_step() -> None:
    loop = InnerLoop(Scaled(), Descent())
    carry = loop.start(sample(loop.family))
    with pytest.raises(ValueError, match=r"\{'lr': 'torch.int64'\} are no real floating-point"):
        loop.run({"lr": torch.tensor(1)}, carry, 1)
    with pytest.raises(ValueError, match="no tasks"):
        loop.start({"center": torch.zeros(0, 3)})
    with pytest.raises(TypeError, match=r"learnedopt\.optimizers\.make"):
        InnerLoop(Scaled(), "adam")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"such as FinalLoss\(\)"):
        Unrolled(1).estimate(loop, {"lr": torch.tensor(0.1)}, FinalLoss, carry)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither 'train' nor 'valid'"):
        loop.losses({}, loop.begin({"lr": torch.tensor(0.1)}, carry), "test")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="number_of_tasks"):
        MetaTrainer(loop, Unrolled(1), FinalLoss(), number_of_tasks=3)


@final
class ReversedStep(Kernel):
    """Descent with the parameters in another order, in float64 whatever they are."""

    def step(self, theta: Any, grads: Any, state: Any, params: Any, loss: Tensor) -> Any:
        return {k: params[k] - theta["lr"].double() * grads[k].double() for k in reversed(list(params))}, state


@final
class Backwards(Descent):
    """Descent with such a kernel."""

    kernel = ReversedStep()

    def init(self, theta: Any, params: Any) -> Any:
        return params, ()


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_a_step_changes_neither_the_order_nor_the_dtype_of_parameters(chunk_size: int) -> None:
    family = Scaled(torch.float32)
    loop = InnerLoop(family, Backwards(), Execution(chunk_size))
    theta, carry = {"lr": torch.tensor(0.1)}, loop.start(sample(family, 3))
    whole, pieces = (Unrolled(4, segment=n).estimate(loop, theta, FinalLoss(), carry) for n in (None, 1))
    torch.testing.assert_close(pieces.grads["lr"], whole.grads["lr"], rtol=1e-5, atol=0)
    end = loop.run(theta, carry, 4, Tape.NONE).end
    assert [(k, p.dtype) for k, p in end.params.items()] == [("w", torch.float32), ("log_scale", torch.float32)]


class Backward(SGD):
    """Climbs."""

    kernel = None

    def update(self, theta: Any, grads: Any, state: Any, params: Any, loss: Tensor) -> Any:
        deltas, state = super().update(theta, grads, state, params, loss)
        return {k: -d for k, d in deltas.items()}, state


def test_the_engine_follows_an_update_that_is_overridden() -> None:
    loop = InnerLoop(Scaled(), Backward(0.1))
    theta, carry = loop.rule.init_theta(torch.Generator()), loop.start(sample(loop.family, 1))
    losses = loop.run(theta, carry, 3, Tape.NONE).losses
    assert (losses[1:] > losses[:-1]).all()


class Squares(Penalty):
    """``factor |w|^2``, which knows no closed form, and nothing of the other parameter."""

    def value(self, theta: Any, params: Any) -> Tensor:
        return theta["factor"] * params["w"].square().sum()


class Pulled(InnerObjective):
    """The family's loss with a penalty of a user's own."""

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty

    def init_theta(self, generator: torch.Generator) -> Any:
        return {"factor": torch.tensor(0.4)}


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("own", [True, False], ids=["without a closed form", "to a learned start"])
def test_penalties_go_with_offloaded_segments(own: bool, chunk_size: int) -> None:
    family = Scaled()
    template = {k: 0.9 * p[0] for k, p in family.init_params(sample(family, 1)).items()}
    inner = Pulled(Squares()) if own else Proximal(template, 0.7, learn=True)
    loop = InnerLoop(family, optimizers.make("maml", template=template), Execution(chunk_size), inner)
    theta, carry = loop.init_theta(torch.Generator()), loop.start(sample(family, 2))
    whole = Unrolled(4).estimate(loop, theta, FinalLoss(), carry)
    pieces = Unrolled(4, segment=2, offload=True).estimate(loop, theta, FinalLoss(), carry)
    torch.testing.assert_close(pieces.grads, whole.grads, rtol=1e-12, atol=1e-14)
    assert all(g.any() for g in whole.grads.values())


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("tape", [Tape.FULL, Tape.NONE], ids=lambda tape: tape.value)
def test_a_penalty_is_a_term_of_the_loss_whose_gradient_is_taken_apart(tape: Tape, chunk_size: int) -> None:
    class Whole(Pulled):
        def loss(self, theta: Any, family: TaskFamily, params: Any, batch: Any) -> Tensor:
            return family.loss(params, batch) + Squares().value(theta, params)

    family = Scaled()
    theta = {"lr": torch.tensor(0.1), "factor": torch.tensor(0.4)}
    for objective in (Pulled(Squares()), Whole(None)):
        loop = InnerLoop(family, Descent(), Execution(chunk_size), objective)
        leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
        rollout = loop.run(leaves, loop.start(sample(family, 2)), 3, tape)
        total = loop.losses(leaves, rollout.end, "valid").mean() + rollout.losses.mean()
        found = torch.autograd.grad(total, [*leaves.values()]) if tape is Tape.FULL else ()
        if objective.penalty is not None:
            expected = (total.detach(), *found)
    torch.testing.assert_close((total.detach(), *found), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "gradient",
    [lambda params: {k: torch.ones(1) for k in params}, lambda params: {"w": params["w"]}, lambda params: params["w"]],
    ids=["shapes", "names", "no dict"],
)
def test_a_penaltys_gradient_of_another_shape_is_refused(gradient: Any) -> None:
    class Broadcasts(Squares):
        def gradient(self, theta: Any, params: Any) -> Any:
            return gradient(params)

    loop = InnerLoop(Scaled(), Descent(), inner_objective=Pulled(Broadcasts()))
    with pytest.raises(ValueError, match=r"Broadcasts\.gradient must return one gradient of the same shape"):
        loop.run(loop.init_theta(torch.Generator()), loop.start(sample(loop.family)), 1)
